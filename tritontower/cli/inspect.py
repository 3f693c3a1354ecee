"""Show the configuration, layer graph and cost of a checkpoint's tower, without reading its weights.

Prints the configuration, the layer graph with shapes, parameters, FLOPs and bytes of each node, and for each image size
the tokens, FLOPs and memory of one forward pass.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from tritontower.text_table import text_table

from . import options

if TYPE_CHECKING:
    from tritontower import VisionTower
    from tritontower.graph.summary import Description

EXAMPLE = "tritontower inspect Qwen/Qwen2-VL-2B-Instruct --size 1024x768 --dot tower.dot"

_SIZES = [(224, 224), (448, 448), (1024, 768), (1920, 1080)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, the image sizes, and the file for the graph."""
    options.add_model(parser)
    parser.add_argument(
        "--size",
        type=options.image_size,
        action="append",
        metavar="WIDTHxHEIGHT",
        help="an image size whose cost is estimated; may be repeated, the first is that of the graph table "
        "(default: 224x224, 448x448, 1024x768 and 1920x1080)",
    )
    dot_help = "write the graph to FILE as Graphviz DOT (dot -Tsvg FILE)"
    parser.add_argument("--dot", type=options.output_file, metavar="FILE", help=dot_help)
    options.add_bounds(parser)
    options.add_device_and_dtype(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the summary and writes the graph if ``--dot`` is given."""
    from tritontower.errors import CheckpointNotFoundError

    tower = options.load_tower(arguments, delay_load=True)
    try:
        _dtype_name(tower)
    except CheckpointNotFoundError:  # neither the configuration nor local weights declare one
        arguments.dtype = "bfloat16"
        tower = options.load_tower(arguments, delay_load=True)
    bounds = options.read_bounds(arguments)
    images: list[dict[str, Any]] = []
    descriptions: list[Description] = []
    for width, height in arguments.size or _SIZES:
        layout = tower.preprocessor.layout(width, height, **bounds)
        workload = tower.workload([(width, height)], **bounds)
        descriptions.append(tower.describe(workload))
        image = {"width": width, "height": height, "grid": layout.grid[1:], "tiles": len(layout.tiles)}
        image |= {"tokens": workload.tokens, "flops": descriptions[-1].total.flops}
        images.append({**image, "peak_bytes": tower.memory_plan(workload).peak_bytes})
    if arguments.dot is not None:
        title = f"Vision tower of {arguments.model}"
        arguments.dot.write_text(descriptions[0].to_dot(title), encoding="utf-8")
    if arguments.json:
        report = {
            "config": tower.config.to_json(),
            "dtype": _dtype_name(tower),
            "weights_bytes": tower.weights_bytes,
            "graph": descriptions[0].to_json(),
            "images": images,
        }
        print(json.dumps(report, indent=2))
    else:
        print(_format_text(tower, descriptions[0], images))
        if arguments.dot is not None:
            print(f"\ngraph: {arguments.dot}")
    return 0


def _dtype_name(tower: "VisionTower") -> str:
    return str(tower.dtype).removeprefix("torch.")


def _format_text(tower: "VisionTower", description: "Description", images: list[dict[str, Any]]) -> str:
    sizes = [
        (
            "{width} × {height}".format(**image),
            "{} × {}".format(*image["grid"]),
            image["tiles"],
            f"{image['tokens']:,}",
            f"{image['flops'] / 1e12:,.3f}",
            f"{image['peak_bytes'] / 2**20:,.1f} MiB",
        )
        for image in images
    ]
    graph = description.text()
    if description.launches is None:
        # A graph for a CPU is fused differently, and torch runs its nodes.
        graph += "\n(this is the graph for a CPU; `tritontower bench launches MODEL` counts the launches on a GPU)"
    title = f"One image a forward pass, {_dtype_name(tower)}; weights: {tower.weights_bytes / 2**20:,.0f} MiB"
    return "\n\n".join(
        [
            text_table("Configuration", ("key", "value"), _flatten(tower.config.to_json())),
            graph,
            text_table(title, ("image", "patches", "tiles", "tokens", "TFLOP", "peak memory"), sizes),
        ]
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in values.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return flat
