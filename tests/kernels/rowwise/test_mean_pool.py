"""Means of rows: every count, the order of the sums, and AvgPool2d; see ``test_promises`` for all else."""

import pytest
import torch
from support.numbers import normal, relative_error, tolerance

from tritontower.kernels.rowwise.mean_pool import mean_rows
from tritontower.kernels.rowwise.positions import merge_block_positions

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [2, 3, 4])
def test_means_of_squares_are_average_pooling(device, dtype, side):
    grid = (1, 4 * side, 4 * side)
    x = normal(16 * side * side, 144, dtype=dtype, device=device)
    row, column = merge_block_positions([grid], side).long().unbind(1)
    planes = x.new_empty(144, grid[1], grid[2])
    planes[:, row, column] = x.t()
    want = torch.nn.AvgPool2d(side)(planes[None].float())[0].flatten(1).t()
    means = mean_rows(x, side * side)
    # The same values in the same dtype; torch adds them in another order.
    assert relative_error(means, want) <= tolerance(dtype, means.numel())
    torch.testing.assert_close(mean_rows(x.float(), side * side), want, rtol=1e-6, atol=1e-6)


def test_rows_are_added_in_order(device):
    """2²⁴ absorbs a 1 that is added to it."""
    x = torch.tensor([[1.0], [2.0**24], [-(2.0**24)], [2.0**24], [-(2.0**24)], [1.0]], device=device)
    assert mean_rows(x, 3).tolist() == [[0.0], [torch.tensor(1 / 3).item()]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_not_rounded_before_the_end(device, dtype):
    """Sums of halves of the last place, which 16 bits would lose."""
    x = torch.ones(16, 80, dtype=dtype, device=device)
    x[8:] += torch.finfo(dtype).eps
    x[:8] += torch.finfo(dtype).eps * 2
    x[15] += torch.finfo(dtype).eps
    assert torch.equal(mean_rows(x, 16), x.double().mean(0, keepdim=True).to(dtype))


# One row; the loop's remainder after unrolling by 4; many rows.
@pytest.mark.parametrize("count", [1, 2, 3, 16, 49])
def test_means_of_any_count_match_fp64(device, count):
    x = normal(5 * count, 72, dtype=torch.bfloat16, device=device) + 1
    expected = x.double().view(-1, count, 72).mean(1)
    assert relative_error(mean_rows(x, count), expected) <= tolerance(x.dtype, expected.numel())


def test_refusals():
    x = torch.zeros(12, 8)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"count must be positive and divide the 12 rows of x, got {count}"):
            mean_rows(x, count)
    with pytest.raises(ValueError, match="out must not be x"):
        mean_rows(x, 4, out=x[:3])
