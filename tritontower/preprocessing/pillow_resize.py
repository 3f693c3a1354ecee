"""Resizes and crops bytes as transformers does, by Pillow, in pieces that stay in a cache and threads can share."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tritontower.kernels.runtime.checks import ceil_div

from .images.buffers import allocate_array
from .threads import Spread, run_serially

Bytes = NDArray[np.uint8]
Size = tuple[int, int]
"""Width and height."""
Order = Callable[[Size, Size], tuple[int, ...]]
"""Old size, new size → axes of ``[height, width, channels]`` in the order in which they are resized."""

FILTERS = frozenset(int(filter) for filter in Image.Resampling)
PIECE = 2**18
"""Pixels per call of Pillow.  Pillow reuses its memory for small pieces, and they stay in a cache.  For whole images it
allocates new memory every time, which cost a sixth of the time at 2048 × 2048."""


def resize_image(array: Bytes, size: Size, resample: int, spread: Spread = run_serially) -> Bytes:
    """Resizes ``[height, width, channels]`` to ``size``; an array of that size is returned as it is."""
    if array.shape[1::-1] == size:
        return array
    if max(array.shape[0] * array.shape[1], size[0] * size[1]) <= PIECE:
        return resize_by_pillow(array, size, resample)
    order = find_axis_order(resample)
    if order is None:
        return resize_by_pillow(array, size, resample)
    for axis in order(array.shape[1::-1], size):
        array = _resize_axis(axis, array, size[1 - axis], resample, spread)
    return array


def resize_by_pillow(array: Bytes, size: Size, resample: int) -> Bytes:
    """Resizes a whole array in one call of Pillow."""
    return np.asarray(Image.fromarray(array).resize(size, resample=resample))


def crop_center(array: Bytes, height: int, width: int) -> Bytes:
    """Crops the middle as ``transformers.image_transforms.center_crop`` does, with black outside the image."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    if top < 0 or left < 0:
        padded = np.zeros((max(height, array.shape[0]), max(width, array.shape[1]), array.shape[2]), np.uint8)
        # Half of the padding goes before the image, rounded up, and the crop moves with it.
        down, right = ceil_div(padded.shape[0] - array.shape[0], 2), ceil_div(padded.shape[1] - array.shape[1], 2)
        padded[down : down + array.shape[0], right : right + array.shape[1]] = array
        array, top, left = padded, top + down, left + right
    return array[top : top + height, left : left + width]


@lru_cache
def find_axis_order(resample: int) -> Order | None:
    """Returns the order in which Pillow resizes the axes, rounding to bytes between; ``None`` if none reproduces it."""
    generator = np.random.default_rng(0)
    # Around the limit between the two orders, and elsewhere.
    limits = [((24, 40), (24 - loss, 40 - 2 * loss + more)) for loss in (-9, 0, 1, 5, 12) for more in (-1, 0, 1)]
    sizes = [*limits, *((tuple(a), tuple(b)) for a, b in generator.integers(1, 50, (40, 2, 2)).tolist())]
    for order in (_width_first, _larger_loss_first):
        for old, new in sizes:
            image = resized = generator.integers(0, 256, (old[1], old[0], 3), np.uint8)
            for axis in order(old, new):
                resized = _resize_axis(axis, resized, new[1 - axis], resample, run_serially)
            if not np.array_equal(resized, resize_by_pillow(image, new, resample)):
                break
        else:
            return order
    return None


def _width_first(old: Size, new: Size) -> tuple[int, ...]:
    """The order of Pillow up to version 12."""
    return tuple(axis for axis in (1, 0) if old[1 - axis] != new[1 - axis])


def _larger_loss_first(old: Size, new: Size) -> tuple[int, ...]:
    """The order of Pillow 13: height first where it loses more than twice as many pixels as the width."""
    axes = _width_first(old, new)
    lost_columns, lost_rows = (before - after for before, after in zip(old, new, strict=True))
    return axes[::-1] if lost_rows > max(0, 2 * lost_columns) else axes


def _resize_axis(axis: int, array: Bytes, length: int, resample: int, spread: Spread) -> Bytes:
    """Resizes rows (axis 0) or columns (axis 1) to ``length``, piece by piece along the other axis."""
    shape = (length, *array.shape[1:]) if axis == 0 else (len(array), length, *array.shape[2:])
    resized = allocate_array(shape, np.uint8)
    step = max(1, PIECE // max(length, array.shape[axis]))

    def resize_part(part: slice) -> None:
        for first in range(part.start, part.stop, step):
            last = min(first + step, part.stop)
            piece = (slice(None), slice(first, last)) if axis == 0 else (slice(first, last), slice(None))
            size = (last - first, length) if axis == 0 else (length, last - first)
            resized[piece] = resize_by_pillow(array[piece], size, resample)

    spread(resize_part, array.shape[1 - axis])
    return resized
