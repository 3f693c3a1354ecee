"""Fits an image into a canvas of several tiles, and adds the whole image squashed into one tile.

The pixels follow ``LlavaNextImageProcessor`` and ``LlavaOnevisionImageProcessor`` of transformers.  The rows of the tiles
follow ``pack_image_features`` of their models: the tokens of the squashed image, then those of the canvas without its
padding, row by row, each row followed by the newline embedding.  A canvas with more tokens than the model was trained for
is first shrunk by bilinear interpolation of its rows.

An image is always cut into tiles.  transformers makes a single tile of each image in a LLaVA-OneVision prompt with
several images; here an embedding does not depend on what else is in the call.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.layout import Assembly, ImageLayout
from tritontower.errors import ConfigError, ProcessorError, UsageError, shorten
from tritontower.preprocessing.bounds import Bounds

from .rule import Resize, ResizeRule

Sizes = tuple[tuple[int, int], ...]
"""Heights and widths of canvases, pixels; in the order in which they are tried."""


def select_canvas(width: int, height: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Selects the height and width of the canvas that keeps most pixels, and of equal ones wastes the fewest.

    The rule of ``transformers.image_processing_utils.select_best_resolution``; of tied canvases, the first.
    """

    def rate(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=rate)


def fit_size(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Computes width and height, pixels, of an image in a canvas; the side that does not fill it is rounded up.

    The rule of ``transformers.image_processing_utils.get_patch_output_size``.
    """
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return canvas_width, min(math.ceil(height * across), canvas_height)
    return min(math.ceil(width * down), canvas_width), canvas_height


@dataclass(frozen=True)
class Canvas:
    """The grid of tokens of all tiles of an image, and the part of it that is kept.

    A tile has ``side`` × ``side`` tokens.  Of the tokens, ``top`` rows at the top and at the bottom and ``left`` columns at
    the left and at the right are padding.  The kept part is interpolated to ``shrunk`` rows and columns.
    """

    side: int
    tile_rows: int
    tile_columns: int
    top: int
    left: int
    shrunk: tuple[int, int] | None

    @classmethod
    def for_image(
        cls, width: int, height: int, side: int, tiles: tuple[int, int], shrink_limit: int | None
    ) -> "Canvas":
        """Computes the kept part of ``tiles`` (rows and columns of tiles) for an image of ``width`` × ``height`` pixels.

        The models compute the padding from the aspect ratios, in tokens.  ``shrink_limit`` is the number of tiles whose
        tokens are kept; up to 1.1 times as many along each side are allowed.
        """
        rows, columns = tiles[0] * side, tiles[1] * side
        top = left = 0
        # A result that should be whole may lie just below a whole number; hence the seven decimals.
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

    def locate_rows(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Returns the indices in all rows of all tiles of the tokens at ``rows`` and ``columns`` of the kept part."""
        rows, columns = rows + self.top, columns + self.left
        # The squashed image is the first tile.
        tile = 1 + rows // self.side * self.tile_columns + columns // self.side
        return (tile * self.side + rows % self.side) * self.side + columns % self.side


# An assembly with four taps takes a quarter of a megabyte; images of many sizes share few canvases.
@lru_cache(maxsize=128)
def assemble_tiles(canvas: Canvas, newline: bool) -> Assembly:
    """Builds the assembly of an image's tokens from the rows of the squashed image and of the tiles."""
    base = torch.arange(canvas.side**2, device="cpu")[:, None]
    weights = None
    if canvas.shrunk is None:
        down, across = (torch.arange(count, device="cpu") for count in canvas.kept)
        index = canvas.locate_rows(down[:, None], across)[..., None]
    else:
        index, weights = _interpolate(canvas, canvas.shrunk)
        if newline:
            weights = torch.cat((weights, _first_tap(len(weights), 1)), dim=1)
        weights = torch.cat((_first_tap(len(base)), weights.flatten(0, 1)))
    if newline:
        index = torch.cat((index, index.new_full((len(index), 1, index.shape[2]), -1)), dim=1)
    return Assembly(torch.cat((base.expand(-1, index.shape[2]), index.flatten(0, 1))).int(), weights)


def _first_tap(*shape: int) -> torch.Tensor:
    """Returns weights ``[*shape, 4]``: 1 for the first tap, 0 for the others."""
    return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float32, device="cpu").expand(*shape, 4)


def _interpolate(canvas: Canvas, target: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns bilinear taps ``[rows, columns, 4]`` of the kept part shrunk to ``target``, and their weights."""
    (upper, lower, down), (left, right, across) = map(_linear_taps, canvas.kept, target)
    index = torch.stack(
        [canvas.locate_rows(rows[:, None], columns) for rows in (upper, lower) for columns in (left, right)]
    )
    weights = torch.stack([y[:, None] * x for y in (1 - down, down) for x in (1 - across, across)])
    return index.movedim(0, -1), weights.movedim(0, -1)


def _linear_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the two samples on both sides of each of ``target`` samples, and the weight of the second.

    As in ``torch.nn.functional.interpolate`` with ``mode="bilinear"``, corners not aligned: the scale is fp32, and
    multiplication and addition are rounded once, as in fused instructions.
    """
    scale = torch.tensor(source, dtype=torch.float32, device="cpu") / target
    place = (
        ((torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * scale.double() - 0.5).float().clamp_(min=0)
    )
    first = place.long().clamp_(max=source - 1)
    return first, (first + 1).clamp_(max=source - 1), place - first


@dataclass(frozen=True, kw_only=True)
class AnyResolution(ResizeRule):
    """Makes the squashed image and the tiles of the best canvas.

    Attributes:
        pinpoints: heights and widths of the canvases in ``config.json``, pixels; ``None`` if it has none.
        newline: each row of tokens of the canvas is followed by the newline embedding.
        shrink_limit: tiles' worth of tokens above which a canvas is shrunk (9 for ``anyres_max_9``); ``None``: never.
    """

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
            raise UsageError(f"shrink_limit must be at least 1 tile, or None, got {shorten(self.shrink_limit)}")

    @cached_property
    def side(self) -> int:
        """Side of every tile, pixels."""
        square = ("height", "width"), ("side",)
        size = self.settings.read_size("size", (*square, ("shortest_edge",)))
        if size is None:
            raise self.settings.reader.error("size", None, "an object with height and width, or with shortest_edge")
        sides = {*size.values(), *(self.settings.read_size("crop_size", square) or {}).values()}
        if len(sides) != 1:
            raise ProcessorError(
                f"size and crop_size of the image processor of {self.source.folder} must be the same square, got sides of "
                f"{sorted(sides)} pixels"
            )
        (side,) = sides
        self.check_grid((side, side))
        return side

    @cached_property
    def canvases(self) -> Sizes:
        """Heights and widths of the canvases, pixels; raises if ``config.json`` has others."""
        found = self._read_pairs(self.settings.values.get("image_grid_pinpoints"), self.settings.source)
        if self.pinpoints is not None and found != self._read_pairs(self.pinpoints, "config.json"):
            raise ProcessorError(
                f"image_grid_pinpoints in {self.settings.source} and in config.json of {self.source.folder} must be "
                f"equal, got different lists of {len(found)} and {len(self.pinpoints)} canvases; the two files belong to "
                "different models"
            )
        return found

    def _read_pairs(self, pinpoints: Any, source: str) -> Sizes:
        side = self.side
        allowed = f"a list of pairs of height and width, each a multiple of a tile's {side} pixels"
        pairs = pinpoints if isinstance(pinpoints, (list, tuple)) else ()
        is_valid = bool(pairs) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
        lengths = chain.from_iterable(pairs) if is_valid else ()
        if not is_valid or not all(type(length) is int and length > 0 and length % side == 0 for length in lengths):
            raise ConfigError("image_grid_pinpoints", pinpoints, allowed, source=source)
        return tuple((height, width) for height, width in pairs)

    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        side = self.side
        size = select_canvas(width, height, self.canvases)[::-1]
        self.check_planned((width, height), size, 1, "leave large canvases out of image_grid_pinpoints")
        columns, rows = size[0] // side, size[1] // side
        patches = side // self.config.patch.size
        canvas = Canvas.for_image(width, height, patches // self.config.merge, (rows, columns), self.shrink_limit)
        return ImageLayout(
            tiles=((1, patches, patches),) * (1 + rows * columns),
            processed_size=size,
            grid=(1, rows * patches, columns * patches),
            assembly=assemble_tiles(canvas, self.newline),
        )

    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        return {
            "size": {"height": self.side, "width": self.side},
            "image_grid_pinpoints": [list(canvas) for canvas in self.canvases],
        }

    def resize_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterator[NDArray[np.uint8]]:
        side, (width, height) = self.side, layout.processed_size
        yield resize(array, (side, side))
        fitted = fit_size(array.shape[1], array.shape[0], width, height)
        # Black outside the image.  Of an odd remainder the smaller half is above, and left.
        canvas = np.zeros((height, width, array.shape[2]), np.uint8)
        top, left = (height - fitted[1]) // 2, (width - fitted[0]) // 2
        canvas[top : top + fitted[1], left : left + fitted[0]] = resize(array, fitted)
        for row in range(0, height, side):
            for column in range(0, width, side):
                yield canvas[row : row + side, column : column + side]

    def is_supported(self, processor: Any) -> bool:
        crop = getattr(processor, "crop_size", None)
        # A crop of a tile to its own size changes nothing.
        return crop is None or (crop["height"], crop["width"]) == (self.side, self.side)
