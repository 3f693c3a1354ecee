"""How many rows a launch is planned for, and how many of them there are.

A captured CUDA graph replays launches of one size over packs of many sizes.  It is planned for ``planned`` rows, the rows
beyond those of the pack at hand are padding, and the device finds in ``live`` how many are not.  An operation that is
given an valid_rows chooses its configuration for ``planned`` rows, whatever its tensors hold, so that a replayed launch and
an eager one are the same launch; and where a whole tile of rows lies beyond ``live`` it writes zeros and computes nothing.
"""

from dataclasses import dataclass

import torch

__all__ = ["ValidRows", "live_rows", "planned_rows"]


@dataclass(frozen=True)
class ValidRows:
    """Rows of one launch."""

    planned: int
    """Rows that the configuration is chosen for."""
    live: torch.Tensor | None = None
    """``[1]`` int32 on the device: the rows that count; ``None``: all."""


def planned_rows(valid_rows: ValidRows | None, rows: int) -> int:
    """The rows that a launch over ``rows`` rows chooses its configuration for."""
    return rows if valid_rows is None else valid_rows.planned


def live_rows(valid_rows: ValidRows | None, device: torch.device) -> torch.Tensor | None:
    """What a kernel on ``device`` reads the rows that count from; ``None``: they all do.

    Raises:
        ValueError: ``valid_rows.live`` is not one number.
        TypeError: it is not int32, or lies on another device.
    """
    live = None if valid_rows is None else valid_rows.live
    if live is None:
        return None
    if live.dtype != torch.int32 or live.device != device:
        raise TypeError(f"valid_rows.live is {live.dtype} on {live.device}; it has to be torch.int32 on {device}")
    if live.numel() != 1:
        raise ValueError(f"valid_rows.live has shape {tuple(live.shape)}; it has to be one number, [1]")
    return live
