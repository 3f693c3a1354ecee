"""CudaGraphCache over padded buffers that stay where they are, and the CUDA graphs that replay them.

A :class:`StaticBuffers` is what all packs of one :class:`~tritontower.engine.buckets.Bucket` share: buffers for the inputs, tables of
segments, an arena, and buffers for the outputs, all at fixed addresses.  :meth:`StaticBuffers.fill` brings a pack into
them, one copy for the pixels and one for everything else, out of page-locked memory and without waiting; what then runs,
launch by launch or as one graph, is the same for every pack.

:class:`CudaGraphCache` keeps them.  A bucket's first pack runs launch by launch.  Its second does, too, and is then captured: the
graph's first replay has to reproduce that pass bit for bit, or the bucket stays without one.  A capture that fails is
remembered likewise, with one warning each; only one for which there was no memory is tried again, when its bucket has come
several times as often: there may be some then.

Everything lives in one block of memory that the passes of all buckets share, since they run one after the other; where a
larger pass needs a larger block, graphs keep the old one until they go.
"""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol
from weakref import WeakSet

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import UsageError, is_out_of_memory
from tritontower.graph.ir import Graph, Node, Rows, Workload
from tritontower.graph.memory_plan import ALIGNMENT, MemoryPlan, plan_memory
from tritontower.kernels.runtime.segments import PlannedSegments, Segments
from tritontower.kernels.runtime.valid_rows import ValidRows

from .buckets import Bucket, Division, Planner, planned
from .ops import BatchMetadata, Step, Tensors

__all__ = [
    "CaptureBackend",
    "CaptureLimits",
    "CudaGraphCache",
    "CudaGraphs",
    "Observer",
    "Replay",
    "StaticBuffers",
    "empty_cache",
    "plan_static_buffers",
]

logger = logging.getLogger("tritontower")

Observer = Callable[[Node, Tensors], None]
"""Called after every node, with the node and everything computed so far; the tensors are overwritten later."""

DTYPES = {"float32": torch.float32, "int32": torch.int32}

USES_BEFORE_CAPTURE = 2
"""How often a bucket comes before it is captured.  One that was evicted has to come twice as often the next time."""
MOST_HISTORIES = 4096
"""Buckets whose uses are remembered."""
MOST_UNCAPTURED = 16
"""CudaGraphCache without a graph that are kept laid out."""

_WORD = 4
_APART = 16 // _WORD  # words: pointers to multiples of 16 bytes are what kernels are compiled for
_DIMENSIONS: tuple[Rows, ...] = ("patches", "selected", "merged", "tokens", "tiles")


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


# -- CUDA graphs ------------------------------------------------------------------------------------------------------

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


class CudaGraphs:
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


# -- one bucket's pass ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Section:
    """A matrix at a fixed place of a pass's memory."""

    offset: int
    rows: int
    width: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    @property
    def end(self) -> int:
        return -(-(self.offset + self.size) // ALIGNMENT) * ALIGNMENT

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.offset : self.offset + self.size].view(self.dtype).view(self.rows, self.width)


class _Layout:
    """Where everything of a bucket's pass is in its memory: arena, outputs, pixels, and the words of all else.

    The words are what one copy fills: numbers of live rows, tables of segments, and the inputs that are no pixels.
    """

    def __init__(self, graph: Graph, bucket: Bucket, dtype: torch.dtype) -> None:
        plan = plan_memory(graph, bucket.workload, dtype.itemsize)
        self.values = {name: self._section(graph, bucket, name, dtype, offset) for name, offset in plan.offsets.items()}
        end = plan.arena_bytes
        for name in (*graph.outputs, "pixels"):
            self.values[name] = section = self._section(graph, bucket, name, dtype, end)
            end = section.end
        self.words_offset, words = end, len(_DIMENSIONS) * _APART
        self.tables = words
        for division in (bucket.segments, bucket.windows, bucket.tiles):
            words += 0 if division is None else _table_words(division)
        self.tables_end = words
        for name in graph.inputs:
            if name != "pixels":
                section = self._section(graph, bucket, name, dtype, self.words_offset + words * _WORD)
                self.values[name] = section
                words += _whole(section.size // _WORD)
        self.words = words
        self.size = -(-(self.words_offset + words * _WORD) // ALIGNMENT) * ALIGNMENT

    @staticmethod
    def _section(graph: Graph, bucket: Bucket, name: str, dtype: torch.dtype, offset: int) -> _Section:
        value = graph.values[name]
        kind = bucket.pixels if name == "pixels" else DTYPES.get(value.dtype, dtype)
        return _Section(offset, value.held_rows(bucket.workload), value.width, kind)


def _whole(words: int) -> int:
    return -(-words // _APART) * _APART


def _table_words(division: Division) -> int:
    """Words for a division's tables: cumulative lengths, and tiles of two heights, of 64 rows or more."""
    tiles = PlannedSegments.planned_tiles(division.total, division.count, division.longest, 64)
    return _whole(division.count + 1) + 2 * _whole(2 * tiles)


class _Tables:
    """Where the tables of segments are: among a pass's words as far as they go, else each in memory of its own.

    It does not know the pass: what knows each other outlives its last user until Python looks for such rings, and with a
    pass its graph and its memory would.
    """

    def __init__(self, words: torch.Tensor, start: int, end: int) -> None:
        self._words, self._free, self._end = words, start, end

    def allocate(self, words: int) -> torch.Tensor:
        """Memory for a table."""
        start, end = self._free, self._free + _whole(words)
        if end > self._end:
            return torch.empty(words, dtype=torch.int32, device=self._words.device)
        self._free = end
        return self._words[start : start + words]


class StaticBuffers:
    """The buffers of all packs of one bucket.

    Attributes:
        bucket: what it is planned for.
        memory: what everything lies in; it may be larger.
        size: bytes of it that are used.
        facts: what the steps have to know beside the tensors.
        tensors: every value of the graph, padded.
        replay: the captured pass; ``None`` before it is captured.
    """

    def __init__(self, graph: Graph, bucket: Bucket, layout: _Layout, memory: torch.Tensor) -> None:
        self.bucket, self.memory, self.size = bucket, memory, layout.size
        self.replay: Replay | None = None
        self._graph, self._layout = graph, layout
        self.tensors: Tensors = {name: section.of(memory) for name, section in layout.values.items()}
        start = layout.words_offset
        self._words = memory[start : start + layout.words * _WORD].view(torch.int32)
        tables = _Tables(self._words, layout.tables, layout.tables_end)
        self._divisions: dict[str, tuple[Division, PlannedSegments]] = {}
        for name in ("segments", "windows", "tiles"):
            division: Division | None = getattr(bucket, name)
            if division is not None:
                held = PlannedSegments(division.total, division.count, division.longest, tables.allocate)
                self._divisions[name] = (division, held)
        held_divisions = {name: held for name, (_, held) in self._divisions.items()}
        self.facts = BatchMetadata(
            segments=held_divisions.get("segments", Segments([])),
            windows=held_divisions.get("windows"),
            tiles=held_divisions.get("tiles", Segments([])),
            side=bucket.side,
            valid_rows={
                dimension: ValidRows(bucket.workload.rows(dimension), self._words[place : place + 1])
                for dimension, place in _live_places()
            },
        )

    def seal(self, sealed: bool) -> None:
        """Says whether tables of segments that there are not yet are refused: what a capture makes, nothing fills later."""
        for _, held in self._divisions.values():
            held.sealed = sealed

    def fill(self, batch: PackedBatch) -> None:
        """Brings a pack of this bucket into the buffers; nothing of the pack before stays.

        The copies come from page-locked memory that nobody else has: torch hands it out again only when they are done.
        """
        inputs = [name for name in self._graph.inputs if name != "pixels"]
        on_host = _are_on_host([getattr(batch, name) for name in inputs])
        words = self._layout.words if on_host else self._layout.tables_end
        staged = self._staging(words, torch.int32, zeroed=True)
        image = staged.numpy()
        workload = batch.workload
        for dimension, place in _live_places():
            image[place] = workload.rows(dimension)
        for name, (division, held) in self._divisions.items():
            held.assign(division.lengths(getattr(batch, name)))
            for table, rows in held.rows_of_tables():
                # A table of its own has a copy of its own.
                place = (table.data_ptr() - self._words.data_ptr()) // _WORD
                if 0 <= place < self._layout.tables_end:
                    image[place : place + rows.size] = rows.ravel()
                else:
                    own = self._staging(rows.size, torch.int32).view(rows.shape)
                    own.numpy()[:] = rows
                    table.copy_(own, non_blocking=True)
        if on_host:
            for name in inputs:
                source, section = getattr(batch, name), self._layout.values[name]
                start = (section.offset - self._layout.words_offset) // _WORD
                staged[start : start + source.numel()].view(source.dtype).view(source.shape).copy_(source)
        self._words[:words].copy_(staged, non_blocking=True)
        if not on_host:
            for name in inputs:
                self._bring(self.tensors[name], getattr(batch, name))
        self._bring(self.tensors["pixels"], batch.pixels)

    def _bring(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``source`` and zeros behind it, without waiting."""
        if target.device.type == "cuda" and source.device.type == "cpu" and not source.is_pinned():
            source = self._staging(source.numel(), source.dtype).view(source.shape).copy_(source)
        rows = len(source)
        target[:rows].copy_(source, non_blocking=True)
        if rows < len(target):
            target[rows:].zero_()

    def _staging(self, count: int, dtype: torch.dtype, *, zeroed: bool = False) -> torch.Tensor:
        make = torch.zeros if zeroed else torch.empty
        return make(count, dtype=dtype, pin_memory=self.memory.device.type == "cuda")

    def take(self, outputs: Tensors) -> None:
        """Copies the rows of the outputs that are no padding."""
        for name, rows in outputs.items():
            rows.copy_(self.tensors[name][: len(rows)])

    def live(self, workload: Workload) -> Tensors:
        """The rows of every value that are no padding."""
        values = self._graph.values
        return {name: tensor[: values[name].held_rows(workload)] for name, tensor in self.tensors.items()}


def _are_on_host(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _live_places() -> Iterator[tuple[Rows, int]]:
    """Every dimension, and which of a pass's words says how many of its rows are no padding."""
    return ((dimension, number * _APART) for number, dimension in enumerate(_DIMENSIONS))


def plan_static_buffers(
    graph: Graph,
    workload: Workload,
    itemsize: int,
    *,
    rows_per_token: int = 1,
    tile_rows: int | None = None,
    pixels: torch.dtype = torch.float32,
) -> MemoryPlan:
    """The memory plan of a planned pass: that of the rounded workload, with outputs in the pass's memory and the caller's.

    The tables of segments, less than a thousandth of it, are left out.

    Args:
        graph, workload, itemsize: as in :func:`~tritontower.graph.memory_plan.plan_memory`.
        rows_per_token, tile_rows: as in :func:`~tritontower.engine.buckets.planned`.
        pixels: the dtype that pixels come in.
    """
    plan = plan_memory(graph, planned(workload, rows_per_token=rows_per_token, tile_rows=tile_rows), itemsize)
    outputs = plan_memory(graph, workload, itemsize).output_bytes
    wider = torch.float32.itemsize - pixels.itemsize
    return replace(
        plan,
        input_bytes=plan.input_bytes - wider * plan.workload.patches * graph.values["pixels"].width,
        output_bytes=plan.output_bytes + outputs,
    )


# -- all passes -------------------------------------------------------------------------------------------------------


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
        self._passes: OrderedDict[Bucket, StaticBuffers] = OrderedDict()
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
        self._passes.clear()
        self.memory = self.memory.new_empty(0)

    def _of(self, bucket: Bucket) -> tuple[StaticBuffers, _History]:
        """The pass and the history of a bucket, which become the most recently used."""
        history = self._histories.setdefault(bucket, _History())
        self._histories.move_to_end(bucket)
        if len(self._histories) > MOST_HISTORIES:
            self._histories.popitem(last=False)
        entry = self._passes.get(bucket)
        if entry is None:
            layout = _Layout(self._graph, bucket, self._dtype)
            entry = StaticBuffers(self._graph, bucket, layout, self._memory_of(layout.size))
            self._passes[bucket] = entry
            idle = [key for key, other in self._passes.items() if other.replay is None]
            for key in idle[:-MOST_UNCAPTURED]:
                del self._passes[key]
        self._passes.move_to_end(bucket)
        return entry, history

    def _memory_of(self, size: int) -> torch.Tensor:
        if self.memory.numel() < size:
            # Drop the old block first, unless graphs hold it: two of them at once would break the promised peak.
            for key in [key for key, entry in self._passes.items() if entry.replay is None]:
                del self._passes[key]
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
        return {bucket: entry for bucket, entry in self._passes.items() if entry.replay is not None}

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
            del self._passes[bucket]

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
