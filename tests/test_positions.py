"""Patch positions, frequencies and rotary tables: bit for bit what transformers computes."""

import random

import pytest
import torch
from support.numbers import relative_error
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids

from tritontower.kernels.configs import ARCHITECTURES
from tritontower.kernels.positions import axial_frequencies, compile_specs, merge_block_positions, rotary_table


def random_grids(merge, seed, count=4, longest=20):
    """Pictures and a few videos."""
    draw = random.Random(seed)
    return [
        (draw.choice((1, 1, 3)), merge * draw.randint(1, longest), merge * draw.randint(1, longest))
        for _ in range(count)
    ]


@pytest.fixture(params=["kernel", "reference"])
def device(request):
    """Each backend in turn."""
    if request.param == "kernel":
        return request.getfixturevalue("kernel_device")
    return torch.device("cpu")


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
