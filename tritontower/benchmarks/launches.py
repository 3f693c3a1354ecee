"""Launches of a block and of a pass, counted from the graph: as it is defined, and as it runs on a GPU.

Nothing runs and no weights are read.  What is counted is said in :mod:`tritontower.graph.launch_count`.  *plain* and *fused* are the
graph's own: every product is one launch.  Few rows are cut into parts along K as well, each such product with a second
launch; how many do depends on the configurations, so the numbers of every architecture with its default configurations
stand beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.graph.ir import Graph
from tritontower.graph.launch_count import GraphLaunches, count_launches
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.text_table import text_table

from .documents import Document, document
from .towers import Pass

__all__ = ["benchmark_launches", "launch_rows", "launch_table"]

COLUMNS = (
    "tower",
    "blocks",
    "pack",
    "patches",
    "a block, plain",
    "a block, fused",
    "a pass, plain",
    "a pass, fused",
    "of them library calls",
    *ARCHITECTURES,
)


def launch_rows(tower: VisionTower, passes: Sequence[Pass], title: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one tower, which need not be loaded."""
    config = tower.config
    plain = build(config)
    fused = fold_still_images(fuse(plain, select_passes(torch.device("cuda"))))
    for name, make in passes:
        workload = make(tower).workload

        def counted(graph: Graph, where: str | None = None, workload: Any = workload) -> GraphLaunches:
            return count_launches(graph, workload, dtype=torch.bfloat16, device=where)

        counts = {"plain": counted(plain), "fused": counted(fused)}
        there = {name: counted(fused, name) for name in ARCHITECTURES}
        yield {
            "family": title or config.family,
            "pack": name,
            "blocks": config.blocks_needed,
            "patches": workload.patches,
            **{f"{kind}_block": found.per_block.total for kind, found in counts.items()},
            **{f"{kind}_pass": found.total.total for kind, found in counts.items()},
            "library_calls": counts["fused"].total.library,
            "architectures": {
                name: {"block": found.per_block.total, "pass": found.total.total} for name, found in there.items()
            },
        }


def benchmark_launches(towers: Sequence[tuple[str | None, VisionTower]], passes: Sequence[Pass]) -> Document:
    """The rows of several towers."""
    rows = [row for title, tower in towers for row in launch_rows(tower, passes, title)]
    return document("launches", rows, device=torch.device("cpu"))


def launch_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    rows = [
        (
            row["family"],
            row["blocks"],
            row["pack"],
            f"{row['patches']:,}",
            row["plain_block"],
            row["fused_block"],
            row["plain_pass"],
            row["fused_pass"],
            row["library_calls"],
            *("{block} / {pass}".format(**row["architectures"][name]) for name in ARCHITECTURES),
        )
        for row in found["rows"]
    ]
    return text_table(
        "Launches on a GPU, counted from the graph: as it is defined (plain) and as it runs (fused), with every product\n"
        "one launch; by architecture: a block / a pass with its default configurations, which split the\n"
        "products of few rows into parts",
        COLUMNS,
        rows,
    )
