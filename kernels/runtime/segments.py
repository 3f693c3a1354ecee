"""Segments of a packed batch: runs of rows that attend only within themselves.

A batch is the rows of many images (or windows, or frames) concatenated; a *segment* is a run of rows that attend to each
other.  :class:`Segments` computes cumulative lengths, the list of query tiles for the attention kernel, and the runs of
equal neighboring segments that the torch reference processes in one call.  Each is computed once.

:class:`StaticSegments` changes in place: its device tables keep their address and size, as a replayed CUDA graph needs.
:class:`DeviceSegments` leaves boundaries that are on the device there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from .checks import ceil_div

LARGEST_TOTAL = 2**31 - 1
"""The kernels count rows in int32."""


@dataclass(frozen=True)
class SegmentRun:
    """``count`` neighboring segments of ``length`` rows each; the first begins at row ``start``."""

    length: int
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.length * self.count


class Segments:
    """Division of ``total`` packed rows into ``count`` segments; immutable, and equal if the lengths are equal.

    Segments of zero rows are allowed: they have no tile and no run, and keep their place in ``lengths``.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths: tuple[int, ...] = tuple(int(length) for length in lengths)
        if any(length < 0 for length in self.lengths):
            raise ValueError(f"segment lengths must not be negative, got {_shortened(self.lengths)}")
        self.total: int = sum(self.lengths)
        if self.total > LARGEST_TOTAL:
            raise ValueError(
                f"segments must have at most {LARGEST_TOTAL} rows (int32 on the device), got {self.total}; "
                "split the batch"
            )
        self.count: int = len(self.lengths)
        self.longest: int = max(self.lengths, default=0)
        self._tiles: dict[tuple[int, torch.device, int], torch.Tensor] = {}
        self._cu_seqlens: dict[tuple[torch.device, int], torch.Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> "Segments":
        """Makes segments of ``lengths`` rows; raises ``ValueError`` for a negative one, or rows that exceed int32."""
        return cls(lengths)

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: torch.Tensor, total: int, max_seqlen: int | torch.Tensor | None = None
    ) -> "Segments":
        """Makes segments of the boundaries ``cu_seqlens``, ``[count + 1]`` integers from 0 to ``total``.

        Boundaries on a GPU stay there, and nothing waits for them: a ``max_seqlen`` on a GPU is not read either.
        """
        if cu_seqlens.device.type == "cpu":
            return Segments.from_lengths(cu_seqlens.diff().tolist())
        return DeviceSegments(cu_seqlens, total, max_seqlen)

    def __eq__(self, other: object) -> bool:
        return self.lengths == other.lengths if isinstance(other, Segments) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({_shortened(self.lengths)})"

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """``[count + 1]`` int32 on the CPU: segment ``s`` has rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``."""
        ends = torch.tensor(self.lengths, dtype=torch.int64, device="cpu").cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """:attr:`cu_seqlens` on ``device``, copied once for each of its streams."""
        key = (torch.device(device), _stream(device))
        if key not in self._cu_seqlens:
            self._cu_seqlens[key] = on_device(self.cu_seqlens, device)
        return self._cu_seqlens[key]

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """All tiles of ``block_rows`` query rows: ``[tiles, 2]`` int32 of (segment, tile within it), made once.

        Tiles of long segments come first: a tile costs as much as its segment is long, so that the cheap tiles fill the
        gaps at the end.
        """
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        key = (block_rows, torch.device(device), _stream(device))
        if key not in self._tiles:
            self._tiles[key] = on_device(torch.from_numpy(_tile_list(self.lengths, block_rows)), device)
        return self._tiles[key]

    def groups(self) -> tuple[SegmentRun, ...]:
        """Runs of equal neighboring segments, in row order, which cover every row exactly once.

        The rows of a run reshape to ``[count, length, ...]`` without a copy, so that one batched call computes them all.
        Empty segments do not interrupt a run.
        """
        return self._groups

    @cached_property
    def _groups(self) -> tuple[SegmentRun, ...]:
        runs: list[SegmentRun] = []
        start = 0
        for length in filter(None, self.lengths):
            if runs and runs[-1].length == length:
                runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(SegmentRun(length, start, 1))
            start += length
        return tuple(runs)


class StaticSegments(Segments):
    """Division into at most ``count`` segments of ``total`` rows, in device tables that keep their address and size.

    :meth:`assign` sets the current division; :meth:`list_tables` then lists the contents of the tables, which the owner of
    the memory copies there.  Operations use it like any other division: ``total``, ``count`` and ``longest`` are the
    planned limits, ``lengths`` are the current ones.  Segments after the assigned ones are empty.  A tile after the
    existing ones lies after the end of segment 0, so its program does nothing.

    ``allocate`` returns a device table of so many int32.  While ``is_sealed``, no other table is made, because a capture is
    running.
    """

    def __init__(self, total: int, count: int, longest: int, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__([0] * count)
        self.total, self.longest = total, longest
        self.is_sealed = False
        self._allocate = allocate
        self._table = allocate(count + 1)
        self._tables_of_tiles: dict[int, torch.Tensor] = {}

    # Two instances have two sets of tables, whatever they hold now.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @staticmethod
    def max_tiles(total: int, count: int, longest: int, block_rows: int) -> int:
        """Maximum number of tiles of a division into ``count`` segments of at most ``longest`` rows, ``total`` together."""
        return count if longest <= block_rows else count + total // block_rows

    def assign(self, lengths: Iterable[int]) -> None:
        """Sets the current lengths; the caller then fills the tables."""
        lengths = tuple(lengths)
        if len(lengths) > self.count or sum(lengths) != self.total or max(lengths, default=0) > self.longest:
            raise ValueError(
                f"segments must have {self.total} rows in at most {self.count} segments of at most {self.longest}, got "
                f"{_shortened(lengths)}: {sum(lengths)} rows in {len(lengths)} segments of at most "
                f"{max(lengths, default=0)}"
            )
        self.lengths = lengths + (0,) * (self.count - len(lengths))
        # These are cached for one division.
        for name in ("cu_seqlens", "_groups"):
            self.__dict__.pop(name, None)

    def list_tables(self) -> Iterator[tuple[torch.Tensor, "np.ndarray[tuple[int, ...], np.dtype[np.int32]]"]]:
        """Yields each device table with its contents for the current lengths."""
        ends = np.zeros(self.count + 1, dtype=np.int32)
        np.cumsum(self.lengths, out=ends[1:])
        yield self._table, ends
        for block_rows, table in self._tables_of_tiles.items():
            tiles = np.empty(table.shape, dtype=np.int32)
            found = _tile_list(self.lengths, block_rows)
            tiles[: len(found)] = found
            tiles[len(found) :] = (0, ceil_div(self.total, block_rows))
            yield table, tiles

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """The device table of cumulative lengths."""
        return self._table

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """The device table of tiles of ``block_rows`` rows, made and filled on first use."""
        if block_rows not in self._tables_of_tiles:
            if self.is_sealed:
                raise RuntimeError(f"the table of tiles of {block_rows} rows must be made before the capture starts")
            planned = self.max_tiles(self.total, self.count, self.longest, block_rows)
            table = self._allocate(2 * planned).view(planned, 2)
            self._tables_of_tiles[block_rows] = table
            rows = next(rows for own, rows in self.list_tables() if own is table)
            table.copy_(on_device(torch.from_numpy(rows), table.device))
        return self._tables_of_tiles[block_rows]


class DeviceSegments(Segments):
    """Division of ``total`` rows at boundaries that only the device reads; ``longest`` is a bound.

    The boundaries are not checked: that they rise from 0 to ``total`` is up to the caller.
    """

    def __init__(self, cu_seqlens: torch.Tensor, total: int, max_seqlen: int | torch.Tensor | None = None) -> None:
        super().__init__(())
        del self.lengths
        is_known = isinstance(max_seqlen, int) or (max_seqlen is not None and max_seqlen.device.type == "cpu")
        self.total, self.count = total, len(cu_seqlens) - 1
        self.longest = min(total, int(max_seqlen)) if is_known and max_seqlen is not None else total
        self._table = cu_seqlens.to(torch.int32).contiguous()

    # A comparison of lengths would wait for the device.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Rows of each segment, copied from the device; kernels of attention do without."""
        return tuple(self._table.diff().tolist())

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """The given boundaries in int32."""
        return self._table

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """As many tiles as any such division may have; those after the existing ones lie after the last segment's end."""
        key = (block_rows, self._table.device, _stream(self._table.device))
        if key not in self._tiles:
            tiles_each = (self._table.diff() + block_rows - 1) // block_rows
            ends = tiles_each.cumsum(0)
            index = torch.arange(self.count + self.total // block_rows, device=ends.device)
            segment = torch.searchsorted(ends, index, right=True).clamp_(max=self.count - 1)
            tile = index - (ends - tiles_each)[segment]
            self._tiles[key] = torch.stack([segment, tile], 1).to(torch.int32)
        return self._tiles[key]


def _stream(device: torch.device) -> int:
    # Copies are not waited for, so a table is complete only for work on the same stream.
    return torch.cuda.current_stream(device).stream_id if torch.device(device).type == "cuda" else 0


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU table to ``device`` without waiting; a copy from pageable memory would wait."""
    if torch.device(device).type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=1024)  # sizes of images recur, and forward passes wait for this
def _tile_list(lengths: tuple[int, ...], block_rows: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    rows = np.array(lengths, dtype=np.int64)
    order = np.argsort(-rows, kind="stable")
    tiles_each = -(-rows[order] // block_rows)
    tiles = np.empty((int(tiles_each.sum()), 2), dtype=np.int32)
    tiles[:, 0] = np.repeat(order, tiles_each)
    tiles[:, 1] = np.arange(len(tiles)) - np.repeat(tiles_each.cumsum() - tiles_each, tiles_each)
    return tiles


def _shortened(lengths: tuple[int, ...], shown: int = 8) -> str:
    head = ", ".join(map(str, lengths[:shown]))
    return f"[{head}]" if len(lengths) <= shown else f"[{head}, …; {len(lengths)} in all]"
