"""Captures launches as a CUDA graph and replays them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Protocol
from weakref import WeakSet

import torch

Replay = Callable[[], None]
"""Repeats captured launches on the current stream."""


class CaptureBackend(Protocol):
    """Interface of what captures launches; tests replace :class:`CudaCapture`."""

    @property
    def held_bytes(self) -> int:
        """Device memory that captured launches allocated and that living replays hold."""

    def capture(self, launch: Callable[[], None]) -> Replay:
        """Captures the launches of ``launch``; after an exception, the device must still be usable."""


capture_lock = Lock()
"""Serializes captures in this process: torch refuses to empty its caches during a capture."""


def empty_cache() -> None:
    """Frees the device memory in torch's caches, after any capture has ended."""
    with capture_lock:
        torch.cuda.empty_cache()


class CudaCapture:
    """Captures with :class:`torch.cuda.CUDAGraph`, while other threads may use the device (``thread_local``).

    The same launches must have run before, so that all kernels are compiled and loaded.  A capture neither waits for the
    device nor empties torch's caches, unlike :class:`torch.cuda.graph`.  All graphs of an executor allocate from one pool,
    because no two of them run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the pool, which is freed with its last graph."""
        return self._pool_bytes if self._graphs else 0

    def capture(self, launch: Callable[[], None]) -> Replay:
        """See :class:`CaptureBackend`."""
        graph = torch.cuda.CUDAGraph()
        # A pool lives as long as a graph that uses it.
        pool = next((graph.pool() for graph in self._graphs), None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with capture_lock, torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                launch()
            except BaseException:
                with suppress(RuntimeError):  # the failed launch may have ended the capture
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.add(graph)
        segments = torch.cuda.memory_snapshot(graph.pool(), include_traces=False)
        self._pool_bytes = sum(segment["total_size"] for segment in segments)
        return graph.replay


class Comparison:
    """A bitwise comparison of pairs of tensors, computed by their device while the host goes on."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        same = torch.stack([(_bits(first) == _bits(second)).all() for first, second in pairs]).all()
        self._same = torch.empty((), dtype=torch.bool, pin_memory=same.is_cuda)
        self._same.copy_(same, non_blocking=True)
        self._copied = torch.cuda.Event() if same.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def is_done(self) -> bool:
        """Returns whether the result is known; does not wait."""
        return self._copied is None or self._copied.query()

    def is_equal(self) -> bool:
        """Returns the result; waits for it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._same)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == torch.int32.itemsize else torch.int16)
