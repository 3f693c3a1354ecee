"""PixelNormalization: the arithmetic of transformers' ``rescale`` and ``normalize`` on uint8 pixels.

A value is ``(byte × factor − mean) / deviation``.  ``byte × factor`` is computed in fp64 and rounded to fp32, the rest in
fp32.  So there are 256 values per channel, in :attr:`PixelNormalization.table`.  A tower that takes uint8 pixels
(:mod:`tritontower.engine.uint8_graph`) has this arithmetic folded into its weights.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.kernels.gemm.patch_projection import fold_normalization

BYTES = 256
LARGEST_BYTE = np.float32(255)
CHUNK_ROWS = 128
"""Patches per step: they stay in a core's cache between the three operations."""


@dataclass(frozen=True)
class PixelNormalization:
    """Normalization of uint8 pixels to the values that a tower was trained on.

    Attributes:
        factor: multiplier of a byte, usually 1/255; 1 if nothing is rescaled.
        means: one per channel, of the rescaled values; 0 if nothing is normalized.
        deviations: one per channel, positive; 1 if nothing is normalized.
    """

    factor: float
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """``[channels, 256]``: the value of every byte."""
        rescaled = (np.arange(BYTES, dtype=np.float64) * self.factor).astype(np.float32)
        table: NDArray[np.float32] = (rescaled - self._means) / self._deviations
        return table

    @cached_property
    def _means(self) -> NDArray[np.float32]:
        return np.array(self.means, np.float32)[:, None]

    @cached_property
    def _deviations(self) -> NDArray[np.float32]:
        return np.array(self.deviations, np.float32)[:, None]

    @cached_property
    def _divides(self) -> bool:
        """fp32 division by 255 gives the table's values bit for bit, with vector instructions instead of look-ups."""
        divided = np.arange(BYTES, dtype=np.uint8) / LARGEST_BYTE
        return np.array_equal((divided - self._means) / self._deviations, self.table)

    def normalize(self, raw: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Writes normalized values of ``[rows, channels · n]``; ``out`` may have any row stride."""
        channels = len(self.means)
        per_channel = raw.shape[1] // channels
        shape = (-1, channels, per_channel)
        # As long as a row: numpy has an overhead for every run of values, which only long runs are worth.
        means, deviations = (values.repeat(per_channel) for values in (self._means, self._deviations))
        for start in range(0, len(raw), CHUNK_ROWS):
            taken, made = raw[start : start + CHUNK_ROWS], out[start : start + CHUNK_ROWS]
            if self._divides:
                np.copyto(made, taken)
                np.divide(made, LARGEST_BYTE, out=made)
                np.subtract(made, means, out=made)
                np.divide(made, deviations, out=made)
                continue
            taken, made = taken.reshape(shape), made.reshape(shape)
            for channel, values in enumerate(self.table):
                np.take(values, taken[:, channel], out=made[:, channel], mode="clip")

    def fold(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Folds the normalization into a patch projection's fp32 weight: see :func:`fold_normalization`."""
        return fold_normalization(weight, None, mean=self.means, std=self.deviations, rescale_factor=self.factor)
