"""Promises of all matmuls: independent rows, strides, valid rows, descriptors, configurations, refused arguments."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from support.gemm import OPERATIONS, ROWS, SMALL, Operation, Tensors
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.gemm import linear, patch_projection, qkv_projection
from tritontower.kernels.gemm.linear_config import GATED, LinearConfig
from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.config import ARCHITECTURES, SHARED_MEMORY_LIMIT
from tritontower.kernels.runtime.valid_rows import ValidRows

BF16 = torch.bfloat16
TUNED = LinearConfig(64, 64, 32, group_rows=4, num_warps=4, num_stages=2)

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def select_rows(tensors: Tensors, rows: slice) -> Tensors:
    return {name: tensor[rows] if name in ROWS else tensor for name, tensor in tensors.items()}


@each_operation
@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 3), (BF16, 1)])
def test_rows_do_not_depend_on_each_other(device, operation, dtype, split):
    tensors, config = operation.make(70, dtype, device), replace(SMALL, split=split)
    batch = operation.run(tensors, config=config)
    for rows in (slice(0, 1), slice(31, 33), slice(69, 70)):
        assert torch.equal(operation.run(select_rows(tensors, rows), config=config), batch[rows])


@each_operation
@pytest.mark.parametrize("change", [{"split": 2}, {"operands": "descriptors"}, {"vendor": True}])
def test_rows_may_be_strided(device, operation, change):
    tensors = operation.make(37, torch.float32, device)
    want = operation.expected(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            fill = float("nan") if tensor.is_floating_point() else 255
            tensors[name] = torch.nn.functional.pad(tensor, (0, 16), value=fill)[:, : tensor.shape[1]]
    storage = torch.full((37, want.shape[1] + 9), 7.0, device=device)
    out = storage[:, 4:-5]
    assert operation.run(tensors, out=out, config=replace(SMALL, **change)) is out
    assert relative_error(out, want) <= TOLERANCE[torch.float32]
    assert (storage[:, :4] == 7).all()
    assert (storage[:, -5:] == 7).all()


@each_operation
def test_rows_beyond_32_bit_offsets(
    device: torch.device, operation: Operation, distant_storage: Callable[[int], torch.Tensor]
) -> None:
    # The third row begins after element 2³¹.
    stride = 2**30 + 64
    storage = distant_storage(3 * stride)
    tensors = operation.make(3, torch.float32, device)
    want = operation.expected(tensors)
    for index, name in enumerate(("x", "patches", "residual", "cosines", "sines")):
        if name in tensors and tensors[name].is_floating_point():
            far = storage.as_strided(tensors[name].shape, (stride, 1), 128 * (1 + index))
            tensors[name] = far.copy_(tensors[name])
    out = storage.as_strided(want.shape, (stride, 1))
    for split in (1, 2):
        operation.run(tensors, out=out, config=replace(SMALL, split=split))
        assert relative_error(out, want) <= TOLERANCE[torch.float32]


# None; one tile and one row; whole tiles; more than there are.
@each_operation
@pytest.mark.parametrize(
    ("count", "operands", "split"),
    [(0, "pointers", 2), (33, "pointers", 3), (33, "descriptors", 1), (64, "descriptors", 3), (100, "pointers", 1)],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows_are_exact_and_padding_tiles_zero(kernel_device, operation, count, split, operands):
    tensors, config = operation.make(70, BF16, kernel_device), replace(SMALL, split=split, operands=operands)
    whole = operation.run(tensors, config=config)
    # If K is split, the tile that is stored is that of the reduction.
    height = SMALL.block_rows if split == 1 or operation.module is patch_projection else linear.REDUCE_ROWS
    zeros = min(70, align_up(count, height))
    # Tiles without valid rows are not read.
    for name in {"x", "residual"} & set(tensors):
        tensors[name][zeros:] = float("nan")
    valid_rows = ValidRows(70, torch.tensor([count], dtype=torch.int32, device=kernel_device))
    y = operation.run(tensors, config=config, valid_rows=valid_rows)
    assert torch.equal(y[:zeros], whole[:zeros])
    assert torch.equal(y[zeros:], torch.zeros_like(y[zeros:]))


# The copy engine fills the last block of K with zeros, as masked loads do; a padded byte counts as -128, times zero.
@each_operation
@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 2), (torch.float16, 1), (BF16, 2)])
@pytest.mark.usefixtures("poisoned_empty")
def test_descriptors_give_the_bits_of_pointers(kernel_device, operation, dtype, split):
    tensors = operation.make(33, dtype, kernel_device)
    first, second = (
        operation.run(tensors, config=replace(SMALL, split=split, operands=operands))
        for operands in ("pointers", "descriptors")
    )
    assert torch.equal(first, second)


@each_operation
def test_passes_give_the_same_bits(kernel_device, operation):
    tensors, config = operation.make(37, BF16, kernel_device), replace(SMALL, block_columns=64)
    once, *others = (operation.run(tensors, config=replace(config, passes=passes)) for passes in (1, 2, 4))
    assert all(torch.equal(once, other) for other in others)


@each_operation
def test_no_rows_give_an_empty_result(device, operation):
    tensors = operation.make(1, torch.float32, device)
    columns = operation.run(tensors).shape[1]
    assert operation.run(select_rows(tensors, slice(0))).shape == (0, columns)


@pytest.mark.parametrize(
    ("operation", "constants"),
    [
        (OPERATIONS[0], {"columns": 20, "inner": 80, "activation": "gelu", "residual": True}),
        (OPERATIONS[3], {"columns": 20, "inner": 80, "pixels": "uint8"}),
        (OPERATIONS[4], {"columns": 120, "inner": 80, "head_dim": 20}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tuned_configuration_of_the_planned_rows_applies(kernel_device, operation, constants, request, monkeypatch):
    request.addfinalizer(registry.clear)
    used = []

    def spy(*arguments):
        used.append(arguments[2])
        return real(*arguments)

    real = operation.module.make_operands
    monkeypatch.setattr(operation.module, "make_operands", spy)
    name = operation.module.__name__.removeprefix("tritontower.kernels.")
    entry = {"kernel": name, "dtype": "bfloat16", "constants": constants, "sizes": {"rows": 512}}
    tensors, default = operation.make(7, BF16, kernel_device), LinearConfig(128, 128, 128, 8, 4, 1)
    want = operation.run(tensors, config=TUNED)

    def run(**changes):
        registry.fill(kernel_device, [registry.TunedTable([entry | {"config": asdict(TUNED)} | changes])])
        return operation.run(tensors, valid_rows=ValidRows(512))

    assert torch.equal(run(), want)
    run(constants=constants | {"inner": 33})
    run(config=asdict(TUNED) | {"block_rows": 48})
    assert used[:2] == [TUNED, TUNED]
    assert TUNED not in used[2:]
    if kernel_device.type == "cpu":
        assert used[2:] == [default, default]


X, WEIGHT, BIAS = torch.zeros(4, 8), torch.zeros(24, 8), torch.zeros(24)
HEADS = {"heads": 2, "head_dim": 4, "cosines": torch.zeros(4, 2), "sines": torch.zeros(4, 2)}
ARGUMENTS = {
    linear.linear: {},
    patch_projection.patch_projection: {},
    qkv_projection.qkv_projection: HEADS,
}
COUNT = torch.zeros(1, dtype=torch.int32)
INDEX = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize("operation", ARGUMENTS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "must be float32.*got torch.int32"),
        ({"x": X[:, :0], "weight": WEIGHT[:, :0]}, ValueError, r"must be \[M, K\] with K at least 1"),
        ({"x": X[0]}, ValueError, r"must be \[M, K\].*got shape \(8,\)"),
        ({"x": torch.zeros(8, 4).T}, ValueError, "must have last stride 1.*contiguous"),
        ({"weight": torch.zeros(24, 9)}, ValueError, r"weight must have shape \(24, 8\), got \(24, 9\)"),
        ({"weight": torch.zeros(8, 24).T}, ValueError, "weight must have last stride 1.*contiguous"),
        ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(24,\), got \(23,\)"),
        ({"bias": BIAS.half()}, TypeError, "bias must be torch.float32.*got torch.float16"),
        ({"out": torch.zeros(4, 25)}, ValueError, r"out must have shape \(4, 24\), got \(4, 25\)"),
        ({"valid_rows": ValidRows(4, COUNT.float())}, TypeError, "valid_rows.count must be torch.int32 on cpu"),
        ({"valid_rows": ValidRows(4, COUNT.expand(2))}, ValueError, r"must be one number, got shape \(2,\)"),
    ],
)
def test_invalid_arguments_are_rejected(operation, change, error, message):
    refuse(operation, change, error, message)


@pytest.mark.parametrize(
    ("operation", "change", "error", "message"),
    [
        (
            linear.linear,
            {"activation": "relu"},
            ValueError,
            "activation must be one of quick_gelu.*, or None, got 'relu'",
        ),
        (linear.linear, {"weight": WEIGHT.bfloat16()}, TypeError, "weight must be torch.float32.*bfloat16"),
        (
            linear.linear,
            {"weight": WEIGHT[:5], "bias": None, "activation": "silu_gated"},
            ValueError,
            "even number of rows",
        ),
        (linear.linear, {"residual": X}, ValueError, r"residual must have shape \(4, 24\), got \(4, 8\)"),
        (linear.linear, {"out": X, "activation": "silu_gated"}, ValueError, r"out must have shape \(4, 12\)"),
        (patch_projection.patch_projection, {"weight": WEIGHT.int()}, TypeError, "weight must be float32.*torch.int32"),
        (
            patch_projection.patch_projection,
            {"position_table": torch.zeros(3, 24)},
            ValueError,
            "at least 4 rows.*got 3; pass position_index",
        ),
        (
            patch_projection.patch_projection,
            {"position_index": INDEX},
            ValueError,
            "position_table must be given",
        ),
        (
            patch_projection.patch_projection,
            {"position_table": torch.zeros(3, 24), "position_index": INDEX.long()},
            TypeError,
            "position_index must be torch.int32",
        ),
        (qkv_projection.qkv_projection, {"cosines": None}, ValueError, "cosines and sines must both be given"),
        (
            qkv_projection.qkv_projection,
            {"sines": X[:, :3]},
            ValueError,
            r"sines must have shape \(4, 2\), got \(4, 3\)",
        ),
        (qkv_projection.qkv_projection, {"sines": X.double()}, TypeError, "sines must be torch.float32.*torch.float64"),
        (
            qkv_projection.qkv_projection,
            {"heads": 0},
            ValueError,
            "heads and head_dim must be at least 1.*got 0, 4 and 4",
        ),
        (
            qkv_projection.qkv_projection,
            {"query_scale": 0.0},
            ValueError,
            "query_scale must be a positive, finite fp32",
        ),
        (qkv_projection.qkv_projection, {"padded_head_dim": 2}, ValueError, "at least head_dim, got 2, 4 and 2"),
        (
            qkv_projection.qkv_projection,
            {"head_dim": 3, "padded_head_dim": 4},
            ValueError,
            "must be even for a rotation",
        ),
    ],
)
def test_invalid_special_arguments_are_rejected(operation, change, error, message):
    refuse(operation, change, error, message)


def refuse(operation, change, error, message):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS} | ARGUMENTS[operation] | change
    with pytest.raises(error, match=message):
        operation(arguments.pop("x"), **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_default_tiles_fit_shared_memory(dtype, architecture):
    shape = {"dtype": dtype, "architecture": architecture}
    found = [(patch_projection.default_config(**shape), 1)]
    for rows in (1, 64, 256, 4096, 65536):
        found.append((qkv_projection.default_config(rows, 3840, 1280, **shape), 1))
        for activation in (None, "gelu", *GATED):
            config = linear.default_config(rows, 5120, 1280, activation=activation, **shape)
            found.append((config, 2 if activation in GATED else 1))
    for config, paired in found:
        block = (config.block_rows + paired * config.block_columns) * config.block_inner * dtype.itemsize
        assert block * config.num_stages <= SHARED_MEMORY_LIMIT[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_few_rows_split_k(architecture):
    def split(rows):
        return linear.default_config(rows, 3584, 5120, dtype=BF16, activation=None, architecture=architecture).split

    assert split(1) == split(64) > 1
    assert split(65) == split(256) > 1
    assert split(257) == 1
    few, many = (
        qkv_projection.default_config(rows, 3840, 5120, dtype=BF16, architecture=architecture) for rows in (64, 16384)
    )
    assert few.split > 1 == many.split
    assert many.block_columns <= 128
