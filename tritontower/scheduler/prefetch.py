"""What runs beside the device: images decoded in threads, the next pass made while the tower has the one before."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch

from tritontower.errors import ImageTooLargeError, Limits
from tritontower.preprocessing.base import Each
from tritontower.preprocessing.images.image import (
    CanonicalImage,
    ChannelOrder,
    ImageInput,
    canonical_rgb,
    decoded_bytes,
    is_large,
)

__all__ = ["ahead", "canonical_images", "progress_bar", "workers"]

WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode and preprocess for one call.  More would wait for Python's lock, not for pixels."""

LONG_LIST = 64
"""Images from which on a progress bar is shown on a terminal, unless the caller says otherwise."""

Pass = TypeVar("Pass")


@contextmanager
def workers(tasks: int) -> Iterator[Each]:
    """What works like ``map`` in threads, a bounded number of calls ahead; ``map`` itself for a single task."""
    if tasks < 2:
        yield map
        return
    with ThreadPoolExecutor(min(WORKERS, tasks), thread_name_prefix="tritontower-images") as pool:
        yield partial(_buffered_map, pool)


def _buffered_map(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    coming: deque[Future[Any]] = deque()
    try:
        for values in zip(*arguments, strict=False):
            coming.append(pool.submit(function, *values))
            if len(coming) > 2 * WORKERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def ahead(
    passes: Generator[Pass, None, None], stream: torch.cuda.Stream | None, *, alone: bool
) -> Generator[Pass, None, None]:
    """The same passes, each made in another thread while the caller has the one before; not if there is but one."""
    if alone:
        yield from passes
        return
    context = copy_context()

    def advance() -> Pass | None:
        with torch.cuda.stream(stream):
            return context.run(next, passes, None)

    with closing(passes), ThreadPoolExecutor(1, thread_name_prefix="tritontower-next-pass") as thread:
        coming = thread.submit(advance)
        while (part := coming.result()) is not None:
            coming = thread.submit(advance)
            yield part


@contextmanager
def progress_bar(total: int, progress: bool | None) -> Iterator[Callable[[int], object]]:
    """What a bar is moved on by; ``progress`` says whether it is shown, ``None``: for long lists, on a terminal."""
    from tqdm import tqdm

    hidden = not progress if progress is not None else (None if total >= LONG_LIST else True)  # None: off a terminal
    with tqdm(total=total, unit="image", disable=hidden) as bar:
        yield bar.update


def canonical_images(
    images: Sequence[ImageInput], limits: Limits, each: Each = map, input_data_format: ChannelOrder | None = None
) -> list[CanonicalImage]:
    """Decodes images, by ``each`` where there is enough to do.

    Raises:
        ImageTooLargeError: decoded, they would take more than ``limits.max_decoded_bytes``; found before they are.
        ImageError: one of them cannot be used; the first, if there are several.
    """
    sizes = (decoded_bytes(image, limits) for image in images) if len(images) > 1 else ()
    for index, held in enumerate(accumulate(sizes)):
        if index and held > limits.max_decoded_bytes:
            raise ImageTooLargeError(
                f"decoded, it and those before it would take {held} bytes, and all {len(images)} are needed at once; the "
                f"limit is {limits.max_decoded_bytes} bytes; pass fewer or smaller ones, encode still images with "
                "encode, which works them off in portions, or pass Limits(max_decoded_bytes=...)",
                index=index,
            )

    def decode(index: int, image: ImageInput) -> CanonicalImage:
        return canonical_rgb(image, index=index, limits=limits, input_data_format=input_data_format)

    if not any(map(is_large, images)):
        each = map
    return list(each(decode, range(len(images)), images))
