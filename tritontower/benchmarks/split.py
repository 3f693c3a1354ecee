"""Where a pass spends its time: seconds by node kind, as an observer of the executor sees them."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Node
from tritontower.text_table import text_table

__all__ = ["node_seconds", "split_table"]


def node_seconds(tower: VisionTower, batch: PackedBatch, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each node kind in one pass, the most expensive kind first.

    On a GPU the device is waited for after every node, which no ordinary pass does: the sum is more than such a pass takes.

    Args:
        tower: loaded.
        batch: what to run.
        repeats: passes that count, beside a first one that does not.
    """
    batch = batch.to(tower.device)
    executor = tower.executor_for(batch)
    passes = [_one_pass(executor.run, batch, tower.device) for _ in range(repeats + 1)][1:]
    medians = {kind: statistics.median(seconds[kind] for seconds in passes) for kind in passes[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def _one_pass(run: Any, batch: PackedBatch, device: torch.device) -> dict[str, float]:
    seconds: dict[str, float] = {}
    last = 0.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal last
        end = now()
        seconds[node.kind] = seconds.get(node.kind, 0.0) + end - last
        last = end

    last = now()
    run(batch, observe)
    return seconds


def split_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of :func:`node_seconds`: one line for each pass (name → seconds by kind), kinds as columns."""
    kinds = list(dict.fromkeys(kind for seconds in rows.values() for kind in seconds))
    cells = [
        (name, *(_milliseconds(seconds.get(kind)) for kind in kinds), _milliseconds(sum(seconds.values())))
        for name, seconds in rows.items()
    ]
    return text_table("Milliseconds by node kind", ("pass", *kinds, "sum"), cells)


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1e3 * seconds:,.1f}"
