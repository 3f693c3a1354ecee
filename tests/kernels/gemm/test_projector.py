"""Projector MLP: both backends against fp64 and against the module it replaces, gathers, scratch, row invariance."""

import copy

import pytest
import torch
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.gemm import projector as projector_module
from tritontower.kernels.gemm.linear import GATED, LinearConfig
from tritontower.kernels.gemm.projector import ProjectorConfig, compile_specs, default_config, projector_mlp
from tritontower.kernels.rowwise.norm import NormConfig
from tritontower.kernels.runtime.config import ARCHITECTURES
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
# The norm, the hidden rows and the result are rounded, each on its own.
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


def device_of(request, backend):
    return request.getfixturevalue("kernel_device") if backend == "kernel" else torch.device("cpu")


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(("rows", "width", "merge"), [(4, 20, 4), (148, 24, 4), (5, 77, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_fp64(request, backend, dtype, rows, width, merge, config):
    tensors = inputs(rows, width, merge, dtype, device=device_of(request, backend))
    y = projector_mlp(*tensors, merge=merge, eps=EPS, config=config)
    assert relative_error(y, expected(tensors, merge)) <= ALLOWED[dtype]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("activation", [None, *GATED])
@pytest.mark.usefixtures("poisoned_empty")
def test_rms_norm_without_biases(request, backend, activation):
    tensors = inputs(36, 24, 4, torch.bfloat16, activation=activation, device=device_of(request, backend))
    tensors[2] = tensors[4] = tensors[6] = None
    y = projector_mlp(*tensors, merge=4, norm_kind="rms_norm", rounding="before_weight", eps=EPS, activation=activation)
    want = expected(tensors, 4, kind="rms_norm", activation=activation)
    assert relative_error(y, want) <= 1.5 * ALLOWED[torch.bfloat16]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_scratch", [True, False])
@pytest.mark.usefixtures("poisoned_empty")
def test_gathers_rows_and_uses_scratch(request, backend, with_norm, with_scratch):
    device = device_of(request, backend)
    tensors = inputs(30, 24, 4, torch.float32, device=device)
    if not with_norm:
        tensors[1] = tensors[2] = None
    row_index = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:28].to(device, torch.int32)
    scratch = {}
    if with_scratch:
        scratch = {"normed": torch.empty(28, 24, device=device), "hidden": torch.empty(7, 40, device=device)}
    out = torch.empty(7, 24, device=device)
    y = projector_mlp(*tensors, merge=4, eps=EPS, row_index=row_index, out=out, **scratch)
    assert y is out
    assert relative_error(y, expected(tensors, 4, row_index=row_index)) <= TOLERANCE[torch.float32]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in scratch.values())


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_scratch", [True, False])
def test_rows_may_stand_apart(request, backend, with_norm, with_scratch):
    device = device_of(request, backend)
    tensors = inputs(12, 24, 4, torch.float32, device=device)
    tensors[0] = torch.nn.functional.pad(tensors[0], (2, 3), value=float("nan"))[:, 2:26]
    if not with_norm:
        tensors[1] = tensors[2] = None
    normed = torch.empty(12, 24, device=device) if with_scratch else None
    wide = torch.full((3, 30), 7.0, device=device)
    projector_mlp(*tensors, merge=4, eps=EPS, normed=normed, out=wide[:, 3:27])
    assert relative_error(wide[:, 3:27], expected(tensors, 4)) <= TOLERANCE[torch.float32]
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 27:] == 7).all()


def test_normed_may_be_x_itself():
    tensors = inputs(12, 24, 4, torch.float32)
    want = expected(tensors, 4)
    assert (
        relative_error(projector_mlp(*tensors, merge=4, eps=EPS, normed=tensors[0]), want) <= TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_qwen2_vls_patch_merger(dtype):
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    torch.manual_seed(0)
    merger = module.PatchMerger(dim=32, context_dim=24, spatial_merge_size=2).to(dtype)
    x = torch.randn(16, 24).to(dtype)
    with torch.inference_mode():
        truth = copy.deepcopy(merger).double()(x.double())
        want = merger(x)
        norm, (first, _, second) = merger.ln_q, merger.mlp
        y = projector_mlp(
            x,
            norm.weight,
            norm.bias,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            merge=4,
            eps=norm.eps,
        )
    assert relative_error(y, truth) <= max(1.1 * relative_error(want, truth), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_reference_token_alone_has_the_bits_it_has_in_a_pack(dtype, kind):
    tensors = inputs(4 * 519, 20, 4, dtype)
    tensors[2] = tensors[2] if kind == "layer_norm" else None

    def run(start, stop):
        return projector_mlp(tensors[0][4 * start : 4 * stop], *tensors[1:], merge=4, norm_kind=kind, eps=EPS)

    pack = run(0, 519)
    for start, stop in ((0, 1), (17, 18), (518, 519), (5, 7), (40, 43), (3, 517)):
        assert torch.equal(run(start, stop), pack[start:stop]), (start, stop)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
def test_kernel_token_alone_has_the_bits_it_has_in_a_pack(kernel_device, config):
    tensors = inputs(4 * 37, 20, 4, torch.bfloat16, device=kernel_device)

    def run(start, stop):
        return projector_mlp(tensors[0][4 * start : 4 * stop], *tensors[1:], merge=4, eps=EPS, config=config)

    pack = run(0, 37)
    for start, stop in ((0, 1), (17, 19), (36, 37)):
        assert torch.equal(run(start, stop), pack[start:stop])


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("live", [0, 5, 32, 37])
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows(kernel_device, live, config):
    """Whole tiles of tokens beyond those that count are zeros; the norm before them computes every row."""
    tensors = inputs(4 * 37, 20, 4, torch.bfloat16, device=kernel_device)
    whole = projector_mlp(*tensors, merge=4, eps=EPS, config=config)
    valid_rows = ValidRows(37, torch.tensor([live], dtype=torch.int32, device=kernel_device))
    y = projector_mlp(*tensors, merge=4, eps=EPS, config=config, valid_rows=valid_rows)
    assert torch.equal(y[:live], whole[:live])
    assert torch.isfinite(y).all()
    assert not y[-(-live // 32) * 32 :].any()


def test_configuration_is_chosen_for_the_planned_tokens(kernel_device, monkeypatch):
    chosen = []
    monkeypatch.setattr(projector_module, "choose_config", lambda *sizes, **options: chosen.append(sizes) or SMALL)
    tensors = inputs(4 * 7, 20, 4, torch.float32, device=kernel_device)
    want = projector_mlp(*tensors, merge=4, eps=EPS, config=SMALL)
    assert torch.equal(projector_mlp(*tensors, merge=4, eps=EPS, valid_rows=ValidRows(512)), want)
    projector_mlp(*tensors, merge=4, eps=EPS)
    assert chosen == [(512, 20, 80, 40, 24), (7, 20, 80, 40, 24)]


def test_tuned_products_are_taken(monkeypatch):
    asked = []

    def choose_linear(rows, columns, inner, **options):
        asked.append((rows, columns, inner, options["activation"], options["residual"]))
        return TILE

    monkeypatch.setattr(projector_module, "choose_linear", choose_linear)
    device = torch.device("cpu")
    config = projector_module.choose_config(7, 20, 80, 40, 24, dtype=torch.float32, activation="gelu", device=device)
    assert (config.first, config.second) == (TILE, TILE)
    assert asked == [(7, 40, 80, "gelu", False), (7, 24, 40, None, False)]


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
        ({"merge": 3}, ValueError, "8 rows cannot be merged by 3"),
        ({"merge": 0}, ValueError, "cannot be merged by 0"),
        ({"activation": "relu"}, ValueError, "unknown activation 'relu'"),
        ({"norm_kind": "batch_norm"}, ValueError, "unknown norm 'batch_norm'"),
        ({"rounding": "twice"}, ValueError, "unknown rounding 'twice'"),
        ({"rounding": "before_weight"}, ValueError, "belongs to rms_norm"),
        ({"norm_kind": "rms_norm"}, ValueError, "rms_norm has no bias"),
        ({"norm_weight": None}, ValueError, "norm_bias was given without norm_weight"),
        ({"norm_weight": torch.zeros(23)}, ValueError, r"norm_weight has shape \(23,\).*\[24\]"),
        ({"weight_1": torch.zeros(40, 24)}, ValueError, r"weight_1 has shape \(40, 24\).*\[any, 96\]"),
        ({"weight_2": torch.zeros(24, 41)}, ValueError, r"weight_2 has shape \(24, 41\).*\[any, 40\]"),
        ({"weight_2": torch.zeros(24, 40).half()}, TypeError, "weight_2 is torch.float16"),
        ({"bias_2": torch.zeros(23)}, ValueError, r"bias_2 has shape \(23,\)"),
        ({"row_index": torch.zeros(8, dtype=torch.int64)}, TypeError, "row_index is torch.int64"),
        ({"row_index": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"row_index has shape \(2, 4\)"),
        ({"normed": torch.zeros(8, 48)[:, :24]}, ValueError, "normed.*has to be contiguous"),
        ({"hidden": torch.zeros(3, 40)}, ValueError, r"hidden has shape \(3, 40\).*\[2, 40\]"),
        ({"out": torch.zeros(2, 25)}, ValueError, r"out has shape \(2, 25\).*\[2, 24\]"),
        ({"x": torch.zeros(8, 24).int()}, TypeError, "x is torch.int32"),
        ({"x": torch.zeros(24, 8).T}, ValueError, "x.*strides"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    arguments = dict(zip(NAMES, inputs(8, 24, 4, torch.float32), strict=True)) | {"merge": 4, "eps": EPS} | change
    tensors = [arguments.pop(name) for name in NAMES]
    with pytest.raises(error, match=message):
        projector_mlp(*tensors, **arguments)


def test_refuses_to_gather_in_place():
    tensors = inputs(8, 24, 4, torch.float32)
    row_index = torch.arange(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="normed is x, but rows are gathered"):
        projector_mlp(*tensors, merge=4, eps=EPS, row_index=row_index, normed=tensors[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_tokens_split_both_products(architecture):
    config = default_config(
        64, 1280, 5120, 5120, 3584, dtype=torch.bfloat16, activation="gelu", architecture=architecture
    )
    assert config.first.split > 1
    assert config.second.split > 1
    names = [spec.name for spec in compile_specs(architecture)]
    assert len(set(names)) == len(names)
    assert any("64 tokens" in name and "partial" in name for name in names)
