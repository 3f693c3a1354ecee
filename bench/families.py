"""Every family's tower at its published width against transformers' own, on the same pictures and random weights.

    python -m bench.families                                 # all families, 8 blocks each, a picture of 448 × 448
    python -m bench.families --family Qwen2.5-VL --pack mixed --depth 0

The depth is cut (``--depth``, 0 for the published one): blocks repeat, and a ratio hardly changes with their number; what
does not repeat (patch projection, projector) counts for more than it would, and a deepstack level behind a block that is
cut away is left out.  transformers runs with sdpa, its fastest attention here.  Both get the same preprocessed pixels;
preprocessing is not timed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritontower import VisionTower
from tritontower.batch import PackedBatch
from tritontower.drawing import text_table
from tritontower.errors import ReferenceModelError, shorten
from tritontower.families import FamilySummary, family_files
from tritontower.parity import Reference
from tritontower.random_checkpoint import write_random_checkpoint

from .measuring import provenance
from .towers import AGREEMENT, compare_times

PACKS: Mapping[str, list[tuple[int, int]]] = {
    "448": [(448, 448)],
    "1024": [(1024, 1024)],
    "small": [(224, 224)] * 16,
    "mixed": [(448, 448), (224, 160), (640, 480), (112, 112), (300, 700), (900, 120)],
}
"""Name → width and height of the pictures of one pass."""

COLUMNS = ("family", "blocks", "pack", "patches", "tokens", "tritontower ms", "transformers ms", "ratio", "distance")
DEPTH_KEYS = ("depth", "num_hidden_layers")


def summaries() -> dict[str, FamilySummary]:
    """Title → summary of every family whose checkpoints transformers reads as well."""
    files = dict.fromkeys(family_files().values())
    found = [summary for file in files for summary in file.SUMMARIES]
    return {summary.title: summary for summary in found if "model_type" in summary.example}


def shallow(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """``config`` with at most ``depth`` vision blocks, and without what it says of blocks behind them."""
    vision: dict[str, Any] = dict(config.get("vision_config") or config)
    key = next((key for key in DEPTH_KEYS if key in vision), DEPTH_KEYS[-1])
    if depth:
        vision[key] = min(depth, vision.get(key, depth))
        if "deepstack_visual_indexes" in vision:
            vision["deepstack_visual_indexes"] = [
                level for level in vision["deepstack_visual_indexes"] if level < depth
            ]
    return {**config, "vision_config": vision} if "vision_config" in config else vision


def packed(tower: VisionTower, sizes: list[tuple[int, int]]) -> PackedBatch:
    """Pictures of noise."""
    generator = np.random.default_rng(0)
    return tower.preprocess([generator.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes])


def measure(summary: FamilySummary, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the table for one family."""
    config = shallow(summary.example, arguments.depth)
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, arguments.dtype)
        checkpoint = write_random_checkpoint(Path(folder), config, summary.processor, dtype=dtype)
        tower = VisionTower.from_pretrained(checkpoint, device=arguments.device)
        reference = Reference(tower, tower.dtype)
        batches = {pack: packed(tower, PACKS[pack]) for pack in arguments.pack}
    rows = []
    for pack, batch in batches.items():
        facts = {"family": summary.title, "blocks": tower.config.blocks_needed, "pack": pack}
        rows.append(facts | compare_times(tower, reference, batch, arguments.repeats))
    return rows


def main() -> None:
    """Entry point."""
    known = summaries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=sorted(known), help="may be repeated; default: all")
    parser.add_argument("--pack", action="append", choices=sorted(PACKS), help="may be repeated; default: 448")
    parser.add_argument("--depth", type=int, default=8, help="blocks; 0 for the published number (default: 8)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(AGREEMENT))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it")
    torch.set_num_threads(arguments.threads)
    arguments.pack = arguments.pack or ["448"]
    rows = []
    for title in arguments.family or known:
        try:
            rows += measure(known[title], arguments)
        except ReferenceModelError as error:
            print(f"{title} is left out: {shorten(str(error), 160)}", file=sys.stderr)
    facts = provenance(torch.device(arguments.device))
    document = {"bench": "families", "dtype": arguments.dtype, "depth": arguments.depth, **facts, "rows": rows}
    print(_table(document))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _table(document: Mapping[str, Any]) -> str:
    def median(seconds: list[float]) -> str:
        return f"{1e3 * sorted(seconds)[len(seconds) // 2]:,.0f}"

    rows = [
        (
            row["family"],
            str(row["blocks"]),
            row["pack"],
            f"{row['patches']:,}",
            f"{row['tokens']:,}",
            median(row["seconds"]),
            median(row["transformers_seconds"]),
            f"{row['ratio']:.2f}",
            f"{row['distance']:.1e}",
        )
        for row in document["rows"]
    ]
    where = document.get("gpu") or f"{document['threads']} threads of {document['cpu']}"
    return text_table(
        f"Published widths, {document['dtype']}, {where}; ratio: transformers ÷ tritontower, medians", COLUMNS, rows
    )


if __name__ == "__main__":
    main()
