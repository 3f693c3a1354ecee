"""Gathered rows: order of the sums, roundings, special values and refusals; see ``test_promises`` for all else."""

import pytest
import torch
from support.numbers import normal

from tritontower.kernels.rowwise.gather import MAX_TAPS, gather_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOURCE_ROWS = 23


def test_taps_are_summed_in_order_and_the_residual_last(device):
    """2²⁴ absorbs a 1 that is added to it, so the result shows the order."""
    source = torch.tensor([[1.0], [2.0**24]], device=device)
    weights = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], device=device)
    index = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.int32, device=device)
    assert gather_rows(source, index, weights).tolist() == [[0.0], [1.0]]
    last = gather_rows(source, index[1:], weights[1:], residual=torch.full((1, 1), 2.0**24, device=device))
    assert last.tolist() == [[2.0**24]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(device, dtype):
    """Each tap alone is too small to change the residual; together they are not."""
    step = torch.finfo(dtype).eps
    source = torch.full((1, 80), step / 4, dtype=dtype, device=device)
    index = torch.zeros(5, 4, dtype=torch.int32, device=device)
    weights = torch.ones(5, 4, device=device)
    one = torch.ones(5, 80, dtype=dtype, device=device)
    assert torch.equal(gather_rows(source, index, weights, residual=one), one + step)


def bilinear(side, wanted):
    """Taps and weights that shrink a ``side × side`` grid to ``wanted × wanted``, half-pixel centers."""
    place = ((torch.arange(wanted) + 0.5) * (side / wanted) - 0.5).clamp(min=0)
    low = place.floor().int()
    high = (low + 1).clamp(max=side - 1)
    part = place - low
    ends = [(low, 1 - part), (high, part)]
    taps = [(row[:, None] * side + column, a[:, None] * b) for row, a in ends for column, b in ends]
    index, weights = zip(*taps, strict=True)
    return torch.stack(index, -1).view(-1, 4).contiguous(), torch.stack(weights, -1).view(-1, 4).contiguous()


def test_four_taps_interpolate_a_grid_as_torch_does(device):
    index, weights = bilinear(17, 11)
    grid = normal(17 * 17, 72, device=device)
    planes = grid.t().view(1, 72, 17, 17)
    want = torch.nn.functional.interpolate(planes, size=(11, 11), mode="bilinear").view(72, -1).t()
    torch.testing.assert_close(gather_rows(grid, index.to(device), weights.to(device)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("taps", [None, 2])
def test_rows_that_are_not_named_are_not_read(device, taps):
    source = torch.full((SOURCE_ROWS, 72), float("nan"), device=device)
    source[4], source[9] = 1.0, 2.0
    index = torch.tensor([[4, 9], [9, 4], [-1, 4]], dtype=torch.int32, device=device)
    fill = torch.full((72,), 3.0, device=device)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=device)
    if taps is None:
        index, weights = index[:, 0].contiguous(), None
        want = torch.tensor([1.0, 2.0, 3.0], device=device)
    else:
        want = torch.tensor([1.0, 1.0, 3.0], device=device)
    assert torch.equal(gather_rows(source, index, weights, fill=fill), want[:, None].expand(3, 72))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_keeps_all_bits(device, dtype):
    largest = torch.finfo(dtype).max
    source = torch.tensor([[float("inf"), float("nan"), -0.0, largest, torch.finfo(dtype).tiny / 4]], dtype=dtype)
    copy = gather_rows(source.to(device), torch.zeros(2, dtype=torch.int32, device=device)).cpu()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(copy.view(bits), source.expand(2, 5).contiguous().view(bits))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_source_without_rows_is_all_fill(device, weighted):
    fill = normal(48, device=device)
    index = torch.full((3,), -1, dtype=torch.int32, device=device)
    weights = torch.full((3,), 2.0, device=device) if weighted else None
    rows = gather_rows(torch.empty(0, 48, device=device), index, weights, fill=fill)
    assert torch.equal(rows, (fill * (2.0 if weighted else 1.0)).expand(3, 48))


SOURCE = torch.zeros(4, 8)
INDEX = torch.zeros(3, dtype=torch.int32)
TAPS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index": INDEX.long()}, TypeError, "index must be torch.int32 on cpu, got torch.int64"),
        ({"index": INDEX[None, None]}, ValueError, r"index must be .* got shape \(1, 1, 3\)"),
        ({"index": TAPS[:, 0]}, ValueError, r"index must be contiguous, .* strides \(2,\)"),
        ({"index": TAPS}, ValueError, "weights must be given for several taps"),
        ({"index": TAPS[:, :0]}, ValueError, "1 to 16 taps"),
        ({"index": torch.zeros(3, MAX_TAPS + 1, dtype=torch.int32)}, ValueError, f"1 to {MAX_TAPS} taps"),
        ({"weights": torch.zeros(3, 2)}, ValueError, r"weights must have shape \(3,\), got \(3, 2\)"),
        ({"fill": torch.zeros(7)}, ValueError, r"fill must have shape \(8,\), got \(7,\)"),
        ({"residual": torch.zeros(4, 8)}, ValueError, r"residual must have shape \(3, 8\), got \(4, 8\)"),
        ({"out": SOURCE[:3]}, ValueError, "out must not be source"),
        ({"source": SOURCE[:0]}, ValueError, "source must have rows for the 3 of index"),
        ({"index": INDEX - 1}, ValueError, "index must hold 0 to 3, got -1; -1 needs a fill"),
        ({"index": INDEX - 2, "fill": SOURCE[0]}, ValueError, "index must hold -1 to 3, got -2"),
        ({"index": INDEX + 4}, ValueError, "index must hold 0 to 3, got 4"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        gather_rows(**({"source": SOURCE, "index": INDEX} | changes))
