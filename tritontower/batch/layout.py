"""ImageLayout: tiles, grids and tokens of an image of a given size.

Most towers process one *tile* of an image: the image, resized.  Some process several (tiles, crops, a thumbnail) and
combine the rows of all of them, with rows left out, averaged or added.  A layout depends on the size alone, so tokens can
be counted without an image.
"""

from dataclasses import dataclass

import torch

from tritontower.config import TowerConfig

Grid = tuple[int, int, int]
"""Temporal patches, rows and columns of patches of one tile or video."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class Assembly:
    """Tokens of an image as weighted sums of the rows of its tiles.

    Attributes:
        index: ``[tokens, taps]`` int32 on the CPU: projector rows, tile by tile, each tile's rows in raster order; −1 is
            the newline embedding.
        weights: ``[tokens, taps]`` fp32: weight of each row; ``None``: one tap of weight 1.
    """

    index: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Layout of an image of one size.

    Attributes:
        tiles: grid of patches of every tile, in order.
        processed_size: width and height after resizing, pixels; of a tiled image, those of its canvas.
        grid: grid reported to an engine: of the only tile, or of the canvas.
        assembly: weighted sums that make the tokens; ``None``: the rows in order.
    """

    tiles: tuple[Grid, ...]
    processed_size: tuple[int, int]
    grid: Grid
    assembly: Assembly | None = None

    @classmethod
    def of_one_tile(cls, grid: Grid, patch_side: int) -> "ImageLayout":
        """Makes the layout of an image with a single tile."""
        return cls((grid,), (grid[2] * patch_side, grid[1] * patch_side), grid)

    @property
    def patches(self) -> int:
        """Patches of all tiles."""
        return sum(t * h * w for t, h, w in self.tiles)

    def tokens(self, config: TowerConfig) -> int:
        """Counts the tokens of the image in a tower."""
        if self.assembly is not None:
            return len(self.assembly.index)
        return self.patches // config.rows_per_token + (len(self.tiles) if config.keep_class_token else 0)
