"""Background prefetching: decodes images in a thread pool and prepares the next batch while the current one runs."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch

from tritontower.errors import ImageError, ImageTooLargeError, Limits
from tritontower.preprocessing.images.decode import count_decoded_bytes, decode_image
from tritontower.preprocessing.images.image import CanonicalImage, ChannelOrder, ImageInput, is_large
from tritontower.preprocessing.preprocessor import Each

WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode and preprocess for one call.  More would only wait for Python's lock."""

PROGRESS_BAR_IMAGES = 64
"""Number of images at which a progress bar is shown on a terminal by default."""

Batch = TypeVar("Batch")


@contextmanager
def thread_map(tasks: int) -> Iterator[Each]:
    """Yields a ``map`` that runs in threads, a bounded number of calls ahead; plain ``map`` for a single task."""
    if tasks < 2:
        yield map
        return
    with ThreadPoolExecutor(min(WORKERS, tasks), thread_name_prefix="tritontower-images") as pool:
        yield partial(_buffered_map, pool)


def _buffered_map(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    try:
        for values in zip(*arguments, strict=False):
            pending.append(pool.submit(function, *values))
            if len(pending) > 2 * WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def prefetch(
    batches: Generator[Batch, None, None], stream: torch.cuda.Stream | None, *, enabled: bool
) -> Generator[Batch, None, None]:
    """Yields the same batches; prepares each in another thread while the caller runs the one before."""
    if not enabled:
        yield from batches
        return
    context = copy_context()

    def advance() -> Batch | None:
        with torch.cuda.stream(stream):
            return context.run(next, batches, None)

    with closing(batches), ThreadPoolExecutor(1, thread_name_prefix="tritontower-next-batch") as thread:
        coming = thread.submit(advance)
        while (batch := coming.result()) is not None:
            coming = thread.submit(advance)
            yield batch


@contextmanager
def progress_bar(total: int, progress: bool | None) -> Iterator[Callable[[int], object]]:
    """Yields the function that advances the bar; ``progress=None`` shows it for long lists on a terminal."""
    from tqdm import tqdm

    is_long = total >= PROGRESS_BAR_IMAGES
    hidden = not progress if progress is not None else (None if is_long else True)  # None: hidden unless on a terminal
    with tqdm(total=total, unit="image", disable=hidden) as bar:
        yield bar.update


def split_portions(images: Sequence[ImageInput], limits: Limits, max_images: int | None = None) -> Iterator[slice]:
    """Splits a list of images so that each portion fits into ``limits.max_decoded_bytes``; decodes nothing."""
    start = held = 0
    for index, image in enumerate(images):
        size = count_decoded_bytes(image, limits) if len(images) > 1 else 0
        if index > start and (held + size > limits.max_decoded_bytes or index - start == max_images):
            yield slice(start, index)
            start, held = index, 0
        held += size
    if images:
        yield slice(start, len(images))


def decode(
    images: Sequence[ImageInput],
    limits: Limits,
    each: Each = map,
    input_data_format: ChannelOrder | None = None,
    *,
    first: int = 0,
    take_digests: bool = False,
) -> Iterator[CanonicalImage | ImageError]:
    """Decodes images in order and yields an error in the place of an image that cannot be decoded.

    ``each`` is used if an image is large enough to be worth a thread.  ``first`` is the position of the first image in the
    caller's list.  ``take_digests`` computes the digests here, in the threads.
    """

    def decode_one(index: int, image: ImageInput) -> CanonicalImage | ImageError:
        try:
            decoded = decode_image(image, index=index, limits=limits, input_data_format=input_data_format)
        except ImageError as error:
            return error
        if take_digests:
            _ = decoded.digest
        return decoded

    if not any(map(is_large, images)):
        each = map
    yield from each(decode_one, range(first, first + len(images)), images)


def decode_all(
    images: Sequence[ImageInput], limits: Limits, each: Each = map, input_data_format: ChannelOrder | None = None
) -> list[CanonicalImage]:
    """Decodes images that are needed at once, unless they would take more than ``limits.max_decoded_bytes``."""
    portion = next(split_portions(images, limits), slice(0, 0))
    if portion.stop < len(images):
        held = sum(count_decoded_bytes(image, limits) for image in images[: portion.stop + 1])
        raise ImageTooLargeError(
            f"decoded, the images up to this one would take {held} bytes, and all {len(images)} are needed at once; the "
            f"limit is {limits.max_decoded_bytes} bytes; pass fewer or smaller ones, encode still images with encode, "
            "which processes them in portions, or pass Limits(max_decoded_bytes=...)",
            index=portion.stop,
        )
    decoded = []
    for image in decode(images, limits, each, input_data_format):
        if isinstance(image, ImageError):
            raise image
        decoded.append(image)
    return decoded
