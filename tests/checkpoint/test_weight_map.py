"""Weight maps: stored shapes, and the place of every number, compared with plain tensor arithmetic."""

import math

import pytest
import torch

from tritontower.checkpoint.weight_map import (
    ChannelMajor,
    ClassTokenFirst,
    InterleavedRotary,
    OneFrame,
    RowSlice,
    Shape,
    Stacked,
    Stored,
    Transposed,
    WeightMap,
    WithBatchDimension,
)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def write(weight_map: WeightMap, shape: Shape, tensors: dict[str, torch.Tensor], *, reverse: bool = False):
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(weight_map.stored_shapes(shape))
    assert set(weight_map.stored_names) == tensors.keys()
    target = torch.zeros(shape)
    for name in reversed(tensors) if reverse else tensors:
        weight_map.write(target, name, tensors[name])
    return target


W, Q, K, TABLE, TOKEN = numbered(9, 4), numbered(8, 3), numbered(8, 3) * 2, numbered(5, 3), torch.tensor([0.5, 0.25, 1])
WITH_TOKEN = torch.cat((TABLE[:1] + TOKEN, TABLE[1:]))
INTERLEAVED, HALVES = (InterleavedRotary("q", 2), InterleavedRotary("k", 2)), [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("weight_map", "tensors", "canonical"),
    [
        (Stored("w"), {"w": W}, W),
        (Transposed("w"), {"w": W}, W.T),
        (OneFrame("w"), {"w": W.view(3, 3, 2, 2)}, W.view(3, 3, 1, 2, 2)),
        (WithBatchDimension("w"), {"w": W[None]}, W),
        (RowSlice("w", 0, 1, 3), {"w": W}, W[:3]),
        (RowSlice("w", 1, 2, 3), {"w": W}, W[3:]),
        (Stacked.of("q", "k"), {"q": Q, "k": K}, torch.cat((Q, K))),
        (Stacked((*INTERLEAVED, Stored("v"))), {"q": Q, "k": K, "v": -Q}, torch.cat((Q[HALVES], K[HALVES], -Q))),
        (ClassTokenFirst("table", "token"), {"table": TABLE, "token": TOKEN}, WITH_TOKEN),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, WeightMap) else "",
)
def test_stored_tensors_make_the_canonical_one_in_any_order(
    weight_map: WeightMap, tensors: dict[str, torch.Tensor], canonical: torch.Tensor
) -> None:
    for reverse in (False, True):
        assert torch.equal(write(weight_map, tuple(canonical.shape), tensors, reverse=reverse), canonical)


def test_numbers_are_cast_and_padding_stays_zero() -> None:
    weight_map = Stacked.of("gate", "up")
    third = torch.full((3, 5), 1 / 3)
    target = torch.zeros(8, 6, dtype=torch.bfloat16)
    weight_map.write(target, "up", third)
    weight_map.write(target, "gate", -third)
    assert torch.equal(target[:3, :5], -third.bfloat16())
    assert torch.equal(target[4:7, :5], third.bfloat16())
    assert not target[[3, 7]].any()
    assert not target[:, 5].any()


def test_interleaved_rotary_rows_rotate_the_same() -> None:
    # Rotating neighbors (2i, 2i+1) before is rotating halves (i, i + hd/2) after.
    heads, head_dim, width = 3, 8, 5
    stored, x = torch.randn(heads * head_dim, width), torch.randn(width)
    canonical = write(InterleavedRotary("wq", heads), (heads * head_dim, width), {"wq": stored})
    angles = torch.rand(head_dim // 2)
    pairs = (stored @ x).view(heads, head_dim // 2, 2)
    halves = (canonical @ x).view(heads, 2, head_dim // 2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(4), angles))
    first = halves[:, 0] * angles.cos() - halves[:, 1] * angles.sin()
    second = halves[:, 1] * angles.cos() + halves[:, 0] * angles.sin()
    assert torch.allclose(torch.stack((first, second), dim=-1), rotated, atol=1e-6)


def test_channel_major_columns_take_an_unfolded_square() -> None:
    channels, merge = 6, 2
    stored = torch.randn(4, channels * merge * merge)
    canonical = write(ChannelMajor("w", merge * merge), tuple(stored.shape), {"w": stored})
    square = torch.randn(1, channels, merge, merge)
    unfolded = torch.nn.functional.unfold(square, merge).squeeze()
    patches = square.permute(0, 2, 3, 1).flatten()
    assert torch.allclose(canonical @ patches, stored @ unfolded, atol=1e-5)


@pytest.mark.parametrize(
    ("weight_map", "canonical", "held"),
    [
        (Stored("a"), (4, 3), (6, 5)),
        (Stacked.of("a", "b"), (6, 5), (8, 7)),
        (Stacked((Transposed("a"), Transposed("b"))), (6, 5), (8, 7)),
        (Transposed("a"), (4, 3), (6, 5)),
        (OneFrame("a"), (4, 3, 1, 2, 2), (6, 3, 1, 2, 2)),
        (WithBatchDimension("a"), (4, 3), (6, 5)),
    ],
)
def test_view_shares_the_memory_of_the_canonical_tensor(weight_map: WeightMap, canonical: Shape, held: Shape) -> None:
    target = torch.zeros(held)
    tensors = {name: torch.randn(shape) for name, shape in weight_map.stored_shapes(canonical).items()}
    for name, tensor in tensors.items():
        weight_map.write(target, name, tensor)
    for name, tensor in tensors.items():
        view = weight_map.view(target, name, tuple(tensor.shape))
        assert view is not None
        assert view.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        assert view.shape == tensor.shape
        assert torch.equal(view, tensor)


@pytest.mark.parametrize(
    ("weight_map", "canonical"),
    [
        (InterleavedRotary("a", 2), (8, 3)),
        (ChannelMajor("a", 4), (3, 8)),
        (ClassTokenFirst("a", "b"), (5, 3)),
        (RowSlice("a", 0, 1, 3), (3, 4)),
        (Stacked(INTERLEAVED), (16, 3)),
        (Stacked.of("a", "a"), (6, 3)),
    ],
)
def test_reordered_summed_or_repeated_tensors_have_no_view(weight_map: WeightMap, canonical: Shape) -> None:
    for name, shape in weight_map.stored_shapes(canonical).items():
        assert weight_map.view(torch.zeros(canonical), name, tuple(shape)) is None
