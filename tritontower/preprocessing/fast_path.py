"""Makes transformers' pixels without transformers' arithmetic, bit for bit.

transformers makes one fp64 image, two fp32 images and a transposed copy before it cuts patches.  Here Pillow resizes, as
in transformers, and the resized bytes are cut into patches a few rows at a time and normalized in place.  This is done
only for known processors and settings, and only after a self-check on a small image.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from tritontower.batch.layout import ImageLayout
from tritontower.batch.normalization import PixelNormalization

from .images.buffers import allocate_array
from .patchify import cut_bytes, cut_values
from .pillow_resize import FILTERS, Bytes, resize_image
from .resize.rule import ResizeRule
from .threads import Spread, run_serially


def allocate_pixels(patches: int, inner: int, *, raw: bool = False) -> torch.Tensor:
    """Allocates ``[patches, inner]``, fp32 or, with ``raw``, uint8."""
    return torch.from_numpy(allocate_array((patches, inner), np.uint8 if raw else np.float32))


def make_probe() -> Bytes:
    """Makes ``[31, 45, 3]`` of deterministic noise for the self-check."""
    return np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)


@dataclass(frozen=True)
class FastPath:
    """Makes the pixels of one processor for one resizing rule.

    Attributes:
        rule: makes the tiles.
        resample: Pillow's number of the resampling filter.
        normalization: how bytes are normalized.
    """

    rule: ResizeRule
    resample: int
    normalization: PixelNormalization

    @classmethod
    def from_processor(cls, rule: ResizeRule, processor: Any) -> "FastPath | None":
        """Reads the settings of an image processor of transformers.

        Returns ``None`` for a class that is not listed in the rule, for methods replaced on the object, and for
        settings that transformers may reject.  The result still needs a self-check.
        """
        kind, options = type(processor), rule.source.options
        if f"{kind.__module__}.{kind.__qualname__}" not in rule.PROCESSORS:
            return None
        if any(callable(getattr(kind, name, None)) for name in vars(processor)):
            return None
        resample = _get_setting(processor, options, "resample")
        if not isinstance(resample, int) or isinstance(resample, bool) or resample not in FILTERS:
            return None
        normalization = _read_normalization(processor, options, rule.config.patch.channels)
        if normalization is None or not rule.is_supported(processor):
            return None
        return cls(rule, int(resample), normalization)

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


def _get_setting(processor: Any, options: Mapping[str, Any], name: str) -> Any:
    return options[name] if name in options else getattr(processor, name, None)


def _read_normalization(processor: Any, options: Mapping[str, Any], channels: int) -> PixelNormalization | None:
    get = partial(_get_setting, processor, options)
    rescales, normalizes, factor = get("do_rescale"), get("do_normalize"), get("rescale_factor")
    if not isinstance(rescales, bool) or not isinstance(normalizes, bool) or (rescales and not _is_number(factor)):
        return None
    means: tuple[float, ...] | None = (0.0,) * channels
    deviations: tuple[float, ...] | None = (1.0,) * channels
    if normalizes:
        means, deviations = (_per_channel(get(name), channels) for name in ("image_mean", "image_std"))
    if means is None or deviations is None or not min(deviations) > 0:
        return None
    return PixelNormalization(float(factor) if rescales else 1.0, means, deviations)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    values: Collection[Any] = [value] * channels if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(_is_number, values)):
        return None
    return tuple(map(float, values))
