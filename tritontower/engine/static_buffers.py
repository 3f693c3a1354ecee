"""Buffers at fixed addresses that all batches of one bucket share."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Rows, Workload
from tritontower.graph.memory_plan import ALIGNMENT, MemoryPlan, plan_memory
from tritontower.kernels.gemm.aligned_rows import ALIGNMENT as ROW_ALIGNMENT
from tritontower.kernels.gemm.aligned_rows import include_padding
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.launch import LaunchList
from tritontower.kernels.runtime.segments import Segments, StaticSegments
from tritontower.kernels.runtime.valid_rows import ValidRows

from .buckets import Bucket, SegmentCapacity, round_up_workload
from .cuda_graphs import Comparison, Replay
from .ops import BatchMetadata, Tensors

_WORD = 4
# Words between tables: kernels are compiled for pointers to multiples of 16 bytes.
_TABLE_ALIGNMENT = 16 // _WORD
_DIMENSIONS: tuple[Rows, ...] = ("patches", "selected", "merged", "tokens", "tiles")
# The word that holds the number of valid rows of each dimension.
_COUNTERS = {dimension: number * _TABLE_ALIGNMENT for number, dimension in enumerate(_DIMENSIONS)}


@dataclass(frozen=True)
class MemorySlot:
    """A matrix at a fixed offset of a block of memory; rows are ``stride`` elements apart (0: as many as are in a row)."""

    offset: int
    rows: int
    width: int
    dtype: torch.dtype
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix, with the padding of its rows."""
        return self.rows * (self.stride or self.width) * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Returns the matrix as a view of a uint8 tensor."""
        elements = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return elements.view(self.rows, self.stride or self.width)[:, : self.width]


class AddressMap:
    """Offsets of a bucket's values and tables in one block of memory.

    In order: the arena, the outputs, the pixels, and *words* that one copy fills: numbers of valid rows, tables of segments
    (up to ``tables_end`` words) and all other inputs.  ``words_offset`` and ``size`` are in bytes.
    """

    def __init__(self, graph: Graph, bucket: Bucket, dtype: torch.dtype) -> None:
        plan = plan_memory(graph, bucket.workload, dtype.itemsize)

        def slot(name: str, offset: int) -> MemorySlot:
            value = graph.values[name]
            rows = value.held_rows(bucket.workload)
            if name == "pixels":
                return MemorySlot(offset, rows, value.width, bucket.pixels, align_up(value.width, ROW_ALIGNMENT))
            return MemorySlot(offset, rows, value.width, value.torch_dtype(dtype))

        self.slots = {name: slot(name, offset) for name, offset in plan.offsets.items()}
        end = plan.arena_bytes
        for name in (*graph.outputs, "pixels"):
            self.slots[name] = slot(name, end)
            end = align_up(end + self.slots[name].nbytes, ALIGNMENT)
        self.words_offset, words = end, len(_COUNTERS) * _TABLE_ALIGNMENT
        for capacity in bucket.capacities.values():
            words += _count_table_words(capacity)
        self.tables_end = words
        for name in graph.inputs:
            if name != "pixels":
                self.slots[name] = slot(name, self.words_offset + words * _WORD)
                words += align_up(self.slots[name].nbytes // _WORD, _TABLE_ALIGNMENT)
        self.words = words
        self.size = align_up(self.words_offset + words * _WORD, ALIGNMENT)


def _count_table_words(capacity: SegmentCapacity) -> int:
    """Words of the cumulative lengths, and of tile tables for two tile heights of 64 rows or more."""
    tiles = StaticSegments.max_tiles(capacity.total, capacity.count, capacity.longest, 64)
    return align_up(capacity.count + 1, _TABLE_ALIGNMENT) + 2 * align_up(2 * tiles, _TABLE_ALIGNMENT)


class _TableAllocator:
    """Allocates tables of segments from a range of words, and separately when it is full.

    Holds no reference to the buffers: a reference cycle would keep the graph and its memory alive until Python's
    garbage collection.
    """

    def __init__(self, words: torch.Tensor, end: int) -> None:
        self._words, self._next, self._end = words, len(_COUNTERS) * _TABLE_ALIGNMENT, end

    def allocate(self, words: int) -> torch.Tensor:
        start, end = self._next, self._next + align_up(words, _TABLE_ALIGNMENT)
        if end > self._end:
            return torch.empty(words, dtype=torch.int32, device=self._words.device)
        self._next = end
        return self._words[start : start + words]


class StaticBuffers:
    """The buffers of all batches of one bucket.

    Attributes:
        tensors: every value of the layer graph, padded.
        graph: the captured launches, which hold ``driver_bytes`` of device memory.
        comparison: of the results of ``graph`` with those of the launches, while it is not known.
        replay: ``graph``, once its results are known to be right.
    """

    def __init__(self, graph: Graph, bucket: Bucket, addresses: AddressMap, memory: torch.Tensor) -> None:
        self.bucket, self.addresses, self.memory = bucket, addresses, memory
        self.graph: Replay | None = None
        self.driver_bytes = 0
        self.comparison: Comparison | None = None
        self.replay: Replay | None = None
        self.launches: LaunchList | None = None
        self._graph = graph
        self.tensors: Tensors = {name: slot.view(memory) for name, slot in addresses.slots.items()}
        start = addresses.words_offset
        self._words = memory[start : start + addresses.words * _WORD].view(torch.int32)
        tables = _TableAllocator(self._words, addresses.tables_end)
        self._segments = {
            name: StaticSegments(capacity.total, capacity.count, capacity.longest, tables.allocate)
            for name, capacity in bucket.capacities.items()
        }
        self.metadata = BatchMetadata(
            segments=self._segments.get("segments", Segments([])),
            windows=self._segments.get("windows"),
            tiles=self._segments.get("tiles", Segments([])),
            side=bucket.side,
            valid_rows={
                dimension: ValidRows(bucket.workload.rows(dimension), self._words[word : word + 1])
                for dimension, word in _COUNTERS.items()
            },
        )

    def seal(self, is_sealed: bool) -> None:
        """Forbids or allows new tables of segments: a table created during a capture would never be filled."""
        for segments in self._segments.values():
            segments.is_sealed = is_sealed

    def fill(self, batch: PackedBatch) -> None:
        """Copies a batch into the buffers without waiting for the device.

        Each copy has its own page-locked source, which torch reuses only after the copy has finished.
        """
        sources = {name: batch.tensors[name] for name in self._graph.inputs}
        pixels = sources.pop("pixels")
        on_host = are_on_host(sources.values())
        words = self.addresses.words if on_host else self.addresses.tables_end
        staged = self._stage(words, torch.int32, zeroed=True)
        staged_words = staged.numpy()
        for dimension, word in _COUNTERS.items():
            staged_words[word] = batch.workload.rows(dimension)
        for name, segments in self._segments.items():
            segments.assign(self.bucket.capacities[name].pad_lengths(getattr(batch.attention, name)))
            for table, rows in segments.list_tables():
                word = (table.data_ptr() - self._words.data_ptr()) // _WORD
                if 0 <= word < self.addresses.tables_end:
                    staged_words[word : word + rows.size] = rows.ravel()
                else:
                    # A table that was allocated separately has its own copy.
                    own = self._stage(rows.size, torch.int32).view(rows.shape)
                    own.numpy()[:] = rows
                    table.copy_(own, non_blocking=True)
        if on_host:
            for name, source in sources.items():
                start = (self.addresses.slots[name].offset - self.addresses.words_offset) // _WORD
                staged[start : start + source.numel()].view(source.dtype).view(source.shape).copy_(source)
        self._words[:words].copy_(staged, non_blocking=True)
        if not on_host:
            for name, source in sources.items():
                self._copy_padded(self.tensors[name], source)
        self._copy_padded(self.tensors["pixels"], pixels)

    def _copy_padded(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies ``source``, followed by zeros."""
        rows, width = source.shape
        target = include_padding(target)
        if target.device.type == "cuda" and source.device.type == "cpu":
            # Rows with their padding: torch copies other strides through a temporary.
            whole = include_padding(source)
            if whole.shape != target[:rows].shape or not source.is_pinned():
                whole = self._stage(rows * target.shape[1], source.dtype).view(rows, -1)
                whole[:, :width].copy_(source)
                whole[:, width:].zero_()
            target[:rows].copy_(whole, non_blocking=True)
        else:
            target[:rows, :width].copy_(source, non_blocking=True)
        target[rows:].zero_()

    def _stage(self, count: int, dtype: torch.dtype, *, zeroed: bool = False) -> torch.Tensor:
        make = torch.zeros if zeroed else torch.empty
        return make(count, dtype=dtype, pin_memory=self.memory.device.type == "cuda")

    def copy_outputs(self, outputs: Tensors) -> None:
        """Copies the valid rows of the outputs."""
        for name, rows in outputs.items():
            rows.copy_(self.tensors[name][: len(rows)])

    def slice_valid_rows(self, workload: Workload) -> Tensors:
        """Returns the valid rows of every value."""
        values = self._graph.values
        return {name: tensor[: values[name].held_rows(workload)] for name, tensor in self.tensors.items()}


def are_on_host(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether all tensors are in host memory, where one copy brings them to the device together."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def plan_static_buffers(
    graph: Graph,
    workload: Workload,
    itemsize: int,
    *,
    rows_per_token: int = 1,
    tile_rows: int | None = None,
    pixels: torch.dtype = torch.float32,
) -> MemoryPlan:
    """Plans the memory of a forward pass in static buffers: of the rounded workload, with outputs in both places.

    The tables of segments, less than a thousandth of it, are not counted.
    """
    plan = plan_memory(graph, round_up_workload(workload, rows_per_token=rows_per_token, tile_rows=tile_rows), itemsize)
    outputs = plan_memory(graph, workload, itemsize).output_bytes
    width = graph.values["pixels"].width
    added = pixels.itemsize * align_up(width, ROW_ALIGNMENT) - torch.float32.itemsize * width
    inputs = plan.input_bytes + plan.workload.patches * added
    return replace(plan, input_bytes=inputs, output_bytes=plan.output_bytes + outputs)
