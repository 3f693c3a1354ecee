"""Patch positions, frequencies and rotary tables: the same bits as in transformers."""

import random

import pytest
import torch
from support.numbers import relative_error
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from tritontower.kernels.rowwise.positions import (
    axial_frequencies,
    bilinear_taps,
    merge_block_positions,
    rotary_table,
    window_order,
)


def random_grids(merge, seed, count=4, longest=20):
    """Images and a few videos."""
    draw = random.Random(seed)
    return [
        (draw.choice((1, 1, 3)), merge * draw.randint(1, longest), merge * draw.randint(1, longest))
        for _ in range(count)
    ]


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_positions_are_those_of_transformers(merge, seed):
    grids = random_grids(merge, seed)
    positions = merge_block_positions(grids, merge)
    assert positions.dtype == torch.int32
    assert torch.equal(positions.long(), get_vision_position_ids(torch.tensor(grids), merge))


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(2))
def test_windows_are_those_of_transformers(merge, side, seed):
    grids = random_grids(merge, seed)
    order, lengths = window_order(grids, merge, side)
    # Windows are given in pixels there, here of patches of 14.
    expected, bounds = get_vision_window_index(torch.tensor(grids), merge, side * merge * 14, 14)
    assert torch.equal(order, expected)
    assert lengths == (bounds.diff() // merge**2).tolist()


@pytest.mark.parametrize("grids", [[], [(0, 4, 4)], [(1, 0, 4)], [(1, 4, 0)]], ids=str)
def test_no_windows(grids):
    order, lengths = window_order(grids, 2, 2)
    assert order.shape == (0,)
    assert order.dtype == torch.int64
    assert lengths == []


def make_taps(grids, merge, side):
    return bilinear_taps(merge_block_positions(grids, merge), grids, side)


def summed(index, weights, table):
    """``[N, D]`` fp64: each row's taps, weighted and added."""
    return (table.double()[index.long()] * weights.double()[..., None]).sum(1)


def stretched(grids, merge, side, table):
    """The same by ``interpolate``, in the order of the merge blocks."""
    square = table.double().view(1, side, side, -1).permute(0, 3, 1, 2)
    rows = []
    for frames, height, width in grids:
        grid = torch.nn.functional.interpolate(square, (height, width), mode="bilinear", align_corners=True)[0]
        vertical, horizontal = merge_block_positions([(1, height, width)], merge).long().unbind(1)
        rows.append(grid[:, vertical, horizontal].T.repeat(frames, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("side", [1, 2, 4, 48])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_tables_are_stretched_from_corner_to_corner(side, merge, seed):
    grids = [*random_grids(merge, seed, longest=40), (1, merge, merge), (2, merge * 24, merge)]
    table = torch.randn(side * side, 8, generator=torch.Generator().manual_seed(seed))
    index, weights = make_taps(grids, merge, side)
    assert (index.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert index.min() >= 0
    assert index.max() < side * side
    assert weights.min() >= 0.0
    assert relative_error(summed(index, weights, table), stretched(grids, merge, side, table)) <= 1e-7
    theirs = get_vision_interpolation_indices_and_weights(torch.tensor(grids), side, "bilinear", True, merge)
    # transformers computes the coordinates in fp32, where one near 47 is off by up to 2e-6.
    assert relative_error(summed(index, weights, table), summed(*theirs, table)) <= 2e-6


def test_corners_and_whole_rows_are_the_tables_own():
    index, weights = make_taps([(1, 48, 48)], 2, 48)
    positions = merge_block_positions([(1, 48, 48)], 2)
    assert torch.equal(weights.max(dim=1).values, torch.ones(48 * 48))
    assert torch.equal(index.gather(1, weights.argmax(1, keepdim=True))[:, 0], positions[:, 0] * 48 + positions[:, 1])
    # 95 = 2 · 47 + 1: every other place of the larger grid is a row of the table, to the last bit.
    index, weights = make_taps([(1, 95, 95)], 1, 48)
    whole = (merge_block_positions([(1, 95, 95)], 1) % 2 == 0).all(1)
    assert torch.equal(weights[whole].max(dim=1).values, torch.ones(48 * 48))
    assert torch.equal(
        index[whole].gather(1, weights[whole].argmax(1, keepdim=True))[:, 0].int(), torch.arange(48 * 48)
    )
    assert weights[~whole].max() == 0.5


def test_taps_do_not_depend_on_the_batch():
    grids = [(1, 6, 10), (2, 14, 4), (1, 2, 2)]
    packed = make_taps(grids, 2, 48)
    alone = [make_taps([grid], 2, 48) for grid in grids]
    assert torch.equal(packed[0], torch.cat([index for index, _ in alone]))
    assert torch.equal(packed[1], torch.cat([weights for _, weights in alone]))


def qwen(head_dim, theta):
    config = Qwen2VLVisionConfig(embed_dim=head_dim * 2, num_heads=2)
    config.rope_parameters = {"rope_theta": theta, "rope_type": "axial"}
    return Qwen2VLVisionRotaryEmbedding(config)


def pixtral(head_dim, theta):
    config = PixtralVisionConfig(hidden_size=head_dim * 2, num_attention_heads=2, head_dim=head_dim)
    config.rope_parameters = {"rope_theta": theta, "rope_type": "axial"}
    return PixtralVisionRotaryEmbedding(config)


@pytest.mark.parametrize(("head_dim", "theta"), [(80, 10000.0), (72, 10000.0), (64, 10000), (128, 1e6), (4, 100.0)])
def test_frequencies_are_those_of_transformers(head_dim, theta):
    height, width = axial_frequencies(head_dim, theta, "halves")
    assert torch.equal(height, qwen(head_dim, theta).inv_freq)
    assert torch.equal(width, height)
    assert torch.equal(torch.cat(axial_frequencies(head_dim, theta, "alternating")), pixtral(head_dim, theta).inv_freq)


@pytest.mark.parametrize(("layout", "module"), [("halves", qwen), ("alternating", pixtral)])
@pytest.mark.parametrize("head_dim", [80, 72, 64])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("poisoned_empty")
def test_tables_are_those_of_transformers(device, layout, module, head_dim, seed):
    positions = merge_block_positions(random_grids(2, seed, longest=40), 2)
    side = int(positions.max()) + 1
    cos, sin = rotary_table(positions.to(device), axial_frequencies(head_dim, 10000.0, layout), side=side)
    want = module(head_dim, 10000.0)(torch.zeros(0), positions)
    for table, wanted in zip((cos, sin), want, strict=True):
        assert torch.equal(table.cpu().repeat(1, 2), wanted)


def test_tables_are_written_where_asked(device):
    positions = merge_block_positions([(1, 4, 6)], 2).to(device)
    frequencies = axial_frequencies(24, 10000.0, "halves")
    want = rotary_table(positions, frequencies, side=6)
    both = torch.zeros(24, 30, device=device)
    cos, sin = both[:, :12], both[:, 15:27]
    returned = rotary_table(positions, frequencies, side=9, out_cos=cos, out_sin=sin)
    assert returned[0] is cos
    assert returned[1] is sin
    assert torch.equal(cos, want[0])
    assert torch.equal(sin, want[1])
    assert not both[:, 12:15].any()
    assert not both[:, 27:].any()


def test_empty_inputs(device):
    assert merge_block_positions([], 2).shape == merge_block_positions([(0, 2, 2)], 2).shape == (0, 2)
    index, weights = make_taps([], 2, 48)
    assert (index.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert index.shape == weights.shape == (0, 4)
    empty = torch.empty(0, 2, dtype=torch.int32, device=device)
    cos, sin = rotary_table(empty, axial_frequencies(8, 10000.0, "halves"), side=1)
    assert cos.shape == sin.shape == (0, 4)


def test_callers_may_change_results_without_spoiling_caches():
    merge_block_positions([(1, 2, 2)], 1).fill_(-1)
    assert merge_block_positions([(1, 2, 2)], 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    order, lengths = window_order([(1, 4, 4)], 1, 2)
    order.fill_(-1)
    lengths.clear()
    assert window_order([(1, 4, 4)], 1, 2)[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order([(1, 4, 4)], 1, 2)[1] == [4, 4, 4, 4]


POSITIONS = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
FREQUENCIES = (torch.ones(4), torch.ones(4))
TABLE = {"positions": POSITIONS, "frequencies": FREQUENCIES, "side": 4}


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (axial_frequencies, {"head_dim": 82}, ValueError, "head_dim must be a positive multiple of 4, got 82"),
        (axial_frequencies, {"layout": "quarters"}, ValueError, "layout must be one of .* got 'quarters'"),
        (merge_block_positions, {"merge": 0}, ValueError, "merge must be at least 1, got 0"),
        (merge_block_positions, {"grids": [(1, 4, 4), (1, 4, 5)]}, ValueError, r"multiples of merge=2, .* \(1, 4, 5\)"),
        (merge_block_positions, {"grids": [(-1, 4, 4)]}, ValueError, r"got .*\(-1, 4, 4\)"),
        (window_order, {"side": 0}, ValueError, "side must be at least 1, got 0"),
        (window_order, {"grids": [(1, 3, 4)]}, ValueError, r"multiples of merge=2, .* \(1, 3, 4\)"),
        (bilinear_taps, {"side": 0}, ValueError, "side must be at least 1, got 0"),
        (bilinear_taps, {"positions": POSITIONS}, ValueError, r"positions must have shape \(16, 2\), got \(2, 2\)"),
        (rotary_table, {"positions": POSITIONS.long()}, TypeError, "positions must be torch.int32 on cpu"),
        (rotary_table, {"positions": POSITIONS[0]}, ValueError, r"positions must be \[N, 2\], got shape \(2,\)"),
        (rotary_table, {"positions": POSITIONS.t()}, ValueError, "positions must have last stride 1"),
        (rotary_table, {"positions": -POSITIONS}, ValueError, "positions must be 0 to 3, got -3 to 0"),
        (rotary_table, {"side": 3}, ValueError, "positions must be 0 to 2, got 0 to 3; side is 3"),
        (rotary_table, {"frequencies": (torch.ones(4).half(),) * 2}, TypeError, "frequencies must be float32"),
        (rotary_table, {"frequencies": (torch.ones(4), torch.ones(5))}, ValueError, r"two \[hd/4\], got .*\(5,\)"),
        (rotary_table, {"out_cos": torch.zeros(2, 7)}, ValueError, r"out_cos must have shape \(2, 8\), got \(2, 7\)"),
        (rotary_table, {"out_sin": torch.zeros(2, 8).half()}, TypeError, "out_sin must be torch.float32"),
    ],
)
def test_refusals(function, arguments, error, message):
    usual = {
        axial_frequencies: {"head_dim": 80, "theta": 1e4, "layout": "halves"},
        merge_block_positions: {"grids": [(1, 4, 4)], "merge": 2},
        window_order: {"grids": [(1, 4, 4)], "merge": 2, "side": 2},
        bilinear_taps: {"positions": torch.zeros(16, 2).int(), "grids": [(1, 4, 4)], "side": 4},
        rotary_table: TABLE,
    }[function]
    with pytest.raises(error, match=message):
        function(**{**usual, **arguments})
