"""Every image to one size: squashed, or scaled by its shorter side and cropped; with pan-and-scan, crops beside it.

The rules of ``CLIPImageProcessor``, ``SiglipImageProcessor`` and ``Gemma3ImageProcessor`` of transformers, which differ
in their settings alone.  Scaling by the shorter side can make an enormous image out of a tiny one before the crop, so
the size in between is what the limits are about.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tritontower.batch.layout import Grid, ImageLayout
from tritontower.errors import ProcessorError
from tritontower.preprocessing.base import PIXEL_OPTIONS, Bounds, Preprocessor, Resize
from tritontower.preprocessing.fast_path import cropped

__all__ = ["FixedSize", "PanAndScan", "scaled_by_shorter_side"]

PAN_AND_SCAN_OPTIONS = (
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


def scaled_by_shorter_side(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height, pixels, with the shorter side at ``shorter`` and the other rounded down."""
    longer = int(shorter * max(width, height) / min(width, height))
    return (shorter, longer) if width <= height else (longer, shorter)


@dataclass(frozen=True)
class PanAndScan:
    """When a long image is also seen in crops, and in how many.

    The rule of ``Gemma3ImageProcessor.pan_and_scan``; the defaults are those of ``Gemma3Processor``, since published
    files hold none.

    Attributes:
        least_crop: side below which nothing is cropped, pixels.
        most_crops: how many crops there may be.
        least_ratio: longer side ÷ shorter side below which nothing is cropped.
    """

    least_crop: int = 256
    most_crops: int = 4
    least_ratio: float = 1.2

    def crops(self, width: int, height: int) -> int:
        """How many crops stand beside an image of ``width`` × ``height`` pixels.

        Raises:
            ProcessorError: settings with which a crop would be empty.
        """
        longer, shorter = max(width, height), min(width, height)
        if longer / shorter < self.least_ratio:
            return 0
        count = min(math.floor(longer / shorter + 0.5), longer // self.least_crop)
        count = min(max(count, 2), self.most_crops)
        each = math.ceil(longer / count)
        if min(each, shorter) < self.least_crop:
            return 0
        if each * (count - 1) >= longer:
            raise ProcessorError(
                f"pan-and-scan would cut {longer} pixels into {count} crops of {each}, the last of them empty; raise "
                "pan_and_scan_min_crop_size or lower pan_and_scan_max_num_crops"
            )
        return count


@dataclass(frozen=True)
class _Sizes:
    """What the settings say: how an image is resized, and what is cropped from it."""

    resize: Mapping[str, int]
    crop: Mapping[str, int] | None

    @property
    def final(self) -> tuple[int, int]:
        """Width and height of every tile, pixels."""
        size = self.crop or self.resize
        return size["width"], size["height"]


@dataclass(frozen=True, kw_only=True)
class FixedSize(Preprocessor):
    """Views of one size: the whole image, and crops of a long one where that is asked for.

    Attributes:
        pan_and_scan: whether the model's processor knows pan-and-scan; whether it is done, its settings say.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "size", "crop_size", "do_center_crop")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil",
        "transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
        "transformers.models.llava.image_processing_pil_llava.LlavaImageProcessorPil",
        "transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
    )

    pan_and_scan: bool = False

    @property
    def _known_options(self) -> Sequence[str]:
        return (*self.OPTIONS, *PAN_AND_SCAN_OPTIONS) if self.pan_and_scan else self.OPTIONS

    @cached_property
    def sizes(self) -> _Sizes:
        """How an image is resized and cropped.

        Raises:
            ConfigError: a spelling of a size that is not known.
            ProcessorError: images would differ in size, or their grid is not the tower's.
        """
        crops = self.settings.reader.get(bool, "do_center_crop", default=False)
        crop = self.settings.size("crop_size", (("height", "width"), ("side",))) if crops else None
        spellings = (("height", "width"), ("shortest_edge",), ("side",))
        resize = self.settings.size("size", spellings)
        if resize is None or (crops and crop is None):
            key = "size" if resize is None else "crop_size"
            raise self.settings.reader.error(key, None, "an object with height and width")
        if crop is not None and "side" in crop:
            crop = _square(crop["side"])
        if "side" in resize:
            resize = {"shortest_edge": resize["side"]} if crops else _square(resize["side"])
        if crop is None and "shortest_edge" in resize:
            raise ProcessorError(
                f"the image processor of {self.folder} scales the shorter side to {resize['shortest_edge']} pixels and "
                "crops nothing, but the tower needs images of one size; set do_center_crop and crop_size"
            )
        sizes = _Sizes(resize, crop)
        self._check_grid(self._grid(sizes)[1:], sizes.final)
        return sizes

    @cached_property
    def crops(self) -> PanAndScan | None:
        """The rule by which a long image is also seen in crops; ``None``: it is not."""
        reader, usual = self.settings.reader, PanAndScan()
        if not (self.pan_and_scan and reader.get(bool, "do_pan_and_scan", default=False)):
            return None
        return PanAndScan(
            reader.get(int, "pan_and_scan_min_crop_size", default=usual.least_crop, minimum=1),
            reader.get(int, "pan_and_scan_max_num_crops", default=usual.most_crops, minimum=1),
            reader.get(float, "pan_and_scan_min_ratio_to_activate", default=usual.least_ratio, minimum=0.0),
        )

    def _grid(self, sizes: _Sizes) -> Grid:
        width, height = sizes.final
        side = self.config.patch.size
        return 1, height // side, width // side

    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        sizes = self.sizes
        tiles = 1 + (0 if self.crops is None else self.crops.crops(width, height))
        self._check_planned((width, height), self._before_crop(width, height), tiles, "crop the image")
        grid = self._grid(sizes)
        return ImageLayout((grid,) * tiles, sizes.final, grid)

    def _before_crop(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the largest image that the processor makes on its way, pixels."""
        made = []
        pads = self.settings.kind == "LlavaImageProcessor" and self.settings.reader.get(bool, "do_pad", default=False)
        if pads and width != height:
            width = height = max(width, height)
            made.append((width, height))
        resize = self.sizes.resize
        if "shortest_edge" in resize:
            made.append(scaled_by_shorter_side(width, height, resize["shortest_edge"]))
        else:
            made.append((resize["width"], resize["height"]))
        return max(made, key=math.prod)

    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        sizes = self.sizes
        arguments: dict[str, Any] = {"size": dict(sizes.resize)}
        if sizes.crop is not None:
            arguments |= {"do_center_crop": True, "crop_size": dict(sizes.crop)}
        if self.pan_and_scan:
            arguments["do_pan_and_scan"] = self.crops is not None
        if self.crops is not None:
            arguments["pan_and_scan_min_crop_size"] = self.crops.least_crop
            arguments["pan_and_scan_max_num_crops"] = self.crops.most_crops
            arguments["pan_and_scan_min_ratio_to_activate"] = self.crops.least_ratio
        return arguments

    def _resized_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterator[NDArray[np.uint8]]:
        sizes = self.sizes
        for tile in self._seen(array, len(layout.tiles) - 1):
            height, width = tile.shape[:2]
            if "shortest_edge" in sizes.resize:
                size = scaled_by_shorter_side(width, height, sizes.resize["shortest_edge"])
            else:
                size = sizes.resize["width"], sizes.resize["height"]
            made = resize(tile, size)
            yield made if sizes.crop is None else cropped(made, sizes.crop["height"], sizes.crop["width"])

    def _seen(self, array: NDArray[np.uint8], crops: int) -> Iterator[NDArray[np.uint8]]:
        """The whole image, and the crops of its longer side."""
        yield array
        longer = max(array.shape[:2])
        for start in range(0, longer if crops else 0, -(-longer // max(crops, 1))):
            stretch = slice(start, start - (-longer // crops))
            yield array[:, stretch] if array.shape[1] == longer else array[stretch]

    def _is_usual(self) -> bool:
        processor = self.processor
        crops = self.options.get("do_center_crop", getattr(processor, "do_center_crop", None))
        return not getattr(processor, "do_pad", None) and bool(crops) == (self.sizes.crop is not None)


def _square(side: int) -> Mapping[str, int]:
    return {"height": side, "width": side}
