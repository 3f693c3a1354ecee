"""Both sides rounded to a multiple of a token's, the area kept between bounds: the rule of the Qwen-VL models.

The rule of ``transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize``.  Videos go through the same image
processor frame by frame, because transformers' video processors need torchvision: what they do beyond it (one size for
the whole video, the last frame repeated until the patches come out even) is done here.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tritontower.batch.layout import Grid, ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import AspectRatioError, ImageTooLargeError, ProcessorError, UsageError, shorten
from tritontower.preprocessing.base import PIXEL_OPTIONS, Bounds, Each, Preprocessor
from tritontower.preprocessing.fast_path import cut_bytes, pixel_matrix, resized
from tritontower.preprocessing.images.image import CanonicalImage, check_size
from tritontower.preprocessing.processor_config import VIDEO_FILES, Settings

__all__ = ["Area", "SmartResize", "smart_resize", "smart_resize_video"]

Area = tuple[int, int]
"""Least and greatest area of a resized image, pixels; of a whole video, its frames' areas added."""

STILL_AREA: Area = (56 * 56, 28 * 28 * 1280)
"""What ``Qwen2VLImageProcessor`` takes where its file says nothing."""
CLIP_AREAS: Mapping[str, Area] = {
    "per_frame": (128 * 28 * 28, 768 * 28 * 28),
    "per_video": (128 * 32 * 32, 768 * 32 * 32),
}
"""What ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor`` take where no file says anything."""

LARGEST_RATIO = 200
"""Longer side ÷ shorter side from which on the rule is not defined."""


def smart_resize(width: int, height: int, factor: int, area: Area) -> tuple[int, int]:
    """Width and height, pixels, to which an image is resized: multiples of ``factor``, the area within ``area``.

    Rounding is to the nearest even multiple on ties, and the scale comes from the original sides, not from the rounded
    ones.

    Raises:
        AspectRatioError: one side more than 200 times the other.
    """
    _check_ratio(width, height)
    return _scaled(width, height, 1, round(width / factor), round(height / factor), 1, factor, area)


def smart_resize_video(frames: int, width: int, height: int, temporal: int, factor: int, area: Area) -> tuple[int, int]:
    """Width and height of every frame of a video whose frames together keep within ``area``.

    The rule of ``transformers.models.qwen3_vl.video_processing_qwen3_vl.smart_resize``: a frame smaller than ``factor``
    is enlarged first, and the number of frames counts rounded to ``temporal``.

    Raises:
        AspectRatioError: one side more than 200 times the other.
    """
    if width < factor or height < factor:
        scale = max(factor / height, factor / width)
        width, height = int(width * scale), int(height * scale)
    _check_ratio(width, height)
    rounded_frames = round(frames / temporal) * temporal
    return _scaled(width, height, frames, round(width / factor), round(height / factor), rounded_frames, factor, area)


def _scaled(
    width: int, height: int, frames: int, columns: int, rows: int, rounded_frames: int, factor: int, area: Area
) -> tuple[int, int]:
    least, greatest = area
    rounded = rounded_frames * columns * factor * rows * factor
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


def _check_ratio(width: int, height: int) -> None:
    if max(width, height) / min(width, height) > LARGEST_RATIO:
        raise AspectRatioError(
            f"{width} × {height} pixels is an aspect ratio above {LARGEST_RATIO}, for which the model's resizing rule "
            "is not defined; crop it"
        )


@dataclass(frozen=True, kw_only=True)
class SmartResize(Preprocessor):
    """One tile, resized to multiples of a token's side, its area within bounds.

    Attributes:
        frame_budget: what the bounds of a video's area count: every frame alone, or all frames together.
    """

    BOUNDS: ClassVar[tuple[str, ...]] = ("min_pixels", "max_pixels")
    WITHOUT_BOUNDS: ClassVar[str] = "it keeps an image's area within bounds, whatever its sides"
    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "min_pixels", "max_pixels")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    )

    frame_budget: Literal["per_frame", "per_video"] = "per_frame"

    @cached_property
    def image_area(self) -> Area:
        """The area that the checkpoint allows a still image."""
        return _area(self.settings, STILL_AREA)

    @cached_property
    def frame_area(self) -> Area:
        """The area that the checkpoint allows one frame of a video, or the whole video: see ``frame_budget``."""
        default = CLIP_AREAS[self.frame_budget]
        try:
            settings = Settings.of_files(self.folder, VIDEO_FILES, "video_processor")
        except ProcessorError:
            if self.given is None:
                raise
            return default
        return _area(settings, default)

    def video_layout(self, frames: int, width: int, height: int, **bounds: Unpack[Bounds]) -> ImageLayout:
        """What a video of ``frames`` frames of ``width`` × ``height`` pixels becomes; nothing is decoded.

        Raises:
            EmptyImageError, AspectRatioError, ImageTooLargeError, UsageError, ProcessorError: as for a still image.
            ImageTooLargeError: more pixels than :class:`~tritontower.errors.Limits` allow a video.
            ProcessorError: fewer frames than the rule is defined for.
        """
        self.check_bounds(bounds)
        if not all(isinstance(number, Integral) for number in (frames, width, height)):
            shown = f"frames {shorten(frames)}, width {shorten(width)} and height {shorten(height)}"
            raise UsageError(f"{shown} must be whole numbers")
        frames, width, height = int(frames), int(width), int(height)
        temporal = self.config.patch.temporal
        least_frames = temporal if self.frame_budget == "per_video" else 1
        if frames < least_frames:
            raise ProcessorError(
                f"a video of {frames} frames; this model's videos need at least {least_frames}; "
                "encode a single frame as a still image"
            )
        check_size(width, height, limits=self.limits)
        if self.frame_budget == "per_video":
            area = self._bounded(self.frame_area, bounds, temporal)
            size = smart_resize_video(frames, width, height, temporal, self.factor, area)
        else:
            size = smart_resize(width, height, self.factor, self._bounded(self.frame_area, bounds, 1))
        patches = -(-frames // temporal)
        planned = patches * temporal * size[0] * size[1]
        if planned > self.limits.max_video_pixels:
            raise ImageTooLargeError(
                f"a video of {frames} frames of {width} × {height} pixels would be resized to {size[0]} × {size[1]} each, "
                f"{planned} pixels in all; the limit is {self.limits.max_video_pixels}; take fewer frames, lower "
                "max_pixels, or pass Limits(max_video_pixels=...)"
            )
        return self._one_tile(patches, (width, height), size)

    def video(
        self,
        frames: Sequence[CanonicalImage],
        *,
        each: Each = map,
        raw: bool | None = False,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """Packs one video, its frames in order and all of one size; the arguments are those of :meth:`images`.

        Raises:
            ProcessorError: there are too few frames, or they differ in size.
            UsageError: ``raw``, and :attr:`rescaling` is not known.
        """
        raw = self._stay_bytes(raw)
        sizes = {(frame.width, frame.height) for frame in frames}
        if len(sizes) != 1:
            raise ProcessorError(
                "a video needs at least one frame"
                if not sizes
                else f"the frames of a video differ in size: {sorted(sizes)}"
            )
        (size,) = sizes
        layout = self.video_layout(len(frames), *size, **bounds)
        return PackedBatch.pack(
            self.config,
            self._video_patches(frames, layout, each, raw),
            [layout],
            original_sizes=[size],
            content_hashes=[_digest(frames)],
        )

    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        area = self._bounded(self.image_area, bounds, 1)
        return self._one_tile(1, (width, height), smart_resize(width, height, self.factor, area))

    def _one_tile(self, temporal: int, original: tuple[int, int], size: tuple[int, int]) -> ImageLayout:
        self._check_planned(original, size, 1, "lower max_pixels")
        side = self.config.patch.size
        grid: Grid = (temporal, size[1] // side, size[0] // side)
        return ImageLayout.of_one_tile(grid, side)

    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        least, greatest = self._bounded(self.image_area, bounds, 1)
        return {"size": {"shortest_edge": least, "longest_edge": greatest}}

    def _expected(self) -> Mapping[str, Any]:
        patch = self.config.patch
        return {
            "patch_size": patch.size,
            "merge_size": self.config.merge,
            "temporal_patch_size": patch.temporal,
            "do_resize": True,
        }

    def _fill_by_processor(self, out: torch.Tensor, image: CanonicalImage, layout: ImageLayout, bounds: Bounds) -> None:
        out.copy_(self._rows(image.array, layout, **self._arguments(bounds)))

    def _rows(self, array: NDArray[np.uint8], layout: ImageLayout, **arguments: Any) -> torch.Tensor:
        """``[patches, channels · patch²]``: one frame, cut by the processor itself, which uses the same order."""
        # A still image would come with its one frame repeated over the frames that a patch spans; one is enough.
        features = self._processed(array, temporal_patch_size=1, **arguments)
        _, rows, columns = layout.grid
        self._check_made(features["image_grid_thw"].tolist(), ImageLayout.of_one_tile((1, rows, columns), 1))
        pixels: torch.Tensor = features["pixel_values"]
        self._check_channels(pixels.shape[1] // self.config.patch.size**2)
        return pixels

    def _video_patches(
        self, frames: Sequence[CanonicalImage], layout: ImageLayout, each: Each, raw: bool
    ) -> torch.Tensor:
        """``[patches, inner]``: columns are channel, frame, row and column of the patch."""
        patch, fast_path = self.config.patch, self.fast_path
        pixels = pixel_matrix(layout.patches, patch.inner, raw=fast_path is not None)
        slots = pixels.view(layout.grid[0], -1, patch.channels, patch.temporal, patch.size**2)

        def fill(number: int, frame: CanonicalImage) -> None:
            rows = self._frame_rows(frame, layout)
            slots[number // patch.temporal, :, :, number % patch.temporal] = rows.unflatten(1, (patch.channels, -1))
            _ = frame.digest  # the video's digest is made of it; here, several threads are at it

        for _ in each(fill, range(len(frames)), frames):
            pass
        # The last frame is repeated until every temporal patch is full.
        filled = (len(frames) - 1) % patch.temporal + 1
        slots[-1, :, :, filled:] = slots[-1, :, :, filled - 1 : filled]
        if fast_path is None or raw:
            return pixels
        values = pixel_matrix(layout.patches, patch.inner)
        fast_path.rescaling.normalize(pixels.numpy(), values.numpy())
        return values

    def _frame_rows(self, frame: CanonicalImage, layout: ImageLayout) -> torch.Tensor:
        """``[patches, channels · patch²]`` of one frame: bytes where there is a fast_path, else the processor's fp32."""
        if self.fast_path is None:
            return self._rows(self._resized(frame, layout.processed_size), layout, do_resize=False)
        _, rows, columns = layout.grid
        made = np.empty((rows * columns, self.config.patch.still_inner), np.uint8)
        array = resized(frame.array, layout.processed_size, self.fast_path.resample)
        cut_bytes(array, self.config.patch.size, self.config.merge, made)
        return torch.from_numpy(made)

    def _resized(self, frame: CanonicalImage, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The frame at the video's size, which the processor's own rule would not find for every video."""
        resample = self.options.get("resample", self.processor.resample)
        return np.asarray(Image.fromarray(frame.array).resize(size, resample=resample))

    def _bounded(self, area: Area, bounds: Bounds, frames: int) -> Area:
        """The checkpoint's ``area`` with the caller's ``bounds`` in it, which must leave room for ``frames`` tokens."""
        least, greatest = self._whole(bounds, "min_pixels", area[0]), self._whole(bounds, "max_pixels", area[1])
        if not 1 <= least <= greatest:
            raise ProcessorError(
                f"min_pixels = {least} and max_pixels = {greatest} must be positive and in order; the checkpoint's own "
                f"are {area[0]} and {area[1]}"
            )
        if greatest < frames * self.factor**2:
            each = "" if frames == 1 else f" in each of {frames} frames"
            raise ProcessorError(
                f"max_pixels = {greatest} is less than one token's {self.factor} × {self.factor} pixels{each}; "
                f"allowed: at least {frames * self.factor**2}"
            )
        return least, greatest


def _area(settings: Settings, default: Area) -> Area:
    """The allowed area, which published files spell in three ways; ``default`` where a file says nothing."""
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


def _digest(frames: Sequence[CanonicalImage]) -> str:
    """A digest of all frames in their order."""
    state = hashlib.blake2b(digest_size=32, person=b"tritontower-clip")
    for frame in frames:
        state.update(bytes.fromhex(frame.digest))
    return state.hexdigest()
