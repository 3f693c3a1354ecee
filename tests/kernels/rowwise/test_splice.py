"""Images' rows put into a prompt's: both backends bit for bit what indexing and addition make of them."""

import pytest
import torch

from tritontower.kernels.rowwise.splice import SpliceConfig, compile_specs, splice_rows
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.config import ARCHITECTURES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 1152), (7, 72), (40, 1280), (300, 48), (9, 3584)]
IMAGE_ROWS = 23


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def numbers(rows, device="cpu", seed=0):
    """Every third row stays text on average; the first is replaced and the last stays, where there are two."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, IMAGE_ROWS, (rows,), generator=generator, dtype=torch.int32)
    index[torch.rand(rows, generator=generator) < 1 / 3] = -1
    index[-1], index[0] = -1, IMAGE_ROWS - 1
    return index.to(device)


def expected(text, rows, index, add):
    """Row by row; a sum of two halves is exact in fp32, so there is one rounding."""
    result = text.clone()
    for place, row in enumerate(index.tolist()):
        if row >= 0:
            result[place] = (text[place].float() + rows[row].float() if add else rows[row]).to(text.dtype)
    return result


@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_splicing_is_indexing_and_one_rounding(device, dtype, rows_dtype, shape, add):
    text = normal(*shape, dtype=dtype, device=device)
    rows = normal(IMAGE_ROWS, shape[1], dtype=rows_dtype, device=device, seed=1)
    index = numbers(shape[0], device)
    want = expected(text, rows, index, add)
    result = splice_rows(text, rows, index, add=add)
    assert result.is_contiguous()
    assert torch.equal(result, want)
    assert splice_rows(text, rows, index, add=add, out=text) is text
    assert torch.equal(text, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_views_are_read_and_written_and_nothing_else(device, dtype, add, inside):
    wide = normal(31, 300, dtype=dtype, device=device)
    before = wide.clone()
    text = wide[:, 100:180]
    rows = normal(IMAGE_ROWS, 3, 96, dtype=dtype, device=device, seed=1)[:, 1, 8:88]
    index = numbers(31, device)
    want = expected(text, rows, index, add)
    outside = torch.full((31, 200), 7.0, dtype=dtype, device=device)
    out = text if inside else outside[:, 40:120]
    assert splice_rows(text, rows, index, add=add, out=out) is out
    assert torch.equal(out, want)
    if inside:
        before[:, 100:180] = want
        assert torch.equal(wide, before)
    else:
        assert torch.equal(wide, before)
        out.fill_(7.0)
        assert bool((outside == 7.0).all())


def test_a_copy_keeps_what_no_sum_could(device):
    rows = torch.tensor([[float("inf"), float("nan"), -0.0, 3e38, 1e-45]], device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    copy = splice_rows(torch.zeros(2, 5, device=device), rows, index)
    assert torch.equal(copy.view(torch.int32), rows.expand(2, 5).contiguous().view(torch.int32))


def test_what_is_replaced_or_not_named_does_not_matter(device):
    rows = torch.full((4, 72), float("nan"), device=device)
    rows[2] = 1.0
    text = torch.full((3, 72), float("nan"), device=device)
    text[1] = 2.0
    index = torch.tensor([2, -1, 2], dtype=torch.int32, device=device)
    want = torch.tensor([1.0, 2.0, 1.0], device=device)[:, None].expand(3, 72)
    assert torch.equal(splice_rows(text, rows, index), want)


@pytest.mark.parametrize("add", [False, True])
def test_rows_that_stay_are_not_written_in_place(kernel_device, add):
    """What stays need not be written: here it would be seen, since the rows lie upon each other."""
    text = torch.zeros(4, 48, device=kernel_device).as_strided((4, 48), (0, 1))
    index = torch.tensor([-1, -1, 0, -1], dtype=torch.int32, device=kernel_device)
    splice_rows(text, torch.ones(1, 48, device=kernel_device), index, add=add, out=text, config=SpliceConfig(4, 64, 4))
    assert bool((text == 1.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_reference_and_kernel_agree_bit_for_bit(kernel_device, dtype, add):
    text = normal(131, 333, dtype=dtype, device=kernel_device)
    rows = normal(IMAGE_ROWS, 333, dtype=torch.bfloat16, device=kernel_device, seed=1)
    index = numbers(131, kernel_device)
    kernel = splice_rows(text, rows, index, add=add)
    with dispatch.use("reference"):
        assert torch.equal(splice_rows(text.cpu(), rows.cpu(), index.cpu(), add=add), kernel.cpu())


@pytest.mark.parametrize("config", [SpliceConfig(1, 16, 4), SpliceConfig(16, 64, 2), SpliceConfig(4, 1024, 8)])
def test_configuration_does_not_change_a_bit(kernel_device, config):
    text = normal(19, 130, dtype=torch.bfloat16, device=kernel_device)
    rows = normal(IMAGE_ROWS, 130, dtype=torch.bfloat16, device=kernel_device, seed=1)
    index = numbers(19, kernel_device)
    assert torch.equal(
        splice_rows(text, rows, index, add=True, config=config), splice_rows(text, rows, index, add=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_a_prompt(device, dtype):
    text, rows = normal(301, 97, dtype=dtype, device=device), normal(IMAGE_ROWS, 97, device=device, seed=1)
    index = numbers(301, device)
    prompt = splice_rows(text, rows, index, add=True)
    for row in (0, 150, 300):
        only = slice(row, row + 1)
        assert torch.equal(splice_rows(text[only], rows, index[only], add=True)[0], prompt[row])


def check_distant_rows(storage, stride, width):
    near = normal(3, width, device=storage.device)
    far = storage.as_strided((3, width), (stride, 1))
    far.copy_(near)
    order = torch.tensor([2, -1, 1], dtype=torch.int32, device=storage.device)
    want = near[[2, 1, 1]]
    assert torch.equal(splice_rows(near, far, order), want)
    splice_rows(far, near, order, out=far)
    assert torch.equal(far, want)


def test_offsets_beyond_32_bits(distant_storage):
    # The third row begins beyond element 2³¹.
    stride, width = 2**30 + 64, 64
    check_distant_rows(distant_storage(3 * stride), stride, width)


@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_nothing_to_do(device, shape):
    index = torch.zeros(shape[0], dtype=torch.int32, device=device)
    assert splice_rows(torch.empty(shape, device=device), torch.empty(1, shape[1], device=device), index).shape == shape


def test_without_rows_everything_stays(device):
    text = normal(3, 48, device=device)
    index = torch.full((3,), -1, dtype=torch.int32, device=device)
    assert torch.equal(splice_rows(text, torch.empty(0, 48, device=device), index), text)


TEXT = torch.zeros(3, 8)
ROWS = torch.zeros(4, 8)
INDEX = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": TEXT.double()}, TypeError, "text is torch.float64"),
        ({"text": TEXT[0]}, ValueError, r"text has shape \(8,\)"),
        ({"text": torch.zeros(8, 3).t()}, ValueError, "text has .*last stride 1"),
        ({"rows": ROWS.int()}, TypeError, "rows is torch.int32"),
        ({"rows": ROWS.to("meta")}, TypeError, "rows is on meta and text on cpu"),
        ({"rows": ROWS[:, :7]}, ValueError, r"rows has shape \(4, 7\) and text \(3, 8\)"),
        ({"rows": torch.zeros(8, 4).t()}, ValueError, "rows has .*last stride 1"),
        ({"index": INDEX.long()}, TypeError, "index is torch.int64"),
        ({"index": INDEX[:2]}, ValueError, r"index has shape \(2,\)"),
        ({"index": torch.zeros(6, dtype=torch.int32)[::2]}, ValueError, r"strides \(2,\)"),
        ({"index": INDEX + 4}, ValueError, r"index holds 4, but rows \(4, 8\)"),
        ({"index": INDEX - 2}, ValueError, "index holds -2"),
        ({"out": TEXT.half()}, TypeError, "out is torch.float16; text is torch.float32"),
        ({"out": torch.zeros(2, 8)}, ValueError, r"out has shape \(2, 8\); it has to be \(3, 8\)"),
        ({"out": ROWS[:3]}, ValueError, "out is rows"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        splice_rows(**({"text": TEXT, "rows": ROWS, "index": INDEX} | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specifications(architecture):
    specs = compile_specs(architecture)
    assert {(spec.constants["ADD"], spec.constants["IN_PLACE"]) for spec in specs} == {
        (add, inside) for add in (False, True) for inside in (False, True)
    }
    assert len({spec.name for spec in specs}) == len(specs)
