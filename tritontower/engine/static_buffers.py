"""Buffers at fixed addresses that all batches of one bucket share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Rows, Workload
from tritontower.graph.memory_plan import ALIGNMENT, MemoryPlan, plan_memory
from tritontower.kernels.runtime.segments import Segments, StaticSegments
from tritontower.kernels.runtime.valid_rows import ValidRows

from .buckets import Bucket, Division, planned
from .cuda_graphs import Replay
from .ops import BatchMetadata, Tensors

__all__ = ["DTYPES", "StaticBuffers", "plan_static_buffers"]

DTYPES = {"float32": torch.float32, "int32": torch.int32}

_WORD = 4
_APART = 16 // _WORD  # words: pointers to multiples of 16 bytes are what kernels are compiled for
_DIMENSIONS: tuple[Rows, ...] = ("patches", "selected", "merged", "tokens", "tiles")


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
    tiles = StaticSegments.max_tiles(division.total, division.count, division.longest, 64)
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
        self._divisions: dict[str, tuple[Division, StaticSegments]] = {}
        for name in ("segments", "windows", "tiles"):
            division: Division | None = getattr(bucket, name)
            if division is not None:
                held = StaticSegments(division.total, division.count, division.longest, tables.allocate)
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

    def seal(self, is_sealed: bool) -> None:
        """Says whether tables of segments that there are not yet are refused: what a capture makes, nothing fills later."""
        for _, held in self._divisions.values():
            held.is_sealed = is_sealed

    def fill(self, batch: PackedBatch) -> None:
        """Brings a pack of this bucket into the buffers; nothing of the pack before stays.

        The copies come from page-locked memory that nobody else has: torch hands it out again only when they are done.
        """
        inputs = [name for name in self._graph.inputs if name != "pixels"]
        sources = batch.tensors
        on_host = _are_on_host([sources[name] for name in inputs])
        words = self._layout.words if on_host else self._layout.tables_end
        staged = self._staging(words, torch.int32, zeroed=True)
        image = staged.numpy()
        workload = batch.workload
        for dimension, place in _live_places():
            image[place] = workload.rows(dimension)
        for name, (division, held) in self._divisions.items():
            held.assign(division.lengths(getattr(batch.attention, name)))
            for table, rows in held.list_tables():
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
                source, section = sources[name], self._layout.values[name]
                start = (section.offset - self._layout.words_offset) // _WORD
                staged[start : start + source.numel()].view(source.dtype).view(source.shape).copy_(source)
        self._words[:words].copy_(staged, non_blocking=True)
        if not on_host:
            for name in inputs:
                self._bring(self.tensors[name], sources[name])
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
