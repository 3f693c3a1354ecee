"""Uninitialized numpy arrays in huge pages."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritontower.kernels.runtime.checks import align_up

HUGE_PAGE = 2**21
"""Bytes."""


def allocate_array(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Allocates an uninitialized array, aligned to huge pages if it is large.

    With ordinary pages, the first write of 2.4 MB took four times as long, that of 50 MB six times.  numpy requests huge
    pages from 4 MiB on; the part that is never written takes address space and no memory.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < HUGE_PAGE:
        return np.empty(shape, dtype)
    memory = np.empty(align_up(size, HUGE_PAGE) + HUGE_PAGE, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + size].view(dtype).reshape(shape)
