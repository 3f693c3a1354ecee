"""The only place that launches kernels and calls torch's libraries on a GPU.

:func:`launch` runs a kernel through Triton's own launch path, and :func:`call_library` an operation of torch, such as a
matmul by cuBLAS or a copy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a jitted ``kernel`` on ``grid``; ``options`` are named arguments, warps and stages.

    Triton launches on the current device: that of the first tensor becomes it.
    """
    first = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, **options)


def call_library(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Calls an operation of torch that writes to a tensor among its arguments."""
    function(*arguments, **options)


def allocate_workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory for a temporary result that the next launches of the same operation read."""
    return torch.empty(*shape, dtype=dtype, device=device)
