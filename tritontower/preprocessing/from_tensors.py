"""Pixels that somebody else has preprocessed already → packed batch."""

from collections.abc import Sequence

import torch

from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import UsageError, shorten

from .base import cut_into_patches

__all__ = ["pack_tiles"]


def pack_tiles(config: TowerConfig, tiles: Sequence[torch.Tensor]) -> PackedBatch:
    """Packs tiles that are resized and normalized: each is a still image of its own, and its only tile.

    Args:
        config: the tower.
        tiles: ``[channels, height, width]`` each, of any floating dtype.  Where the tower has one grid for every tile,
            what is left of a side that is no multiple of a patch is left out, as by a convolution without padding;
            elsewhere both sides are multiples of a token's.

    Returns:
        A batch with fp32 pixels on the first tile's device, and empty content hashes, since the pixels are not what
        came.

    Raises:
        UsageError: a tile that the tower cannot take.
    """
    layouts = [_layout(config, tile, index) for index, tile in enumerate(tiles)]
    counts = [layout.patches for layout in layouts]
    device = tiles[0].device if tiles else torch.device("cpu")
    pixels = torch.empty(sum(counts), config.patch.still_inner, dtype=torch.float32, device=device)
    for tile, out in zip(tiles, pixels.split(counts), strict=True):
        cut_into_patches(tile[None].detach(), config.patch.size, config.merge, out)
    sizes = [layout.processed_size for layout in layouts]
    return PackedBatch.pack(config, pixels, layouts, original_sizes=sizes, content_hashes=[""] * len(layouts))


def _layout(config: TowerConfig, tile: torch.Tensor, index: int) -> ImageLayout:
    patch, merge, channels = config.patch.size, config.merge, config.patch.channels
    if not isinstance(tile, torch.Tensor):
        raise UsageError(f"tile {index} is {shorten(tile)}; it has to be a tensor [channels, height, width]")
    if tile.ndim != 3 or tile.shape[0] != channels or not tile.is_floating_point():
        raise UsageError(
            f"tile {index} has shape {list(tile.shape)} and dtype {tile.dtype}; this tower takes [{channels}, height, "
            "width] of a floating dtype, resized and normalized; for other images call encode"
        )
    height, width = tile.shape[1:]
    grid = (1, height // patch, width // patch)
    if config.num_patches is not None:
        side = round(config.num_patches**0.5)
        if grid != (1, side, side):
            raise UsageError(
                f"tile {index} is {width} × {height} pixels; this tower takes {side} × {side} patches of {patch} pixels"
            )
    elif min(height, width) < 1 or height % (patch * merge) or width % (patch * merge):
        raise UsageError(
            f"tile {index} is {width} × {height} pixels; both sides have to be multiples of {patch * merge}"
        )
    return ImageLayout((grid,), (width, height), grid)
