"""Projector MLP: both backends compared with fp64 and the module it replaces, gathers, scratch, row invariance."""

import copy

import pytest
import torch
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.gemm import projector as projector_module
from tritontower.kernels.gemm.linear import GATED, LinearConfig
from tritontower.kernels.gemm.projector import ProjectorConfig, projector_mlp
from tritontower.kernels.rowwise.norm import NormConfig
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.valid_rows import ValidRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
TILE = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)
SMALL = ProjectorConfig(NormConfig(rows=4, num_warps=4), TILE, TILE)
SPLIT = ProjectorConfig(
    NormConfig(rows=4, num_warps=4),
    LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1, split=2),
    LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1, split=3),
)
# The norm, the hidden rows and the result are each rounded.
ALLOWED = {dtype: 2 * tolerance for dtype, tolerance in TOLERANCE.items()}


def inputs(rows, width, merge, dtype, *, activation="gelu", device="cpu", seed=0):
    """x, norm weight and bias, and the two layers, such that everything inside is of order one."""
    generator = torch.Generator().manual_seed(seed)
    merged, hidden, columns = merge * width, 40, 24
    first = 2 * hidden if activation in GATED else hidden
    tensors = (
        torch.randn(rows, width, generator=generator) + 1,
        torch.rand(width, generator=generator) + 0.5,
        torch.randn(width, generator=generator),
        torch.randn(first, merged, generator=generator) / merged**0.5,
        torch.randn(first, generator=generator),
        torch.randn(columns, hidden, generator=generator) / hidden**0.5,
        torch.randn(columns, generator=generator),
    )
    return [tensor.to(device, dtype) for tensor in tensors]


def expected(tensors, merge, *, kind="layer_norm", activation="gelu", row_index=None):
    """The formula in fp64."""
    x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2 = (
        None if tensor is None else tensor.double() for tensor in tensors
    )
    x = x if row_index is None else x[row_index.long()]
    if norm_weight is not None and kind == "layer_norm":
        x = torch.nn.functional.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
    elif norm_weight is not None:
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * norm_weight
    hidden = x.reshape(len(x) // merge, -1) @ weight_1.T + (0 if bias_1 is None else bias_1)
    if activation in GATED:
        gate, up = hidden.chunk(2, dim=1) if activation == "silu_gated" else (hidden[:, ::2], hidden[:, 1::2])
        hidden = torch.nn.functional.silu(gate) * up
    elif activation == "gelu":
        hidden = torch.nn.functional.gelu(hidden)
    return hidden @ weight_2.T + (0 if bias_2 is None else bias_2)


@pytest.mark.parametrize(
    ("dtype", "rows", "width", "merge", "config"),
    [
        (torch.float32, 4, 20, 4, SMALL),
        (torch.float32, 148, 24, 4, SPLIT),
        (torch.float16, 5, 77, 1, SPLIT),
        (torch.bfloat16, 148, 24, 4, SMALL),
        (torch.bfloat16, 4, 20, 4, SPLIT),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_fp64(device, dtype, rows, width, merge, config):
    tensors = inputs(rows, width, merge, dtype, device=device)
    y = projector_mlp(*tensors, merge=merge, eps=EPS, config=config)
    assert relative_error(y, expected(tensors, merge)) <= ALLOWED[dtype]


@pytest.mark.parametrize("activation", [None, *GATED])
@pytest.mark.usefixtures("poisoned_empty")
def test_rms_norm_without_biases(device, activation):
    tensors = inputs(36, 24, 4, torch.bfloat16, activation=activation, device=device)
    tensors[2] = tensors[4] = tensors[6] = None
    y = projector_mlp(*tensors, merge=4, norm_kind="rms_norm", rounding="before_weight", eps=EPS, activation=activation)
    want = expected(tensors, 4, kind="rms_norm", activation=activation)
    assert relative_error(y, want) <= 1.5 * ALLOWED[torch.bfloat16]


@pytest.mark.parametrize(("with_norm", "with_scratch"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.usefixtures("poisoned_empty")
def test_strided_or_gathered_rows_and_scratch(device, with_norm, with_scratch, gathered):
    tensors = inputs(30 if gathered else 28, 24, 4, torch.float32, device=device)
    tensors[0] = torch.nn.functional.pad(tensors[0], (2, 3), value=float("nan"))[:, 2:26]
    if not with_norm:
        tensors[1] = tensors[2] = None
    generator = torch.Generator().manual_seed(1)
    row_index = torch.randperm(30, generator=generator)[:28].to(device, torch.int32) if gathered else None
    scratch = {}
    if with_scratch:
        scratch = {"normed": torch.empty(28, 24, device=device), "hidden": torch.empty(7, 40, device=device)}
    wide = torch.full((7, 30), 7.0, device=device)
    out = wide[:, 3:27]
    assert projector_mlp(*tensors, merge=4, eps=EPS, row_index=row_index, out=out, **scratch) is out
    assert relative_error(out, expected(tensors, 4, row_index=row_index)) <= TOLERANCE[torch.float32]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in scratch.values())
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 27:] == 7).all()


def test_normed_may_be_x_itself():
    tensors = inputs(12, 24, 4, torch.float32)
    want = expected(tensors, 4)
    y = projector_mlp(*tensors, merge=4, eps=EPS, normed=tensors[0])
    assert relative_error(y, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_patch_merger_of_qwen2_vl(dtype):
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    torch.manual_seed(0)
    merger = module.PatchMerger(dim=32, context_dim=24, spatial_merge_size=2).to(dtype)
    x = torch.randn(16, 24).to(dtype)
    with torch.inference_mode():
        truth = copy.deepcopy(merger).double()(x.double())
        want = merger(x)
        norm, (first, _, second) = merger.ln_q, merger.mlp
        layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
        y = projector_mlp(x, *layers, merge=4, eps=norm.eps)
    assert relative_error(y, truth) <= max(1.1 * relative_error(want, truth), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "layer_norm"), (torch.float16, "layer_norm"), (torch.bfloat16, "rms_norm")]
)
def test_reference_tokens_do_not_depend_on_each_other(dtype, kind):
    tensors = inputs(4 * 519, 20, 4, dtype)
    tensors[2] = tensors[2] if kind == "layer_norm" else None

    def run(start, stop):
        return projector_mlp(tensors[0][4 * start : 4 * stop], *tensors[1:], merge=4, norm_kind=kind, eps=EPS)

    batch = run(0, 519)
    for start, stop in ((0, 1), (17, 18), (518, 519), (5, 7), (40, 43), (3, 517)):
        assert torch.equal(run(start, stop), batch[start:stop]), (start, stop)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
def test_kernel_tokens_do_not_depend_on_each_other(kernel_device, config):
    tensors = inputs(4 * 37, 20, 4, torch.bfloat16, device=kernel_device)

    def run(start, stop):
        return projector_mlp(tensors[0][4 * start : 4 * stop], *tensors[1:], merge=4, eps=EPS, config=config)

    batch = run(0, 37)
    for start, stop in ((0, 1), (17, 19), (36, 37)):
        assert torch.equal(run(start, stop), batch[start:stop])


@pytest.mark.parametrize(("count", "config"), [(0, SPLIT), (5, SMALL), (32, SPLIT), (37, SMALL)])
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows_are_exact_and_padding_tiles_zero(kernel_device, count, config):
    tensors = inputs(4 * 37, 20, 4, torch.bfloat16, device=kernel_device)
    whole = projector_mlp(*tensors, merge=4, eps=EPS, config=config)
    valid_rows = ValidRows(37, torch.tensor([count], dtype=torch.int32, device=kernel_device))
    y = projector_mlp(*tensors, merge=4, eps=EPS, config=config, valid_rows=valid_rows)
    assert torch.equal(y[:count], whole[:count])
    assert torch.isfinite(y).all()
    assert not y[align_up(count, 32) :].any()


def test_configuration_is_selected_for_the_planned_tokens(kernel_device, monkeypatch):
    chosen = []
    monkeypatch.setattr(projector_module, "choose_config", lambda *sizes, **options: chosen.append(sizes) or SMALL)
    tensors = inputs(4 * 7, 20, 4, torch.float32, device=kernel_device)
    want = projector_mlp(*tensors, merge=4, eps=EPS, config=SMALL)
    assert torch.equal(projector_mlp(*tensors, merge=4, eps=EPS, valid_rows=ValidRows(512)), want)
    projector_mlp(*tensors, merge=4, eps=EPS)
    assert chosen == [(512, 20, 80, 40, 24), (7, 20, 80, 40, 24)]


def test_no_rows(kernel_device):
    tensors = inputs(0, 24, 4, torch.float32, device=kernel_device)
    assert projector_mlp(*tensors, merge=4, eps=EPS).shape == (0, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 250, 2000])
def test_many_tokens_on_a_gpu(kernel_device, dtype, tokens):
    tensors = inputs(4 * tokens, 1280, 4, dtype, device=kernel_device)
    assert relative_error(projector_mlp(*tensors, merge=4, eps=EPS), expected(tensors, 4)) <= ALLOWED[dtype]


NAMES = ("x", "norm_weight", "norm_bias", "weight_1", "bias_1", "weight_2", "bias_2")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"merge": 3}, ValueError, "merge must divide the number of rows, 8, got 3"),
        ({"merge": 0}, ValueError, "merge must divide"),
        ({"activation": "relu"}, ValueError, "activation must be one of .*got 'relu'"),
        ({"norm_kind": "batch_norm"}, ValueError, "norm_kind must be one of .*got 'batch_norm'"),
        ({"rounding": "twice"}, ValueError, "rounding must be one of .*got 'twice'"),
        ({"rounding": "before_weight"}, ValueError, "rounding must be 'once' for layer_norm"),
        ({"norm_kind": "rms_norm"}, ValueError, "norm_bias must be None"),
        ({"norm_weight": None}, ValueError, "norm_bias must be None, except for layer_norm with a norm_weight"),
        ({"norm_weight": torch.zeros(23)}, ValueError, r"norm_weight must have shape \(24,\), got \(23,\)"),
        ({"weight_1": torch.zeros(40, 24)}, ValueError, r"weight_1 must have shape \(40, 96\), got \(40, 24\)"),
        ({"weight_2": torch.zeros(24, 41)}, ValueError, r"weight_2 must have shape \(24, 40\), got \(24, 41\)"),
        ({"weight_2": torch.zeros(24, 40).half()}, TypeError, "weight_2 must be torch.float32"),
        ({"bias_2": torch.zeros(23)}, ValueError, r"bias_2 must have shape \(24,\), got \(23,\)"),
        ({"row_index": torch.zeros(8, dtype=torch.int64)}, TypeError, "row_index must be torch.int32"),
        ({"row_index": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"row_index must have shape \(8,\)"),
        ({"normed": torch.zeros(8, 48)[:, :24]}, ValueError, "normed must be contiguous"),
        ({"hidden": torch.zeros(3, 40)}, ValueError, r"hidden must have shape \(2, 40\), got \(3, 40\)"),
        ({"out": torch.zeros(2, 25)}, ValueError, r"out must have shape \(2, 24\), got \(2, 25\)"),
        ({"x": torch.zeros(8, 24).int()}, TypeError, "x must be float32.*got torch.int32"),
        ({"x": torch.zeros(24, 8).T}, ValueError, "x must have last stride 1"),
    ],
)
def test_invalid_arguments_are_rejected(change, error, message):
    arguments = dict(zip(NAMES, inputs(8, 24, 4, torch.float32), strict=True)) | {"merge": 4, "eps": EPS} | change
    tensors = [arguments.pop(name) for name in NAMES]
    with pytest.raises(error, match=message):
        projector_mlp(*tensors, **arguments)


def test_gathering_in_place_is_rejected():
    tensors = inputs(8, 24, 4, torch.float32)
    row_index = torch.arange(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="normed must not be x if rows are gathered"):
        projector_mlp(*tensors, merge=4, eps=EPS, row_index=row_index, normed=tensors[0])
