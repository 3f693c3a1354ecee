"""Promises of every kernel over rows: accuracy, views, independence of other rows, large offsets and refusals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from support.numbers import TOLERANCE, normal, relative_error, tolerance

from tritontower.kernels.rowwise import activations, gather, mean_pool, norm, splice
from tritontower.kernels.rowwise.common import TileConfig
from tritontower.kernels.runtime import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOURCE_ROWS = 23
GROUP = 9  # rows of one mean
EPS = 1e-6


def make_index(rows, lowest, device, seed=0):
    """Row numbers from ``lowest``; the first is ``lowest`` itself and the last the highest there is."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(lowest, SOURCE_ROWS, rows, generator=generator, dtype=torch.int32)
    if index.numel():
        index.view(-1)[-1], index.view(-1)[0] = SOURCE_ROWS - 1, lowest
    return index.to(device)


def make_matrices(names, rows, width, dtype, device):
    return {name: normal(rows, width, dtype=dtype, device=device, seed=seed) for seed, name in enumerate(names)}


def make_gather(rows, width, dtype, device, taps=None, *, filled, added):
    index = make_index((rows,) if taps is None else (rows, taps), -1 if filled else 0, device)
    arguments = {"source": normal(SOURCE_ROWS, width, dtype=dtype, device=device), "index": index}
    if taps is not None:
        arguments["weights"] = normal(rows, taps, device=device, seed=3)
    if filled:
        arguments["fill"] = normal(width, dtype=dtype, device=device, seed=1)
    if added:
        arguments["residual"] = normal(rows, width, dtype=dtype, device=device, seed=2)
    return arguments


def gather_truth(source, index, weights=None, fill=None, residual=None):
    fill = source.new_zeros(source.shape[1]) if fill is None else fill
    rows = torch.cat([source, fill[None]]).double()[index.long()]  # -1 counts from the end
    if weights is not None:
        rows = (rows * weights.double()[..., None]).sum(1)
    return rows if residual is None else rows + residual.double()


def make_norm(rows, width, dtype, device, *, has_bias):
    """x with a mean well away from zero, weights around one."""
    x = normal(rows, width, device=device) * 2 + 3
    weight = normal(width, device=device, seed=1) * 0.2 + 1
    bias = {"bias": normal(width, dtype=dtype, device=device, seed=2)} if has_bias else {}
    return {"x": x.to(dtype), "weight": weight.to(dtype), **bias}


def norm_truth(x, weight, bias=None, *, kind):
    x, weight = x.double(), weight.double()
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias.double(), EPS)
    normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return normalized * (weight + 1 if kind == "gemma_rms_norm" else weight)


def splice_truth(text, rows, index, *, add):
    chosen = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).double()[index.long()]
    is_kept = (index < 0)[:, None] | torch.tensor(add)
    return text.double() * is_kept + chosen


def make_splice(rows, width, dtype, device):
    """Rows of bf16 in a text of another dtype."""
    images = normal(SOURCE_ROWS, width, dtype=torch.bfloat16, device=device, seed=1)
    text = normal(rows, width, dtype=dtype, device=device)
    return {"text": text, "rows": images, "index": make_index((rows,), -1, device)}


ACTIVATION_TRUTHS = {
    "quick_gelu": lambda x: x.double() * torch.sigmoid(1.702 * x.double()),
    "gelu": lambda x: torch.nn.functional.gelu(x.double()),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x.double(), approximate="tanh"),
    "silu": lambda x: torch.nn.functional.silu(x.double()),
}


@dataclass(frozen=True)
class Operation:
    """One operation, its inputs and its formula in fp64."""

    name: str
    run: Callable
    make: Callable
    truth: Callable
    by_row: tuple[str, ...]
    """Arguments with one row per row of the result."""
    group: int = 1
    """Rows of such an argument per row of the result."""
    is_exact: bool = False
    """Both backends give the same bits."""
    slack: float = 1.0
    """Roundings that the definition has, compared with one."""
    has_config: bool = False

    def alone(self, arguments, row):
        """The arguments of one row of the result."""
        rows = slice(row * self.group, (row + 1) * self.group)
        return {name: tensor[rows] if name in self.by_row else tensor for name, tensor in arguments.items()}


def make_operations():
    for kind, truth in ACTIVATION_TRUTHS.items():
        run, make = partial(activations.activation, kind=kind), partial(make_matrices, ("x",))
        yield Operation(kind, run, make, truth, ("x",))
    make = partial(make_matrices, ("x", "y"))
    yield Operation("add", activations.add, make, lambda x, y: x.double() + y.double(), ("x", "y"), is_exact=True)
    make = lambda rows, *rest: make_matrices(("x",), GROUP * rows, *rest)  # noqa: E731
    truth = lambda x: x.double().view(-1, GROUP, x.shape[1]).mean(1)  # noqa: E731
    run = partial(mean_pool.mean_rows, count=GROUP)
    yield Operation("mean", run, make, truth, ("x",), GROUP, is_exact=True, has_config=True)
    for name, taps, filled, added in (
        ("copy", None, False, False),
        ("copy filled", None, True, False),
        ("copy added", None, False, True),
        ("one tap", 1, False, True),
        ("four taps", 4, True, True),
        ("sixteen taps", gather.MAX_TAPS, True, False),
    ):
        make = partial(make_gather, taps=taps, filled=filled, added=added)
        by_row = ("index", "weights", "residual")
        yield Operation(name, gather.gather_rows, make, gather_truth, by_row, is_exact=taps is None, has_config=True)
    for kind, rounding in (
        ("layer_norm", "once"),
        ("rms_norm", "once"),
        ("rms_norm", "before_weight"),
        ("gemma_rms_norm", "once"),
    ):
        run = partial(norm.norm, kind=kind, rounding=rounding, eps=EPS)
        make = partial(make_norm, has_bias=kind == "layer_norm")
        slack = 1.5 if rounding == "before_weight" else 1.0
        yield Operation(f"{kind} {rounding}", run, make, partial(norm_truth, kind=kind), ("x",), slack=slack)
    for add in (False, True):
        run, truth = partial(splice.splice_rows, add=add), partial(splice_truth, add=add)
        name = "splice added" if add else "splice"
        yield Operation(name, run, make_splice, truth, ("text", "index"), is_exact=True, has_config=True)


OPERATIONS = list(make_operations())
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@every_operation
@pytest.mark.parametrize("dtype", DTYPES)
# One column; odd sizes in one masked tile; several tiles of rows, in two exact blocks; several tiles of columns.
@pytest.mark.parametrize("shape", [(2, 1), (7, 333), (67, 1152), (2, 3584)])
@pytest.mark.usefixtures("poisoned_empty")
def test_results_match_fp64(device, operation, dtype, shape):
    arguments = operation.make(*shape, dtype, device)
    result = operation.run(**arguments)
    assert result.is_contiguous()
    expected = operation.truth(**arguments)
    if operation.is_exact and operation.name != "mean":
        assert torch.equal(result, expected.to(dtype))
    assert relative_error(result, expected) <= operation.slack * tolerance(dtype, result.numel())


@pytest.mark.gpu
@every_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_match_fp64(kernel_device, operation, dtype):
    arguments = operation.make(16384, 1280, dtype, kernel_device)
    error = relative_error(operation.run(**arguments), operation.truth(**arguments))
    assert error <= operation.slack * tolerance(dtype, 16384 * 1280)


@every_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_the_same_bits_and_nothing_else_is_written(device, operation, dtype):
    arguments = operation.make(31, 80, dtype, device)
    expected = operation.run(**arguments)

    def embed(tensor):
        wide = torch.full((len(tensor), 200), 7.0, dtype=tensor.dtype, device=device)
        wide[:, 104:184] = tensor
        return wide[:, 104:184]

    views = {
        name: embed(tensor) if tensor.dim() == 2 and tensor.shape[1] == 80 else tensor
        for name, tensor in arguments.items()
    }
    wide = torch.full((31, 200), 7.0, dtype=dtype, device=device)
    out = wide[:, 104:184]
    assert operation.run(**views, out=out) is out
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert bool((wide == 7.0).all())


@pytest.mark.parametrize(
    ("name", "argument"),
    [("gelu", "x"), ("quick_gelu", "x"), ("add", "x"), ("add", "y"), ("layer_norm once", "x"), ("rms_norm once", "x"),
     ("rms_norm before_weight", "x"), ("copy added", "residual"), ("four taps", "residual"), ("splice", "text"),
     ("splice added", "text")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_an_input(device, name, argument, dtype):
    operation = next(each for each in OPERATIONS if each.name == name)
    arguments = operation.make(40, 200, dtype, device)
    expected = operation.run(**arguments)
    assert operation.run(**arguments, out=arguments[argument]) is arguments[argument]
    assert torch.equal(arguments[argument], expected)


@every_operation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("restore_threads")
def test_a_row_alone_equals_the_row_in_a_batch(device, monkeypatch, operation, dtype):
    for module in (activations, gather, mean_pool, norm):
        monkeypatch.setattr(module, "CHUNK", 2000)  # several chunks in the reference
    arguments = operation.make(101, 97, dtype, device)
    for threads in (1, 3) if device.type == "cpu" and not dispatch.runs_kernel(torch.empty(0)) else (1,):
        torch.set_num_threads(threads)
        batch = operation.run(**arguments)
        for row in (0, 50, 100):
            assert torch.equal(operation.run(**operation.alone(arguments, row))[0], batch[row])


@every_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_kernel_agree(kernel_device, operation, dtype):
    arguments = operation.make(33, 500, dtype, kernel_device)
    kernel = operation.run(**arguments)
    with dispatch.use("reference"):
        reference = operation.run(**{name: tensor.cpu() for name, tensor in arguments.items()})
    if operation.is_exact:
        assert torch.equal(kernel.cpu(), reference)
    assert relative_error(kernel, reference) <= TOLERANCE[dtype] / 4


@pytest.mark.parametrize("config", [TileConfig(1, 32, 4), TileConfig(16, 64, 2), TileConfig(4, 1024, 8)])
@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each.has_config], ids=lambda each: each.name)
def test_tiles_do_not_change_a_bit(kernel_device, operation, config):
    arguments = operation.make(7, 130, torch.bfloat16, kernel_device)
    assert torch.equal(operation.run(**arguments, config=config), operation.run(**arguments))


@every_operation
def test_offsets_beyond_32_bits(distant_storage, device, operation):
    """Rows of every input in turn, and of the output, end beyond element 2³¹."""
    stride, width = 2**30 + 64, 64
    storage = distant_storage(3 * stride)
    if operation.name == "mean":
        operation = replace(operation, run=partial(mean_pool.mean_rows, count=3), make=partial(make_matrices, ("x",)))
    arguments = operation.make(3, width, torch.float32, device)
    for name in ("source", "rows"):
        if name in arguments:
            arguments[name] = arguments[name][:3].float()
    if "index" in arguments:
        order = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
        arguments["index"] = (
            order.view(3, *[1] * (arguments["index"].dim() - 1)).expand_as(arguments["index"]).contiguous()
        )
    expected = operation.run(**arguments)
    for name, tensor in arguments.items():
        if tensor.shape == (3, width):
            far = storage.as_strided((3, width), (stride, 1))
            far.copy_(tensor)
            assert torch.equal(operation.run(**{**arguments, name: far}), expected)
    far = storage.as_strided(expected.shape, (stride, 1))
    operation.run(**arguments, out=far)
    assert torch.equal(far, expected)


@every_operation
@pytest.mark.parametrize("shape", [(0, 48), (3, 0)])
def test_empty_inputs(device, operation, shape):
    if "norm" in operation.name and shape[1] == 0:
        pytest.skip("a norm needs columns")
    assert operation.run(**operation.make(*shape, torch.float32, device)).shape == shape


@every_operation
def test_refusals_that_all_have_in_common(operation):
    arguments = operation.make(4, 8, torch.float32, "cpu")
    first, tensor = next(iter(arguments.items()))
    for change, error, message in (
        ({first: tensor.double()}, TypeError, f"{first} must be float32, float16 or bfloat16, got torch.float64"),
        ({first: tensor[0]}, ValueError, rf"{first}.* must be \[.*got .*\(8,\)"),
        ({first: tensor.t().contiguous().t()}, ValueError, f"{first} must have last stride 1.*pass a contiguous"),
        ({"out": torch.empty(4, 9)}, ValueError, r"out must have shape \(4, 8\), got \(4, 9\)"),
        ({"out": torch.empty(4, 8).half()}, TypeError, "out must be torch.float32 on cpu, got torch.float16"),
        ({"out": torch.empty(8, 4).t()}, ValueError, "out must have last stride 1"),
    ):
        with pytest.raises(error, match=message):
            operation.run(**{**arguments, **change})
