"""Preprocessed pixels → batch: what is taken, and what is refused."""

from dataclasses import replace

import pytest
import torch
from support.configs import CONFIG, FIXED, TILED

from tritontower.errors import UsageError
from tritontower.models.common.hf_reference import tile_images
from tritontower.preprocessing import pack_tiles


@pytest.mark.parametrize("merge", [1, 2])
def test_a_tile_is_found_again_in_its_patches(merge: int) -> None:
    config = replace(CONFIG, projector=replace(CONFIG.projector, merge=merge))
    tiles = [torch.randn(3, 56, 84), torch.randn(3, 28, 28)]
    batch = pack_tiles(config, tiles)
    assert batch.images.token_counts == (24 // merge**2, 4 // merge**2)
    assert batch.images.processed_sizes == ((84, 56), (28, 28))
    assert all(map(torch.equal, tile_images(batch, config), tiles))


def test_a_tile_of_a_tower_with_a_class_token_is_found_again() -> None:
    tiles = list(torch.randn(2, 3, 6, 6))
    assert all(map(torch.equal, tile_images(pack_tiles(FIXED, tiles), FIXED), tiles))
    assert pack_tiles(TILED, tiles).images.token_counts == (9, 9)


def test_what_is_left_of_a_side_is_left_out() -> None:
    tile = torch.randn(3, 7, 7)
    (cut,) = tile_images(pack_tiles(FIXED, [tile]), FIXED)
    assert torch.equal(cut, tile[:, :6, :6])


def test_no_tiles_is_an_empty_batch() -> None:
    assert len(pack_tiles(CONFIG, [])) == 0


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (
            torch.zeros(3, 28, 28, dtype=torch.uint8),
            r"tile 0 must be \[3, .* got shape \[3, 28, 28\] and dtype torch.uint8.*encode",
        ),
        ("photo.jpg", r"tile 0 must be a tensor .* got 'photo.jpg'"),
        (torch.zeros(4, 28, 28), r"\[3, height, width\].*\[4, 28, 28\]"),
        (torch.zeros(1, 3, 28, 28), r"\[1, 3, 28, 28\]"),
        (torch.zeros(3, 28, 42), r"must be multiples of 28, got 42 × 28"),
        (torch.zeros(3, 0, 28), r"28 × 0 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(tile: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack_tiles(CONFIG, [tile])


def test_another_size_than_the_towers_is_refused() -> None:
    with pytest.raises(UsageError, match="must have 3 × 3 patches of 2 pixels, got 8 × 6"):
        pack_tiles(FIXED, [torch.zeros(3, 6, 8)])
