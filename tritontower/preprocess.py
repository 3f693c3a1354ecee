"""Pictures → :class:`~tritontower.batch.PackedBatch`, by the checkpoint's own transformers image processor.

transformers' PIL processors are the definition of the pixels; this module feeds them canonical RGB, keeps one of the
identical frames that they write for a still picture, and packs.  Clips go through the same image processor frame by
frame, because transformers' video processors need torchvision: what they do beyond it (one size for the whole clip, the
last frame repeated until the patches come out even) is done here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from .batch import Grid, PackedBatch
from .config import TowerConfig
from .errors import ConfigError, ImageTooLargeError, Limits, ProcessorError, UsageError, shorten
from .families import Family
from .images import CanonicalImage, check_size
from .reader import ConfigReader, read_json

__all__ = ["Area", "Preprocessor"]

Area = tuple[int, int]
"""Least and greatest area of a resized picture, pixels."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
VIDEO_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Preprocessor:
    """Turns canonical pictures into packed batches for one tower.

    Attributes:
        config: the tower.
        family: how the tower's model resizes.
        folder: the checkpoint.
        limits: what a picture may cost.
        given: an image processor of transformers to use instead of the checkpoint's.
    """

    config: TowerConfig
    family: Family
    folder: Path
    limits: Limits
    given: Any = None

    @property
    def factor(self) -> int:
        """What both sides of a resized picture are multiples of, pixels."""
        return self.config.patch.size * self.config.projector.merge

    @cached_property
    def picture_area(self) -> Area:
        """The area that the checkpoint allows a still picture."""
        if self.given is not None:
            return self._area(ConfigReader({"size": dict(self.given.size)}, type(self.given).__name__))
        return self._area(self._settings(PROCESSOR_FILES, "image_processor"))

    @cached_property
    def frame_area(self) -> Area:
        """The area that the checkpoint allows one frame of a clip."""
        try:
            return self._area(self._settings(VIDEO_FILES, "video_processor"), self.family.SHRINKS_VIDEO_TO)
        except ProcessorError:
            if self.given is None:
                raise
            return self.family.SHRINKS_VIDEO_TO

    @cached_property
    def processor(self) -> Any:
        """The image processor of transformers, on its PIL backend."""
        processor = self.given if self.given is not None else self._load()
        expected = {
            "patch_size": self.config.patch.size,
            "merge_size": self.config.projector.merge,
            "temporal_patch_size": self.config.patch.temporal,
            "do_resize": True,
        }
        for name, value in expected.items():
            if (found := getattr(processor, name, None)) != value:
                raise ProcessorError(
                    f"the image processor of {self.folder} has {name} = {found!r}, but the tower needs {value!r}; "
                    "the processor's file and config.json belong to different models"
                )
        return processor

    def grid(self, width: int, height: int, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Grid:
        """The grid of patches that a still picture of ``width`` × ``height`` pixels becomes; nothing is decoded.

        Raises:
            EmptyImageError, AspectRatioError, ImageTooLargeError: no picture of this size can be encoded.
            UsageError: a side that is not a whole number.
            ProcessorError: bounds of the area that allow nothing.
        """
        if not (isinstance(width, Integral) and isinstance(height, Integral)):
            raise UsageError(f"width {shorten(width)} and height {shorten(height)} must be whole numbers of pixels")
        area = self._bounded(self.picture_area, min_pixels, max_pixels)
        return self._grid(width, height, 1, area)

    def pictures(
        self, images: Sequence[CanonicalImage], *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> PackedBatch:
        """Packs still pictures, in order; see :meth:`grid` for the errors."""
        area = self._bounded(self.picture_area, min_pixels, max_pixels)
        planned = [self._grid(image.width, image.height, 1, area) for image in images]
        frames = self._frames(images, planned, area)
        return self._pack(frames.flatten(1), planned, images)

    def clip(
        self, frames: Sequence[CanonicalImage], *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> PackedBatch:
        """Packs one clip, its frames in order and all of one size.

        Raises:
            ProcessorError: there is no frame, or the frames differ in size.
        """
        sizes = {(frame.width, frame.height) for frame in frames}
        if len(sizes) != 1:
            raise ProcessorError(
                "a clip needs at least one frame"
                if not sizes
                else f"the frames of a clip differ in size: {sorted(sizes)}"
            )
        area = self._bounded(self.frame_area, min_pixels, max_pixels)
        temporal, ((width, height),) = self.config.patch.temporal, sizes
        grid = self._grid(width, height, -(-len(frames) // temporal), area)
        one_frame = (1, *grid[1:])
        pixels = self._frames(frames, [one_frame] * len(frames), area)
        pixels = pixels.unflatten(0, (len(frames), -1))
        # The last frame is repeated until every temporal patch is full.
        padding = grid[0] * temporal - len(frames)
        pixels = torch.cat([pixels, pixels[-1:].expand(padding, -1, -1, -1)])
        # [patch in time, frame of it, patch, channel, pixel] → a row per patch: channel, frame, pixel.
        pixels = pixels.unflatten(0, (grid[0], temporal)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        return self._pack(pixels.flatten(1), [grid], frames[:1])

    def _frames(self, images: Sequence[CanonicalImage], planned: Sequence[Grid], area: Area) -> torch.Tensor:
        """``[patches, channels, pixels of a patch]``: every image resized, normalised and cut, once."""
        channels, side = self.config.patch.channels, self.config.patch.size
        if not images:
            return torch.empty(0, channels, side * side)
        features = self.processor(
            images=[image.array for image in images],
            input_data_format="channels_last",
            size={"shortest_edge": area[0], "longest_edge": area[1]},
            return_tensors="pt",
        )
        grids = [tuple(grid) for grid in features["image_grid_thw"].tolist()]
        if grids != [tuple(grid) for grid in planned]:
            raise ProcessorError(
                f"the image processor of {self.folder} made grids {grids} where {list(planned)} were planned; "
                "its resizing rule is not the family's"
            )
        pixels: torch.Tensor = features["pixel_values"]
        # A still picture comes with its one frame repeated over the frames that a patch spans; one is enough.
        frames: torch.Tensor = pixels.unflatten(1, (channels, self.config.patch.temporal, side * side))
        return frames[:, :, 0]

    def _pack(self, pixels: torch.Tensor, grids: Sequence[Grid], images: Sequence[CanonicalImage]) -> PackedBatch:
        return PackedBatch.pack(
            self.config,
            pixels.contiguous(),
            grids,
            original_sizes=[(image.width, image.height) for image in images],
            content_hashes=[image.digest for image in images],
        )

    def _grid(self, width: int, height: int, temporal: int, area: Area) -> Grid:
        check_size(width, height, limits=self.limits)
        resized_width, resized_height = self.family.resized(width, height, self.factor, area)
        if resized_width * resized_height > self.limits.max_planned_pixels:
            raise ImageTooLargeError(
                f"{width} × {height} pixels would be resized to {resized_width} × {resized_height}, the limit is "
                f"{self.limits.max_planned_pixels} pixels; lower max_pixels, or pass Limits(max_planned_pixels=...)"
            )
        side = self.config.patch.size
        return temporal, resized_height // side, resized_width // side

    def _bounded(self, area: Area, min_pixels: int | None, max_pixels: int | None) -> Area:
        least = area[0] if min_pixels is None else min_pixels
        greatest = area[1] if max_pixels is None else max_pixels
        if not (isinstance(least, Integral) and isinstance(greatest, Integral)):
            raise ProcessorError(
                f"min_pixels = {shorten(least)} and max_pixels = {shorten(greatest)} must be whole numbers of pixels"
            )
        least, greatest = int(least), int(greatest)
        if not 1 <= least <= greatest:
            raise ProcessorError(
                f"min_pixels = {least} and max_pixels = {greatest} must be positive and in order; the checkpoint's own "
                f"are {area[0]} and {area[1]}"
            )
        if greatest < self.factor**2:
            raise ProcessorError(
                f"max_pixels = {greatest} is less than one token's {self.factor} × {self.factor} pixels; "
                f"allowed: at least {self.factor**2}"
            )
        return least, greatest

    def _settings(self, files: Sequence[str], section: str) -> ConfigReader:
        """The first of ``files`` that has settings; of ``processor_config.json`` only its own section counts."""
        for name in files:
            if not (self.folder / name).is_file():
                continue
            values: Mapping[str, Any] = read_json(self.folder / name)
            if name == "processor_config.json":
                values = values.get(section) or {}
            if values:
                return ConfigReader(values, name)
        raise ProcessorError(
            f"{self.folder} holds no image processor: neither {' nor '.join(files)} says how pictures are resized; "
            "copy the file from the published checkpoint, or pass an image processor of transformers as `processor`"
        )

    def _area(self, settings: ConfigReader, default: Area = (56 * 56, 28 * 28 * 1280)) -> Area:
        """The allowed area, which published files spell in three ways; a file without any has the class's default."""
        least, greatest = default
        for small, large in (
            ("size.shortest_edge", "size.longest_edge"),
            ("size.min_pixels", "size.max_pixels"),
            ("min_pixels", "max_pixels"),
        ):
            least = settings.get(int, small, default=least, minimum=1)
            greatest = settings.get(int, large, default=greatest, minimum=1)
        if least > greatest:
            raise settings.error("size", [least, greatest], "a least area not above the greatest")
        return least, greatest

    def _load(self) -> Any:
        # From its own module: the name at the top of transformers 5.17 asks for torchvision, whatever the backend.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        least, greatest = self.picture_area
        try:
            return AutoImageProcessor.from_pretrained(
                str(self.folder),
                backend="pil",
                local_files_only=True,
                trust_remote_code=False,
                # Some published files spell the area in a way that transformers refuses; this one it takes.
                size={"shortest_edge": least, "longest_edge": greatest},
            )
        except (ConfigError, OSError, ValueError, TypeError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ProcessorError(f"transformers cannot load the image processor of {self.folder}: {reason}") from error
