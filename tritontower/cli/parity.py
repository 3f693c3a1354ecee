"""Compare the tower with transformers, on the same checkpoint and the same images.

In float32 the relative L2 distance must be at most 1e-5.  In bfloat16 and float16 both are compared with transformers in
float32, and the tower's error must be at most 1.10 times transformers' own.  Exit code 1 otherwise.

For a quantized checkpoint, transformers gets the same dequantized weights; its own quantized execution is not compared.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING

from tritontower.text_table import text_table

from .options import add_bounds, add_device_and_dtype, add_images, add_json, add_model, load_tower, read_bounds

if TYPE_CHECKING:
    from PIL import Image

    from tritontower.parity.parity import NodeParity, Parity


EXAMPLE = "tritontower parity Qwen/Qwen2-VL-2B-Instruct cat.jpg --dtype float32 --per-node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, images and ``--per-node``."""
    add_model(parser)
    add_images(parser, required=False, without="three drawn ones of different sizes")
    parser.add_argument("--per-node", action="store_true", help="also compare every value that both compute")
    add_bounds(parser)
    add_device_and_dtype(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compares and prints; returns 1 if the tower exceeds its limit."""
    from tritontower.parity.parity import compare, compare_nodes

    tower = load_tower(arguments)
    batch = tower.preprocess(arguments.images or synthetic_images(), **read_bounds(arguments))
    parity = compare(tower, batch)
    nodes = compare_nodes(tower, batch) if arguments.per_node else []
    if arguments.json:
        print(json.dumps(_report(parity, nodes), indent=2))
    else:
        print(describe(parity))
        if nodes:
            rows = [(node.node, node.value, node.reference, f"{node.error:.2e}") for node in nodes]
            print("\n" + text_table("Node by node", ("node", "value", "in transformers", "distance"), rows))
    return 0 if parity.passed else 1


def describe(parity: "Parity") -> str:
    """The comparison as a table, with the verdict."""
    name = str(parity.dtype).removeprefix("torch.")
    theirs = parity.embeddings.reference_error
    rows = [
        (f"tritontower {name}", f"{parity.embeddings.error:.2e}", f"{parity.seconds * 1e3:,.0f}"),
        (f"transformers {name}", f"{theirs:.2e}" if theirs else "0", f"{parity.reference_seconds * 1e3:,.0f}"),
    ]
    table = text_table(
        "Distance from transformers in float32 (relative L2, all images)", ("tower", "distance", "ms"), rows
    )
    verdict = "pass" if parity.passed else "FAIL"
    return f"{table}\n\n{verdict}: {parity.embeddings.error:.2e}, allowed {parity.embeddings.limit:.2e}; worst image {parity.worst_image:.2e}"


def _report(parity: "Parity", nodes: list["NodeParity"]) -> dict[str, object]:
    return {
        "passed": parity.passed,
        "dtype": str(parity.dtype).removeprefix("torch."),
        "error": _finite(parity.embeddings.error),
        "limit": _finite(parity.embeddings.limit),
        "worst_image": _finite(parity.worst_image),
        "reference_error": _finite(parity.embeddings.reference_error),
        "seconds": parity.seconds,
        "reference_seconds": parity.reference_seconds,
        "nodes": [
            {"node": node.node, "value": node.value, "reference": node.reference, "error": _finite(node.error)}
            for node in nodes
        ],
    }


def _finite(distance: float | None) -> float | None:
    """``distance``, or ``None`` if it is not finite, which JSON cannot express."""
    return distance if distance is not None and math.isfinite(distance) else None


def synthetic_images() -> list["Image.Image"]:
    """Three images of different sizes, with smooth and sharp parts; the same in every run."""
    import numpy as np
    from PIL import Image

    images = []
    for width, height in ((224, 224), (350, 120), (150, 400)):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        rings = 127.5 + 127.5 * np.sin(np.hypot(x - width / 3, y - height / 2) / 6)
        checks = 255.0 * ((x // 17 + y // 23) % 2)
        slope = 255.0 * x / width
        images.append(Image.fromarray(np.stack([rings, checks, slope], axis=-1).astype(np.uint8)))
    return images
