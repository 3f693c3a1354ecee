"""Splits the time of a forward pass by node kind, through the executor's observer."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Node
from tritontower.text_table import text_table

from .documents import milliseconds


def node_seconds(tower: VisionTower, batch: PackedBatch, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each node kind in one forward pass, the most expensive kind first.

    On a GPU the device is synchronized after every node, so the sum exceeds an ordinary forward pass.
    """
    batch = batch.to(tower.device)
    executor = tower.executor_for(batch)
    runs = [_run_once(executor.run, batch, tower.device) for _ in range(repeats + 1)][1:]
    medians = {kind: statistics.median(seconds[kind] for seconds in runs) for kind in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def _run_once(run: Any, batch: PackedBatch, device: torch.device) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    last = now()

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal last
        end = now()
        seconds[node.kind] = seconds.get(node.kind, 0.0) + end - last
        last = end

    run(batch, observe)
    return seconds


def split_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of :func:`node_seconds`: one line per batch, kinds as columns."""
    kinds = list(dict.fromkeys(kind for seconds in rows.values() for kind in seconds))
    cells = [
        (name, *(milliseconds(seconds.get(kind), 1) for kind in kinds), milliseconds(sum(seconds.values()), 1))
        for name, seconds in rows.items()
    ]
    return text_table("Milliseconds by node kind", ("batch", *kinds, "sum"), cells)
