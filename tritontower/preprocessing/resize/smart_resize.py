"""Resizes both sides to multiples of a token's side, with the area within bounds: the rule of the Qwen-VL models.

The rule of ``transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize``.  Videos use the same image processor
frame by frame, because transformers' video processors need torchvision.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from tritontower.batch.layout import ImageLayout
from tritontower.errors import AspectRatioError, ImageTooLargeError, ProcessorError
from tritontower.kernels.runtime.checks import ceil_div
from tritontower.preprocessing.bounds import Bounds, read_bound
from tritontower.preprocessing.processor_config import PIXEL_OPTIONS, VIDEO_FILES, Settings

from .rule import ResizeRule

Area = tuple[int, int]
"""Least and greatest area of a resized image, pixels; of a whole video, the sum over its frames."""

STILL_AREA: Area = (56 * 56, 28 * 28 * 1280)
"""Default of ``Qwen2VLImageProcessor``."""
VIDEO_AREAS: Mapping[str, Area] = {
    "per_frame": (128 * 28 * 28, 768 * 28 * 28),
    "per_video": (128 * 32 * 32, 768 * 32 * 32),
}
"""Defaults of ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor``."""

LARGEST_RATIO = 200
"""Greatest longer side ÷ shorter side for which the rule is defined."""


def smart_resize(
    width: int, height: int, factor: int, area: Area, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """Computes the width and height of a resized image: multiples of ``factor``, the area within ``area``.

    Ties are rounded to the even multiple.  The scale comes from the original sides, not from the rounded ones.

    Several frames together stay within ``area``: the rule of
    ``transformers.models.qwen3_vl.video_processing_qwen3_vl.smart_resize``.  A frame smaller than ``factor`` is enlarged
    first, and the number of frames is rounded to ``temporal``.
    """
    if frames > 1 and min(width, height) < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    if max(width, height) / min(width, height) > LARGEST_RATIO:
        raise AspectRatioError(
            f"the aspect ratio must be at most {LARGEST_RATIO}, for which the model's resizing rule is defined, "
            f"got {width} × {height} pixels; crop it"
        )
    least, greatest = area
    columns, rows = round(width / factor), round(height / factor)
    rounded = round(frames / temporal) * temporal * columns * factor * rows * factor
    if rounded > greatest:
        shrink = math.sqrt(frames * width * height / greatest)
        return (
            max(factor, math.floor(width / shrink / factor) * factor),
            max(factor, math.floor(height / shrink / factor) * factor),
        )
    if rounded < least:
        grow = math.sqrt(least / (frames * width * height))
        return math.ceil(width * grow / factor) * factor, math.ceil(height * grow / factor) * factor
    return columns * factor, rows * factor


@dataclass(frozen=True, kw_only=True)
class SmartResize(ResizeRule):
    """Makes one tile, resized to multiples of a token's side, with the area within bounds."""

    BOUNDS: ClassVar[tuple[str, ...]] = ("min_pixels", "max_pixels")
    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "min_pixels", "max_pixels")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    )
    # The processor repeats the frame of a still image over the frames of a patch; one is enough.
    CALL_ARGUMENTS: ClassVar[Mapping[str, Any]] = {"temporal_patch_size": 1}

    frame_budget: Literal["per_frame", "per_video"] = "per_frame"
    """Scope of a video's area: every frame, or all frames together."""

    @cached_property
    def image_area(self) -> Area:
        """Area that the checkpoint allows for a still image."""
        return _read_area(self.settings, STILL_AREA)

    @cached_property
    def frame_area(self) -> Area:
        """Area that the checkpoint allows for one frame, or for the whole video: see ``frame_budget``."""
        default = VIDEO_AREAS[self.frame_budget]
        try:
            settings = Settings.from_files(self.source.folder, VIDEO_FILES, "video_processor")
        except ProcessorError:
            if self.source.given is None:
                raise
            return default
        return _read_area(settings, default)

    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        area = self._bound_area(self.image_area, bounds, 1)
        size = smart_resize(width, height, self.factor, area)
        return self.plan_one_tile((width, height), size, "lower max_pixels")

    def plan_video(self, frames: int, width: int, height: int, bounds: Bounds) -> ImageLayout:
        temporal = self.config.patch.temporal
        least_frames = temporal if self.frame_budget == "per_video" else 1
        if frames < least_frames:
            raise ProcessorError(
                f"a video of this model must have at least {least_frames} frames, got {frames}; "
                "encode a single frame as a still image"
            )
        if self.frame_budget == "per_video":
            area = self._bound_area(self.frame_area, bounds, temporal)
            size = smart_resize(width, height, self.factor, area, frames, temporal)
        else:
            size = smart_resize(width, height, self.factor, self._bound_area(self.frame_area, bounds, 1))
        patches = ceil_div(frames, temporal)
        planned, limit = patches * temporal * size[0] * size[1], self.source.limits.max_video_pixels
        if planned > limit:
            raise ImageTooLargeError(
                f"a video of {frames} frames of {width} × {height} pixels would be resized to {size[0]} × {size[1]} each, "
                f"{planned} pixels in all; the limit is {limit}; take fewer frames, lower max_pixels, or pass "
                "Limits(max_video_pixels=...)"
            )
        return self.plan_one_tile((width, height), size, "lower max_pixels", patches)

    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        least, greatest = self._bound_area(self.image_area, bounds, 1)
        return {"size": {"shortest_edge": least, "longest_edge": greatest}}

    def list_expected_attributes(self) -> Mapping[str, Any]:
        patch = self.config.patch
        return {
            "patch_size": patch.size,
            "merge_size": self.config.merge,
            "temporal_patch_size": patch.temporal,
            "do_resize": True,
        }

    def _bound_area(self, area: Area, bounds: Bounds, frames: int) -> Area:
        """Applies the caller's ``bounds`` to the checkpoint's ``area``, which must have room for ``frames`` tokens."""
        least, greatest = read_bound(bounds, "min_pixels", area[0]), read_bound(bounds, "max_pixels", area[1])
        if not 1 <= least <= greatest:
            raise ProcessorError(
                f"min_pixels and max_pixels must be positive and in order, got min_pixels = {least} and "
                f"max_pixels = {greatest}; the checkpoint's own are {area[0]} and {area[1]}"
            )
        needed = frames * self.factor**2
        if greatest < needed:
            each = "" if frames == 1 else f" in each of {frames} frames"
            raise ProcessorError(
                f"max_pixels must be at least {needed}, one token of {self.factor} × {self.factor} pixels{each}, "
                f"got {greatest}"
            )
        return least, greatest


def _read_area(settings: Settings, default: Area) -> Area:
    """Reads the allowed area in any of the three published forms."""
    least, greatest = default
    for small, large in (
        ("size.shortest_edge", "size.longest_edge"),
        ("size.min_pixels", "size.max_pixels"),
        ("min_pixels", "max_pixels"),
    ):
        least = settings.reader.get(int, small, default=least, minimum=1)
        greatest = settings.reader.get(int, large, default=greatest, minimum=1)
    if least > greatest:
        raise settings.reader.error("size", [least, greatest], "a least area not above the greatest")
    return least, greatest
