"""Show what a checkpoint's tower is made of and what it costs, without reading its weights.

Prints the configuration, the layer graph with shapes, parameters, operations and bytes per node, and for each image
size the tokens, the operations and the memory of one pass.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.text_table import text_table

from .options import add_bounds, add_json, add_model, add_placement, bounds_of, image_size, load_tower, output_file

if TYPE_CHECKING:
    from tritontower import VisionTower
    from tritontower.graph.summary import Description

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "tritontower inspect Qwen/Qwen2-VL-2B-Instruct --size 1024x768 --svg tower.svg"

_SIZES = [(224, 224), (448, 448), (1024, 768), (1920, 1080)]


@dataclass(frozen=True)
class _ImageCost:
    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: int
    tokens: int
    flops: int
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the image sizes, and where to draw."""
    add_model(parser)
    parser.add_argument(
        "--size",
        type=image_size,
        action="append",
        metavar="WIDTHxHEIGHT",
        help="an image size to work out the costs for; may be repeated, the first is that of the graph table "
        "(default: 224x224, 448x448, 1024x768 and 1920x1080)",
    )
    parser.add_argument("--svg", type=output_file, metavar="FILE", help="draw the graph into FILE")
    add_bounds(parser)
    add_placement(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the description and draws it where asked."""
    tower = load_tower(arguments, delay_load=True)
    if arguments.dtype == "auto" and not _knows_its_dtype(tower):
        arguments.dtype = "bfloat16"
        tower = load_tower(arguments, delay_load=True)
    bounds = bounds_of(arguments)
    costs: list[_ImageCost] = []
    descriptions: list[Description] = []
    for width, height in arguments.size or _SIZES:
        layout = tower.preprocessor.layout(width, height, **bounds)
        workload = tower.workload([(width, height)], **bounds)
        plan, description = tower.memory_plan(workload), tower.describe(workload)
        descriptions.append(description)
        costs.append(
            _ImageCost(
                size=(width, height),
                grid=layout.grid[1:],
                tiles=len(layout.tiles),
                tokens=workload.tokens,
                flops=description.total.flops,
                peak_bytes=plan.peak_bytes,
            )
        )
    if arguments.svg is not None:
        _draw(descriptions[0], arguments.svg, str(arguments.model))
    if arguments.json:
        print(json.dumps(_report(tower, descriptions[0], costs), indent=2))
    else:
        print(_text(tower, descriptions[0], costs))
        if arguments.svg is not None:
            print(f"\ndrawn: {arguments.svg}")
    return 0


def _knows_its_dtype(tower: "VisionTower") -> bool:
    """Whether the configuration declares a precision, or there are weights here that have one."""
    from tritontower.errors import CheckpointNotFoundError

    try:
        return tower.dtype is not None
    except CheckpointNotFoundError:
        return False


def _draw(description: "Description", path: Path, model: str) -> None:
    path.write_text(description.svg(title=f"Vision tower of {model}"), encoding="utf-8")


def _report(tower: "VisionTower", description: "Description", costs: list[_ImageCost]) -> dict[str, Any]:
    return {
        "config": tower.config.to_json(),
        "dtype": str(tower.dtype).removeprefix("torch."),
        "weights_bytes": tower.weights_bytes,
        "graph": description.to_json(),
        "images": [
            {
                "width": cost.size[0],
                "height": cost.size[1],
                "grid": cost.grid,
                "tiles": cost.tiles,
                "tokens": cost.tokens,
                "flops": cost.flops,
                "peak_bytes": cost.peak_bytes,
            }
            for cost in costs
        ],
    }


def _text(tower: "VisionTower", description: "Description", costs: list[_ImageCost]) -> str:
    dtype = str(tower.dtype).removeprefix("torch.")
    settings = [(key, value) for key, value in _flat(tower.config.to_json())]
    sizes = [
        (
            f"{cost.size[0]} × {cost.size[1]}",
            f"{cost.grid[0]} × {cost.grid[1]}",
            cost.tiles,
            f"{cost.tokens:,}",
            f"{cost.flops / 1e12:,.3f}",
            f"{cost.peak_bytes / 2**20:,.1f} MiB",
        )
        for cost in costs
    ]
    return "\n\n".join(
        [
            text_table("Configuration", ("key", "value"), settings),
            description.text() + _launches_remark(tower),
            text_table(
                f"One image a pass, in {dtype}; the weights take {tower.weights_bytes / 2**20:,.0f} MiB beside it",
                ("image", "patches", "tiles", "tokens", "TFLOP", "peak memory"),
                sizes,
            ),
        ]
    )


def _launches_remark(tower: "VisionTower") -> str:
    """A graph for a CPU is not fused as one for a GPU, and torch runs its nodes: its launches are nobody's."""
    from tritontower.kernels.runtime.dispatch import backend_on

    if backend_on(tower.device) != "reference":
        return ""
    return "\n(this is the graph for a CPU; `tritontower bench launches MODEL` counts the launches on a GPU)"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, value))
    return flat
