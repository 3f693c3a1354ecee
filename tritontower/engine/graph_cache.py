"""Static buffers and CUDA graphs of all buckets of one layer graph.

The first batch of a bucket runs launch by launch; then the launches are captured.  The device compares the graph's first
replay with the results, bit for bit, while the host goes on; from then on the bucket is replayed.  A bucket whose capture or
comparison fails stays *eager* (launch by launch), with one warning; only :meth:`.Executor.warm_up` tries again.

All buffers share one block of memory, because forward passes run one after the other.  If a larger bucket needs a larger
block, graphs keep the old one until they are evicted.

When the graphs reach their limit of bytes, a bucket replaces the least recently used graph only if the bucket's own last use
is more recent.  So buckets that come round in turn, too many for the limit, do not evict each other before they are replayed.
"""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import UsageError
from tritontower.graph.ir import Graph

from .buckets import Bucket, BucketPlanner
from .cuda_graphs import CaptureBackend, Comparison
from .ops import Tensors
from .static_buffers import AddressMap, StaticBuffers

logger = logging.getLogger("tritontower")

MOST_HISTORIES = 4096
"""Buckets whose last uses are remembered."""
MOST_UNCAPTURED = 16
"""Buckets without a graph whose buffers are kept."""
NODE_BYTES = 64 * 1024
"""Device memory of a captured launch in the driver, which torch does not report.  Graphs of 500, 1,000 and 2,000 empty kernels
take 66 and 63 KB for each more (https://forums.developer.nvidia.com/t/244901, driver 470); newer drivers need no more."""


@dataclass(frozen=True)
class CaptureLimits:
    """Limit of the captured CUDA graphs; the least recently used graph is evicted first.

    Attributes:
        max_bytes: device memory that graphs add to what a forward pass needs anyway: their launches in the driver, what
            these allocated, and older, smaller blocks of static buffers.  It applies separately to still images and videos,
            and to uint8 and float pixels.
    """

    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise UsageError(f"max_bytes must be at least 0, got {self.max_bytes}; cuda_graphs=False captures nothing")


@dataclass
class _History:
    last_use: int = 0
    previous_use: int = 0
    is_requested: bool = False
    is_eager: bool = False


class CudaGraphCache:
    """The static buffers and CUDA graphs of one layer graph; not thread-safe.

    ``buffers`` holds the least recently used bucket first; ``memory`` is the block for new buffers, graphs may hold older,
    smaller ones.  Without a ``backend``, nothing is captured.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        device: torch.device,
        backend: CaptureBackend | None,
        limits: CaptureLimits,
    ) -> None:
        self._graph, self._dtype, self._device = graph, dtype, device
        self._backend, self._max_bytes = backend, limits.max_bytes
        self._histories: OrderedDict[Bucket, _History] = OrderedDict()
        self._clock = 0
        self.bucket = BucketPlanner(graph, device).bucket
        self.buffers: OrderedDict[Bucket, StaticBuffers] = OrderedDict()
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def captured(self) -> list[Bucket]:
        """The buckets that have a graph, the least recently used first."""
        return [bucket for bucket, buffers in self.buffers.items() if buffers.graph is not None]

    @property
    def captured_bytes(self) -> int:
        """Device memory of the graphs, as in :class:`CaptureLimits`."""
        captured = [self.buffers[bucket] for bucket in self.captured]
        older = {
            id(buffers.memory): buffers.memory.numel() for buffers in captured if buffers.memory is not self.memory
        }
        pool = 0 if self._backend is None else self._backend.held_bytes
        return sum(older.values()) + pool + sum(buffers.driver_bytes for buffers in captured)

    def fill(self, bucket: Bucket, batch: PackedBatch) -> StaticBuffers:
        """Returns the buffers of ``bucket``, filled with ``batch``; their ``replay`` is set if it may be used."""
        self._clock += 1
        history = self._histories.setdefault(bucket, _History())
        history.previous_use, history.last_use = history.last_use, self._clock
        self._histories.move_to_end(bucket)
        if len(self._histories) > MOST_HISTORIES:
            self._histories.popitem(last=False)
        buffers = self.buffers.get(bucket)
        if buffers is None:
            addresses = AddressMap(self._graph, bucket, self._dtype)
            buffers = StaticBuffers(self._graph, bucket, addresses, self._memory_for(addresses.size))
            self.buffers[bucket] = buffers
            for idle in self._uncaptured()[:-MOST_UNCAPTURED]:
                del self.buffers[idle]
        self.buffers.move_to_end(bucket)
        self._settle(buffers)
        buffers.fill(batch)
        return buffers

    def request_capture(self, bucket: Bucket) -> None:
        """Makes the next use of ``bucket`` capture it, even if an earlier capture failed or other graphs are evicted."""
        history = self._histories.setdefault(bucket, _History())
        history.is_requested, history.is_eager = bucket not in self.captured, False

    def has_graph(self, bucket: Bucket) -> bool:
        """Returns whether ``bucket`` has a graph that may be replayed; waits for the comparison of its first replay."""
        buffers = self.buffers.get(bucket)
        if buffers is None:
            return False
        self._settle(buffers, wait=True)
        return buffers.replay is not None

    def capture_if_due(self, buffers: StaticBuffers, launch: Callable[[], None], outputs: Tensors) -> None:
        """Captures ``launch``, which has just used ``buffers``, if it has no graph and there is room for one.

        A replay must reproduce ``outputs``.
        """
        history = self._histories[buffers.bucket]
        if buffers.launches is not None:
            buffers.driver_bytes = NODE_BYTES * len(buffers.launches)
        if (
            self._backend is None
            or buffers.graph is not None
            or history.is_eager
            or not self._has_room(history, buffers)
        ):
            return
        if self._device.type == "cuda" and buffers.bucket.backend == "reference":
            return  # Python decides between calls of the torch references by the lengths of segments.
        history.is_requested = False
        buffers.seal(True)
        try:
            graph = self._backend.capture(launch)
            for name in outputs:
                buffers.tensors[name].fill_(float("nan"))
            graph()
            comparison = Comparison([(buffers.tensors[name][: len(rows)], rows) for name, rows in outputs.items()])
        except BaseException as error:  # torch, Triton and the driver each raise their own
            history.is_eager = True
            if not isinstance(error, Exception):
                raise
            self._warn(buffers.bucket, f"the capture failed ({type(error).__name__}: {error})")
            return
        finally:
            buffers.seal(False)
        held = buffers.driver_bytes + self._backend.held_bytes
        if held > self._max_bytes:
            # Evicting other graphs would not help: the pool that they allocated from lives as long as this graph.
            history.is_eager = True
            limit = f"the limit is {self._max_bytes} (CaptureLimits.max_bytes)"
            self._warn(buffers.bucket, f"its CUDA graph holds {held} bytes, {limit}")
            return
        buffers.graph, buffers.comparison = graph, comparison
        logger.debug("captured a CUDA graph for %s", buffers.bucket.workload)
        self._evict()

    def _settle(self, buffers: StaticBuffers, *, wait: bool = False) -> None:
        """Takes the graph into use if its first replay had the right bits; does nothing while the device compares them."""
        comparison = buffers.comparison
        if comparison is None or not (wait or comparison.is_done()):
            return
        buffers.comparison = None
        if comparison.is_equal():
            buffers.replay = buffers.graph
        else:
            buffers.graph = None
            self._histories.setdefault(buffers.bucket, _History()).is_eager = True
            self._warn(buffers.bucket, "the CUDA graph's first replay differs from the eager results")

    def _has_room(self, history: _History, buffers: StaticBuffers) -> bool:
        """Returns whether a graph fits into the limit, or may replace the least recently used one."""
        captured = self.captured
        fits = not captured or self.captured_bytes + buffers.driver_bytes <= self._max_bytes
        if fits or history.is_requested:
            return True
        oldest = self._histories.get(captured[0], _History())
        return oldest.last_use < history.previous_use

    def release(self) -> None:
        """Drops all graphs and buffers; buckets that failed to be captured stay eager."""
        self.buffers.clear()
        self.memory = self.memory.new_empty(0)

    def _uncaptured(self) -> list[Bucket]:
        return [bucket for bucket, buffers in self.buffers.items() if buffers.graph is None]

    def _memory_for(self, size: int) -> torch.Tensor:
        if self.memory.numel() < size:
            # Free the old block first, unless graphs use it: both at once would exceed the memory plan.
            for bucket in self._uncaptured():
                del self.buffers[bucket]
            self.memory = self.memory.new_empty(0)
            self.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            # Graphs now hold the old block beside it.
            self._evict()
        return self.memory

    def _evict(self) -> None:
        """Evicts the least recently used graphs until the limit holds; the newest graph alone is within it."""
        for bucket in self.captured[:-1]:
            if self.captured_bytes <= self._max_bytes:
                return
            if self._device.type == "cuda":
                # The graph may still be running.
                torch.cuda.current_stream(self._device).synchronize()
            del self.buffers[bucket]

    def _warn(self, bucket: Bucket, reason: str) -> None:
        warnings.warn(
            f"batches of up to {bucket.workload.patches} patches run without a CUDA graph: {reason}; warm_up() tries again, "
            "cuda_graphs=False captures nothing",
            RuntimeWarning,
            stacklevel=2,
        )
