"""How the rows of a packed batch divide into segments that attend only within themselves.

A pack is the rows of many images (or windows, or frames) laid one after another; a *segment* is one run of rows whose
members attend to each other.  This module holds the arithmetic of such a division: cumulative lengths, the flat list of
query tiles that the attention kernel walks, and the runs of equal neighbours that the torch reference handles in one
call.  It needs torch only, and nothing of it is computed twice for one :class:`Segments`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

__all__ = ["SegmentRun", "Segments"]

LARGEST_TOTAL = 2**31 - 1
"""Rows are counted in int32 on the device."""


@dataclass(frozen=True)
class SegmentRun:
    """``count`` neighbouring segments of ``length`` rows each; the first begins at row ``start``."""

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
        self._tiles: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._cu_seqlens: dict[torch.device, torch.Tensor] = {}

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
        ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    def cu_seqlens_on(self, device: torch.device) -> torch.Tensor:
        """:attr:`cu_seqlens` on ``device``, copied once."""
        device = torch.device(device)
        if device not in self._cu_seqlens:
            self._cu_seqlens[device] = self.cu_seqlens.to(device)
        return self._cu_seqlens[device]

    def tiles(self, block_rows: int, device: torch.device) -> torch.Tensor:
        """Every tile of ``block_rows`` query rows: ``[tiles, 2]`` int32 of (segment, tile within it), made once.

        Tiles of long segments come first: a tile costs as much as its segment is long, and a device that is handed the
        expensive work first finishes with the cheap work filling the gaps.

        Raises:
            ValueError: ``block_rows`` is not positive.
        """
        if block_rows < 1:
            raise ValueError(f"a tile needs at least one row, got block_rows={block_rows}")
        key = (block_rows, torch.device(device))
        if key not in self._tiles:
            self._tiles[key] = self._tile_list(block_rows).to(device)
        return self._tiles[key]

    def _tile_list(self, block_rows: int) -> torch.Tensor:
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        order = torch.argsort(lengths, descending=True, stable=True)
        tiles_each = (lengths[order] + block_rows - 1) // block_rows
        segment = torch.repeat_interleave(order, tiles_each)
        first = torch.repeat_interleave(tiles_each.cumsum(0) - tiles_each, tiles_each)
        return torch.stack([segment, torch.arange(len(segment)) - first], dim=1).to(torch.int32)

    def groups(self) -> tuple[SegmentRun, ...]:
        """The runs of equal neighbouring segments, in row order; together they cover every row exactly once.

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


def _shortened(lengths: tuple[int, ...], shown: int = 8) -> str:
    """``lengths`` for a message: the first few, and how many there are."""
    head = ", ".join(map(str, lengths[:shown]))
    return f"[{head}]" if len(lengths) <= shown else f"[{head}, …; {len(lengths)} in all]"
