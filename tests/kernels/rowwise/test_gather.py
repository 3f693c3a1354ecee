"""Rows picked, weighed, summed and added: both backends against fp64, exact where nothing is computed."""

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.rowwise import gather
from tritontower.kernels.rowwise.gather import MAX_TAPS, GatherConfig, compile_specs, gather_rows
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.config import ARCHITECTURES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 1152), (7, 72), (40, 1280), (300, 48), (9, 3584)]
SOURCE_ROWS = 23


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def numbers(rows, taps=None, *, lowest=0, device="cpu", seed=0):
    """Row numbers from ``lowest``; the first is ``lowest`` itself and the last the highest there is."""
    shape = (rows,) if taps is None else (rows, taps)
    index = torch.randint(lowest, SOURCE_ROWS, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    index.view(-1)[-1] = SOURCE_ROWS - 1
    index.view(-1)[0] = lowest
    return index.to(device)


def expected(source, index, weights=None, fill=None, residual=None):
    """The formula in fp64."""
    fill = source.new_zeros(source.shape[1]) if fill is None else fill
    rows = torch.cat([source, fill[None]]).double()[index.long()]  # -1 counts from the end
    if index.dim() == 2:
        rows = (rows * (1 if weights is None else weights.double()[..., None])).sum(1)
    elif weights is not None:
        rows = rows * weights.double()[:, None]
    return rows if residual is None else rows + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_a_copy_is_exact(device, dtype, shape):
    rows, width = shape
    source = normal(SOURCE_ROWS, width, dtype=dtype, device=device)
    fill = normal(width, dtype=dtype, device=device, seed=1)
    index = numbers(rows, device=device)
    assert torch.equal(gather_rows(source, index), source[index.long()])
    assert torch.equal(gather_rows(source, index[:, None]), source[index.long()])
    index = numbers(rows, lowest=-1, device=device)
    assert torch.equal(gather_rows(source, index, fill=fill), torch.cat([source, fill[None]])[index.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("taps", [None, 1, 4, MAX_TAPS])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_weighted_rows_match_fp64(device, dtype, shape, taps, filled, added):
    rows, width = shape
    source = normal(SOURCE_ROWS, width, dtype=dtype, device=device)
    fill = normal(width, dtype=dtype, device=device, seed=1) if filled else None
    residual = normal(rows, width, dtype=dtype, device=device, seed=2) if added else None
    index = numbers(rows, taps, lowest=-1 if filled else 0, device=device)
    weights = normal(*index.shape, device=device, seed=3)
    total = gather_rows(source, index, weights, fill=fill, residual=residual)
    want = expected(source, index, weights, fill, residual)
    assert total.is_contiguous()
    assert relative_error(total, want) <= tolerance(dtype, total.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_one_row_added_is_torchs_addition(device, dtype, shape):
    rows, width = shape
    source = normal(SOURCE_ROWS, width, dtype=dtype, device=device)
    residual = normal(rows, width, dtype=dtype, device=device, seed=1)
    index = numbers(rows, device=device)
    assert torch.equal(gather_rows(source, index, residual=residual), source[index.long()] + residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 1152, 5120])
def test_many_rows(kernel_device, dtype, width):
    source, residual = normal(4096, width, dtype=dtype), normal(16384, width, dtype=dtype, seed=1)
    index = torch.randint(0, 4096, (16384, 4), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    weights = torch.rand(16384, 4, generator=torch.Generator().manual_seed(3))
    want = expected(source, index, weights, residual=residual)
    source, index, weights, residual = (each.to(kernel_device) for each in (source, index, weights, residual))
    total = gather_rows(source, index, weights, residual=residual)
    assert relative_error(total, want) <= tolerance(dtype, total.numel())
    assert torch.equal(gather_rows(source, index[:, 0].contiguous()), source[index[:, 0].long()])


def test_taps_are_summed_in_order_and_the_residual_last(device):
    """2²⁴ swallows a 1 that is added to it, and what is left tells who came when."""
    source = torch.tensor([[1.0], [2.0**24]], device=device)
    weights = torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], device=device)
    index = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.int32, device=device)
    assert gather_rows(source, index, weights).tolist() == [[0.0], [1.0]]
    last = gather_rows(source, index[1:], weights[1:], residual=torch.full((1, 1), 2.0**24, device=device))
    assert last.tolist() == [[2.0**24]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once(device, dtype):
    """Each tap alone is lost beside the residual; together they are not."""
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_views_are_found_and_nothing_else_is_written(device, dtype):
    source = normal(SOURCE_ROWS, 3, 96, dtype=dtype, device=device)[:, 1, 8:88]
    residual = normal(31, 200, dtype=dtype, device=device, seed=1)[:, :80]
    index = numbers(31, 4, lowest=-1, device=device)
    weights = normal(31, 4, device=device, seed=2)
    fill = normal(80, dtype=dtype, device=device, seed=3)
    copied = {"index": index[:, 0].contiguous(), "fill": fill}
    summed = {"index": index, "weights": weights, "fill": fill, "residual": residual}
    for arguments in (copied, summed, {"index": copied["index"], "fill": fill, "residual": residual}):
        wide = torch.full((31, 300), 7.0, dtype=dtype, device=device)
        out = wide[:, 100:180]
        assert gather_rows(source, out=out, **arguments) is out
        contiguous = {name: tensor.contiguous() for name, tensor in arguments.items()}
        assert torch.equal(out, gather_rows(source.contiguous(), **contiguous))
        out.fill_(7.0)
        assert bool((wide == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [None, 4])
def test_out_may_be_the_residual(device, dtype, taps):
    source = normal(SOURCE_ROWS, 320, dtype=dtype, device=device)
    wide = normal(45, 400, dtype=dtype, device=device, seed=1)
    rows = wide[:, 40:360]
    index = numbers(45, taps, device=device)
    weights = None if taps is None else normal(45, taps, device=device, seed=2)
    want = gather_rows(source, index, weights, residual=rows)
    assert gather_rows(source, index, weights, residual=rows, out=rows) is rows
    assert torch.equal(rows, want)


def test_halves_of_one_matrix_are_source_and_target(device):
    wide = normal(SOURCE_ROWS, 160, device=device)
    index = numbers(SOURCE_ROWS, device=device)
    want = wide[index.long(), :80]
    gather_rows(wide[:, :80], index, out=wide[:, 80:])
    assert torch.equal(wide[:, 80:], want)


@pytest.mark.parametrize("taps", [None, 2])
def test_rows_that_nobody_names_are_not_read(device, taps):
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
def test_a_copy_keeps_what_no_sum_could(device, dtype):
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


@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_nothing_to_do(device, shape):
    rows, width = shape
    source = torch.empty(0, width, device=device)
    index = torch.zeros(rows, dtype=torch.int32, device=device)
    assert gather_rows(source, index).shape == shape
    taps = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    assert gather_rows(source, taps, torch.zeros(rows, 4, device=device)).shape == shape


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("restore_threads")
def test_a_row_alone_equals_the_row_in_a_pack(monkeypatch, dtype, threads):
    torch.set_num_threads(threads)
    for width, chunk in ((97, 2000), (1280, 131072)):
        monkeypatch.setattr(gather, "_CHUNK", chunk)
        source, residual = normal(SOURCE_ROWS, width, dtype=dtype), normal(301, width, dtype=dtype, seed=1)
        index, weights = numbers(301, 4, lowest=-1), normal(301, 4, seed=2)
        fill = normal(width, dtype=dtype, seed=3)
        pack = gather_rows(source, index, weights, fill=fill, residual=residual)
        assert relative_error(pack, expected(source, index, weights, fill, residual)) <= tolerance(dtype, pack.numel())
        for row in (0, 150, 300):
            only = slice(row, row + 1)
            alone = gather_rows(source, index[only], weights[only], fill=fill, residual=residual[only])
            assert torch.equal(alone[0], pack[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_invariant_too(kernel_device, dtype):
    source = normal(SOURCE_ROWS, 1000, dtype=dtype, device=kernel_device)
    index, weights = numbers(101, 4, device=kernel_device), normal(101, 4, device=kernel_device, seed=1)
    pack = gather_rows(source, index, weights)
    for row in (0, 57, 100):
        only = slice(row, row + 1)
        assert torch.equal(gather_rows(source, index[only], weights[only])[0], pack[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_kernel_differ_by_less_than_a_rounding(kernel_device, dtype):
    source = normal(SOURCE_ROWS, 500, dtype=dtype, device=kernel_device)
    index, weights = numbers(33, 4, device=kernel_device), normal(33, 4, device=kernel_device, seed=1)
    kernel = gather_rows(source, index, weights)
    with dispatch.use("reference"):
        reference = gather_rows(source.cpu(), index.cpu(), weights.cpu())
    assert relative_error(kernel, reference) <= TOLERANCE[dtype] / 4


@pytest.mark.parametrize("config", [GatherConfig(1, 16, 4), GatherConfig(16, 64, 2), GatherConfig(4, 1024, 8)])
def test_configuration_does_not_change_a_bit(kernel_device, config):
    source = normal(SOURCE_ROWS, 130, dtype=torch.bfloat16, device=kernel_device)
    index, weights = numbers(19, 4, lowest=-1, device=kernel_device), normal(19, 4, device=kernel_device, seed=1)
    fill = normal(130, dtype=torch.bfloat16, device=kernel_device, seed=2)
    usual = gather_rows(source, index, weights, fill=fill)
    assert torch.equal(gather_rows(source, index, weights, fill=fill, config=config), usual)


def check_distant_rows(storage, stride, width):
    near = normal(3, width, device=storage.device)
    far = storage.as_strided((3, width), (stride, 1))
    far.copy_(near)
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device=storage.device)
    swapped = near[order.long()]
    assert torch.equal(gather_rows(far, order), swapped)
    taps = torch.stack([order, order], dim=1)
    halves = torch.full((3, 2), 0.5, device=storage.device)
    assert torch.equal(gather_rows(far, taps, halves), swapped)
    assert torch.equal(gather_rows(near, order, residual=far, out=far), near + swapped)
    assert torch.equal(gather_rows(near, order, out=far), swapped)


def test_offsets_beyond_32_bits(distant_storage):
    # The third row begins beyond element 2³¹.
    stride, width = 2**30 + 64, 64
    check_distant_rows(distant_storage(3 * stride), stride, width)


SOURCE = torch.zeros(4, 8)
INDEX = torch.zeros(3, dtype=torch.int32)
TAPS = torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"source": SOURCE.double()}, TypeError, "source is torch.float64"),
        ({"source": SOURCE.int()}, TypeError, "source is torch.int32"),
        ({"source": SOURCE[0]}, ValueError, r"\(8,\); it has to be \[P, D\]"),
        ({"source": torch.zeros(8, 4).t()}, ValueError, "last stride 1"),
        ({"index": INDEX.long()}, TypeError, "index is torch.int64"),
        ({"index": INDEX[None, None]}, ValueError, r"\(1, 1, 3\)"),
        ({"index": TAPS[:, 0]}, ValueError, r"strides \(2,\); it has to be a contiguous"),
        ({"index": TAPS}, ValueError, "2 taps a row, which need weights"),
        ({"index": TAPS[:, :0]}, ValueError, "0 taps a row"),
        ({"index": torch.zeros(3, MAX_TAPS + 1, dtype=torch.int32)}, ValueError, f"may be 1 to {MAX_TAPS}"),
        ({"weights": torch.zeros(3, 2)}, ValueError, r"weights has shape \(3, 2\)"),
        ({"index": TAPS, "weights": torch.zeros(2, 3).t()}, ValueError, r"strides \(1, 3\); every tap"),
        ({"weights": torch.zeros(3).half()}, TypeError, "weights is torch.float16"),
        ({"fill": torch.zeros(7)}, ValueError, r"fill has shape \(7,\); it has to be \(8,\)"),
        ({"fill": torch.zeros(8).half()}, TypeError, "fill is torch.float16"),
        ({"fill": torch.zeros(16)[::2]}, ValueError, "fill has .*last stride 1"),
        ({"residual": torch.zeros(4, 8)}, ValueError, r"residual has shape \(4, 8\); it has to be \(3, 8\)"),
        ({"residual": torch.zeros(3, 8).half()}, TypeError, "residual is torch.float16"),
        ({"out": torch.zeros(3, 9)}, ValueError, r"out has shape \(3, 9\)"),
        ({"out": torch.zeros(3, 8).half()}, TypeError, "out is torch.float16"),
        ({"out": torch.zeros(8, 3).t()}, ValueError, "out has .*last stride 1"),
        ({"out": SOURCE[:3]}, ValueError, "out is source"),
        ({"source": SOURCE[:0]}, ValueError, "it has none"),
        ({"index": INDEX - 1}, ValueError, "index holds -1, which stands for fill"),
        ({"index": INDEX - 2, "fill": SOURCE[0]}, ValueError, "index holds -2, but source .* rows 0 to 3"),
        ({"index": INDEX + 4}, ValueError, r"index holds 4, but source \(4, 8\) has rows 0 to 3"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        gather_rows(**({"source": SOURCE, "index": INDEX} | changes))


def test_the_interpreter_checks_the_range_too(kernel_device):
    if kernel_device.type != "cpu":
        pytest.skip("a GPU is not asked for what it holds")
    with pytest.raises(ValueError, match="index holds 4"):
        gather_rows(SOURCE, INDEX + 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_specifications(architecture):
    specs = compile_specs(architecture)
    assert {spec.constants["TAPS"] for spec in specs} >= {1, 4}
    assert len({spec.name for spec in specs}) == len(specs)
