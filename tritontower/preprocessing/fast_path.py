"""Makes transformers' pixels without transformers' arithmetic, bit for bit.

transformers makes one fp64 image, two fp32 images and a transposed copy before it cuts patches.  Here Pillow resizes, as
in transformers, and the resized bytes are cut into patches a few rows at a time and normalized in place.  This is done
only for known processors and settings, and only after a self-check on a small image.
"""

from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from tritontower.batch.layout import ImageLayout
from tritontower.batch.normalization import PixelNormalization
from tritontower.errors import ImageError, ProcessorError

from .bounds import Bounds
from .hf_processor import HFProcessor
from .images.buffers import allocate_array
from .patchify import cut_bytes, cut_values
from .pillow_resize import FILTERS, Bytes, resize_image
from .resize.rule import ResizeRule
from .threads import Spread, run_serially


def allocate_pixels(patches: int, inner: int, *, raw: bool = False) -> torch.Tensor:
    """Allocates ``[patches, inner]``, fp32 or, with ``raw``, uint8."""
    return torch.from_numpy(allocate_array((patches, inner), np.uint8 if raw else np.float32))


@dataclass(frozen=True)
class FastPath:
    """Makes the pixels of one processor for one resizing rule; ``resample`` is Pillow's number of the filter."""

    rule: ResizeRule
    resample: int
    normalization: PixelNormalization

    @classmethod
    def from_processor(cls, rule: ResizeRule, processor: Any) -> "FastPath | None":
        """Reads the settings of an image processor of transformers.

        Returns ``None`` for a class that is not listed in the rule, for methods replaced on the object, and for
        settings that transformers may reject.  The result still needs a self-check.
        """
        kind = type(processor)
        if f"{kind.__module__}.{kind.__qualname__}" not in rule.PROCESSORS:
            return None
        if any(callable(getattr(kind, name, None)) for name in vars(processor)):
            return None
        settings = {**vars(processor), **rule.source.options}
        resample = settings.get("resample")
        if not isinstance(resample, int) or isinstance(resample, bool) or resample not in FILTERS:
            return None
        normalization = _read_normalization(settings, rule.config.patch.channels)
        if normalization is None or not rule.is_supported(processor):
            return None
        return cls(rule, int(resample), normalization)

    def passes_self_check(self, hf_processor: HFProcessor) -> bool:
        """Returns whether the processor makes the same pixels of a small image of noise."""
        probe = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
        try:
            layout = self.rule.plan(probe.shape[1], probe.shape[0], Bounds())
            ours, theirs = (allocate_pixels(layout.patches, self.rule.config.patch.still_inner) for _ in range(2))
            hf_processor.fill(theirs, probe, layout, self.rule.list_arguments(Bounds()))
        except (ImageError, ProcessorError):
            # The images themselves will raise the same error.
            return False
        self.fill(ours, probe, layout)
        return torch.equal(ours, theirs)

    def fill(self, out: torch.Tensor, array: Bytes, layout: ImageLayout, spread: Spread = run_serially) -> None:
        """Writes the patches of one image: bytes if ``out`` is uint8, else normalized fp32."""
        patch, merge = self.rule.config.patch.size, self.rule.config.merge
        resize = partial(resize_image, resample=self.resample, spread=spread)
        counts = [t * h * w for t, h, w in layout.tiles]
        for tile, rows in zip(self.rule.resize_tiles(array, layout, resize), out.split(counts), strict=True):
            if rows.dtype == torch.uint8:
                cut_bytes(tile, patch, merge, rows.numpy())
            else:
                cut_values(tile, patch, merge, self.normalization, rows.numpy(), spread)


def _read_normalization(settings: dict[str, Any], channels: int) -> PixelNormalization | None:
    rescales, normalizes = settings.get("do_rescale"), settings.get("do_normalize")
    if not isinstance(rescales, bool) or not isinstance(normalizes, bool):
        return None
    factor = _read_numbers(settings.get("rescale_factor") if rescales else 1.0, 1)
    means = _read_numbers(settings.get("image_mean") if normalizes else 0.0, channels)
    deviations = _read_numbers(settings.get("image_std") if normalizes else 1.0, channels)
    if not factor or not means or not deviations or not min(deviations) > 0:
        return None
    return PixelNormalization(factor[0], means, deviations)


def _read_numbers(value: Any, count: int) -> tuple[float, ...]:
    """Returns ``count`` numbers, repeating a single one; empty for anything else."""
    values = value if isinstance(value, (list, tuple)) else [value] * count
    is_valid = len(values) == count and all(isinstance(item, Real) and not isinstance(item, bool) for item in values)
    return tuple(map(float, values)) if is_valid else ()
