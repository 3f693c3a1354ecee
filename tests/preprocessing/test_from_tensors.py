"""Packing of preprocessed pixels: accepted and rejected tiles."""

from typing import Any

import pytest
import torch
from support.configs import FIXED, TILED
from support.preprocessing import put_together, tower

from tritontower.config import TowerConfig
from tritontower.errors import UsageError
from tritontower.preprocessing import pack_tiles


@pytest.mark.parametrize("merge", [1, 2])
def test_tiles_are_packed_unchanged(merge: int) -> None:
    config = tower(merge=merge)
    tiles = [torch.randn(3, 56, 84, dtype=torch.float64, requires_grad=True), torch.randn(3, 28, 28).bfloat16()]
    before = [tile.detach().clone() for tile in tiles]
    batch = pack_tiles(config, tiles)
    assert batch.images.grids == ((1, 4, 6), (1, 2, 2))
    assert batch.images.token_counts == (24 // merge**2, 4 // merge**2)
    assert batch.images.processed_sizes == ((84, 56), (28, 28))
    assert not batch.pixels.requires_grad
    assert all(map(torch.equal, tiles, before))
    for tile, grid, rows in zip(tiles, batch.images.grids, batch.pixels.split([24, 4]), strict=True):
        assert torch.equal(put_together(rows, grid, 14, merge), tile.detach().float())
    assert len(pack_tiles(config, [])) == 0


def test_tiles_of_a_fixed_grid_may_have_a_margin() -> None:
    tiles = list(torch.randn(2, 3, 7, 6))
    batch = pack_tiles(FIXED, tiles)
    assert batch.images.processed_sizes == ((6, 7),) * 2
    for tile, rows in zip(tiles, batch.pixels.split(10), strict=True):
        assert not rows[0].any(), "the class token"
        assert torch.equal(put_together(rows[1:], (1, 3, 3), 2, 1), tile[:, :6, :6])
    assert pack_tiles(TILED, tiles).images.token_counts == (9, 9)


@pytest.mark.parametrize(
    ("config", "tile", "message"),
    [
        (tower(merge=2), torch.ones(3, 56, 60), r"multiples of 28, got 60 × 56 pixels"),
        (tower(merge=2), torch.ones(3, 0, 28), r"28 × 0 pixels"),
        (tower(merge=2), torch.ones(1, 56, 56), r"must be \[3, height, width\].* got shape \[1, 56, 56\]"),
        (tower(merge=2), torch.ones(1, 3, 56, 56), r"\[1, 3, 56, 56\]"),
        (tower(merge=2), torch.ones(3, 56, 56, dtype=torch.uint8), r"torch.uint8; for other images call encode"),
        (tower(merge=2), "a tile", r"tile 0 must be a tensor .* got 'a tile'"),
        (tower(table_side=4), torch.ones(3, 56, 70), r"must have 4 × 4 patches of 14 pixels, got 70 × 56 pixels"),
    ],
)
def test_tiles_that_do_not_fit_are_rejected(config: TowerConfig, tile: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack_tiles(config, [tile])
