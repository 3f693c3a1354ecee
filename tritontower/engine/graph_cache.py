"""Static buffers and CUDA graphs of all buckets of one layer graph."""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import UsageError, is_out_of_memory
from tritontower.graph.ir import Graph, Node

from .buckets import Bucket, Planner
from .cuda_graphs import CaptureBackend
from .ops import Step, Tensors
from .static_buffers import StaticBuffers, _Layout

__all__ = ["CaptureLimits", "CudaGraphCache", "Observer"]

logger = logging.getLogger("tritontower")

Observer = Callable[[Node, Tensors], None]
"""Called after every node, with the node and everything computed so far; the tensors are overwritten later."""

USES_BEFORE_CAPTURE = 2
"""How often a bucket comes before it is captured.  One that was evicted has to come twice as often the next time."""
MOST_HISTORIES = 4096
"""Buckets whose uses are remembered."""
MOST_UNCAPTURED = 16
"""CudaGraphCache without a graph that are kept laid out."""


@dataclass(frozen=True)
class CaptureLimits:
    """How much captured CUDA graphs may hold; the least recently used goes first.

    Attributes:
        max_graphs: graphs of a tower; it may have as many for each of still images and videos, raw pixels and others.
        max_bytes: bytes of device memory that these hold: their buffers, each counted once, and what their launches
            allocated.  Buffers are shared with passes that are not captured.
    """

    max_graphs: int = 32
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.max_graphs < 1 or self.max_bytes < 0:
            raise UsageError(
                f"max_graphs is {self.max_graphs} and max_bytes {self.max_bytes}; allowed: at least 1 and 0. "
                "cuda_graphs=False captures nothing"
            )


@dataclass
class _History:
    """What is known of a bucket, whether its pass is laid out or not."""

    uses: int = 0
    due: int = USES_BEFORE_CAPTURE
    """Uses at which it is captured."""
    refused: bool = False

    def postpone(self) -> None:
        """Makes the next capture wait for several times as many uses as there were."""
        self.due = 2 * (self.due + self.uses)


class CudaGraphCache:
    """The planned passes of one graph; one caller at a time.

    Args:
        graph: what runs.
        steps: its nodes, bound to their weights.
        dtype: of activations.
        device: where they run.
        backend: what captures; ``None``: nothing is captured.
        limits: how much captured passes may hold.

    Attributes:
        memory: the block that the next pass is laid out in; graphs may hold older, smaller ones.
    """

    def __init__(
        self,
        graph: Graph,
        steps: Sequence[tuple[Node, Step]],
        dtype: torch.dtype,
        device: torch.device,
        backend: CaptureBackend | None,
        limits: CaptureLimits,
    ) -> None:
        self._graph, self._steps, self._dtype, self._device = graph, steps, dtype, device
        self._planner = Planner(graph, device)
        self._backend, self._limits = backend, limits
        self.buffers: OrderedDict[Bucket, StaticBuffers] = OrderedDict()
        self._histories: OrderedDict[Bucket, _History] = OrderedDict()
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def bucket(self, batch: PackedBatch) -> Bucket | None:
        """What a pass over ``batch`` is planned for; ``None`` where it cannot be padded."""
        return self._planner.bucket(batch)

    @property
    def captured(self) -> int:
        """How many buckets have a graph."""
        return len(self._captured())

    @property
    def captured_bytes(self) -> int:
        """Bytes of device memory that graphs hold: buffers, each counted once, and what their launches allocated."""
        blocks = {entry.memory.data_ptr(): entry.memory.numel() for entry in self._captured().values()}
        return sum(blocks.values()) + (0 if self._backend is None else self._backend.held_bytes)

    def run(self, bucket: Bucket, batch: PackedBatch, outputs: Tensors, observer: Observer | None = None) -> None:
        """One pass over a batch of ``bucket``; the results go to ``outputs``."""
        entry, history = self._of(bucket)
        history.uses += 1
        entry.fill(batch)
        if observer is not None:
            self._observed(entry, batch, observer)
        elif entry.replay is not None:
            entry.replay()
        else:
            self._launch(entry)
        entry.take(outputs)
        due = entry.replay is None and not history.refused and history.uses >= history.due
        if due and observer is None and not self._is_decided_by_host(bucket):
            self._capture(entry, history, outputs)

    def _is_decided_by_host(self, bucket: Bucket) -> bool:
        """Whether Python decides how a pass is cut into calls: torch's references do, by the lengths of segments."""
        return self._device.type == "cuda" and bucket.backend == "reference"

    def warm_up(self, bucket: Bucket, batch: PackedBatch, outputs: Tensors) -> bool:
        """One pass, whose bucket has its graph at once if it can have one; whether it has."""
        _, history = self._of(bucket)
        history.due = min(history.due, history.uses + 1)
        self.run(bucket, batch, outputs)
        return bucket in self._captured()

    def release(self) -> None:
        """Drops all graphs and buffers; what was refused stays refused, and what was postponed postponed.

        Memory that is given back is no reason to capture at once: a call that runs out of it releases, too, and needs it.
        """
        self.buffers.clear()
        self.memory = self.memory.new_empty(0)

    def _of(self, bucket: Bucket) -> tuple[StaticBuffers, _History]:
        """The pass and the history of a bucket, which become the most recently used."""
        history = self._histories.setdefault(bucket, _History())
        self._histories.move_to_end(bucket)
        if len(self._histories) > MOST_HISTORIES:
            self._histories.popitem(last=False)
        entry = self.buffers.get(bucket)
        if entry is None:
            layout = _Layout(self._graph, bucket, self._dtype)
            entry = StaticBuffers(self._graph, bucket, layout, self._memory_of(layout.size))
            self.buffers[bucket] = entry
            idle = [key for key, other in self.buffers.items() if other.replay is None]
            for key in idle[:-MOST_UNCAPTURED]:
                del self.buffers[key]
        self.buffers.move_to_end(bucket)
        return entry, history

    def _memory_of(self, size: int) -> torch.Tensor:
        if self.memory.numel() < size:
            # Drop the old block first, unless graphs hold it: two of them at once would break the promised peak.
            for key in [key for key, entry in self.buffers.items() if entry.replay is None]:
                del self.buffers[key]
            self.memory = self.memory.new_empty(0)
            self.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self.memory

    def _launch(self, entry: StaticBuffers) -> None:
        tensors, facts = entry.tensors, entry.facts
        for _, step in self._steps:
            step(tensors, facts)

    def _observed(self, entry: StaticBuffers, batch: PackedBatch, observer: Observer) -> None:
        live = entry.live(batch.workload)
        for node, step in self._steps:
            step(entry.tensors, entry.facts)
            observer(node, live)

    def _captured(self) -> Mapping[Bucket, StaticBuffers]:
        return {bucket: entry for bucket, entry in self.buffers.items() if entry.replay is not None}

    # -- capturing --

    def _capture(self, entry: StaticBuffers, history: _History, outputs: Tensors) -> None:
        """Captures the pass that just ran, whose buffers are filled and whose results are in ``outputs``."""
        if self._backend is None:
            return
        history.refused = True  # until it is proven
        entry.seal(True)
        try:
            replay = self._backend.capture(lambda: self._launch(entry))
            for name in outputs:
                entry.tensors[name].fill_(float("nan"))
            replay()
            same = all(_same_bits(entry.tensors[name][: len(rows)], rows) for name, rows in outputs.items())
        except Exception as error:  # torch, Triton and the driver each raise their own
            reason = f"it could not be captured as a CUDA graph ({type(error).__name__}: {error})"
            if _failed_for_memory(error):
                history.refused = False
                history.postpone()
                reason += f"; it is tried again after {history.due - history.uses} more of them, and by warm_up()"
            self._warn(entry.bucket, reason)
            return
        finally:
            entry.seal(False)
        if not same:
            self._warn(entry.bucket, "the CUDA graph's first replay differs from the pass that it was captured from")
            return
        if (held := entry.memory.numel() + self._backend.held_bytes) > self._limits.max_bytes:
            # Evicting others would not make room: what they allocated lives as long as this graph.
            reason = (
                f"its CUDA graph holds {held} bytes, the limit is {self._limits.max_bytes} (CaptureLimits.max_bytes)"
            )
            if entry.size + replay.allocated <= self._limits.max_bytes:
                history.refused = False
                history.postpone()
                reason += "; most of them are there for other passes, release() gives them back"
            self._warn(entry.bucket, reason)
            return
        history.refused = False
        entry.replay = replay
        logger.debug("captured a pass of %s", entry.bucket.workload)
        self._evict()

    def _evict(self) -> None:
        """Drops graphs, the least recently used first, until the limits hold: the newest, which is within them, stays."""
        for bucket in self._captured():
            if self.captured <= self._limits.max_graphs and self.captured_bytes <= self._limits.max_bytes:
                return
            # Buckets that take turns are not to be captured again and again.
            self._histories.get(bucket, _History()).postpone()
            if self._device.type == "cuda":
                # Nobody may still be replaying what is about to go.
                torch.cuda.current_stream(self._device).synchronize()
            del self.buffers[bucket]

    def _warn(self, bucket: Bucket, reason: str) -> None:
        warnings.warn(
            f"passes of up to {bucket.workload.patches} patches run launch by launch: {reason}; "
            "cuda_graphs=False captures nothing and does not warn",
            RuntimeWarning,
            stacklevel=2,
        )


def _failed_for_memory(error: BaseException) -> bool:
    """Whether a capture failed for want of memory.

    Ending a capture in which an allocation failed may raise an error of its own, which has the first as its context.
    """
    link: BaseException | None = error
    while link is not None and not is_out_of_memory(link):
        link = link.__cause__ or link.__context__
    return link is not None


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = torch.int32 if first.itemsize == torch.int32.itemsize else torch.int16
    return torch.equal(first.view(bits), second.view(bits))
