"""Splits the time of a forward pass by node kind, through the executor's observer."""

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.devices import synchronize
from tritontower.graph.ir import Node
from tritontower.text_table import text_table

from .documents import milliseconds


def node_seconds(tower: VisionTower, batch: PackedBatch, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each node kind in one forward pass, the most expensive kind first.

    On a GPU the device is synchronized after every node, so the sum exceeds an ordinary forward pass.
    """
    batch = batch.to(tower.device)
    executor = tower.executor_for(batch)
    runs: list[dict[str, float]] = []
    last = 0.0

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal last
        synchronize(tower.device)
        end = time.perf_counter()
        runs[-1][node.kind] += end - last
        last = end

    for _ in range(repeats + 1):
        runs.append(defaultdict(float))
        synchronize(tower.device)
        last = time.perf_counter()
        executor.run(batch, observe)
    # The first run is not counted.
    medians = {kind: statistics.median(seconds[kind] for seconds in runs[1:]) for kind in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def split_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of :func:`node_seconds`: one line per batch, kinds as columns."""
    kinds = list(dict.fromkeys(kind for seconds in rows.values() for kind in seconds))
    cells = [
        (name, *(milliseconds(seconds.get(kind), 1) for kind in kinds), milliseconds(sum(seconds.values()), 1))
        for name, seconds in rows.items()
    ]
    return text_table("Milliseconds by node kind", ("batch", *kinds, "sum"), cells)
