"""The pixels of Mistral's own library instead of those of transformers, for checkpoints in Mistral's own format.

``mistral_common`` rounds the shrunk sides to the nearest pixel where transformers rounds down, and resamples in fp32
with the cubic convolution of OpenCV (``INTER_CUBIC``): four samples, whatever the scale, and no clipping.  Without the
wider filter that Pillow takes for shrinking, the pixels differ by several levels of 255 on average.  Neither library is
needed here, nor any file: the longest edge stands in ``params.json``, the rest is fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from tritontower.batch.layout import ImageLayout
from tritontower.errors import UsageError
from tritontower.preprocessing.base import Bounds, Preprocessor
from tritontower.preprocessing.images.image import CanonicalImage

from .longest_edge import checked_edge

__all__ = ["MistralResize", "cubic_taps", "rounded_to_fit"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
SHARPNESS = -0.75
"""The free parameter of cubic convolution (Keys 1981), as OpenCV sets it."""


def rounded_to_fit(width: int, height: int, longest_edge: int, factor: int) -> tuple[int, int]:
    """Width and height, pixels, to which an image is resized: multiples of ``factor``.

    An image with a side above ``longest_edge`` is shrunk, both sides rounded to the nearest pixel (to the even one on
    ties) and at least one; then both are rounded up to ``factor``.
    """
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return -(-width // factor) * factor, -(-height // factor) * factor


def cubic_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples of a side make each sample of the resized side, and how much each counts.

    Args:
        source: samples that there are.
        target: samples that there shall be.

    Returns:
        ``[4, target]`` int64, beyond the ends the outermost sample, and ``[4, target]`` fp32.
    """
    # In fp32 a coordinate near 4000 would be off by more than a ten-thousandth of a pixel, and the weights with it.
    place = (torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * (source / target) - 0.5
    first = place.floor()
    x, a = place - first, SHARPNESS
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    mirrored = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) ** 2 + 1
    outer = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    weights = torch.stack((outer, inner, mirrored, 1 - outer - inner - mirrored))
    index = (first.long() + torch.arange(-1, 3, device="cpu")[:, None]).clamp_(0, source - 1)
    return index, weights.float()


def _resampled(image: torch.Tensor, target: int, axis: int) -> torch.Tensor:
    """``image`` with ``axis`` resized to ``target`` samples, fp32."""
    index, weights = cubic_taps(image.shape[axis], target)
    shape = [1] * image.ndim
    shape[axis] = target
    total = image.new_zeros((*image.shape[:axis], target, *image.shape[axis + 1 :]), dtype=torch.float32)
    for tap, weight in zip(index, weights.view(4, *shape), strict=True):
        total.addcmul_(image.index_select(axis, tap).float(), weight)
    return total


@dataclass(frozen=True, kw_only=True)
class MistralResize(Preprocessor):
    """One tile, resized and normalized as ``mistral_common`` does.

    Attributes:
        longest_edge: greatest side before it is rounded up to a token's, pixels.
    """

    BOUNDS: ClassVar[tuple[str, ...]] = ("longest_edge",)
    WITHOUT_BOUNDS: ClassVar[str] = "it shrinks an image until its longer side fits, whatever its area"
    OPTIONS: ClassVar[tuple[str, ...]] = ()

    longest_edge: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given is not None:
            raise UsageError(
                "Mistral's own preprocessing is done without a processor; leave `processor` out, or choose the "
                "preprocessing of transformers"
            )

    @cached_property
    def processor(self) -> Any:
        """There is none; raises :class:`~tritontower.errors.UsageError`."""
        raise UsageError("Mistral's own preprocessing has no image processor of transformers")

    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        edge = checked_edge(self._whole(bounds, "longest_edge", self.longest_edge), self.config)
        size = rounded_to_fit(width, height, edge, self.factor)
        self._check_planned((width, height), size, 1, "lower longest_edge")
        side = self.config.patch.size
        return ImageLayout.of_one_tile((1, size[1] // side, size[0] // side), side)

    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        return {}

    def _tiles(self, decoded: CanonicalImage, bounds: Bounds) -> torch.Tensor:
        width, height = self._plan(decoded.width, decoded.height, bounds).processed_size
        image = torch.from_numpy(decoded.array.copy())  # torch has no tensors that are read-only
        image = _resampled(_resampled(image, height, 0), width, 1)
        # The same divisions in the same order as there: a product with the reciprocal rounds differently.
        normalized = (image / 255.0 - image.new_tensor(MEAN)) / image.new_tensor(DEVIATION)
        return normalized.permute(2, 0, 1)[None]
