"""Counts the launches of a block and of a forward pass, without weights and without running anything.

They depend on the configurations (:mod:`tritontower.engine.launch_count`): with few rows some matmuls are split along K, with
a second launch for the sum.  So each architecture has its own numbers, with its default configurations.  *plain* is the graph
as defined, on :data:`PLAIN_ARCHITECTURE`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.engine.launch_count import count_launches
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.text_table import text_table

from .documents import Document, Report
from .towers import MakeBatch

PLAIN_ARCHITECTURE = "sm_90"


def launch_rows(tower: VisionTower, batches: Sequence[MakeBatch], title: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one tower, which need not be loaded."""
    config = tower.config
    plain = build(config)
    fused = fold_still_images(fuse(plain, select_passes(torch.device("cuda"))))
    for name, make in batches:
        workload = make(tower).workload
        defined = count_launches(plain, workload, device=PLAIN_ARCHITECTURE)
        there = {where: count_launches(fused, workload, device=where) for where in ARCHITECTURES}
        yield {
            "family": title or config.family,
            "batch": name,
            "blocks": config.blocks_needed,
            "patches": workload.patches,
            "plain_block": defined.per_block,
            "plain_forward": defined.total.total,
            "architectures": {
                where: {"block": found.per_block, "forward": found.total.total, "library": found.total.library}
                for where, found in there.items()
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
        "tower", "blocks", "batch", "patches", f"plain, {PLAIN_ARCHITECTURE}", *ARCHITECTURES,
    )  # fmt: skip
    rows = [
        (
            *(row[name] for name in ("family", "blocks", "batch")),
            f"{row['patches']:,}",
            "{plain_block} / {plain_forward}".format(**row),
            *("{block} / {forward}".format(**row["architectures"][name]) for name in ARCHITECTURES),
        )
        for row in found["rows"]
    ]
    return text_table(
        "Launches of a block / a forward pass on a GPU, recorded with the default configurations of each architecture;\n"
        "plain: the graph as defined, before fusion",
        columns,
        rows,
    )
