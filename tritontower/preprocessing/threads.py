"""Distributes the work on one large image over a few threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import torch

WORTH_THREADS = 2**18
"""Pixels of an image above which a second thread saves more than its start costs."""
MAX_THREADS = 4
"""Threads for one image: more would wait for memory, and for each other while Pillow holds Python's lock."""

Spread = Callable[[Callable[[slice], None], int], None]
"""Applies a function to slices that together cover ``range(count)``."""


def run_serially(work: Callable[[slice], None], count: int) -> None:
    """Does all the work at once in the caller's thread."""
    work(slice(0, count))


@contextmanager
def spread_over_threads(pixels: int, beside: Callable[[], object] | None = None) -> Iterator[Spread]:
    """Yields a :data:`Spread` over threads, a serial one for few pixels; ``beside`` is done before the context ends."""
    threads = min(torch.get_num_threads(), MAX_THREADS)
    if threads < 2 or pixels < WORTH_THREADS:
        yield run_serially
        if beside is not None:
            beside()
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="tritontower-image") as pool:

        def spread(work: Callable[[slice], None], count: int) -> None:
            ends = [count * part // threads for part in range(threads + 1)]
            first, *others = (slice(*ends) for ends in pairwise(ends) if ends[0] < ends[1])
            futures = [pool.submit(work, part) for part in others]
            work(first)
            for future in futures:
                future.result()

        other = None if beside is None else pool.submit(beside)
        yield spread
        if other is not None:
            other.result()
