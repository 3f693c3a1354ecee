"""Segments of packed rows: cumulative lengths, tiles, runs, and tables that change in place."""

import pytest
import torch

from tritontower.kernels.runtime.segments import SegmentRun, Segments, StaticSegments

CPU = torch.device("cpu")


def test_attributes():
    segments = Segments.from_lengths([3, 0, 150, 1])
    assert segments.lengths == (3, 0, 150, 1)
    assert (segments.total, segments.count, segments.longest) == (154, 4, 150)
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 153, 154]
    assert repr(Segments([1] * 1000)) == "Segments([1, 1, 1, 1, 1, 1, 1, 1, …; 1000 in all])"


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty_segments(lengths):
    segments = Segments(lengths)
    assert (segments.total, segments.longest) == (0, 0)
    assert segments.cu_seqlens.tolist() == [0] * (len(lengths) + 1)
    assert segments.tiles(64, CPU).shape == (0, 2)
    assert segments.groups() == ()


def test_tiles_cover_every_row_once():
    segments = Segments([1, 64, 77, 0, 150, 64])
    rows = [
        segments.cu_seqlens[segment].item() + row
        for segment, tile in segments.tiles(32, CPU).tolist()
        for row in range(tile * 32, min((tile + 1) * 32, segments.lengths[segment]))
    ]
    assert sorted(rows) == list(range(segments.total))


def test_tiles_of_long_segments_come_first():
    segments = Segments([64, 1, 200, 64])
    assert segments.tiles(100, CPU).tolist() == [[2, 0], [2, 1], [0, 0], [3, 0], [1, 0]]
    assert segments.tiles(100, CPU).dtype == torch.int32


def test_device_tensors_are_made_once():
    segments = Segments([5, 6])
    assert segments.tiles(4, CPU) is segments.tiles(4, CPU)
    assert segments.tiles(4, CPU) is not segments.tiles(8, CPU)
    assert segments.cu_seqlens_on(CPU) is segments.cu_seqlens_on(CPU)


def test_groups_are_runs_of_equal_neighbors():
    assert Segments([0, 7, 0, 7, 0]).groups() == (SegmentRun(7, 0, 2),)
    groups = Segments([64, 64, 48, 64, 64, 64]).groups()
    assert groups == (SegmentRun(64, 0, 2), SegmentRun(48, 128, 1), SegmentRun(64, 176, 3))
    assert [run.stop for run in groups] == [128, 176, 368]


def test_equal_lengths_make_equal_segments():
    assert Segments([1, 2]) == Segments((1, 2))
    assert hash(Segments([1, 2])) == hash(Segments([1, 2]))
    assert Segments([1, 2]) != Segments([2, 1])
    assert Segments([1]) != (1,)


def test_negative_length_is_rejected():
    with pytest.raises(ValueError, match=r"must not be negative, got \[3, -1\]"):
        Segments([3, -1])


def test_rows_must_fit_int32():
    assert Segments([2**31 - 1]).total == 2**31 - 1
    with pytest.raises(ValueError, match="at most 2147483647 rows"):
        Segments([2**30, 2**30])


def test_tiles_need_a_row():
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        Segments([3]).tiles(0, CPU)


class TestStatic:
    """Segments that change in place."""

    def make(self, total=100, count=8, longest=64):
        return StaticSegments(total, count, longest, lambda size: torch.full((size,), -7, dtype=torch.int32))

    def fill(self, segments):
        for table, rows in segments.list_tables():
            table.copy_(torch.from_numpy(rows))

    @pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
    def test_tables_keep_their_address(self, block_rows):
        segments = self.make()
        tables = segments.cu_seqlens_on(CPU), None
        for lengths in ([64, 30, 6], [1] * 4 + [64, 32], [20] * 5, [0, 50, 50]):
            segments.assign(lengths)
            self.fill(segments)
            tiles = segments.tiles(block_rows, CPU)
            assert tables[1] in (None, tiles.data_ptr())
            tables = tables[0], tiles.data_ptr()
            assert segments.cu_seqlens_on(CPU) is tables[0]
            assert tables[0].tolist() == Segments(lengths).cu_seqlens.tolist() + [100] * (8 - len(lengths))
            assert segments.cu_seqlens.tolist() == tables[0].tolist()
            expected = Segments(lengths).tiles(block_rows, CPU)
            assert torch.equal(tiles[: len(expected)], expected)
            segment, tile = tiles[len(expected) :].unbind(1)
            assert (tile * block_rows >= torch.tensor(segments.lengths)[segment.long()]).all()
            assert segments.groups() == Segments(lengths).groups()

    def test_limits_do_not_change(self):
        segments = self.make()
        segments.assign([50, 50])
        assert (segments.total, segments.count, segments.longest) == (100, 8, 64)
        assert len(segments.lengths) == 8
        assert segments != self.make()
        assert segments == segments

    def test_planned_tiles_are_an_upper_bound(self):
        for total, count, longest, block_rows in [(100, 8, 64, 16), (100, 100, 1, 16), (100, 3, 100, 64), (7, 7, 7, 2)]:
            planned = StaticSegments.max_tiles(total, count, longest, block_rows)
            worst = [min(longest, total - (count - 1))] + [1] * (count - 1)
            for lengths in (worst, [longest] * (total // longest)):
                assert len(Segments(lengths[:count]).tiles(block_rows, CPU)) <= planned

    @pytest.mark.parametrize("lengths", [[99], [101], [65, 35], [12] * 8 + [4]])
    def test_lengths_must_fit_the_plan(self, lengths):
        with pytest.raises(ValueError, match="must have 100 rows in at most 8 segments of at most 64"):
            self.make().assign(lengths)

    def test_sealed_segments_make_no_table(self):
        segments = self.make()
        segments.assign([50, 50])
        known = segments.tiles(16, CPU)
        segments.is_sealed = True
        assert segments.tiles(16, CPU) is known
        with pytest.raises(RuntimeError, match="tiles of 32 rows must be made before"):
            segments.tiles(32, CPU)
