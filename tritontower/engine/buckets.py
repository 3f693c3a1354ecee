"""Buckets of batch sizes: rows are rounded up, so that batches of many sizes share the launches of one CUDA graph.

A CUDA graph replays launches of fixed sizes.  Rows are rounded up to one of 16 sizes between a power of two and the next, so
at most 6.25 % of them are padding.  Below :data:`FEW_ROWS` there are 8 sizes (12.5 %): there, padding costs less than a forward
pass without a graph.  Everything that decides a launch is in the :class:`Bucket`: batches of one bucket run the same launches.

Sizes that cost next to nothing are coarser, because each distinct value is another graph: numbers of segments, the length of
the longest one, the tokens that an image is assembled from, and the table of positions.

Padding rows are zeros in short segments of their own.  They cost almost nothing, all their values are finite, and no row
of an image ever reads them.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Workload
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.checks import ceil_div, next_power_of_two
from tritontower.kernels.runtime.segments import Segments

FEW_ROWS = 1024
"""Rows up to which sizes are coarse."""
COARSE_STEPS = 4
"""Sizes between a power of two and the next, of what costs a few bytes or a program that returns at once."""
PADDING_SEGMENT = 64
"""Largest number of rows of a padding segment: attention within it grows with the square."""
SMALLEST_SIDE = 256
"""Rows and columns of patches that every table of positions covers."""


def row_steps(rows: int) -> int:
    """Returns how many sizes lie between a power of two and the next; padding is less than one part in so many."""
    return 8 if rows < FEW_ROWS else 16


def round_up(count: int, steps: int) -> int:
    """Rounds up to ``m · 2^k`` with ``steps ≤ m < 2 · steps``; smaller counts stay.  ``steps`` is a power of two."""
    shift = max(0, count.bit_length() - steps.bit_length())
    return -(-count >> shift) << shift


def round_up_workload(workload: Workload, *, rows_per_token: int = 1, tile_rows: int | None = None) -> Workload:
    """Rounds up a workload; no number of rows that a block computes grows by more than one part in :func:`row_steps`.

    Merged rows stay a multiple of ``rows_per_token``.  If all tiles have ``tile_rows`` rows (class token included), whole
    tiles are added.  The scores are 0, because no memory and no launch depends on them.
    """
    steps = row_steps(workload.patches)
    tiles = round_up(workload.tiles, steps)
    if tile_rows is not None and workload.patches != (rows := workload.tiles * tile_rows):
        raise ValueError(f"{workload.tiles} tiles of {tile_rows} rows have {rows} rows, not {workload.patches}")
    selected, merged = workload.rows("selected"), workload.rows("merged")
    if tile_rows is not None:
        patches = tiles * tile_rows
    else:
        unit = 1 if workload.patches % rows_per_token else rows_per_token
        patches = unit * round_up(workload.patches // unit, steps)
    per_tile = selected // max(1, workload.tiles)
    if selected == workload.patches:
        all_selected = patches
    elif tile_rows is not None and selected == per_tile * workload.tiles and per_tile % rows_per_token == 0:
        all_selected = tiles * per_tile
    else:
        all_selected = rows_per_token * round_up(selected // rows_per_token, steps)
    all_merged = all_selected // rows_per_token
    tokens = all_merged if workload.tokens == merged else round_up(workload.tokens, COARSE_STEPS)
    return Workload(patches, tokens, scores=0, selected=all_selected, merged=all_merged, tiles=tiles)


@dataclass(frozen=True)
class SegmentCapacity:
    """The largest division of rows into segments that a bucket holds; ``padding``: rows of a padding segment."""

    total: int
    count: int
    longest: int
    padding: int

    @classmethod
    def for_segments(cls, segments: Segments, total: int, bound: int | None) -> "SegmentCapacity":
        """Returns the capacity for ``segments`` and padding to ``total`` rows; ``bound``: rows of the longest possible one."""
        # 64, 256, 1024, ... rows: configurations of attention differ for short segments only.
        power = max(PADDING_SEGMENT, next_power_of_two(max(1, segments.longest)))
        longest = bound or power << (power.bit_length() + 1) % 2
        # A power of two, not larger than the other segments.
        padding = min(PADDING_SEGMENT, 1 << (longest.bit_length() - 1))
        # The largest possible amount of padding, so that the bucket does not depend on the actual amount.
        most = ceil_div(total // row_steps(8 * total // 9), padding)
        if bound is None:
            count = next_power_of_two(segments.count + most)
        else:
            # Windows at the edges of images are not full: the usual number of them is one size.
            usual = ceil_div(5 * total, 4 * bound)
            count = round_up(max(usual, segments.count) + most, COARSE_STEPS)
        return cls(total=total, count=count, longest=longest, padding=padding)

    def pad_lengths(self, segments: Segments) -> tuple[int, ...]:
        """Returns the lengths of ``segments``, followed by those of the padding segments."""
        whole, rest = divmod(self.total - segments.total, self.padding)
        return (*segments.lengths, *(self.padding,) * whole, *((rest,) if rest else ()))


@dataclass(frozen=True)
class Bucket:
    """Everything that decides the launches of a forward pass; ``side``: that of the table of positions, in patches."""

    workload: Workload
    segments: SegmentCapacity | None
    windows: SegmentCapacity | None
    tiles: SegmentCapacity | None
    side: int
    pixels: torch.dtype
    backend: dispatch.Backend

    @cached_property
    def capacities(self) -> dict[str, SegmentCapacity]:
        """The capacities that a node reads."""
        named = {"segments": self.segments, "windows": self.windows, "tiles": self.tiles}
        return {name: capacity for name, capacity in named.items() if capacity is not None}


class BucketPlanner:
    """Assigns batches to buckets, for one graph on one device."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        attention = [node.attributes for node in graph.nodes if node.kind == "attention"]
        bounds = {attributes["windows"]: attributes.get("length_bound") for attributes in attention}
        self._has_whole, self._has_windows = False in bounds, True in bounds
        self._bound, self._window_bound = bounds.get(False), bounds.get(True)
        self._pools = any(node.kind == "attention_pooling" for node in graph.nodes)
        self._has_tiles = self._pools or any(value.rows == "tiles" for value in graph.values.values())
        self._rotates = any(node.kind == "rotary_table" for node in graph.nodes)

    def bucket(self, batch: PackedBatch) -> Bucket | None:
        """Returns the bucket of ``batch``, or ``None`` if its tiles have several sizes and cannot be padded."""
        attention, tile_rows = batch.attention, self._bound
        if tile_rows is None and self._has_tiles:
            sizes = set(attention.tiles.lengths)
            if len(sizes) > 1:
                return None
            tile_rows = sizes.pop()
        workload = round_up_workload(batch.workload, rows_per_token=batch.tokens.rows_per_token, tile_rows=tile_rows)
        if not self._has_tiles:
            workload = replace(workload, tiles=0)
        rows, windows = workload.patches, attention.windows if self._has_windows else None
        capacity = SegmentCapacity.for_segments
        return Bucket(
            workload=workload,
            segments=capacity(attention.segments, rows, self._bound) if self._has_whole else None,
            windows=None if windows is None else capacity(windows, rows, self._window_bound),
            # A padding tile is a whole tile: pooling needs at least one row.
            tiles=SegmentCapacity(rows, workload.tiles, tile_rows or 0, tile_rows or 0) if self._pools else None,
            side=next_power_of_two(max(SMALLEST_SIDE, attention.side)) if self._rotates else 0,
            pixels=batch.pixels.dtype,
            backend=dispatch.backend_on(self._device),
        )
