"""Shrunk until the longer side fits, then both sides rounded up to a token's: the rule of Pixtral and Mistral 3.

The rule of ``transformers.models.pixtral.image_processing_pixtral.get_resize_output_image_size``.  A tower that joins
patches needs sides that its blocks divide, so the processor is told the side of a block as that of its patch, as
``PixtralProcessor`` tells it; the file alone says the side of a patch, with which rows would be lost.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tritontower.batch.layout import ImageLayout
from tritontower.config import TowerConfig
from tritontower.errors import AspectRatioError, ProcessorError
from tritontower.preprocessing.base import PIXEL_OPTIONS, Bounds, Preprocessor
from tritontower.preprocessing.processor_config import Settings

__all__ = ["LongestEdge", "checked_edge", "shrunk_to_fit"]

CLASS_SIZE = {"longest_edge": 1024}
"""What ``PixtralImageProcessor`` takes where its file says nothing."""

WITHOUT_FILE = "settings without a file"
"""Stands for a file's name in messages where there is none."""


def shrunk_to_fit(width: int, height: int, largest: tuple[int, int], factor: int) -> tuple[int, int]:
    """Width and height, pixels, to which an image is resized: multiples of ``factor``.

    An image that is wider or higher than ``largest`` (width, height) is shrunk to fit, both sides rounded down; then
    both are rounded up to ``factor``, which may pass ``largest`` again.

    Raises:
        AspectRatioError: the shorter side would be left without a pixel.
    """
    ratio = max(height / largest[1], width / largest[0])
    if ratio > 1:
        shrunk = math.floor(width / ratio), math.floor(height / ratio)
        if min(shrunk) < 1:
            raise AspectRatioError(
                f"{width} × {height} pixels shrunk to {largest[0]} × {largest[1]} has a side of less than one pixel; "
                "crop it, or raise longest_edge"
            )
        width, height = shrunk
    return -(-width // factor) * factor, -(-height // factor) * factor


def checked_edge(edge: int, config: TowerConfig) -> int:
    """``edge`` if an image of one token can be as large.

    Raises:
        ProcessorError: it cannot.
    """
    factor = config.patch.size * config.merge
    if edge < factor:
        raise ProcessorError(
            f"longest_edge = {edge} is less than the side of one token, {factor} pixels; allowed: at least {factor}"
        )
    return edge


@dataclass(frozen=True, kw_only=True)
class LongestEdge(Preprocessor):
    """One tile, its sides multiples of a token's, and no larger than the longest edge.

    Attributes:
        without_file: settings for a checkpoint that ships no processor's file, ``size`` and ``patch_size`` at least; a
            file that is there counts instead.  Everything else is then as ``PixtralImageProcessor`` has it.
    """

    BOUNDS: ClassVar[tuple[str, ...]] = ("longest_edge",)
    WITHOUT_BOUNDS: ClassVar[str] = "it shrinks an image until its longer side fits, whatever its area"
    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "size")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil",
    )

    without_file: Mapping[str, Any] | None = None

    @cached_property
    def settings(self) -> Settings:
        """What the processor's file or the given processor says, else ``without_file``; ``options`` in place of it."""
        try:
            return super().settings
        except ProcessorError:
            if self.given is not None or self.without_file is None:
                raise
            return Settings.completed(self.without_file, WITHOUT_FILE).changed(self.options)

    def _load(self) -> Any:
        if self.settings.source != WITHOUT_FILE:
            return super()._load()
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        return PixtralImageProcessorPil(**self._arguments(Bounds()))

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Greatest width and height that the checkpoint allows, before they are rounded up to a token's; pixels.

        Raises:
            ConfigError: a ``size`` that is none of the known spellings.
            ProcessorError: a ``patch_size`` of another tower.
        """
        self._check_patch_size()
        size = self.settings.size("size", (("longest_edge",), ("height", "width"), ("side",))) or CLASS_SIZE
        if "width" in size:
            return size["width"], size["height"]
        edge = size["longest_edge"] if "longest_edge" in size else size["side"]
        return edge, edge

    def _check_patch_size(self) -> None:
        size = self.settings.size("patch_size", (("height", "width"), ("side",)))
        sides = set(size.values()) if size else {self.config.patch.size}
        if not (sides == {self.config.patch.size} or sides == {self.factor}):
            raise ProcessorError(
                f"the image processor of {self.folder} has patch_size = {sorted(sides)}, but the tower needs "
                f"{self.config.patch.size}; the processor's file and config.json belong to different models"
            )

    def _bounded(self, bounds: Bounds) -> tuple[int, int]:
        width, height = self.largest
        return (
            checked_edge(self._whole(bounds, "longest_edge", width), self.config),
            checked_edge(self._whole(bounds, "longest_edge", height), self.config),
        )

    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        size = shrunk_to_fit(width, height, self._bounded(bounds), self.factor)
        self._check_planned((width, height), size, 1, "lower longest_edge")
        side = self.config.patch.size
        return ImageLayout.of_one_tile((1, size[1] // side, size[0] // side), side)

    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        width, height = self._bounded(bounds)
        return {
            "size": {"longest_edge": width} if width == height else {"height": height, "width": width},
            "patch_size": {"height": self.factor, "width": self.factor},
        }

    def _is_usual(self) -> bool:
        return not getattr(self.processor, "do_center_crop", None)
