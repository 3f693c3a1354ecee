"""Recipes: what they ask of a checkpoint, and where the numbers go, held against plain tensor arithmetic."""

import math

import pytest
import torch

from tritontower.checkpoint.weight_map import (
    ChannelMajor,
    ClassTokenFirst,
    InterleavedRotary,
    OfBatchOfOne,
    OneFrame,
    PartOf,
    Recipe,
    Stacked,
    Stored,
    Transposed,
)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def written(recipe: Recipe, shape: tuple[int, ...], tensors: dict[str, torch.Tensor], *, backwards: bool = False):
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(recipe.stored(shape))
    assert set(recipe.names) == tensors.keys()
    target = torch.zeros(shape)
    for name in reversed(tensors) if backwards else tensors:
        recipe.write(target, name, tensors[name])
    return target


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_are_stacked_whatever_the_order_they_come_in(backwards: bool) -> None:
    tensors = {"q": numbered(4, 3), "k": numbered(4, 3) + 100, "v": numbered(4, 3) + 200}
    stacked = written(Stacked.of("q", "k", "v"), (12, 3), tensors, backwards=backwards)
    assert torch.equal(stacked, torch.cat(list(tensors.values())))


def test_padding_stands_behind_every_part_and_is_zero() -> None:
    recipe = Stacked.of("gate", "up")
    assert recipe.stored((6, 5)) == {"gate": (3, 5), "up": (3, 5)}
    target = torch.zeros(8, 5)
    recipe.write(target, "up", numbered(3, 5))
    recipe.write(target, "gate", -numbered(3, 5))
    assert torch.equal(target[:3], -numbered(3, 5))
    assert torch.equal(target[4:7], numbered(3, 5))
    assert not target[[3, 7]].any()
    columns = torch.zeros(5, 4)
    Stored("down").write(columns, "down", numbered(5, 3))
    assert torch.equal(columns[:, :3], numbered(5, 3))
    assert not columns[:, 3].any()


def test_a_transposed_matrix_and_an_image_kernel() -> None:
    assert torch.equal(written(Transposed("w"), (2, 3), {"w": numbered(3, 2)}), numbered(3, 2).T)
    kernel = written(OneFrame("w"), (2, 3, 1, 4, 4), {"w": numbered(2, 3, 4, 4)})
    assert torch.equal(kernel[:, :, 0], numbered(2, 3, 4, 4))


def test_interleaved_rotary_rows_rotate_the_same() -> None:
    # Rotating neighbors (2i, 2i+1) before is rotating halves (i, i + hd/2) after.
    heads, head_dim, width = 3, 8, 5
    stored, x = torch.randn(heads * head_dim, width), torch.randn(width)
    canonical = written(InterleavedRotary("wq", heads), (heads * head_dim, width), {"wq": stored})
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
    canonical = written(ChannelMajor("w", merge * merge), tuple(stored.shape), {"w": stored})
    square = torch.randn(1, channels, merge, merge)
    unfolded = torch.nn.functional.unfold(square, merge).squeeze()
    patches = square.permute(0, 2, 3, 1).flatten()
    assert torch.allclose(canonical @ patches, stored @ unfolded, atol=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_class_embedding_is_in_row_zero(backwards: bool) -> None:
    tensors = {"table": numbered(5, 3), "token": torch.tensor([0.5, 0.25, 0.125])}
    table = written(ClassTokenFirst("table", "token"), (5, 3), tensors, backwards=backwards)
    assert torch.equal(table[0], tensors["table"][0] + tensors["token"])
    assert torch.equal(table[1:], tensors["table"][1:])


def test_parts_of_a_tensor() -> None:
    stored = {"in_proj": numbered(9, 4)}
    assert torch.equal(written(PartOf("in_proj", 0, 1, 3), (3, 4), stored), stored["in_proj"][:3])
    assert torch.equal(written(PartOf("in_proj", 1, 2, 3), (6, 4), stored), stored["in_proj"][3:])


def test_recipes_nest() -> None:
    recipe = Stacked((InterleavedRotary("wq", 2), InterleavedRotary("wk", 2), Stored("wv")))
    tensors = {"wq": numbered(8, 3), "wk": numbered(8, 3) * 2, "wv": numbered(8, 3) * 3}
    stacked = written(recipe, (24, 3), tensors)
    assert torch.equal(stacked[0:4], tensors["wq"][[0, 2, 1, 3]])
    assert torch.equal(stacked[16:], tensors["wv"])


@pytest.mark.parametrize(
    ("recipe", "canonical", "held"),
    [
        (Stored("a"), (4, 3), (6, 5)),
        (Stored("a"), (4,), (6,)),
        (Stacked.of("a", "b"), (6, 5), (8, 7)),
        (Stacked((Transposed("a"), Transposed("b"))), (6, 5), (8, 7)),
        (Transposed("a"), (4, 3), (6, 5)),
        (OneFrame("a"), (4, 3, 1, 2, 2), (6, 3, 1, 2, 2)),
        (OfBatchOfOne("a"), (4, 3), (6, 5)),
    ],
)
def test_a_view_is_the_stored_tensor_in_the_memory_of_the_canonical_one(
    recipe: Recipe, canonical: tuple[int, ...], held: tuple[int, ...]
) -> None:
    target = torch.zeros(held)
    tensors = {name: torch.randn(shape) for name, shape in recipe.stored(canonical).items()}
    for name, tensor in tensors.items():
        recipe.write(target, name, tensor)
    for name, tensor in tensors.items():
        view = recipe.view(target, name, tuple(tensor.shape))
        assert view is not None
        assert view.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        assert view.shape == tensor.shape
        assert torch.equal(view, tensor)


@pytest.mark.parametrize(
    ("recipe", "canonical"),
    [
        (InterleavedRotary("a", 2), (8, 3)),
        (ChannelMajor("a", 4), (3, 8)),
        (ClassTokenFirst("a", "b"), (5, 3)),
        (PartOf("a", 0, 1, 3), (3, 4)),
        (Stacked((InterleavedRotary("a", 2), InterleavedRotary("b", 2))), (16, 3)),
        (Stacked.of("a", "a"), (6, 3)),
    ],
)
def test_what_is_in_another_order_summed_or_there_twice_has_no_view(recipe: Recipe, canonical: tuple[int, ...]) -> None:
    for name, shape in recipe.stored(canonical).items():
        assert recipe.view(torch.zeros(canonical), name, tuple(shape)) is None


def test_numbers_are_cast_to_the_target() -> None:
    target = torch.zeros(2, 2, dtype=torch.bfloat16)
    Stored("w").write(target, "w", torch.full((2, 2), 1 / 3))
    assert torch.equal(target, torch.full((2, 2), 1 / 3).bfloat16())
