"""Looking into a tower: what a patch has an effect on, and which values a pass goes through."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from tritontower import VisionTower
from tritontower.batch import PackedBatch
from tritontower.graph import Node

__all__ = ["row_of", "tokens_moved_by", "values_of"]


def row_of(batch: PackedBatch, place: tuple[int, int]) -> int:
    """Where the patch at ``place`` (row, column) stands in the batch of one still picture."""
    (row,) = (batch.positions == torch.tensor(place, dtype=torch.int32)).all(1).nonzero().flatten().tolist()
    return int(row)


def tokens_moved_by(tower: VisionTower, batch: PackedBatch, row: int) -> set[int]:
    """The tokens in which any bit changes when the patch in ``row`` does."""
    pixels = batch.pixels.clone()
    pixels[row] += 1.0
    before, after = tower.forward(batch), tower.forward(replace(batch, pixels=pixels))
    return set((before != after).any(1).nonzero().flatten().tolist())


def values_of(tower: VisionTower, batch: PackedBatch, *names: str) -> list[torch.Tensor]:
    """Values of the graph, each as the node leaves it that writes it."""
    found: dict[str, torch.Tensor] = {}

    def keep(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        found.update({name: tensors[name].clone() for name in node.outputs if name in names})

    tower.executor_for(batch).run(batch, keep)
    return [found[name] for name in names]
