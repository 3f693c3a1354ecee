"""Packing: metadata of a batch, compared with transformers where it computes the same."""

from dataclasses import replace

import pytest
import torch
from support.configs import CONFIG, FIXED, TILED
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from tritontower.batch.layout import Assembly, ImageLayout
from tritontower.batch.packed_batch import Grid, PackedBatch
from tritontower.config import PositionTable, TowerConfig, Windows
from tritontower.graph.ir import Workload

GRIDS: list[Grid] = [(1, 4, 6), (1, 2, 2), (3, 2, 8), (1, 10, 4)]


def layouts(grids: list[Grid]) -> list[ImageLayout]:
    return [ImageLayout.of_one_tile(grid, CONFIG.patch.size) for grid in grids]


def pack(grids: list[Grid], inner: int = 588, config: TowerConfig = CONFIG) -> PackedBatch:
    patches = sum(t * h * w for t, h, w in grids)
    return PackedBatch.pack(
        config,
        torch.zeros(patches, inner),
        layouts(grids),
        original_sizes=[(w * 14 + 3, h * 14 - 1) for _, h, w in grids],
        content_hashes=[f"hash {number}" for number in range(len(grids))],
    )


def test_positions_and_segments_are_those_of_transformers() -> None:
    batch = pack(GRIDS)
    grids = torch.tensor(GRIDS)
    assert torch.equal(batch.attention.positions.long(), get_vision_position_ids(grids, 2))
    assert torch.equal(batch.attention.segments.cu_seqlens.int(), get_vision_cu_seqlens(grids).int())


def test_counts_and_segments() -> None:
    batch = pack(GRIDS)
    assert batch.attention.segments.lengths == (24, 4, 16, 16, 16, 40)
    assert pack(GRIDS, config=replace(CONFIG, segments="image")).attention.segments.lengths == (24, 4, 48, 40)
    assert len(batch) == 4
    assert batch.images.token_counts == (6, 1, 12, 10)
    assert batch.workload == Workload(116, 29, 24**2 + 4**2 + 3 * 16**2 + 40**2, selected=116, merged=29, tiles=4)
    assert batch.attention.side == 10
    assert batch.images.processed_sizes == ((84, 56), (28, 28), (112, 28), (56, 140))
    empty = pack([])
    assert len(empty) == empty.attention.side == empty.workload.patches == 0


@pytest.mark.parametrize(
    ("grids", "shape", "message"),
    [
        ([(1, 4, 6)], (23, 588), r"shape \[24, 588\].*got \[23, 588\]"),
        ([(1, 4, 6)], (24, 600), r"\[24, 588\] for still images or \[24, 1176\] for videos"),
        ([(1, 3, 8)], (24, 588), "multiples of 2"),
        ([(0, 4, 6)], (0, 588), "positive"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(grids: list[Grid], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedBatch.pack(CONFIG, torch.zeros(shape), layouts(grids), original_sizes=[(1, 1)], content_hashes=[""])


def test_metadata_of_the_wrong_number_is_rejected() -> None:
    with pytest.raises(ValueError, match="one entry per layout"):
        PackedBatch.pack(CONFIG, torch.zeros(24, 588), layouts([(1, 4, 6)]), original_sizes=[], content_hashes=[""])


WINDOWED = replace(CONFIG, windows=Windows(side=2, full_blocks=(31,)))


def numbered(patches: int, inner: int) -> torch.Tensor:
    return torch.arange(1.0, patches + 1).unsqueeze(1).expand(patches, inner).contiguous()


def packed(config: TowerConfig, parts: list[ImageLayout]) -> PackedBatch:
    pixels = numbered(sum(part.patches for part in parts), config.patch.still_inner)
    return PackedBatch.pack(
        config, pixels, parts, original_sizes=[(9, 9)] * len(parts), content_hashes=[""] * len(parts)
    )


def test_windows_stand_side_by_side_and_the_selection_undoes_it() -> None:
    batch = packed(WINDOWED, layouts([(1, 6, 10), (2, 4, 4)]))
    plain = packed(CONFIG, layouts([(1, 6, 10), (2, 4, 4)]))
    assert batch.attention.windows is not None
    assert batch.tokens.selection is not None
    # 3 × 5 tokens in windows of 2 × 2: two bands of three windows, the last ones narrow or low; then two whole windows.
    assert batch.attention.windows.lengths == (16, 16, 8, 8, 8, 4, 16, 16)
    assert batch.attention.segments == plain.attention.segments
    undone = batch.tokens.selection.squeeze(1)
    assert torch.equal(batch.pixels[undone], plain.pixels)
    assert torch.equal(batch.attention.positions[undone], plain.attention.positions)
    for rows in batch.attention.positions.split(batch.attention.windows.lengths):
        low, high = rows.min(0).values, rows.max(0).values
        assert (high - low < 4).all()
        assert (low % 4 == 0).all()
    assert batch.workload.window_scores == sum(length * length for length in batch.attention.windows.lengths)
    assert batch.workload.scores == 60**2 + 2 * 16**2


def test_a_class_token_is_a_patch_of_zeros_before_each_tile() -> None:
    tile = ImageLayout.of_one_tile((1, 3, 3), 2)
    batch = packed(FIXED, [tile, tile])
    assert batch.attention.segments.lengths == (10, 10)
    assert batch.tokens.class_rows.flatten().tolist() == [0, 10]
    assert batch.attention.position_index is not None
    assert batch.attention.position_index.flatten().tolist() == list(range(10)) * 2
    assert not batch.pixels[[0, 10]].any()
    assert batch.tokens.selection is not None
    assert batch.tokens.selection.flatten().tolist() == [*range(1, 10), *range(11, 20)]
    assert torch.equal(batch.pixels[batch.tokens.selection.squeeze(1)], numbered(18, 12))
    assert batch.images.token_counts == (9, 9)
    kept = packed(replace(FIXED, keep_class_token=True), [tile, tile])
    assert kept.tokens.selection is None
    assert kept.images.token_counts == (10, 10)
    with pytest.raises(ValueError, match="no other positions"):
        packed(FIXED, [ImageLayout.of_one_tile((1, 3, 4), 2)])


def test_tiles_are_put_together_and_padding_is_never_projected() -> None:
    one = ImageLayout.of_one_tile((1, 3, 3), 2)
    # Two tiles; of the second only the middle row counts, and a newline ends it.
    index = torch.tensor([[row] for row in (*range(9), 12, 13, 14, -1)], dtype=torch.int32)
    tiled = ImageLayout(((1, 3, 3), (1, 3, 3)), (6, 6), (1, 3, 3), Assembly(index))
    batch = packed(TILED, [tiled, one])
    assert batch.images.token_counts == (13, 9)
    assert batch.images.tile_counts == (2, 1)
    assert batch.tokens.selection is not None
    assert batch.tokens.selection.flatten().tolist() == [*range(1, 10), 14, 15, 16, *range(21, 30)]
    assert batch.tokens.assembly_index is not None
    assert batch.tokens.assembly_index.flatten().tolist() == [*range(12), -1, *range(12, 21)]
    assert batch.workload == Workload(30, 22, 300, selected=21, merged=21, tiles=3)
    assert PackedBatch.without_pixels(TILED, [tiled, one]).workload == batch.workload
    wide = packed(replace(TILED, assembly_taps=4), [tiled])
    assert wide.tokens.assembly_weights is not None
    assert wide.tokens.assembly_weights.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 13


def test_bilinear_positions_reach_every_corner_of_the_table() -> None:
    config = replace(CONFIG, position_table=PositionTable(side=5, sampling="bilinear"))
    batch = packed(config, layouts([(1, 4, 6), (2, 2, 2)]))
    assert batch.attention.position_index is not None
    assert batch.attention.position_weights is not None
    assert torch.allclose(batch.attention.position_weights.sum(1), torch.ones(32))
    table = torch.randn(25, 3)
    rows = (table[batch.attention.position_index.long()] * batch.attention.position_weights.unsqueeze(2)).sum(1)
    stretched = torch.nn.functional.interpolate(
        table.T.view(1, 3, 5, 5), size=(4, 6), mode="bilinear", align_corners=True
    )
    places = batch.attention.positions[:24].long()
    assert torch.allclose(rows[:24], stretched[0, :, places[:, 0], places[:, 1]].T, atol=1e-6)
    # Both frames of a video have the positions of the frame.
    assert torch.equal(rows[24:28], rows[28:])


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = packed(TILED, [ImageLayout.of_one_tile((1, 3, 3), 2)])
    before = {name: tensor.clone() for name, tensor in batch.tensors.items()}
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert moved.tensors.keys() == batch.tensors.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in batch.tensors.items())
    assert moved.workload == batch.workload
    assert moved.attention.side == batch.attention.side == 3


def test_a_batch_has_the_form_of_the_towers_that_it_is_for() -> None:
    batch = pack(GRIDS)
    assert batch.form == CONFIG.batch_form
    assert batch.form == PackedBatch.without_pixels(CONFIG, layouts(GRIDS)).form
    assert batch.form == replace(CONFIG, depth=1, features=(1,), mlp_hidden=64).batch_form, "not what layers there are"
    others = [
        replace(CONFIG, patch=replace(CONFIG.patch, size=16)),
        replace(CONFIG, segments="image"),
        replace(CONFIG, windows=Windows(4, (1,))),
        replace(CONFIG, position_table=PositionTable(8, "bilinear")),
        replace(CONFIG, projector=None),
        replace(CONFIG, newline=True),
        replace(CONFIG, assembly_taps=4),
    ]
    forms = {other.batch_form for other in others}
    assert len(forms) == len(others)
    assert batch.form not in forms
    assert CONFIG.batch_form.differences(others[2].batch_form) == "window 4 instead of None"
