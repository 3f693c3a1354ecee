"""What a pass on a GPU is planned for: rows rounded up, so that packs of many sizes are passes of one size.

A CUDA graph replays launches of one size.  Packs come in any size, so their rows are rounded up to one of sixteen sizes
between a power of two and the next: at most one row in sixteen (6.25 %) is padding.  Everything of a pass that decides a
launch is in its :class:`Bucket`; passes of one bucket are the same launches over other numbers.

Padding rows are rows of zeros in segments of their own, short ones, so that they cost next to nothing, every number in
them is finite, and no row of an image ever meets them.
"""

from dataclasses import dataclass, replace

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Workload
from tritontower.kernels.runtime.dispatch import Backend, backend_on
from tritontower.kernels.runtime.segments import Segments

__all__ = ["Bucket", "Division", "Planner", "planned", "rounded"]

STEPS = 16
"""Sizes between a power of two and the next; padding is less than one part in so many."""
COARSE_STEPS = 4
"""The same for the number of segments, where one too many costs a few bytes, or a program that ends at once."""
PADDING_SEGMENT = 64
"""Rows of a segment of padding at most: attention within it grows with the square."""
SMALLEST_SIDE = 64
"""Rows and columns of patches that every table of positions covers."""


def rounded(count: int, steps: int = STEPS) -> int:
    """The smallest ``m · 2^k`` with ``steps ≤ m < 2 · steps`` that is not below ``count``; below that, ``count`` itself.

    ``steps`` is a power of two.
    """
    shift = max(0, count.bit_length() - steps.bit_length())
    return -(-count >> shift) << shift


def planned(workload: Workload, *, rows_per_token: int = 1, tile_rows: int | None = None) -> Workload:
    """The workload that a pass over ``workload`` is planned for: none of its rows are fewer, or more than a sixteenth more.

    Whatever the graph makes of so many rows comes out even: rows that merge are a multiple of ``rows_per_token``, and
    where ``tile_rows`` is given, whole tiles are added.  Its scores are 0: they depend on more than a number of rows, and
    no memory and no launch depends on them.

    Args:
        workload: what there is to do.
        rows_per_token: rows that become one token.
        tile_rows: rows of every tile, class token included, of a tower whose tiles are all of one size.

    Raises:
        ValueError: ``tile_rows`` is not what the tiles of ``workload`` have.
    """
    if tile_rows is not None and workload.patches != workload.tiles * tile_rows:
        raise ValueError(
            f"{workload.tiles} tiles of {tile_rows} rows have {workload.tiles * tile_rows} rows, not {workload.patches}"
        )
    tiles = rounded(workload.tiles)
    selected, merged = workload.rows("selected"), workload.rows("merged")
    if tile_rows is not None:
        patches = tiles * tile_rows
    else:
        unit = 1 if workload.patches % rows_per_token else rows_per_token
        patches = unit * rounded(workload.patches // unit)
    of_each_tile = selected // max(1, workload.tiles)
    if selected == workload.patches:
        all_selected = patches
    elif tile_rows is not None and selected == of_each_tile * workload.tiles and of_each_tile % rows_per_token == 0:
        all_selected = tiles * of_each_tile
    else:
        all_selected = rows_per_token * rounded(selected // rows_per_token)
    all_merged = all_selected // rows_per_token
    return Workload(
        patches=patches,
        tokens=all_merged if workload.tokens == merged else rounded(workload.tokens),
        scores=0,
        selected=all_selected,
        merged=all_merged,
        tiles=tiles,
    )


@dataclass(frozen=True)
class Division:
    """How a pass's rows may divide into segments, at most."""

    total: int
    count: int
    longest: int
    padding: int
    """Rows of a segment of padding, but for the last, which may be shorter."""

    @classmethod
    def of(cls, segments: Segments, total: int, bound: int | None) -> "Division":
        """What ``segments`` and padding up to ``total`` rows are planned as; no segment ever has more rows than ``bound``."""
        longest = bound or max(1, segments.longest)
        # No more rows than other segments have, and a power of two.
        padding = min(PADDING_SEGMENT, 1 << (longest.bit_length() - 1))
        # As many as the most padding there can be, so that packs with more and less of it are one bucket.
        most = -(-(total // STEPS) // padding)
        return cls(
            total=total,
            count=rounded(segments.count + most, COARSE_STEPS),
            longest=bound or 1 << (longest - 1).bit_length(),
            padding=padding,
        )

    def lengths(self, segments: Segments) -> tuple[int, ...]:
        """The lengths of ``segments``, and behind them those of segments of padding."""
        whole, rest = divmod(self.total - segments.total, self.padding)
        return (*segments.lengths, *(self.padding,) * whole, *((rest,) if rest else ()))


@dataclass(frozen=True)
class Bucket:
    """Everything of a pass that decides one of its launches."""

    workload: Workload
    """Rows of everything."""
    segments: Division | None
    windows: Division | None
    tiles: Division | None
    """``None``: no node asks for them."""
    side: int
    """Rows and columns of patches that the table of positions covers."""
    pixels: torch.dtype
    backend: Backend


class Planner:
    """Which bucket the passes of a graph on a device belong to."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        attention = [node for node in graph.nodes if node.kind == "attention"]
        whole = [node for node in attention if not node.attributes["windows"]]
        windowed = [node for node in attention if node.attributes["windows"]]
        self._whole, self._windowed = bool(whole), bool(windowed)
        self._bound = whole[0].attributes.get("length_bound") if whole else None
        self._window_bound = windowed[0].attributes.get("length_bound") if windowed else None
        self._pools = any(node.kind == "attention_pooling" for node in graph.nodes)
        self._has_tiles = self._pools or any(value.rows == "tiles" for value in graph.values.values())
        self._rotates = any(node.kind == "rotary_table" for node in graph.nodes)

    def bucket(self, batch: PackedBatch) -> Bucket | None:
        """The bucket of a pass over ``batch``; ``None`` for one with tiles of several sizes that count: it cannot be padded."""
        tile_rows = self._bound
        if tile_rows is None and self._has_tiles:
            sizes = set(batch.attention.tiles.lengths)
            if len(sizes) > 1:
                return None
            tile_rows = sizes.pop()
        workload = planned(batch.workload, rows_per_token=batch.tokens.rows_per_token, tile_rows=tile_rows)
        if not self._has_tiles:
            workload = replace(workload, tiles=0)
        rows = workload.patches
        return Bucket(
            workload=workload,
            segments=Division.of(batch.attention.segments, rows, self._bound) if self._whole else None,
            windows=Division.of(batch.attention.windows, rows, self._window_bound)
            if self._windowed and batch.attention.windows is not None
            else None,
            # A tile of padding is a whole one: there is no pooling over no rows.
            tiles=Division(rows, workload.tiles, tile_rows or 0, tile_rows or 0) if self._pools else None,
            side=1 << (max(SMALLEST_SIDE, batch.attention.side) - 1).bit_length() if self._rotates else 0,
            pixels=batch.pixels.dtype,
            backend=backend_on(self._device),
        )
