"""Captures launches as a CUDA graph and replays them."""

from collections.abc import Callable
from threading import Lock
from typing import Protocol
from weakref import WeakSet

import torch

__all__ = ["CaptureBackend", "CudaCapture", "Replay", "empty_cache"]


class Replay(Protocol):
    """Work that was captured."""

    @property
    def allocated(self) -> int:
        """Bytes of device memory by which the capture made the backend's grow."""
        ...

    def __call__(self) -> None:
        """Does the work again, on the current stream."""
        ...


class CaptureBackend(Protocol):
    """What turns launches into something that replays them."""

    @property
    def held_bytes(self) -> int:
        """Bytes of device memory that captured launches allocated for themselves, and that the replays still alive hold."""
        ...

    def capture(self, work: Callable[[], None]) -> Replay:
        """Captures what ``work`` launches; raises whatever goes wrong, and leaves the device usable then."""
        ...


_capturing = Lock()
"""One capture at a time in the process: torch refuses to empty its caches while another is under way."""


def empty_cache() -> None:
    """Gives the device memory back that torch keeps and nobody uses; waits for a capture to end."""
    with _capturing:
        torch.cuda.empty_cache()


class _CudaReplay:
    def __init__(self, graph: torch.cuda.CUDAGraph, allocated: int) -> None:
        self.graph, self.allocated = graph, allocated

    def __call__(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Captures by :class:`torch.cuda.CUDAGraph`.

    Before the capture the work runs once on the stream that it is captured on, for whatever is made at first use: compiled
    kernels, workspaces of vendor libraries.  Other threads may use the device meanwhile (``thread_local``).  What launches
    allocate comes from a pool that all graphs of an executor share, since no two of them ever run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool_bytes = 0

    @property
    def held_bytes(self) -> int:
        """See :class:`CaptureBackend`: the pool, which shrinks with none of its graphs but goes with the last."""
        return self._pool_bytes if self._graphs else 0

    def capture(self, work: Callable[[], None]) -> Replay:
        """See :class:`CaptureBackend`."""
        current = torch.cuda.current_stream(self._device)
        # Where a capture cannot be ended, torch leaves its stream the current one: the outer context goes back.
        with _capturing, torch.cuda.stream(current):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            stream = self._stream
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                work()
            stream.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            # A pool lives as long as a graph that uses it, so a living one is asked.
            pool = next((graph.pool() for graph in self._graphs), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
            grown = max(0, torch.cuda.memory_reserved(self._device) - before)
            self._pool_bytes = self.held_bytes + grown
            self._graphs.add(graph)
            current.wait_stream(stream)
            return _CudaReplay(graph, grown)
