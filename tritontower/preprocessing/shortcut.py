"""transformers' pixels without transformers' arithmetic: resized by Pillow, as there, and cut while they are bytes.

transformers makes a picture of fp64, two of fp32 and a copy in another order before there are patches; here the resized
bytes are cut into rows of patches a few rows at a time, which are then rescaled and normalised where they lie.  The
values are the same, bit for bit.  This is done for the processors and settings that are known to do nothing else; for
all others transformers is asked.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tritontower.pixels import Rescaling

__all__ = [
    "Shortcut",
    "Spread",
    "alone",
    "cropped",
    "cut_bytes",
    "cut_values",
    "pixel_matrix",
    "probe_picture",
    "resized",
    "shortcut_of",
    "spread_over_threads",
]

Bytes = NDArray[np.uint8]
FILTERS = frozenset(int(filter) for filter in Image.Resampling)
WORTH_THREADS = 2**18
"""Pixels of a picture from which on a second thread saves more than starting it costs."""
MOST_THREADS = 4
"""Threads for one picture: each of its three channels is resized by one, and what follows waits for memory."""

Spread = Callable[[Callable[[slice], None], int], None]
"""Has a function work through so many things of a kind, part by part."""


@dataclass(frozen=True)
class Shortcut:
    """What decides about a processor's pixels beside their size.

    Attributes:
        resample: the filter with which Pillow resizes, as it numbers them.
        rescaling: what becomes of the bytes.
    """

    resample: int
    rescaling: Rescaling


def shortcut_of(processor: Any, known: Collection[str], options: Mapping[str, Any], channels: int) -> Shortcut | None:
    """How to make the pixels of ``processor`` without it.

    Args:
        processor: an image processor of transformers.
        known: full names of the classes that the rule has looked at.
        options: settings in place of the processor's own.
        channels: channels of a picture.

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
    rescales, normalises = switches
    if rescales and not _is_number(factor):
        return None
    means, deviations = (0.0,) * channels, (1.0,) * channels
    if normalises:
        found = [_per_channel(setting(name), channels) for name in ("image_mean", "image_std")]
        if found[0] is None or found[1] is None or not min(found[1]) > 0:
            return None
        means, deviations = found[0], found[1]
    return Shortcut(int(resample), Rescaling(float(factor) if rescales else 1.0, means, deviations))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    values = [value] * channels if _is_number(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(_is_number, values)):
        return None
    return tuple(map(float, values))


def probe_picture() -> Bytes:
    """``[31, 45, 3]``: noise, the same every time, on which a shortcut has to prove itself."""
    return np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)


def pixel_matrix(patches: int, inner: int, raw: bool = False) -> torch.Tensor:
    """``[patches, inner]`` fp32 or, ``raw``, uint8, with anything in it.

    Allocated by numpy, which asks for huge pages: with ordinary ones, the first write of 50 MB took six times as long.
    """
    return torch.from_numpy(np.empty((patches, inner), np.uint8 if raw else np.float32))


def alone(work: Callable[[slice], None], count: int) -> None:
    """All parts at once, in the caller's thread."""
    work(slice(0, count))


@contextmanager
def spread_over_threads(pixels: int) -> Iterator[Spread]:
    """A part for each of a few threads, for a picture of so many pixels; one part where that is not worth it.

    As many as torch may use, but no more than :data:`MOST_THREADS`.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    if threads < 2 or pixels < WORTH_THREADS:
        yield alone
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="tritontower-picture") as pool:

        def spread(work: Callable[[slice], None], count: int) -> None:
            ends = [count * part // threads for part in range(threads + 1)]
            for _ in pool.map(work, map(slice, ends[:-1], ends[1:])):
                pass

        yield spread


def resized(array: Bytes, size: tuple[int, int], resample: int, spread: Spread = alone) -> Bytes:
    """``array`` ``[height, width, 3]`` at ``size`` (width, height), as transformers resizes it; itself if it has it."""
    if array.shape[1::-1] == size:
        return array
    if spread is alone:
        return np.asarray(Image.fromarray(array).resize(size, resample=resample))
    made = np.empty((size[1], size[0], array.shape[2]), np.uint8)

    # Not the rows or columns: which of them Pillow resizes first, and rounds to bytes, is its own affair.
    def resize_channels(part: slice) -> None:
        for channel in range(part.start, part.stop):
            plane = Image.fromarray(np.ascontiguousarray(array[..., channel]))
            made[..., channel] = np.asarray(plane.resize(size, resample=resample))

    spread(resize_channels, array.shape[2])
    return made


def cropped(array: Bytes, height: int, width: int) -> Bytes:
    """The middle of ``array``, as ``transformers.image_transforms.center_crop`` has it: black where there is none."""
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    if top < 0 or left < 0:
        whole = np.zeros((max(height, array.shape[0]), max(width, array.shape[1]), array.shape[2]), np.uint8)
        # Half of what is missing goes before the picture, rounded up, and the crop moves with it.
        down, right = -(-(whole.shape[0] - array.shape[0]) // 2), -(-(whole.shape[1] - array.shape[1]) // 2)
        whole[down : down + array.shape[0], right : right + array.shape[1]] = array
        array, top, left = whole, top + down, left + right
    return array[top : top + height, left : left + width]


def cut_bytes(array: Bytes, patch: int, merge: int, out: Bytes) -> None:
    """Writes a view's patches, block by block, the patches of a block in raster order.

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
    array: Bytes, patch: int, merge: int, rescaling: Rescaling, out: NDArray[np.float32], spread: Spread = alone
) -> None:
    """As :func:`cut_bytes`, with what the bytes mean in place of the bytes."""
    strip, per_strip = patch * merge, array.shape[1] // patch * merge

    def cut(part: slice) -> None:
        raw = np.empty((per_strip, out.shape[1]), np.uint8)
        for number in range(part.start, part.stop):
            cut_bytes(array[number * strip : (number + 1) * strip], patch, merge, raw)
            rescaling.normalise(raw, out[number * per_strip : (number + 1) * per_strip])

    spread(cut, array.shape[0] // strip)
