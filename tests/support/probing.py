"""Looking into a tower: what a patch has an effect on, and which values a pass goes through."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Node

__all__ = ["assert_angles_are_fp32", "assert_frames_do_not_see_each_other", "row_of", "tokens_moved_by", "values_of"]


def row_of(batch: PackedBatch, place: tuple[int, int]) -> int:
    """Where the patch at ``place`` (row, column) stands in the batch of one still image."""
    (row,) = (batch.attention.positions == torch.tensor(place, dtype=torch.int32)).all(1).nonzero().flatten().tolist()
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


def assert_angles_are_fp32(tower: VisionTower, batch: PackedBatch, rotation: Any) -> None:
    """The table of angles is that of ``rotation``, transformers' module, in fp32, where bf16 would be far off."""
    expected = rotation(torch.zeros(0), batch.attention.positions)
    for table, wanted in zip(values_of(tower, batch, "cosines", "sines"), expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table.repeat(1, 2), wanted)
    rounded = (batch.attention.positions[..., None].bfloat16() * rotation.inv_freq.bfloat16()).float().flatten(1)
    assert (rounded.cos() - expected[0][:, : rounded.shape[1]]).abs().max() > 0.1


def assert_frames_do_not_see_each_other(tower: VisionTower, batch: PackedBatch) -> None:
    """A patch of one temporal patch of a video moves the tokens of that one alone, and all of them."""
    ((frames, height, width),) = batch.images.grids
    tokens = height * width // batch.tokens.rows_per_token
    for frame in range(frames):
        moved = tokens_moved_by(tower, batch, frame * height * width + 1)
        assert moved == set(range(frame * tokens, (frame + 1) * tokens))
