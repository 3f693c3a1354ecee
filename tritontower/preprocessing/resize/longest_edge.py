"""Shrinks until the longer side fits, then rounds both sides up to a token's: the rule of Pixtral and Mistral 3.

The rule of ``transformers.models.pixtral.image_processing_pixtral.get_resize_output_image_size``.  A tower that merges
patches needs sides that its merge blocks divide.  So the side of a block is passed to the processor as that of its
patch, as ``PixtralProcessor`` does; with the side in the file, rows would be lost.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tritontower.batch.layout import ImageLayout
from tritontower.errors import AspectRatioError, ProcessorError
from tritontower.kernels.runtime.checks import align_up
from tritontower.preprocessing.bounds import Bounds, read_bound
from tritontower.preprocessing.processor_config import PIXEL_OPTIONS, Settings

from .rule import ResizeRule

WITHOUT_FILE = "settings without a file"
"""Replaces the name of a missing file in messages."""


def shrink_to_fit(width: int, height: int, largest: tuple[int, int], factor: int) -> tuple[int, int]:
    """Computes the width and height of a resized image: multiples of ``factor``.

    An image that is wider or higher than ``largest`` (width, height) is shrunk to fit, both sides rounded down.  Then
    both are rounded up to ``factor``, which may exceed ``largest`` again.
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
    return align_up(width, factor), align_up(height, factor)


def check_edge(edge: int, factor: int) -> int:
    """Returns ``edge`` if an image of one token, of side ``factor``, fits."""
    if edge < factor:
        raise ProcessorError(f"longest_edge must be at least {factor}, the side of one token, got {edge}")
    return edge


@dataclass(frozen=True, kw_only=True)
class LongestEdge(ResizeRule):
    """Makes one tile, whose sides are multiples of a token's and at most the longest edge."""

    BOUNDS: ClassVar[tuple[str, ...]] = ("longest_edge",)
    OPTIONS: ClassVar[tuple[str, ...]] = (*PIXEL_OPTIONS, "size")
    PROCESSORS: ClassVar[Collection[str]] = (
        "transformers.models.pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil",
    )

    without_file: Mapping[str, Any] | None = None
    """Settings for a checkpoint without a processor's file; everything else is as in ``PixtralImageProcessor``."""

    @cached_property
    def settings(self) -> Settings:
        """Settings of the processor's file or of the given processor, else ``without_file``."""
        try:
            return self.source.settings
        except ProcessorError:
            if self.source.given is not None or self.without_file is None:
                raise
            return Settings.with_defaults(self.without_file, WITHOUT_FILE).override(self.source.options)

    def make_processor(self) -> Any:
        if self.settings.source != WITHOUT_FILE:
            return None
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        return PixtralImageProcessorPil(**self.list_arguments(Bounds()))

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Greatest width and height in the checkpoint, before rounding up to a token's; pixels."""
        patch = self.settings.read_size("patch_size", (("height", "width"), ("side",)))
        if patch and set(patch.values()) not in ({self.config.patch.size}, {self.factor}):
            raise ProcessorError(
                f"patch_size of the image processor of {self.source.folder} must be {self.config.patch.size} for this "
                f"tower, got {sorted(set(patch.values()))}; its file and config.json belong to different models"
            )
        size = self.settings.read_size("size", (("longest_edge",), ("height", "width"), ("side",)))
        if size is None:
            return 1024, 1024  # the default of PixtralImageProcessor
        if "width" in size:
            return size["width"], size["height"]
        (edge,) = size.values()
        return edge, edge

    def _bound_size(self, bounds: Bounds) -> tuple[int, int]:
        width, height = (check_edge(read_bound(bounds, "longest_edge", side), self.factor) for side in self.largest)
        return width, height

    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        size = shrink_to_fit(width, height, self._bound_size(bounds), self.factor)
        return self.plan_one_tile((width, height), size, "lower longest_edge")

    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        width, height = self._bound_size(bounds)
        return {
            "size": {"longest_edge": width} if width == height else {"height": height, "width": width},
            "patch_size": {"height": self.factor, "width": self.factor},
        }

    def is_supported(self, processor: Any) -> bool:
        return not getattr(processor, "do_center_crop", None)
