"""transformers' pixels without transformers' arithmetic: resized by Pillow, as there, and cut while they are bytes.

transformers makes an image of fp64, two of fp32 and a copy in another order before there are patches; here the resized
bytes are cut into rows of patches a few rows at a time, which are then rescaled and normalized where they lie.  The
values are the same, bit for bit.  This is done for the processors and settings that are known to do nothing else; for
all others transformers is asked.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tritontower.batch.normalization import PixelNormalization, fresh

__all__ = [
    "FastPath",
    "Spread",
    "alone",
    "cropped",
    "cut_bytes",
    "cut_values",
    "fast_path_of",
    "pixel_matrix",
    "probe_image",
    "resized",
    "resizing_passes",
    "spread_over_threads",
]

Bytes = NDArray[np.uint8]
FILTERS = frozenset(int(filter) for filter in Image.Resampling)
WORTH_THREADS = 2**18
"""Pixels of an image from which on a second thread saves more than starting it costs."""
MOST_THREADS = 4
"""Threads for one image: more would wait for memory, and for each other where Pillow holds Python's lock."""

PIECE = 2**18
"""Pixels that Pillow is given at a time.  What it takes for them is memory that it had before, and stays in a cache; for
whole images it takes new memory every time, which cost a sixth of the time at 2048 × 2048."""

Spread = Callable[[Callable[[slice], None], int], None]
"""Has a function work through so many things of a kind, part by part."""


@dataclass(frozen=True)
class FastPath:
    """What decides about a processor's pixels beside their size.

    Attributes:
        resample: the filter with which Pillow resizes, as it numbers them.
        rescaling: what becomes of the bytes.
    """

    resample: int
    rescaling: PixelNormalization


def fast_path_of(processor: Any, known: Collection[str], options: Mapping[str, Any], channels: int) -> FastPath | None:
    """How to make the pixels of ``processor`` without it.

    Args:
        processor: an image processor of transformers.
        known: full names of the classes that the rule has looked at.
        options: settings in place of the processor's own.
        channels: channels of an image.

    Returns:
        ``None`` for another class, for methods replaced on the object, and for settings that transformers may refuse.
    """
    kind = type(processor)
    if f"{kind.__module__}.{kind.__qualname__}" not in known:
        return None
    if any(callable(getattr(kind, name, None)) for name in vars(processor)):
        return None

    def setting(name: str) -> Any:
        return options[name] if name in options else getattr(processor, name, None)

    switches = [setting(name) for name in ("do_rescale", "do_normalize")]
    resample, factor = setting("resample"), setting("rescale_factor")
    if not all(isinstance(switch, bool) for switch in switches) or isinstance(resample, bool):
        return None
    if not isinstance(resample, int) or resample not in FILTERS:
        return None
    rescales, normalizes = switches
    if rescales and not _is_number(factor):
        return None
    means, deviations = (0.0,) * channels, (1.0,) * channels
    if normalizes:
        found = [_per_channel(setting(name), channels) for name in ("image_mean", "image_std")]
        if found[0] is None or found[1] is None or not min(found[1]) > 0:
            return None
        means, deviations = found[0], found[1]
    return FastPath(int(resample), PixelNormalization(float(factor) if rescales else 1.0, means, deviations))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    values = [value] * channels if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(_is_number, values)):
        return None
    return tuple(map(float, values))


def probe_image() -> Bytes:
    """``[31, 45, 3]``: noise, the same every time, on which a fast_path has to prove itself."""
    return np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)


def pixel_matrix(patches: int, inner: int, raw: bool = False) -> torch.Tensor:
    """``[patches, inner]`` fp32 or, ``raw``, uint8, with anything in it."""
    return torch.from_numpy(fresh((patches, inner), np.uint8 if raw else np.float32))


def alone(work: Callable[[slice], None], count: int) -> None:
    """All parts at once, in the caller's thread."""
    work(slice(0, count))


@contextmanager
def spread_over_threads(pixels: int, beside: Callable[[], object] | None = None) -> Iterator[Spread]:
    """A part for each of a few threads, for an image of so many pixels; one part where that is not worth it.

    As many as torch may use, the caller's included, but no more than :data:`MOST_THREADS`.

    Args:
        pixels: how large the image is, before or after it is resized.
        beside: what else there is to do for it, in a thread of the same, over when the context ends.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    if threads < 2 or pixels < WORTH_THREADS:
        yield alone
        if beside is not None:
            beside()
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="tritontower-image") as pool:

        def spread(work: Callable[[slice], None], count: int) -> None:
            ends = [count * part // threads for part in range(threads + 1)]
            first, *others = (slice(*ends) for ends in pairwise(ends) if ends[0] < ends[1])
            coming = [pool.submit(work, part) for part in others]
            work(first)
            for future in coming:
                future.result()

        other = None if beside is None else pool.submit(beside)
        yield spread
        if other is not None:
            other.result()


def resized(array: Bytes, size: tuple[int, int], resample: int, spread: Spread = alone) -> Bytes:
    """``array`` ``[height, width, 3]`` at ``size`` (width, height), as transformers resizes it; itself if it has it."""
    if array.shape[1::-1] == size:
        return array
    if max(array.size // array.shape[2], size[0] * size[1]) <= PIECE:
        return _by_pillow(array, size, resample)
    passes = resizing_passes(array.shape[1::-1], size, resample)
    if passes is None:
        made = fresh((size[1], size[0], array.shape[2]), np.uint8)

        def resize_channels(part: slice) -> None:
            for channel in range(part.start, part.stop):
                made[..., channel] = _by_pillow(np.ascontiguousarray(array[..., channel]), size, resample)

        spread(resize_channels, array.shape[2])
        return made
    for axis in passes:
        array = _resized_along(axis, array, size[1 - axis], resample, spread)
    return array


def _by_pillow(array: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    return np.asarray(Image.fromarray(array).resize(size, resample=resample))


def _resized_along(axis: int, array: Bytes, length: int, resample: int, spread: Spread) -> Bytes:
    """``array`` with ``length`` rows (``axis`` 0) or columns (``axis`` 1), piece by piece of the others."""
    made = fresh((length, *array.shape[1:]) if axis == 0 else (len(array), length, *array.shape[2:]), np.uint8)

    step = max(1, PIECE // max(length, array.shape[axis]))

    def resize_part(part: slice) -> None:
        for first in range(part.start, part.stop, step):
            last = min(first + step, part.stop)
            piece = (slice(None), slice(first, last)) if axis == 0 else (slice(first, last), slice(None))
            size = (last - first, length) if axis == 0 else (length, last - first)
            made[piece] = _by_pillow(array[piece], size, resample)

    spread(resize_part, array.shape[1 - axis])
    return made


CudaGraphCache = tuple[int, ...]
"""The axes of ``[height, width, channels]`` along which an image is resized, in order; it is rounded to bytes between."""


def _width_first(old: tuple[int, int], new: tuple[int, int]) -> CudaGraphCache:
    """What Pillow does up to version 12."""
    return tuple(axis for axis in (1, 0) if old[1 - axis] != new[1 - axis])


def _larger_loss_first(old: tuple[int, int], new: tuple[int, int]) -> CudaGraphCache:
    """What Pillow 13 does: the height goes first where it loses more than twice as many pixels as the width."""
    passes = _width_first(old, new)
    lost_columns, lost_rows = (before - after for before, after in zip(old, new, strict=True))
    return passes[::-1] if lost_rows > max(0, 2 * lost_columns) else passes


def resizing_passes(old: tuple[int, int], new: tuple[int, int], resample: int) -> CudaGraphCache | None:
    """How Pillow resizes an image from one width and height to another: pass by pass, the same bytes.

    Along one axis, the parts of an image do not depend on each other, so that each may be a thread's.

    Args:
        old: width and height before.
        new: width and height after.
        resample: the filter, as Pillow numbers them.

    Returns:
        The axes in order; ``None`` where this Pillow follows none of the orders that are known.
    """
    order = _order_of_passes(resample)
    return None if order is None else order(old, new)


@lru_cache
def _order_of_passes(resample: int) -> Callable[[tuple[int, int], tuple[int, int]], CudaGraphCache] | None:
    """The first of the known orders that accounts for what Pillow makes of small images."""
    generator = np.random.default_rng(0)
    # Around the limit between one order and the other, and elsewhere.
    limits = [((24, 40), (24 - loss, 40 - 2 * loss + more)) for loss in (-9, 0, 1, 5, 12) for more in (-1, 0, 1)]
    sizes = [*limits, *((tuple(a), tuple(b)) for a, b in generator.integers(1, 50, (40, 2, 2)).tolist())]
    for order in (_width_first, _larger_loss_first):
        for old, new in sizes:
            image = generator.integers(0, 256, (old[1], old[0], 3), np.uint8)
            made = image
            for axis in order(old, new):
                made = _resized_along(axis, made, new[1 - axis], resample, alone)
            if not np.array_equal(made, _by_pillow(image, new, resample)):
                break
        else:
            return order
    return None


def cropped(array: Bytes, height: int, width: int) -> Bytes:
    """The middle of ``array``, as ``transformers.image_transforms.center_crop`` has it: black where there is none."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    if top < 0 or left < 0:
        whole = np.zeros((max(height, array.shape[0]), max(width, array.shape[1]), array.shape[2]), np.uint8)
        # Half of what is missing goes before the image, rounded up, and the crop moves with it.
        down, right = -(-(whole.shape[0] - array.shape[0]) // 2), -(-(whole.shape[1] - array.shape[1]) // 2)
        whole[down : down + array.shape[0], right : right + array.shape[1]] = array
        array, top, left = whole, top + down, left + right
    return array[top : top + height, left : left + width]


def cut_bytes(array: Bytes, patch: int, merge: int, out: Bytes) -> None:
    """Writes a tile's patches, block by block, the patches of a block in raster order.

    Args:
        array: ``[height, width, channels]``.  What is left of a side that is no multiple of ``patch``, right and bottom,
            is left out.
        patch: side of a patch, pixels.
        merge: side of a block, patches; divides rows and columns of patches.
        out: ``[patches, channels · patch²]``; its rows may lie any distance apart.
    """
    rows, columns = array.shape[0] // patch, array.shape[1] // patch
    blocks = array[: rows * patch, : columns * patch].reshape(
        rows // merge, merge, patch, columns // merge, merge, patch, -1
    )
    # Row and column of the block, of the patch in it; channel, row and column of the pixel.
    target = out.reshape(rows // merge, columns // merge, merge, merge, -1, patch, patch)
    target[...] = blocks.transpose(0, 3, 1, 4, 6, 2, 5)


def cut_values(
    array: Bytes,
    patch: int,
    merge: int,
    rescaling: PixelNormalization,
    out: NDArray[np.float32],
    spread: Spread = alone,
) -> None:
    """As :func:`cut_bytes`, with what the bytes mean in place of the bytes."""
    strip, per_strip = patch * merge, array.shape[1] // patch * merge

    def cut(part: slice) -> None:
        raw = np.empty((per_strip, out.shape[1]), np.uint8)
        for number in range(part.start, part.stop):
            cut_bytes(array[number * strip : (number + 1) * strip], patch, merge, raw)
            rescaling.normalize(raw, out[number * per_strip : (number + 1) * per_strip])

    spread(cut, array.shape[0] // strip)
