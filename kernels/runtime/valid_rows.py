"""Row counts of launches over padded buffers: planned rows, and valid rows.

A CUDA graph replays launches of one size over batches of many sizes.  It is captured for ``planned`` rows; the rows
after those of the current batch are padding, and the kernels read the number of valid rows from device memory.  An
operation with :class:`ValidRows` selects its configuration for ``planned`` rows, whatever its tensors hold, so that a
replayed and an eager launch are the same.  A tile that has only padding rows is filled with zeros, without computing.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ValidRows:
    """Planned and valid rows of one launch."""

    planned: int
    """Rows that the configuration is selected for."""
    count: torch.Tensor | None = None
    """``[1]`` int32 on the device: the number of valid rows; ``None``: all."""


def planned_rows(valid_rows: ValidRows | None, rows: int) -> int:
    """The number of rows that a launch over ``rows`` rows selects its configuration for."""
    return rows if valid_rows is None else valid_rows.planned


def get_valid_count(valid_rows: ValidRows | None, device: torch.device) -> torch.Tensor | None:
    """The tensor from which a kernel on ``device`` reads the number of valid rows; ``None`` if all are valid."""
    count = None if valid_rows is None else valid_rows.count
    if count is None:
        return None
    if count.dtype != torch.int32 or count.device != device:
        raise TypeError(f"valid_rows.count must be torch.int32 on {device}, got {count.dtype} on {count.device}")
    if count.numel() != 1:
        raise ValueError(f"valid_rows.count must be one number, got shape {tuple(count.shape)}")
    return count
