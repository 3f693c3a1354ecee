"""Spliced rows: mixed dtypes, special values, and rows that stay; see ``test_promises`` for all else."""

import pytest
import torch
from support.numbers import normal

from tritontower.kernels.rowwise.common import TileConfig
from tritontower.kernels.rowwise.splice import splice_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_a_copy_keeps_all_bits(device):
    rows = torch.tensor([[float("inf"), float("nan"), -0.0, 3e38, 1e-45]], device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    copy = splice_rows(torch.zeros(2, 5, device=device), rows, index)
    assert torch.equal(copy.view(torch.int32), rows.expand(2, 5).contiguous().view(torch.int32))


def test_replaced_and_unnamed_rows_have_no_effect(device):
    rows = torch.full((4, 72), float("nan"), device=device)
    rows[2] = 1.0
    text = torch.full((3, 72), float("nan"), device=device)
    text[1] = 2.0
    index = torch.tensor([2, -1, 2], dtype=torch.int32, device=device)
    want = torch.tensor([1.0, 2.0, 1.0], device=device)[:, None].expand(3, 72)
    assert torch.equal(splice_rows(text, rows, index), want)


@pytest.mark.parametrize("add", [False, True])
def test_rows_that_stay_are_not_written_in_place(kernel_device, add):
    """All rows share their memory here, so a write of a row that stays would show."""
    text = torch.zeros(4, 48, device=kernel_device).as_strided((4, 48), (0, 1))
    index = torch.tensor([-1, -1, 0, -1], dtype=torch.int32, device=kernel_device)
    splice_rows(text, torch.ones(1, 48, device=kernel_device), index, add=add, out=text, config=TileConfig(4, 64, 4))
    assert bool((text == 1.0).all())


def test_without_rows_everything_stays(device):
    text = normal(3, 48, device=device)
    index = torch.full((3,), -1, dtype=torch.int32, device=device)
    assert torch.equal(splice_rows(text, torch.empty(0, 48, device=device), index), text)


TEXT = torch.zeros(3, 8)
ROWS = torch.zeros(4, 8)
INDEX = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_rows_of_another_dtype_are_rounded_once(device, dtype, rows_dtype, add):
    text = normal(7, 72, dtype=dtype, device=device)
    rows = normal(7, 72, dtype=rows_dtype, device=device, seed=1)
    index = torch.tensor([6, -1, 4, 3, -1, 1, 0], dtype=torch.int32, device=device)
    chosen = rows[index.clamp(min=0).long()]
    replaced = (chosen.float() + text.float()).to(dtype) if add else chosen.to(dtype)
    expected = torch.where(index[:, None] < 0, text, replaced)
    assert torch.equal(splice_rows(text, rows, index, add=add), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": ROWS.int()}, TypeError, "rows must be float32, .* got torch.int32"),
        ({"rows": ROWS.to("meta")}, TypeError, "rows must be torch.float32 on cpu, got torch.float32 on meta"),
        ({"rows": ROWS[:, :7]}, ValueError, r"equal widths, got \(3, 8\) and \(4, 7\)"),
        ({"rows": torch.zeros(8, 4).t()}, ValueError, "rows must have last stride 1"),
        ({"index": INDEX.long()}, TypeError, "index must be torch.int32 on cpu, got torch.int64"),
        ({"index": torch.zeros(6, dtype=torch.int32)[::2]}, ValueError, r"index must be contiguous, .* strides \(2,\)"),
        ({"index": INDEX + 4}, ValueError, "index must hold -1 to 3, got 4"),
        ({"index": INDEX - 2}, ValueError, "index must hold -1 to 3, got -2"),
        ({"out": ROWS[:3]}, ValueError, "out must not be rows"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        splice_rows(**({"text": TEXT, "rows": ROWS, "index": INDEX} | changes))
