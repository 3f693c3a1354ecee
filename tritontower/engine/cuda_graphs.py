"""Captures launches as a CUDA graph and replays them."""

from collections.abc import Callable
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

    The launches first run once on the capture stream, to compile kernels and create library workspaces.  All graphs of an
    executor allocate from one pool, because no two of them run at once.
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
        current = torch.cuda.current_stream(self._device)
        # If ending a capture fails, torch leaves the capture stream current: the outer context restores it.
        with capture_lock, torch.cuda.stream(current):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            stream = self._stream
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                launch()
            stream.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            # A pool lives as long as a graph that uses it.
            pool = next((graph.pool() for graph in self._graphs), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                launch()
            self._pool_bytes = self.held_bytes + max(0, torch.cuda.memory_reserved(self._device) - before)
            self._graphs.add(graph)
            current.wait_stream(stream)
            return graph.replay
