"""ResizeRule: the interface of all resizing rules, and the checks they share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.layout import Grid, ImageLayout
from tritontower.config import TowerConfig
from tritontower.errors import ImageTooLargeError, ProcessorError, UsageError, list_names
from tritontower.preprocessing.bounds import Bounds
from tritontower.preprocessing.processor_config import PIXEL_OPTIONS, ProcessorSource, Settings

Resize = Callable[[NDArray[np.uint8], tuple[int, int]], NDArray[np.uint8]]
"""Resizes bytes ``[height, width, 3]`` to a width and height, as the processor does."""


@dataclass(frozen=True)
class ResizeRule(ABC):
    """Computes from the settings files alone the tiles and sizes of an image of a given size."""

    BOUNDS: ClassVar[tuple[str, ...]] = ()
    """Supported keys of :class:`Bounds`."""
    OPTIONS: ClassVar[tuple[str, ...]] = PIXEL_OPTIONS
    """Names allowed in ``source.options``."""
    PROCESSORS: ClassVar[Collection[str]] = ()
    """Full names of the classes of transformers that the fast path reproduces."""
    CALL_ARGUMENTS: ClassVar[Mapping[str, Any]] = {}
    """Arguments of every call of the processor, beside those that depend on the bounds."""
    HAS_PROCESSOR: ClassVar[bool] = True
    """``False`` for a rule that makes the pixels itself, in :meth:`make_tiles`."""

    source: ProcessorSource

    def __post_init__(self) -> None:
        known = self.list_options()
        if unknown := sorted(set(self.source.options) - set(known)):
            raise UsageError(
                f"options of the image processor of {self.source.folder} must be among {', '.join(known) or 'none'}, "
                f"got {list_names(unknown)}"
            )

    @property
    def config(self) -> TowerConfig:
        """The tower."""
        return self.source.config

    @property
    def settings(self) -> Settings:
        """Settings of the processor."""
        return self.source.settings

    @property
    def factor(self) -> int:
        """Side of the square of pixels of one token."""
        return self.config.patch.size * self.config.merge

    @abstractmethod
    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        """Computes the layout of an image whose size is within the limits."""

    @abstractmethod
    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        """Returns the settings in the form that transformers accepts, for loading and for calls."""

    def plan_video(self, frames: int, width: int, height: int, bounds: Bounds) -> ImageLayout:
        """Computes the layout of a video of ``frames`` frames whose size is within the limits."""
        raise UsageError(
            f"this tower takes no video: the {self.config.family} family encodes still images only; "
            "encode the frames one by one"
        )

    def list_options(self) -> Sequence[str]:
        """Returns the names of the supported options."""
        return self.OPTIONS

    def list_expected_attributes(self) -> Mapping[str, Any]:
        """Returns attributes that the processor must have, with their values."""
        return {"do_resize": True}

    def make_processor(self) -> Any:
        """Makes a processor for a checkpoint without a settings file; ``None``: transformers loads the file."""
        return None

    def is_supported(self, processor: Any) -> bool:
        """Returns whether :meth:`resize_tiles` covers the processor's settings."""
        return True

    def resize_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterable[NDArray[np.uint8]]:
        """Makes ``[height, width, 3]`` of every tile, as the processor has it before it rescales."""
        return (resize(array, layout.processed_size),)

    def make_tiles(self, array: NDArray[np.uint8], layout: ImageLayout) -> torch.Tensor:
        """Makes normalized tiles ``[tiles, channels, height, width]`` without a processor."""
        raise NotImplementedError

    def check_bounds(self, bounds: Bounds) -> None:
        """Raises :class:`~tritontower.errors.UsageError` for a bound that the rule does not support."""
        foreign = [name for name, value in bounds.items() if value is not None and name not in self.BOUNDS]
        if foreign:
            allowed = f"bounds may be {' and '.join(self.BOUNDS)}" if self.BOUNDS else "no bounds are allowed"
            raise UsageError(
                f"for the resizing rule of the {self.config.family} family {allowed}, got {list_names(foreign)}"
            )

    def plan_one_tile(
        self, original: tuple[int, int], planned: tuple[int, int], advice: str, temporal: int = 1
    ) -> ImageLayout:
        """Makes the layout of an image (or video) resized to the ``planned`` width and height, if within the limits."""
        self.check_planned(original, planned, 1, advice)
        side = self.config.patch.size
        return ImageLayout.of_one_tile((temporal, planned[1] // side, planned[0] // side), side)

    def check_planned(self, original: tuple[int, int], planned: tuple[int, int], tiles: int, advice: str) -> None:
        """Raises unless ``tiles`` images of the ``planned`` width and height are within the limits."""
        limit = self.source.limits.max_planned_pixels
        if planned[0] * planned[1] * tiles > limit:
            times = "" if tiles == 1 else f"{tiles} times "
            raise ImageTooLargeError(
                f"{original[0]} × {original[1]} pixels would be resized to {times}{planned[0]} × {planned[1]}, the "
                f"limit is {limit} pixels; {advice}, or pass Limits(max_planned_pixels=...)"
            )

    def check_grid(self, size: tuple[int, int]) -> Grid:
        """Returns the grid of tiles of ``size`` (width, height) pixels; raises unless the tower can process it."""
        patches, merge, side = self.config.num_patches, self.config.merge, self.config.patch.size
        rows, columns = size[1] // side, size[0] // side
        if (patches is not None and (rows != columns or rows * columns != patches)) or any(
            count < 1 or count % merge for count in (rows, columns)
        ):
            wanted = f"{patches} patches in a square" if patches is not None else f"multiples of {merge}"
            raise ProcessorError(
                f"the image processor of {self.source.folder} must make {wanted}, got {rows} × {columns} patches from "
                f"{size[0]} × {size[1]} pixels; the processor's file and config.json belong to different models"
            )
        return 1, rows, columns
