"""Static buffers and CUDA graphs of all buckets of one layer graph.

The first batch of a bucket runs launch by launch.  After the second, the launches are captured; the graph's first replay
must reproduce the results bit for bit.  A bucket whose capture fails stays *eager* (launch by launch), with one warning;
only :meth:`.Executor.warm_up` tries again.

All buffers share one block of memory, because forward passes run one after the other.  If a larger bucket needs a larger
block, graphs keep the old one until they are evicted.
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
from .cuda_graphs import CaptureBackend
from .ops import Tensors
from .static_buffers import AddressMap, StaticBuffers

logger = logging.getLogger("tritontower")

MOST_HISTORIES = 4096
"""Buckets whose uses are counted."""
MOST_UNCAPTURED = 16
"""Buckets without a graph whose buffers are kept."""


@dataclass(frozen=True)
class CaptureLimits:
    """Limits of the captured CUDA graphs; the least recently used graph is evicted first.

    Attributes:
        max_graphs: graphs of a tower, separately for still images and videos, and for uint8 and float pixels.
        max_bytes: device memory of these graphs: their buffers, each counted once, and what their launches allocated.
            Uncaptured buckets use the same buffers.
    """

    max_graphs: int = 32
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.max_graphs < 1 or self.max_bytes < 0:
            raise UsageError(
                f"max_graphs must be at least 1 and max_bytes at least 0, got {self.max_graphs} and {self.max_bytes}; "
                "cuda_graphs=False captures nothing"
            )


@dataclass
class _History:
    uses: int = 0
    due: int = 2  # uses at which the bucket is captured; after an eviction, at least twice as many
    eager: bool = False


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
        self._backend, self._limits = backend, limits
        self._histories: OrderedDict[Bucket, _History] = OrderedDict()
        self.bucket = BucketPlanner(graph, device).bucket
        self.buffers: OrderedDict[Bucket, StaticBuffers] = OrderedDict()
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def captured(self) -> list[Bucket]:
        """The buckets that have a graph, the least recently used first."""
        return [bucket for bucket, buffers in self.buffers.items() if buffers.replay is not None]

    @property
    def captured_bytes(self) -> int:
        """Device memory of the graphs, as in :class:`CaptureLimits`."""
        held = (self.buffers[bucket].memory for bucket in self.captured)
        blocks = {memory.data_ptr(): memory.numel() for memory in held}
        return sum(blocks.values()) + (0 if self._backend is None else self._backend.held_bytes)

    def fill(self, bucket: Bucket, batch: PackedBatch) -> StaticBuffers:
        """Returns the buffers of ``bucket``, filled with ``batch``."""
        history = self._histories.setdefault(bucket, _History())
        history.uses += 1
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
        buffers.fill(batch)
        return buffers

    def request_capture(self, bucket: Bucket) -> None:
        """Makes the next use of ``bucket`` capture it, even if an earlier capture failed."""
        history = self._histories.setdefault(bucket, _History())
        history.due, history.eager = min(history.due, history.uses + 1), False

    def capture_if_due(self, buffers: StaticBuffers, launch: Callable[[], None], outputs: Tensors) -> None:
        """Captures ``launch``, which has just used ``buffers``, if it is due; a replay must reproduce ``outputs``."""
        history = self._histories[buffers.bucket]
        if self._backend is None or buffers.replay is not None or history.eager or history.uses < history.due:
            return
        if self._device.type == "cuda" and buffers.bucket.backend == "reference":
            return  # Python decides between calls of the torch references by the lengths of segments.
        history.eager = True  # until the replay is verified
        buffers.seal(True)
        try:
            replay = self._backend.capture(launch)
            for name in outputs:
                buffers.tensors[name].fill_(float("nan"))
            replay()
            same = all(_has_same_bits(buffers.tensors[name][: len(rows)], rows) for name, rows in outputs.items())
        except Exception as error:  # torch, Triton and the driver each raise their own
            self._warn(buffers.bucket, f"the capture failed ({type(error).__name__}: {error})")
            return
        finally:
            buffers.seal(False)
        held = buffers.memory.numel() + self._backend.held_bytes
        if not same:
            self._warn(buffers.bucket, "the CUDA graph's first replay differs from the eager results")
        elif held > self._limits.max_bytes:
            # Evicting other graphs would not help: the pool that they allocated from lives as long as this graph.
            limit = f"the limit is {self._limits.max_bytes} (CaptureLimits.max_bytes)"
            reason = f"its CUDA graph holds {held} bytes, {limit}; release() frees memory of larger batches"
            self._warn(buffers.bucket, reason)
        else:
            history.eager, buffers.replay = False, replay
            logger.debug("captured a CUDA graph for %s", buffers.bucket.workload)
            self._evict()

    def release(self) -> None:
        """Drops all graphs and buffers; the histories stay.

        A call that runs out of memory also releases, and needs the memory for itself, not for a new capture.
        """
        self.buffers.clear()
        self.memory = self.memory.new_empty(0)

    def _uncaptured(self) -> list[Bucket]:
        return [bucket for bucket, buffers in self.buffers.items() if buffers.replay is None]

    def _memory_for(self, size: int) -> torch.Tensor:
        if self.memory.numel() < size:
            # Free the old block first, unless graphs use it: both at once would exceed the memory plan.
            for bucket in self._uncaptured():
                del self.buffers[bucket]
            self.memory = self.memory.new_empty(0)
            self.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self.memory

    def _evict(self) -> None:
        """Evicts the least recently used graphs until the limits hold; the newest graph is within them."""
        for bucket in self.captured:
            if len(self.captured) <= self._limits.max_graphs and self.captured_bytes <= self._limits.max_bytes:
                return
            # Buckets that alternate must not be captured again and again.
            if (history := self._histories.get(bucket)) is not None:
                history.due = 2 * (history.due + history.uses)
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


def _has_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = torch.int32 if first.itemsize == torch.int32.itemsize else torch.int16
    return torch.equal(first.view(bits), second.view(bits))
