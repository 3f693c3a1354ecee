"""How many rows a launch is planned for, and how many of them there are.

A captured CUDA graph replays launches of one size over packs of many sizes.  It is planned for ``planned`` rows, the rows
beyond those of the pack at hand are padding, and the device finds in ``live`` how many are not.  An operation that is
given an extent chooses its configuration for ``planned`` rows, whatever its tensors hold, so that a replayed launch and
an eager one are the same launch; and where a whole tile of rows lies beyond ``live`` it writes zeros and computes nothing.
"""

from dataclasses import dataclass

import torch

__all__ = ["Extent"]


@dataclass(frozen=True)
class Extent:
    """Rows of one launch."""

    planned: int
    """Rows that the configuration is chosen for."""
    live: torch.Tensor | None = None
    """``[1]`` int32 on the device: the rows that count; ``None``: all."""
