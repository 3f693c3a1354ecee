"""Resizes every image to one size: squashed, or scaled by its shorter side and cropped; optionally with pan-and-scan.

The rules of ``CLIPImageProcessor``, ``SiglipImageProcessor`` and ``Gemma3ImageProcessor`` of transformers, which differ
only in their settings.  Scaling by the shorter side can make an enormous image out of a tiny one before the crop, so the
limits apply to the size in between.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tritontower.batch.layout import ImageLayout
from tritontower.errors import ProcessorError
from tritontower.kernels.runtime.checks import ceil_div
from tritontower.preprocessing.bounds import Bounds
from tritontower.preprocessing.pillow_resize import crop_center
from tritontower.preprocessing.processor_config import PIXEL_OPTIONS

from .rule import Resize, ResizeRule

PAN_AND_SCAN_OPTIONS = (
    "do_pan_and_scan",
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)


def scale_shorter_side(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Computes width and height, pixels, with the shorter side at ``shorter`` and the other rounded down."""
    longer = int(shorter * max(width, height) / min(width, height))
    return (shorter, longer) if width <= height else (longer, shorter)


@dataclass(frozen=True)
class PanAndScan:
    """Counts the crops that accompany a long image.

    The rule of ``Gemma3ImageProcessor.pan_and_scan``.  The defaults are those of ``Gemma3Processor``, because published
    files have none.  Nothing is cropped below ``least_crop`` pixels of a side, or ``least_ratio`` of the two sides.
    """

    least_crop: int = 256
    most_crops: int = 4
    least_ratio: float = 1.2

    def count_crops(self, width: int, height: int) -> int:
        """Counts the crops of an image of ``width`` × ``height`` pixels; raises if one of them would be empty."""
        longer, shorter = max(width, height), min(width, height)
        if longer / shorter < self.least_ratio:
            return 0
        count = min(math.floor(longer / shorter + 0.5), longer // self.least_crop)
        count = min(max(count, 2), self.most_crops)
        each = ceil_div(longer, count)
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
    """Sizes in the settings: of the resized image, and of the crop from it."""

    resize: Mapping[str, int]
    crop: Mapping[str, int] | None

    @property
    def final(self) -> tuple[int, int]:
        """Width and height of every tile, pixels."""
        size = self.crop or self.resize
        return size["width"], size["height"]

    def resize_to(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image before the crop, pixels."""
        if "shortest_edge" in self.resize:
            return scale_shorter_side(width, height, self.resize["shortest_edge"])
        return self.resize["width"], self.resize["height"]


@dataclass(frozen=True, kw_only=True)
class FixedSize(ResizeRule):
    """Makes tiles of one size: the whole image, and with pan-and-scan the crops of a long one."""

    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "size", "crop_size", "do_center_crop")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil",
        "transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil",
        "transformers.models.llava.image_processing_pil_llava.LlavaImageProcessorPil",
        "transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
    )

    pan_and_scan: bool = False
    """The model's processor supports pan-and-scan; its settings enable it."""

    def list_options(self) -> Sequence[str]:
        return (*self.OPTIONS, *PAN_AND_SCAN_OPTIONS) if self.pan_and_scan else self.OPTIONS

    @cached_property
    def sizes(self) -> _Sizes:
        """Sizes of the resized image and of the crop."""
        crops = self.settings.reader.get(bool, "do_center_crop", default=False)
        crop = self.settings.read_size("crop_size", (("height", "width"), ("side",))) if crops else None
        resize = self.settings.read_size("size", (("height", "width"), ("shortest_edge",), ("side",)))
        if resize is None or (crops and crop is None):
            key = "size" if resize is None else "crop_size"
            raise self.settings.reader.error(key, None, "an object with height and width")
        if crop is not None and "side" in crop:
            crop = _make_square(crop["side"])
        if "side" in resize:
            resize = {"shortest_edge": resize["side"]} if crops else _make_square(resize["side"])
        if crop is None and "shortest_edge" in resize:
            raise ProcessorError(
                f"the image processor of {self.source.folder} scales the shorter side to {resize['shortest_edge']} pixels "
                "and crops nothing, but the tower needs images of one size; set do_center_crop and crop_size"
            )
        sizes = _Sizes(resize, crop)
        self.check_grid(sizes.final)
        return sizes

    @cached_property
    def crops(self) -> PanAndScan | None:
        """Settings of pan-and-scan; ``None``: it is off."""
        reader, default = self.settings.reader, PanAndScan()
        if not (self.pan_and_scan and reader.get(bool, "do_pan_and_scan", default=False)):
            return None
        return PanAndScan(
            reader.get(int, "pan_and_scan_min_crop_size", default=default.least_crop, minimum=1),
            reader.get(int, "pan_and_scan_max_num_crops", default=default.most_crops, minimum=1),
            reader.get(float, "pan_and_scan_min_ratio_to_activate", default=default.least_ratio, minimum=0.0),
        )

    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        final = self.sizes.final
        tiles = 1 + (0 if self.crops is None else self.crops.count_crops(width, height))
        self.check_planned((width, height), self._find_largest_step(width, height), tiles, "crop the image")
        grid = self.check_grid(final)
        return ImageLayout((grid,) * tiles, final, grid)

    def _find_largest_step(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height of the largest image that the processor makes before the crop, pixels."""
        pads = self.settings.kind == "LlavaImageProcessor" and self.settings.reader.get(bool, "do_pad", default=False)
        if not pads or width == height:
            return self.sizes.resize_to(width, height)
        side = max(width, height)
        return max((side, side), self.sizes.resize_to(side, side), key=math.prod)

    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        sizes = self.sizes
        arguments: dict[str, Any] = {"size": dict(sizes.resize)}
        if sizes.crop is not None:
            arguments |= {"do_center_crop": True, "crop_size": dict(sizes.crop)}
        if self.pan_and_scan:
            arguments["do_pan_and_scan"] = self.crops is not None
        if self.crops is not None:
            arguments |= zip(PAN_AND_SCAN_OPTIONS[1:], astuple(self.crops), strict=True)
        return arguments

    def resize_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterator[NDArray[np.uint8]]:
        sizes = self.sizes
        for tile in _list_crops(array, len(layout.tiles) - 1):
            resized = resize(tile, sizes.resize_to(tile.shape[1], tile.shape[0]))
            yield resized if sizes.crop is None else crop_center(resized, sizes.crop["height"], sizes.crop["width"])

    def is_supported(self, processor: Any) -> bool:
        crops = self.source.options.get("do_center_crop", getattr(processor, "do_center_crop", None))
        return not getattr(processor, "do_pad", None) and bool(crops) == (self.sizes.crop is not None)


def _list_crops(array: NDArray[np.uint8], crops: int) -> Iterator[NDArray[np.uint8]]:
    """Yields the whole image, and the crops of its longer side."""
    yield array
    longer = max(array.shape[:2])
    step = ceil_div(longer, max(crops, 1))
    for start in range(0, longer if crops else 0, step):
        part = slice(start, start + step)
        yield array[:, part] if array.shape[1] == longer else array[part]


def _make_square(side: int) -> Mapping[str, int]:
    return {"height": side, "width": side}
