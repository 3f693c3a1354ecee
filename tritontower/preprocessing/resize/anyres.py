"""The image as it fits a canvas of several tiles, cut into them, and once more squashed into one.

The rule of ``LlavaNextImageProcessor`` and ``LlavaOnevisionImageProcessor`` of transformers for the pixels, and that of
``pack_image_features`` of their models for what becomes of the tiles' rows: the tokens of the squashed image, then
those of the canvas without its padding, row by row, each row ended by the newline embedding.  A canvas with more tokens
than the model was trained for is shrunk first, by bilinear interpolation of its rows.

An image is always seen in tiles.  transformers sees the images of a LLaVA-OneVision prompt with several in one
tile each; an embedding here does not depend on what else is in the call.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.layout import Assembly, ImageLayout
from tritontower.errors import ConfigError, ProcessorError, UsageError, shorten
from tritontower.preprocessing.base import PIXEL_OPTIONS, Bounds, Preprocessor, Resize
from tritontower.preprocessing.images.image import CanonicalImage

__all__ = ["AnyResolution", "Canvas", "best_canvas", "fitted_size", "tile_assembly"]

Sizes = tuple[tuple[int, int], ...]
"""Heights and widths of canvases, pixels; in the order in which they are tried."""


def best_canvas(width: int, height: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of the canvas that keeps most of an image's pixels, and of equal ones wastes the fewest.

    The rule of ``transformers.image_processing_utils.select_best_resolution``; of canvases that tie, the first.
    """

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fitted_size(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Width and height, pixels, at which an image fits a canvas; the side that does not fill it is rounded up.

    The rule of ``transformers.image_processing_utils.get_patch_output_size``.
    """
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return canvas_width, min(math.ceil(height * across), canvas_height)
    return min(math.ceil(width * down), canvas_width), canvas_height


@dataclass(frozen=True)
class Canvas:
    """The tokens of an image's tiles put together, and what of them is kept.

    Attributes:
        side: rows, and columns, of tokens of one tile.
        tile_rows: tiles from top to bottom.
        tile_columns: tiles from left to right.
        top: rows of tokens that are padding, at the top and again at the bottom.
        left: columns of tokens that are padding, at the left and again at the right.
        shrunk: rows and columns to which the rest is interpolated; ``None``: it stays.
    """

    side: int
    tile_rows: int
    tile_columns: int
    top: int
    left: int
    shrunk: tuple[int, int] | None

    @classmethod
    def of_image(cls, width: int, height: int, side: int, tiles: tuple[int, int], shrink_limit: int | None) -> "Canvas":
        """What an image of ``width`` × ``height`` pixels leaves of ``tiles`` (rows and columns of tiles).

        The padding is that of the canvas in pixels as the models compute it: from the aspect ratios, in tokens.
        ``shrink_limit`` is how many tiles' worth of tokens is kept; a tenth more of them along each side is let pass.
        """
        rows, columns = tiles[0] * side, tiles[1] * side
        top = left = 0
        # A product that should be whole may lie just below a whole number; hence the seven decimals.
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        kept_rows, kept_columns = rows - 2 * top, columns - 2 * left
        shrunk = None
        if shrink_limit is not None:
            ratio = math.sqrt(kept_rows * kept_columns / (shrink_limit * side**2))
            if ratio > 1.1:
                shrunk = max(1, int(kept_rows // ratio)), max(1, int(kept_columns // ratio))
        return cls(side, *tiles, top, left, shrunk)

    @property
    def kept(self) -> tuple[int, int]:
        """Rows and columns of tokens without the padding."""
        return self.tile_rows * self.side - 2 * self.top, self.tile_columns * self.side - 2 * self.left

    def rows_of(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Where the tokens at ``rows`` and ``columns`` of the kept part stand among all rows of all tiles."""
        rows, columns = rows + self.top, columns + self.left
        # The squashed image is the first tile.
        tile = 1 + rows // self.side * self.tile_columns + columns // self.side
        return (tile * self.side + rows % self.side) * self.side + columns % self.side


# An assembly with four taps takes a quarter of a megabyte; images of many sizes share few canvases.
@lru_cache(maxsize=128)
def tile_assembly(canvas: Canvas, newline: bool) -> Assembly:
    """How the rows of the squashed image and of the tiles make an image's tokens."""
    base = torch.arange(canvas.side**2, device="cpu")[:, None]
    if canvas.shrunk is None:
        rows, columns = canvas.kept
        down, across = (torch.arange(count, device="cpu") for count in (rows, columns))
        tiles = canvas.rows_of(down[:, None], across)[..., None]
        if newline:
            tiles = torch.cat((tiles, tiles.new_full((rows, 1, 1), -1)), dim=1)
        return Assembly(torch.cat((base, tiles.flatten(0, 1))).int())
    index, weights = _interpolated(canvas, canvas.shrunk)
    if newline:
        index = torch.cat((index, index.new_full((len(index), 1, 4), -1)), dim=1)
        weights = torch.cat((weights, _first_tap(len(weights), 1)), dim=1)
    index = torch.cat((base.expand(-1, 4), index.flatten(0, 1)))
    return Assembly(index.int(), torch.cat((_first_tap(len(base)), weights.flatten(0, 1))))


def _first_tap(*shape: int) -> torch.Tensor:
    """Weights ``[*shape, 4]`` of which only the first of four counts."""
    return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float32, device="cpu").expand(*shape, 4)


def _interpolated(canvas: Canvas, target: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear taps ``[rows, columns, 4]`` of the kept part shrunk to ``target``, and their weights."""
    (upper, lower, down), (left, right, across) = map(_linear_taps, canvas.kept, target)
    index = torch.stack(
        [canvas.rows_of(rows[:, None], columns) for rows in (upper, lower) for columns in (left, right)]
    )
    weights = torch.stack([y[:, None] * x for y in (1 - down, down) for x in (1 - across, across)])
    return index.movedim(0, -1), weights.movedim(0, -1)


def _linear_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two samples that each of ``target`` lies between, and how far towards the second.

    As in ``torch.nn.functional.interpolate`` with ``mode="bilinear"``, corners not aligned: the scale is fp32, and the
    product with it and the sum are rounded once, as fused instructions do.
    """
    scale = torch.tensor(source, dtype=torch.float32, device="cpu") / target
    place = (
        ((torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * scale.double() - 0.5).float().clamp_(min=0)
    )
    first = place.long().clamp_(max=source - 1)
    return first, (first + 1).clamp_(max=source - 1), place - first


@dataclass(frozen=True, kw_only=True)
class AnyResolution(Preprocessor):
    """The squashed image and the tiles of the canvas that fits best.

    Attributes:
        pinpoints: heights and widths of the canvases, pixels, as ``config.json`` has them; ``None`` if it does not.
        newline: whether each row of tokens of the canvas ends with the newline embedding.
        shrink_limit: tiles' worth of tokens beyond which a canvas is shrunk (9 for ``anyres_max_9``); ``None``: never.

    Raises:
        UsageError: a tower that keeps its class token, which has no place on a canvas.
    """

    WITHOUT_BOUNDS: ClassVar[str] = "an image becomes as large as the canvas of image_grid_pinpoints that fits it best"
    OPTIONS: ClassVar[tuple[str, ...]] = PIXEL_OPTIONS
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
        "transformers.models.llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
    )

    pinpoints: Sequence[Sequence[int]] | None = None
    newline: bool = True
    shrink_limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.keep_class_token:
            raise UsageError(
                "an image that is cut into tiles has no place for class tokens; choose the features without them"
            )
        if self.shrink_limit is not None and self.shrink_limit < 1:
            raise UsageError(f"shrink_limit = {shorten(self.shrink_limit)} must be at least 1 tile, or None")

    @cached_property
    def side(self) -> int:
        """Side of every tile, pixels.

        Raises:
            ConfigError: a spelling of a size that is not known.
            ProcessorError: tiles that are not square, or whose grid is not the tower's.
        """
        square = ("height", "width"), ("side",)
        size = self.settings.size("size", (*square, ("shortest_edge",)))
        if size is None:
            raise self.settings.reader.error("size", None, "an object with height and width, or with shortest_edge")
        sides = {*size.values(), *(self.settings.size("crop_size", square) or {}).values()}
        if len(sides) != 1:
            raise ProcessorError(
                f"the image processor of {self.folder} has sides of {sorted(sides)} pixels in size and crop_size; "
                "tiles have to be squares of one size"
            )
        (side,) = sides
        patches = side // self.config.patch.size
        self._check_grid((patches, patches), (side, side))
        return side

    @cached_property
    def canvases(self) -> Sizes:
        """Heights and widths of the canvases, pixels.

        Raises:
            ConfigError: they are no pairs of multiples of a tile's side.
            ProcessorError: ``config.json`` has others.
        """
        found = self._pairs(self.settings.values.get("image_grid_pinpoints"), self.settings.source)
        if self.pinpoints is not None and found != self._pairs(self.pinpoints, "config.json"):
            raise ProcessorError(
                f"image_grid_pinpoints in {self.settings.source} and in config.json of {self.folder} differ: "
                f"{len(found)} and {len(self.pinpoints)} canvases, or others, or in another order; the two files "
                "belong to different models"
            )
        return found

    def _pairs(self, pinpoints: Any, source: str) -> Sizes:
        side = self.side
        allowed = f"a list of pairs of height and width, each a multiple of a tile's {side} pixels"
        if not isinstance(pinpoints, (list, tuple)) or not pinpoints:
            raise ConfigError("image_grid_pinpoints", pinpoints, allowed, source=source)
        for pair in pinpoints:
            if not (
                isinstance(pair, (list, tuple))
                and len(pair) == 2
                and all(type(length) is int and length > 0 and length % side == 0 for length in pair)
            ):
                raise ConfigError("image_grid_pinpoints", pair, allowed, source=source)
        return tuple((height, width) for height, width in pinpoints)

    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        side = self.side
        canvas_height, canvas_width = best_canvas(width, height, self.canvases)
        self._check_planned(
            (width, height), (canvas_width, canvas_height), 1, "leave large canvases out of image_grid_pinpoints"
        )
        tile_rows, tile_columns = canvas_height // side, canvas_width // side
        patches = side // self.config.patch.size
        canvas = Canvas.of_image(
            width, height, patches // self.config.merge, (tile_rows, tile_columns), self.shrink_limit
        )
        return ImageLayout(
            tiles=((1, patches, patches),) * (1 + tile_rows * tile_columns),
            processed_size=(canvas_width, canvas_height),
            grid=(1, tile_rows * patches, tile_columns * patches),
            assembly=tile_assembly(canvas, self.newline),
        )

    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        return {
            "size": {"height": self.side, "width": self.side},
            "image_grid_pinpoints": [list(canvas) for canvas in self.canvases],
        }

    def _tiles(self, image: CanonicalImage, bounds: Bounds) -> torch.Tensor:
        return super()._tiles(image, bounds)[0]

    def _resized_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterator[NDArray[np.uint8]]:
        side, (width, height) = self.side, layout.processed_size
        yield resize(array, (side, side))
        fitted = fitted_size(array.shape[1], array.shape[0], width, height)
        # Black where the image does not reach; of an odd rest the smaller half is above, and left.
        canvas = np.zeros((height, width, array.shape[2]), np.uint8)
        top, left = (height - fitted[1]) // 2, (width - fitted[0]) // 2
        canvas[top : top + fitted[1], left : left + fitted[0]] = resize(array, fitted)
        for row in range(0, height, side):
            for column in range(0, width, side):
                yield canvas[row : row + side, column : column + side]

    def _is_usual(self) -> bool:
        crop = getattr(self.processor, "crop_size", None)
        # A crop of a tile to its own size changes nothing.
        return crop is None or (crop["height"], crop["width"]) == (self.side, self.side)
