"""Counts the launches of a block and of a forward pass, without weights and without running anything.

*plain* and *fused* count every matmul as one launch (:mod:`tritontower.graph.launch_count`).  With few rows some matmuls
are split along K, with a second launch for the sum; that depends on the configurations, so each architecture has its own
numbers, with its default configurations.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.graph.launch_count import count_launches
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.text_table import text_table

from .documents import Document, Report
from .towers import MakeBatch


def launch_rows(tower: VisionTower, batches: Sequence[MakeBatch], title: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one tower, which need not be loaded."""
    config = tower.config
    plain = build(config)
    fused = fold_still_images(fuse(plain, select_passes(torch.device("cuda"))))
    for name, make in batches:
        workload = make(tower).workload
        counted = partial(count_launches, workload=workload)
        counts = {"plain": counted(plain), "fused": counted(fused)}
        there = {where: counted(fused, device=where) for where in ARCHITECTURES}
        yield {
            "family": title or config.family,
            "batch": name,
            "blocks": config.blocks_needed,
            "patches": workload.patches,
            **{f"{kind}_block": found.per_block.total for kind, found in counts.items()},
            **{f"{kind}_forward": found.total.total for kind, found in counts.items()},
            "library_calls": counts["fused"].total.library,
            "architectures": {
                where: {"block": found.per_block.total, "forward": found.total.total} for where, found in there.items()
            },
        }


def benchmark_launches(
    towers: Sequence[tuple[str | None, VisionTower]], batches: Sequence[MakeBatch], *, path: Path | None = None
) -> Document:
    """Counts the rows of several towers."""
    report = Report("launches", device=torch.device("cpu"), path=path)
    for title, tower in towers:
        for row in launch_rows(tower, batches, title):
            report.add(row)
    return report.finish()


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    columns = (
        "tower", "blocks", "batch", "patches", "a block, plain", "a block, fused", "forward, plain", "forward, fused",
        "of them library calls", *ARCHITECTURES,
    )  # fmt: skip
    rows = [
        (
            *(row[name] for name in ("family", "blocks", "batch")),
            f"{row['patches']:,}",
            *(row[name] for name in ("plain_block", "fused_block", "plain_forward", "fused_forward", "library_calls")),
            *("{block} / {forward}".format(**row["architectures"][name]) for name in ARCHITECTURES),
        )
        for row in found["rows"]
    ]
    return text_table(
        "Launches on a GPU, counted from the graph: as defined (plain) and as run (fused), one launch per matmul;\n"
        "by architecture: a block / a forward pass with its default configurations, which split matmuls of few rows along K",
        columns,
        rows,
    )
