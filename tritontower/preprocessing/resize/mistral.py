"""Makes the pixels of Mistral's own library, for checkpoints in Mistral's own format.

``mistral_common`` rounds the shrunk sides to the nearest pixel where transformers rounds down.  It resamples in fp32 with
the cubic convolution of OpenCV (``INTER_CUBIC``): four samples, whatever the scale, and no clipping.  Without the wider
filter that Pillow takes for shrinking, the pixels differ by several levels of 255 on average.  Neither library nor a
settings file is needed: the longest edge is in ``params.json``, the rest is fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.layout import ImageLayout
from tritontower.errors import UsageError
from tritontower.kernels.runtime.checks import align_up
from tritontower.preprocessing.bounds import Bounds, read_bound

from .longest_edge import check_edge
from .rule import ResizeRule

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
SHARPNESS = -0.75
"""The free parameter of cubic convolution (Keys 1981), as OpenCV sets it."""


def round_to_fit(width: int, height: int, longest_edge: int, factor: int) -> tuple[int, int]:
    """Computes the width and height of a resized image: multiples of ``factor``.

    An image with a side above ``longest_edge`` is shrunk, both sides rounded to the nearest pixel (ties to even) and at
    least 1.  Then both are rounded up to ``factor``.
    """
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return align_up(width, factor), align_up(height, factor)


def cubic_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the four samples of ``source`` that make each of ``target`` pixels, and their weights: ``[4, target]``."""
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


def _resample(image: torch.Tensor, target: int, axis: int) -> torch.Tensor:
    index, weights = cubic_taps(image.shape[axis], target)
    shape = [1] * image.ndim
    shape[axis] = target
    total = image.new_zeros((*image.shape[:axis], target, *image.shape[axis + 1 :]), dtype=torch.float32)
    for tap, weight in zip(index, weights.view(4, *shape), strict=True):
        total.addcmul_(image.index_select(axis, tap).float(), weight)
    return total


@dataclass(frozen=True, kw_only=True)
class MistralResize(ResizeRule):
    """Makes one tile, resized and normalized as in ``mistral_common``."""

    BOUNDS: ClassVar[tuple[str, ...]] = ("longest_edge",)
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    HAS_PROCESSOR: ClassVar[bool] = False

    longest_edge: int
    """Greatest side before it is rounded up to a token's, pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source.given is not None:
            raise UsageError(
                "Mistral's own preprocessing is done without a processor; leave `processor` out, or choose the "
                "preprocessing of transformers"
            )

    def plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        edge = check_edge(read_bound(bounds, "longest_edge", self.longest_edge), self.factor)
        size = round_to_fit(width, height, edge, self.factor)
        return self.plan_one_tile((width, height), size, "lower longest_edge")

    def list_arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        return {}

    def make_tiles(self, array: NDArray[np.uint8], layout: ImageLayout) -> torch.Tensor:
        width, height = layout.processed_size
        image = torch.from_numpy(array.copy())  # torch has no read-only tensors
        image = _resample(_resample(image, height, 0), width, 1)
        # The divisions of mistral_common in the same order: multiplying by the reciprocal rounds differently.
        normalized = (image / 255.0 - image.new_tensor(MEAN)) / image.new_tensor(DEVIATION)
        return normalized.permute(2, 0, 1)[None]
