"""Packing: the facts about a batch, held against transformers where it states them too."""

from dataclasses import replace

import pytest
import torch
from test_graph import CONFIG
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from tritontower.batch import Grid, PackedBatch
from tritontower.config import TowerConfig

GRIDS: list[Grid] = [(1, 4, 6), (1, 2, 2), (3, 2, 8), (1, 10, 4)]


def pack(grids: list[Grid], inner: int = 588, config: TowerConfig = CONFIG) -> PackedBatch:
    patches = sum(t * h * w for t, h, w in grids)
    return PackedBatch.pack(
        config,
        torch.zeros(patches, inner),
        grids,
        original_sizes=[(w * 14 + 3, h * 14 - 1) for _, h, w in grids],
        content_hashes=[f"hash {number}" for number in range(len(grids))],
    )


def test_positions_and_segments_are_those_of_transformers() -> None:
    batch = pack(GRIDS)
    grids = torch.tensor(GRIDS)
    assert torch.equal(batch.positions.long(), get_vision_position_ids(grids, 2))
    assert torch.equal(batch.segments.cu_seqlens.int(), get_vision_cu_seqlens(grids).int())


def test_a_clip_is_one_segment_where_the_tower_says_so() -> None:
    assert pack(GRIDS).segments.lengths == (24, 4, 16, 16, 16, 40)
    assert pack(GRIDS, config=replace(CONFIG, segments="picture")).segments.lengths == (24, 4, 48, 40)


def test_counts() -> None:
    batch = pack(GRIDS)
    assert len(batch) == 4
    assert batch.token_counts == (6, 1, 12, 10)
    assert batch.workload.patches == 116
    assert batch.workload.tokens == 29
    assert batch.workload.scores == 24**2 + 4**2 + 3 * 16**2 + 40**2
    assert batch.side == 10
    assert batch.processed_sizes == ((84, 56), (28, 28), (112, 28), (56, 140))


def test_an_empty_batch_is_a_batch() -> None:
    batch = pack([])
    assert len(batch) == batch.side == batch.workload.patches == 0
    assert batch.token_counts == ()


@pytest.mark.parametrize(
    ("grids", "shape", "message"),
    [
        ([(1, 4, 6)], (23, 588), r"shape \[23, 588\].*\[24, 588\]"),
        ([(1, 4, 6)], (24, 600), r"\[24, 588\] for still pictures or \[24, 1176\] for clips"),
        ([(1, 3, 8)], (24, 588), "multiples of 2"),
        ([(0, 4, 6)], (0, 588), "positive"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(grids: list[Grid], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedBatch.pack(CONFIG, torch.zeros(shape), grids, original_sizes=[(1, 1)], content_hashes=[""])


def test_facts_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        PackedBatch.pack(CONFIG, torch.zeros(24, 588), [(1, 4, 6)], original_sizes=[], content_hashes=[""])
