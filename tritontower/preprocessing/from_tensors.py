"""Packs pixels that are already preprocessed."""

from collections.abc import Sequence

import torch

from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import UsageError, shorten

from .patchify import cut_into_patches


def pack_tiles(config: TowerConfig, tiles: Sequence[torch.Tensor]) -> PackedBatch:
    """Packs resized and normalized tiles; each is a still image with this single tile.

    Each is ``[channels, height, width]`` of any floating dtype.  Where the tower has one grid for every tile, the
    remainder of a side that is not a multiple of a patch is left out.  Elsewhere both sides must be multiples of a
    token's.  The batch has fp32 pixels on the first tile's device and no content hashes, because the image is unknown.

    Raises:
        UsageError: a tile that the tower cannot take.
    """
    layouts = [_plan_tile(config, tile, index) for index, tile in enumerate(tiles)]
    counts = [layout.patches for layout in layouts]
    device = tiles[0].device if tiles else torch.device("cpu")
    pixels = torch.empty(sum(counts), config.patch.still_inner, dtype=torch.float32, device=device)
    for tile, out in zip(tiles, pixels.split(counts), strict=True):
        cut_into_patches(tile[None].detach(), config.patch.size, config.merge, out)
    sizes = [layout.processed_size for layout in layouts]
    return PackedBatch.pack(config, pixels, layouts, original_sizes=sizes, content_hashes=[""] * len(layouts))


def _plan_tile(config: TowerConfig, tile: torch.Tensor, index: int) -> ImageLayout:
    patch, factor, channels = config.patch.size, config.patch.size * config.merge, config.patch.channels
    if not isinstance(tile, torch.Tensor):
        raise UsageError(f"tile {index} must be a tensor [channels, height, width], got {shorten(tile)}")
    if tile.ndim != 3 or tile.shape[0] != channels or not tile.is_floating_point():
        raise UsageError(
            f"tile {index} must be [{channels}, height, width] of a floating dtype, resized and normalized, got shape "
            f"{list(tile.shape)} and dtype {tile.dtype}; for other images call encode"
        )
    height, width = tile.shape[1:]
    grid = (1, height // patch, width // patch)
    if config.num_patches is not None:
        side = round(config.num_patches**0.5)
        if grid != (1, side, side):
            raise UsageError(
                f"tile {index} must have {side} × {side} patches of {patch} pixels, got {width} × {height} pixels"
            )
    elif min(height, width) < 1 or height % factor or width % factor:
        raise UsageError(f"both sides of tile {index} must be multiples of {factor}, got {width} × {height} pixels")
    return ImageLayout((grid,), (width, height), grid)
