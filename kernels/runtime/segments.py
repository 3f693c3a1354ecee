"""How the rows of a packed batch divide into segments that attend only within themselves.

A pack is the rows of many images (or windows, or frames) laid one after another; a *segment* is one run of rows whose
members attend to each other.  This module holds the arithmetic of such a division: cumulative lengths, the flat list of
query tiles that the attention kernel walks, and the runs of equal neighbors that the torch reference handles in one
call.  Nothing of it is computed twice for one :class:`Segments`.

:class:`PlannedSegments` is a division that changes in place: launches that are captured once and replayed over many packs
find it at the same address, in tables of the same size, every time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

__all__ = ["PlannedSegments", "SegmentRun", "Segments", "on_device"]

LARGEST_TOTAL = 2**31 - 1
"""Rows are counted in int32 on the device."""


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
    """The division of ``total`` packed rows into ``count`` segments; immutable, and equal where the lengths are equal.

    Segments of zero rows are allowed: they own no rows, no tile and no run, and keep their place in ``lengths``.

    Attributes:
        lengths: rows of each segment.
        total: rows of all segments.
        count: number of segments, empty ones included.
        longest: rows of the longest segment; 0 where there is none.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths: tuple[int, ...] = tuple(int(length) for length in lengths)
        if any(length < 0 for length in self.lengths):
            raise ValueError(f"segment lengths must not be negative, got {_shortened(self.lengths)}")
        self.total: int = sum(self.lengths)
        if self.total > LARGEST_TOTAL:
            raise ValueError(
                f"{self.total} packed rows exceed the limit of {LARGEST_TOTAL} (rows are int32 on the device); "
                "split the pack"
            )
        self.count: int = len(self.lengths)
        self.longest: int = max(self.lengths, default=0)
        self._tiles: dict[tuple[int, torch.device, int], torch.Tensor] = {}
        self._cu_seqlens: dict[tuple[torch.device, int], torch.Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> "Segments":
        """The division into segments of ``lengths`` rows.

        Raises:
            ValueError: a length is negative, or the rows do not fit int32.
        """
        return cls(lengths)

    def __eq__(self, other: object) -> bool:
        return self.lengths == other.lengths if isinstance(other, Segments) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({_shortened(self.lengths)})"

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """``[count + 1]`` int32 on the CPU: segment ``s`` owns rows ``cu_seqlens[s]`` up to ``cu_seqlens[s + 1]``."""
        ends = torch.tensor(self.lengths, dtype=torch.int64, device="cpu").cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """:attr:`cu_seqlens` on ``device``, copied once for each of its streams."""
        key = (torch.device(device), _stream(device))
        if key not in self._cu_seqlens:
            self._cu_seqlens[key] = on_device(self.cu_seqlens, device)
        return self._cu_seqlens[key]

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """Every tile of ``block_rows`` query rows: ``[tiles, 2]`` int32 of (segment, tile within it), made once.

        Tiles of long segments come first: a tile costs as much as its segment is long, and a device that is handed the
        expensive work first finishes with the cheap work filling the gaps.

        Raises:
            ValueError: ``block_rows`` is not positive.
        """
        if block_rows < 1:
            raise ValueError(f"a tile needs at least one row, got block_rows={block_rows}")
        key = (block_rows, torch.device(device), _stream(device))
        if key not in self._tiles:
            self._tiles[key] = on_device(torch.from_numpy(_tile_list(self.lengths, block_rows)), device)
        return self._tiles[key]

    def groups(self) -> tuple[SegmentRun, ...]:
        """The runs of equal neighboring segments, in row order; together they cover every row exactly once.

        The rows of a run reshape to ``[count, length, ...]`` without a copy, so one batched call serves them all.
        Empty segments own no rows and interrupt no run.
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


class PlannedSegments(Segments):
    """A division into at most ``count`` segments of ``total`` rows, in device tables that stay where they are.

    :meth:`assign` says what the division is now; :meth:`rows_of_tables` is what the tables then have to hold, and whoever
    owns the memory copies it there.  To an operation it is like any other division: ``total``, ``count`` and ``longest``
    are what it is planned for, ``lengths`` is what it is at the moment.  Segments beyond those assigned are empty; a tile
    beyond those that there are lies beyond the end of segment 0, and whoever gets it has nothing to do.

    Args:
        total: rows of all segments.
        count: the most segments.
        longest: rows that no segment exceeds.
        allocate: number of elements → so many int32 on the device, for a table.

    Attributes:
        sealed: whether a table that there is not yet is refused, as it has to be while launches are captured.
    """

    def __init__(self, total: int, count: int, longest: int, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__([0] * count)
        self.total, self.longest = total, longest
        self.sealed = False
        self._allocate = allocate
        self._table = allocate(count + 1)
        self._tables_of_tiles: dict[int, torch.Tensor] = {}

    # Two of them hold two tables, whatever is in these now.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @staticmethod
    def planned_tiles(total: int, count: int, longest: int, block_rows: int) -> int:
        """Tiles that no division into ``count`` segments of ``total`` rows, each at most ``longest``, has more of."""
        return count if longest <= block_rows else count + total // block_rows

    def assign(self, lengths: Iterable[int]) -> None:
        """Makes the division one into segments of ``lengths`` rows; the tables are the caller's to fill.

        Raises:
            ValueError: it is not one that was planned for.
        """
        lengths = tuple(lengths)
        if len(lengths) > self.count or sum(lengths) != self.total or max(lengths, default=0) > self.longest:
            raise ValueError(
                f"{_shortened(lengths)} have {sum(lengths)} rows in {len(lengths)} segments of at most "
                f"{max(lengths, default=0)}; planned are {self.total} in at most {self.count} of at most {self.longest}"
            )
        self.lengths = lengths + (0,) * (self.count - len(lengths))
        # What is computed once for a division is computed again for the next.
        for name in ("cu_seqlens", "_groups"):
            self.__dict__.pop(name, None)

    def rows_of_tables(self) -> Iterator[tuple[torch.Tensor, "np.ndarray[tuple[int, ...], np.dtype[np.int32]]"]]:
        """Each device table, and what it has to hold for the division to be what it was assigned."""
        ends = np.zeros(self.count + 1, dtype=np.int32)
        np.cumsum(self.lengths, out=ends[1:])
        yield self._table, ends
        for block_rows, table in self._tables_of_tiles.items():
            tiles = np.empty(table.shape, dtype=np.int32)
            found = _tile_list(self.lengths, block_rows)
            tiles[: len(found)] = found
            tiles[len(found) :] = (0, -(-self.total // block_rows))
            yield table, tiles

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """The table of cumulative lengths, which is on one device only."""
        return self._table

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """The table of tiles of ``block_rows`` rows, made and filled the first time that it is asked for.

        Raises:
            RuntimeError: it is not there, and the division is sealed.
        """
        if block_rows not in self._tables_of_tiles:
            if self.sealed:
                raise RuntimeError(f"there is no table of tiles of {block_rows} rows, and none may be made now")
            planned = self.planned_tiles(self.total, self.count, self.longest, block_rows)
            table = self._allocate(2 * planned).view(planned, 2)
            self._tables_of_tiles[block_rows] = table
            rows = next(rows for own, rows in self.rows_of_tables() if own is table)
            table.copy_(on_device(torch.from_numpy(rows), table.device))
        return self._tables_of_tiles[block_rows]


def _stream(device: torch.device) -> int:
    """The current stream of ``device``: what is copied there is not waited for, so only there it is sure to have come."""
    return torch.cuda.current_stream(device).stream_id if torch.device(device).type == "cuda" else 0


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table of the CPU on ``device``, without waiting for it: a copy out of pageable memory would."""
    if torch.device(device).type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def _tile_list(lengths: tuple[int, ...], block_rows: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """``[tiles, 2]``: segment and tile within it, those of long segments first."""
    rows = np.array(lengths, dtype=np.int64)
    order = np.argsort(-rows, kind="stable")
    tiles_each = -(-rows[order] // block_rows)
    tiles = np.empty((int(tiles_each.sum()), 2), dtype=np.int32)
    tiles[:, 0] = np.repeat(order, tiles_each)
    tiles[:, 1] = np.arange(len(tiles)) - np.repeat(tiles_each.cumsum() - tiles_each, tiles_each)
    return tiles


def _shortened(lengths: tuple[int, ...], shown: int = 8) -> str:
    """``lengths`` for a message: the first few, and how many there are."""
    head = ", ".join(map(str, lengths[:shown]))
    return f"[{head}]" if len(lengths) <= shown else f"[{head}, …; {len(lengths)} in all]"
