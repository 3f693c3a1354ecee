"""Patch positions, frequencies and rotary tables: bit for bit what transformers computes."""

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
    compile_specs,
    merge_block_positions,
    rotary_table,
    window_order,
)
from tritontower.kernels.runtime.config import ARCHITECTURES


def random_grids(merge, seed, count=4, longest=20):
    """Images and a few videos."""
    draw = random.Random(seed)
    return [
        (draw.choice((1, 1, 3)), merge * draw.randint(1, longest), merge * draw.randint(1, longest))
        for _ in range(count)
    ]


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_positions_are_those_of_transformers(merge, seed):
    grids = random_grids(merge, seed)
    positions = merge_block_positions(grids, merge)
    assert positions.dtype == torch.int32
    assert torch.equal(positions.long(), get_vision_position_ids(torch.tensor(grids), merge))


def test_positions_of_a_small_grid():
    rows = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert merge_block_positions([(2, 2, 4)], 2).tolist() == [list(row) for row in rows * 2]


def test_positions_are_the_callers_to_change():
    merge_block_positions([(1, 2, 2)], 1).fill_(-1)
    assert merge_block_positions([(1, 2, 2)], 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_no_grids():
    assert merge_block_positions([], 2).shape == (0, 2)
    assert merge_block_positions([(0, 2, 2)], 2).shape == (0, 2)


def windows_of_transformers(grids, merge, side):
    """Order of the merge blocks and blocks per window; windows are given in pixels there, here of patches of 14."""
    pixels = side * merge * 14
    order, bounds = get_vision_window_index(torch.tensor(grids), merge, pixels, 14)
    return order, (bounds.diff() // merge**2).tolist()


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_those_of_transformers(merge, side, seed):
    grids = random_grids(merge, seed)
    order, lengths = window_order(grids, merge, side)
    expected, expected_lengths = windows_of_transformers(grids, merge, side)
    assert torch.equal(order, expected)
    assert lengths == expected_lengths


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [
        ((1, 2, 2), [1]),
        ((1, 8, 8), [16]),
        ((1, 16, 24), [16] * 6),
        ((1, 10, 8), [16, 4]),
        ((1, 8, 10), [16, 4]),
        ((1, 10, 10), [16, 4, 4, 1]),
        ((1, 2, 20), [4, 4, 2]),
        ((3, 10, 4), [8, 2] * 3),
    ],
    ids=str,
)
def test_windows_at_the_edges_are_smaller(grid, lengths):
    order, found = window_order([grid], 2, 4)
    expected, expected_lengths = windows_of_transformers([grid], 2, 4)
    assert found == lengths == expected_lengths
    assert torch.equal(order, expected)


def test_windows_of_a_small_grid():
    order, lengths = window_order([(2, 2, 3)], 1, 2)
    assert order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11]
    assert lengths == [4, 2, 4, 2]


def test_every_block_lies_in_the_square_of_its_window():
    grids, merge, side = [(1, 22, 14), (2, 6, 30)], 2, 3
    order, lengths = window_order(grids, merge, side)
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    first_patches = merge_block_positions(grids, merge)[:: merge**2]
    for blocks in order.split(lengths):
        squares = first_patches[blocks] // (merge * side)
        assert torch.equal(squares, squares[:1].expand_as(squares))


def test_orders_are_the_callers_to_change():
    order, lengths = window_order([(1, 4, 4)], 1, 2)
    order.fill_(-1)
    lengths.clear()
    assert window_order([(1, 4, 4)], 1, 2)[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order([(1, 4, 4)], 1, 2)[1] == [4, 4, 4, 4]


@pytest.mark.parametrize("grids", [[], [(0, 4, 4)], [(1, 0, 4)], [(1, 4, 0)]], ids=str)
def test_no_windows(grids):
    order, lengths = window_order(grids, 2, 2)
    assert order.shape == (0,)
    assert order.dtype == torch.int64
    assert lengths == []


@pytest.mark.parametrize(
    ("grid", "merge", "side", "message"),
    [
        ((1, 4, 4), 2, 0, "side is 0"),
        ((1, 4, 4), 0, 2, "merge is 0"),
        ((1, 4, 5), 2, 2, r"\(1, 4, 5\).*2 × 2"),
    ],
)
def test_window_refusals(grid, merge, side, message):
    with pytest.raises(ValueError, match=message):
        window_order([grid], merge, side)


def taps_of(grids, merge, side):
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
@pytest.mark.parametrize("seed", range(4))
def test_tables_are_stretched_from_corner_to_corner(side, merge, seed):
    grids = [*random_grids(merge, seed, longest=40), (1, merge, merge), (2, merge * 24, merge)]
    table = torch.randn(side * side, 8, generator=torch.Generator().manual_seed(seed))
    index, weights = taps_of(grids, merge, side)
    assert (index.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert index.min() >= 0
    assert index.max() < side * side
    assert weights.min() >= 0.0
    assert relative_error(summed(index, weights, table), stretched(grids, merge, side, table)) <= 1e-7
    theirs = get_vision_interpolation_indices_and_weights(torch.tensor(grids), side, "bilinear", True, merge)
    # They work the places out in fp32, where one near 47 is off by up to 2e-6.
    assert relative_error(summed(index, weights, table), summed(*theirs, table)) <= 2e-6


def test_corners_and_whole_rows_are_the_tables_own():
    index, weights = taps_of([(1, 48, 48)], 2, 48)
    positions = merge_block_positions([(1, 48, 48)], 2)
    assert torch.equal(weights.max(dim=1).values, torch.ones(48 * 48))
    assert torch.equal(index.gather(1, weights.argmax(1, keepdim=True))[:, 0], positions[:, 0] * 48 + positions[:, 1])
    # 95 = 2 · 47 + 1: every other place of the larger grid is a row of the table, to the last bit.
    index, weights = taps_of([(1, 95, 95)], 1, 48)
    whole = (merge_block_positions([(1, 95, 95)], 1) % 2 == 0).all(1)
    assert torch.equal(weights[whole].max(dim=1).values, torch.ones(48 * 48))
    assert torch.equal(
        index[whole].gather(1, weights[whole].argmax(1, keepdim=True))[:, 0].int(), torch.arange(48 * 48)
    )
    assert weights[~whole].max() == 0.5


def test_half_pixel_centers_would_show():
    table = torch.arange(16.0)[:, None]
    index, weights = taps_of([(1, 6, 6)], 1, 4)
    found = summed(index, weights, table)
    assert torch.equal(found[[0, 5, 30, 35], 0], torch.tensor([0.0, 3.0, 12.0, 15.0], dtype=torch.float64))
    square = table.view(1, 1, 4, 4)
    centered = torch.nn.functional.interpolate(square, (6, 6), mode="bilinear", align_corners=False)
    assert relative_error(found, centered.view(-1, 1)) > 1e-2


def test_a_patchs_taps_do_not_depend_on_the_pack():
    grids = [(1, 6, 10), (2, 14, 4), (1, 2, 2)]
    packed = taps_of(grids, 2, 48)
    alone = [taps_of([grid], 2, 48) for grid in grids]
    assert torch.equal(packed[0], torch.cat([index for index, _ in alone]))
    assert torch.equal(packed[1], torch.cat([weights for _, weights in alone]))


def test_no_taps():
    index, weights = taps_of([], 2, 48)
    assert index.shape == weights.shape == (0, 4)
    assert (index.dtype, weights.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize(
    ("rows", "side", "message"),
    [(16, 0, "side is 0"), (15, 4, r"\(15, 2\); these grids need \(16, 2\)"), (17, 4, r"\(17, 2\)")],
)
def test_tap_refusals(rows, side, message):
    with pytest.raises(ValueError, match=message):
        bilinear_taps(torch.zeros(rows, 2, dtype=torch.int32), [(1, 4, 4)], side)


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
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("poisoned_empty")
def test_tables_are_those_of_transformers(device, layout, module, head_dim, seed):
    positions = merge_block_positions(random_grids(2, seed, longest=40), 2)
    side = int(positions.max()) + 1
    cos, sin = rotary_table(positions.to(device), axial_frequencies(head_dim, 10000.0, layout), side=side)
    want = module(head_dim, 10000.0)(torch.zeros(0), positions)
    for table, wanted in zip((cos, sin), want, strict=True):
        assert torch.equal(table.cpu().repeat(1, 2), wanted)


def test_tables_are_accurate_for_large_coordinates(device):
    positions = torch.tensor([[0, 4095], [4095, 1], [2048, 2048]], dtype=torch.int32, device=device)
    frequencies = axial_frequencies(80, 10000.0, "halves")
    cos, sin = rotary_table(positions, frequencies, side=4096)
    # The fp32 angle itself is the definition; what is judged is its cosine.
    angles = (positions.cpu()[..., None].float() * frequencies[0]).flatten(1).double()
    assert relative_error(cos, angles.cos()) <= 1e-7
    assert relative_error(sin, angles.sin()) <= 1e-7


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


def test_a_row_alone_equals_the_row_in_a_pack(device):
    positions = merge_block_positions([(1, 30, 22)], 2).to(device)
    frequencies = axial_frequencies(80, 10000.0, "alternating")
    pack = rotary_table(positions, frequencies, side=30)
    for row in (0, 17, 659):
        alone = rotary_table(positions[row : row + 1], frequencies, side=int(positions[row].max()) + 1)
        assert torch.equal(alone[0][0], pack[0][row])
        assert torch.equal(alone[1][0], pack[1][row])


def test_no_positions(device):
    empty = torch.empty(0, 2, dtype=torch.int32, device=device)
    cos, sin = rotary_table(empty, axial_frequencies(8, 10000.0, "halves"), side=1)
    assert cos.shape == sin.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((82, 10000.0, "halves"), "head_dim is 82"),
        ((0, 10000.0, "halves"), "head_dim is 0"),
        ((80, 10000.0, "quarters"), "quarters"),
    ],
)
def test_frequency_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        axial_frequencies(*arguments)


@pytest.mark.parametrize(
    ("grids", "merge", "message"),
    [
        ([(1, 4, 4)], 0, "merge is 0"),
        ([(1, 4, 4), (1, 4, 5)], 2, r"\(1, 4, 5\).*2 × 2"),
        ([(1, 3, 4)], 2, r"\(1, 3, 4\)"),
        ([(-1, 4, 4)], 2, r"\(-1, 4, 4\)"),
    ],
)
def test_grid_refusals(grids, merge, message):
    with pytest.raises(ValueError, match=message):
        merge_block_positions(grids, merge)


POSITIONS = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
FREQUENCIES = (torch.ones(4), torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"positions": POSITIONS.long()}, TypeError, "int64"),
        ({"frequencies": (FREQUENCIES[0], FREQUENCIES[1].half())}, TypeError, "float16"),
        ({"positions": POSITIONS[0]}, ValueError, r"\(2,\)"),
        ({"positions": POSITIONS.t()}, ValueError, "last stride 1"),
        ({"frequencies": (torch.ones(4), torch.ones(5))}, ValueError, r"\(5,\)"),
        ({"side": 0}, ValueError, "side is 0"),
        ({"side": 3}, ValueError, r"\[0, 3\]; with side 3"),
        ({"positions": -POSITIONS}, ValueError, r"\[-3, 0\]"),
        ({"out_cos": torch.zeros(2, 7)}, ValueError, r"out_cos has shape \(2, 7\)"),
        ({"out_sin": torch.zeros(2, 8).half()}, TypeError, "out_sin is torch.float16"),
    ],
)
def test_table_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        rotary_table(**({"positions": POSITIONS, "frequencies": FREQUENCIES, "side": 4} | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_head_width_is_compiled_ahead(architecture):
    names = [spec.name for spec in compile_specs(architecture)]
    assert len(set(names)) == len(names) == 3
