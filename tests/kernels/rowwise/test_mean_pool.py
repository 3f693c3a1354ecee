"""Averages of rows: both backends against fp64, against each other, and against AvgPool2d."""

import pytest
import torch
from support.numbers import relative_error, tolerance

from tritontower.kernels.rowwise import mean_pool
from tritontower.kernels.rowwise.mean_pool import PoolingConfig, compile_specs, mean_rows
from tritontower.kernels.rowwise.positions import merge_block_positions
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.config import ARCHITECTURES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def expected(x, count):
    """The formula in fp64."""
    return x.double().view(-1, count, x.shape[1]).mean(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 9, 16, 49])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1152), (7, 72), (67, 48), (3, 3584)])
@pytest.mark.usefixtures("poisoned_empty")
def test_means_match_fp64(device, dtype, count, shape):
    rows, width = shape
    x = normal(rows * count, width, dtype=dtype, device=device) + 1
    means = mean_rows(x, count)
    assert means.is_contiguous()
    assert relative_error(means, expected(x, count)) <= tolerance(dtype, means.numel())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(kernel_device, dtype):
    x = normal(65536, 1152, dtype=dtype, device=kernel_device)
    assert relative_error(mean_rows(x, 16), expected(x, 16)) <= tolerance(dtype, 4096 * 1152)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [2, 3, 4])
def test_squares_side_by_side_are_average_pooling(device, dtype, side):
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
    """2²⁴ swallows a 1 that is added to it."""
    x = torch.tensor([[1.0], [2.0**24], [-(2.0**24)], [2.0**24], [-(2.0**24)], [1.0]], device=device)
    assert mean_rows(x, 3).tolist() == [[0.0], [torch.tensor(1 / 3).item()]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_not_rounded_on_the_way(device, dtype):
    """Sums of halves of the last place: every one of them would be lost in 16 bits."""
    x = torch.ones(16, 80, dtype=dtype, device=device)
    x[8:] += torch.finfo(dtype).eps
    x[:8] += torch.finfo(dtype).eps * 2
    x[15] += torch.finfo(dtype).eps
    assert torch.equal(mean_rows(x, 16), x.double().mean(0, keepdim=True).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [3, 16])
def test_views_are_read_and_written(device, dtype, count):
    x = normal(21 * count, 3, 96, dtype=dtype, device=device)[:, 1, 8:88]
    wide = torch.full((21, 200), 7.0, dtype=dtype, device=device)
    out = wide[:, 100:180]
    assert mean_rows(x, count, out=out) is out
    assert torch.equal(out, mean_rows(x.contiguous(), count))
    out.fill_(7.0)
    assert bool((wide == 7.0).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("restore_threads")
def test_a_mean_alone_equals_the_mean_in_a_pack(monkeypatch, dtype, threads):
    torch.set_num_threads(threads)
    for width, chunk in ((97, 2000), (1152, 131072)):
        monkeypatch.setattr(mean_pool, "_CHUNK", chunk)
        x = normal(301 * 16, width, dtype=dtype)
        pack = mean_rows(x, 16)
        assert relative_error(pack, expected(x, 16)) <= tolerance(dtype, pack.numel())
        for row in (0, 150, 300):
            assert torch.equal(mean_rows(x[16 * row : 16 * row + 16], 16)[0], pack[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 9, 16])
def test_reference_and_kernel_agree_bit_for_bit(kernel_device, dtype, count):
    x = normal(131 * count, 333, dtype=dtype, device=kernel_device)
    kernel = mean_rows(x, count)
    with dispatch.use("reference"):
        assert torch.equal(mean_rows(x.cpu(), count), kernel.cpu())


@pytest.mark.parametrize("config", [PoolingConfig(1, 16, 4), PoolingConfig(16, 64, 2), PoolingConfig(4, 1024, 8)])
def test_configuration_does_not_change_a_bit(kernel_device, config):
    x = normal(19 * 9, 130, dtype=torch.bfloat16, device=kernel_device)
    assert torch.equal(mean_rows(x, 9, config=config), mean_rows(x, 9))


def check_distant_rows(storage, stride, width):
    near = normal(4, width, device=storage.device)
    far = storage.as_strided((4, width), (stride, 1))
    far.copy_(near)
    means = mean_rows(near, 2)
    assert torch.equal(mean_rows(far, 2), means)
    doubled = near.repeat_interleave(2, dim=0)
    mean_rows(doubled, 2, out=far)
    assert torch.equal(far, near)


def test_offsets_beyond_32_bits(distant_storage):
    # The last row begins beyond element 2³¹.
    stride, width = 2**30 + 64, 64
    check_distant_rows(distant_storage(4 * stride), stride, width)


@pytest.mark.parametrize("shape", [(0, 48), (32, 0)])
def test_nothing_to_do(device, shape):
    assert mean_rows(torch.empty(shape, device=device), 16).shape == (shape[0] // 16, shape[1])


X = torch.zeros(12, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.double()}, TypeError, "x is torch.float64"),
        ({"x": X[0]}, ValueError, r"\(8,\); it has to be \[N, D\]"),
        ({"x": torch.zeros(8, 12).t()}, ValueError, "last stride 1"),
        ({"count": 0}, ValueError, "count is 0"),
        ({"count": 5}, ValueError, r"\(12, 8\); its 12 rows have to be a multiple of count, which is 5"),
        ({"out": torch.zeros(4, 8)}, ValueError, r"out has shape \(4, 8\); it has to be \(3, 8\)"),
        ({"out": torch.zeros(3, 8).half()}, TypeError, "out is torch.float16"),
        ({"out": torch.zeros(8, 3).t()}, ValueError, "out has .*last stride 1"),
        ({"out": X[:3]}, ValueError, "out is x"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        mean_rows(**({"x": X, "count": 4} | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specifications(architecture):
    specs = compile_specs(architecture)
    assert 16 in {spec.constants["COUNT"] for spec in specs}
    assert len({spec.name for spec in specs}) == len(specs)
