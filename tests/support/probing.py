"""Observation of a tower: the tokens that a patch affects, values of the graph, and changed configurations or weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import RotaryEmbedding
from tritontower.engine.executor import Executor
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.graph.ir import Node
from tritontower.parity.parity import Reference, relative_error


def find_row(batch: PackedBatch, place: tuple[int, int]) -> int:
    """Returns the row of the patch at ``place`` (row, column) in the batch of one still image."""
    (row,) = (batch.attention.positions == torch.tensor(place, dtype=torch.int32)).all(1).nonzero().flatten().tolist()
    return int(row)


def list_affected_tokens(run: Any, batch: PackedBatch, row: int) -> set[int]:
    """Returns the tokens of ``run(batch)`` in which any bit changes with the patch in ``row``."""
    pixels = batch.pixels.clone()
    pixels[row] += 1.0
    before, after = run(batch), run(replace(batch, pixels=pixels))
    return set((before != after).any(1).nonzero().flatten().tolist())


def record_values(tower: VisionTower, batch: PackedBatch, *names: str) -> list[torch.Tensor]:
    """Returns values of the graph, each as the node that writes it leaves it."""
    found: dict[str, torch.Tensor] = {}

    def keep(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        found.update({name: tensors[name].clone() for name in node.outputs if name in names})

    tower.executor_for(batch).run(batch, keep)
    return [found[name] for name in names]


def list_frequencies(rotary: RotaryEmbedding, head_dim: int) -> list[torch.Tensor]:
    """Returns the fp64 frequencies of rows and of columns, by the definition of the layout."""
    if rotary.layout == "halves":
        frequencies = rotary.theta ** (-torch.arange(head_dim // 4).double() / (head_dim // 4))
        return [frequencies, frequencies]
    frequencies = rotary.theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return [frequencies[0::2], frequencies[1::2]]


def errors_with(
    tower: VisionTower, batch: PackedBatch, weights: Mapping[str, torch.Tensor] | None = None, **changes: object
) -> dict[str, float]:
    """Returns the error of each output against transformers, with changed weights or a changed configuration."""
    graph = fold_still_images(fuse(build(replace(tower.config, **changes))))
    ours = Executor(graph, {**tower.read_weights(), **(weights or {})}).run(batch)
    theirs = Reference(tower, torch.float32).run(batch)
    return {name: relative_error(rows, theirs[name]) for name, rows in ours.items()}
