"""What an image of a given size becomes: how many tiles, of which grids, and how their rows make its tokens.

Most towers see one *tile* of an image: the image, resized.  Some see several (tiles, crops, a thumbnail), and put the
rows of all of them together, with rows left out, averaged or added.  A layout depends on the size alone, so tokens can be
counted without an image.
"""

from dataclasses import dataclass

import torch

from tritontower.config import TowerConfig

__all__ = ["Assembly", "Grid", "ImageLayout"]

Grid = tuple[int, int, int]
"""Temporal patches, rows and columns of patches of one tile or video."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class Assembly:
    """An image's tokens as sums of the rows that its tiles became.

    Attributes:
        index: ``[tokens, taps]`` int32 on the CPU: rows of the image's tiles as they leave the projector, counted
            through from its first tile to its last, each tile's rows in raster order; −1 is the newline embedding.
        weights: ``[tokens, taps]`` fp32, what each of them counts; ``None`` where there is one tap, and it counts 1.
    """

    index: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the image."""
        return self.index.shape[0]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """What an image of one size becomes.

    Attributes:
        tiles: the grid of patches of every tile, in order.
        processed_size: width and height after resizing, pixels; of a tiled image, those of all its tiles together.
        grid: the grid that an engine is told: of the only tile, or of the tiles together.
        assembly: how the tiles' rows make the tokens; ``None``: one after the other.
    """

    tiles: tuple[Grid, ...]
    processed_size: tuple[int, int]
    grid: Grid
    assembly: Assembly | None = None

    @classmethod
    def of_one_tile(cls, grid: Grid, patch_side: int) -> "ImageLayout":
        """The layout of an image that is its only tile."""
        return cls((grid,), (grid[2] * patch_side, grid[1] * patch_side), grid)

    @property
    def patches(self) -> int:
        """Patches of all tiles."""
        return sum(t * h * w for t, h, w in self.tiles)

    def tokens(self, config: TowerConfig) -> int:
        """Tokens of the image in a tower."""
        if self.assembly is not None:
            return self.assembly.tokens
        return self.patches // config.rows_per_token + (len(self.tiles) if config.keep_class_token else 0)
