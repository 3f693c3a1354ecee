"""Projector: the MLP from a tower's patches to the language model's tokens.

``y = W₂ f(W₁ merge(norm(x)) + b₁) + b₂``; ``merge`` concatenates ``m`` consecutive rows, which is a view.

Shapes: ``x [N, D]``, ``W₁ [H, m·D]``, ``W₂ [O, H]``, y ``[N/m, O]``.  With a ``row_index`` the rows are gathered first
(Qwen2.5-VL computes in window order and projects in image order).

Three launches: the norm writes its rows (in their new order) into ``normed``, which is then already merged; the first
matmul applies b₁ and f in its epilogue and writes ``hidden``; the second writes y.  The two matmuls are not fused: a tile
of y needs all of H, so one kernel would either hold ``block_rows × O`` sums (1.8 MB at 128 × 3584, more than any register
file) or compute ``hidden`` once per column tile.  ``hidden`` costs little: at 4096 tokens, H = 5120 and bf16, writing and
reading it takes about 4 % of the matmuls' time, and few tokens keep it in the L2 cache.  Few tokens are bound by reading
the weights; then the matmuls split K over more programs (:mod:`.linear`), into an fp32 workspace that is added up in a
fixed order.

FLOPs: 2·(N/m)·(m·D·H + H·O).  Bytes: both weights once; 2·N·D + N·D for the norm; N·D + 2·(N/m)·H + (N/m)·O.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from ..rowwise import norm as norms
from ..rowwise.norm import NormKind, Rounding
from ..runtime import config as configs
from ..runtime.checks import check_float, check_matrix, check_rows, check_tensor
from ..runtime.config import CompileSpec
from ..runtime.dispatch import runs_kernel
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear import GATED, LinearConfig, check_activation, compile_spec, launch_linear, prepare_gates, split_specs
from .linear import choose_config as choose_linear
from .linear import default_config as linear_config
from .torch_reference import linear_reference


def _gather(x: torch.Tensor, row_index: torch.Tensor | None, normed: torch.Tensor | None) -> torch.Tensor:
    # Without a norm: the rows of ``x`` without gaps, in the order of ``row_index``.
    if row_index is not None:
        return (
            torch.index_select(x, 0, row_index) if normed is None else torch.index_select(x, 0, row_index, out=normed)
        )
    if x.is_contiguous():
        return x
    return x.contiguous() if normed is None else normed.copy_(x)


def projector_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_1: torch.Tensor,
    bias_1: torch.Tensor | None,
    weight_2: torch.Tensor,
    bias_2: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kind: NormKind,
    eps: float,
    rounding: Rounding = "once",
    activation: str | None = "gelu",
    row_index: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> None:
    """Writes the projected tokens to ``out``; on the CPU a token's bits do not depend on the other tokens."""
    if norm_weight is None:
        rows = _gather(x, row_index, normed)
    else:
        count = x.shape[0] if row_index is None else len(row_index)
        rows = x.new_empty(count, x.shape[1]) if normed is None else normed
        norms.norm_reference(
            x, norm_weight, norm_bias, rows, kind=kind, eps=eps, rounding=rounding, row_index=row_index
        )
    hidden = linear_reference(rows.view(out.shape[0], -1), weight_1, bias_1, activation, None, hidden)
    linear_reference(hidden, weight_2, bias_2, None, None, out)


@dataclass(frozen=True)
class ProjectorConfig:
    """Launch configurations of the norm and of both matmuls."""

    norm: norms.NormConfig
    first: LinearConfig
    second: LinearConfig


def default_config(
    tokens: int,
    width: int,
    merged: int,
    hidden: int,
    columns: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    architecture: str,
) -> ProjectorConfig:
    """The defaults of the norm over ``width`` and of the matmuls ``merged`` → ``hidden`` → ``columns``."""
    return ProjectorConfig(
        norms.default_config(width, architecture),
        linear_config(tokens, hidden, merged, dtype=dtype, activation=activation, architecture=architecture),
        linear_config(tokens, columns, hidden, dtype=dtype, activation=None, architecture=architecture),
    )


def choose_config(
    tokens: int,
    width: int,
    merged: int,
    hidden: int,
    columns: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    device: torch.device,
) -> ProjectorConfig:
    """The tuned configurations of the norm and of both matmuls on ``device``, or the default ones."""
    return ProjectorConfig(
        norms.default_config(width, configs.architecture(device)),
        choose_linear(tokens, hidden, merged, dtype=dtype, activation=activation, residual=False, device=device),
        choose_linear(tokens, columns, hidden, dtype=dtype, activation=None, residual=False, device=device),
    )


def launch_projector(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_1: torch.Tensor,
    bias_1: torch.Tensor | None,
    weight_2: torch.Tensor,
    bias_2: torch.Tensor | None,
    out: torch.Tensor,
    config: ProjectorConfig,
    *,
    kind: NormKind,
    eps: float,
    rounding: Rounding = "once",
    activation: str | None = "gelu",
    row_index: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    valid_count: torch.Tensor | None = None,
) -> None:
    """The projector of validated, non-empty tensors, as :func:`projector_reference`; zeros in tiles without valid rows."""
    if norm_weight is None:
        rows = _gather(x, row_index, normed)
    else:
        count = x.shape[0] if row_index is None else len(row_index)
        rows = x.new_empty(count, x.shape[1]) if normed is None else normed
        norms.launch_norm(
            x, norm_weight, norm_bias, rows, config.norm, kind=kind, eps=eps, rounding=rounding, row_index=row_index
        )
    if hidden is None:
        hidden = x.new_empty(out.shape[0], weight_2.shape[1])
    launch_linear(rows.view(out.shape[0], -1), weight_1, bias_1, None, hidden, activation, config.first, valid_count)
    launch_linear(hidden, weight_2, bias_2, None, out, None, config.second, valid_count)


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The matmuls of Qwen2-VL's merger (5120 → 5120 → 3584, bf16) at 4096, 256 and 64 tokens; norms: see :mod:`.norm`."""
    dtype = torch.bfloat16
    specs: dict[str, CompileSpec] = {}
    for tokens in (4096, 256, 64):
        config = default_config(
            tokens, 1280, 5120, 5120, 3584, dtype=dtype, activation="gelu", architecture=architecture
        )
        for stage, activation in ((config.first, "gelu"), (config.second, None)):
            parts = (
                [compile_spec(dtype, activation, stage, architecture)]
                if stage.split == 1
                else split_specs(dtype, stage)
            )
            for part in parts:
                name = f"projector, {tokens} tokens: {part.name}"
                specs[name] = replace(part, name=name)
    return list(specs.values())


def projector_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight_1: torch.Tensor,
    bias_1: torch.Tensor | None,
    weight_2: torch.Tensor,
    bias_2: torch.Tensor | None,
    *,
    merge: int,
    norm_kind: NormKind = "layer_norm",
    eps: float = 1e-6,
    rounding: Rounding = "once",
    activation: str | None = "gelu",
    row_index: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: ProjectorConfig | None = None,
    valid_rows: ValidRows | None = None,
) -> torch.Tensor:
    """``W₂ f(W₁ merge(norm(x)) + b₁) + b₂`` (transformers: ``PatchMerger``, ``LlavaMultiModalProjector``, and variants).

    Rounds to x's dtype after the norm and after the activation.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16; any row stride.
        norm_weight: ``[D]``; ``None``: no norm.
        norm_bias: ``[D]``, for ``layer_norm``.
        weight_1: ``[H, merge·D]`` (``[2·H, merge·D]`` if ``activation`` is gated).
        bias_1: one value per row of ``weight_1``.
        weight_2: ``[O, H]``.
        bias_2: ``[O]``.
        merge: number of consecutive rows in a token.
        norm_kind: kind of :func:`.norm.norm`, with its ``eps`` and ``rounding``.
        eps: see ``norm_kind``.
        rounding: see ``norm_kind``.
        activation: one of :data:`.linear_config.EPILOGUES`, or ``None``.
        row_index: ``[M]`` int32: row r before merging is row ``row_index[r]`` of ``x`` (N below is then M).
        normed: scratch ``[N, D]``, contiguous; may be ``x`` itself unless rows are gathered.
        hidden: scratch ``[N/merge, H]``.
        out: output ``[N/merge, O]``; any row stride; must not overlap ``hidden``.
        config: launch configurations; by default the tuned ones for the shape and the device, or safe ones.
        valid_rows: planned tokens (not rows of ``x``), for which the configuration is selected, and valid ones.  Kernels
            write zeros in tiles without valid tokens; the CPU reference computes them.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: wrong shapes, a number of rows that ``merge`` does not divide, an unknown name.
        TypeError: wrong dtypes or devices.
    """
    check_activation(activation)
    check_float("x", x)
    check_matrix("x", x)
    width = x.shape[1]
    if row_index is not None:
        check_tensor("row_index", row_index, (row_index.numel(),), torch.int32, x.device, contiguous=True)
    rows = x.shape[0] if row_index is None else len(row_index)
    if merge < 1 or rows % merge:
        raise ValueError(f"merge must divide the number of rows, {rows}, got {merge}")
    for name, choice, known in (
        ("norm_kind", norm_kind, get_args(NormKind)),
        ("rounding", rounding, get_args(Rounding)),
    ):
        if choice not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {choice!r}")
    if rounding == "before_weight" and norm_kind != "rms_norm":
        raise ValueError(f"rounding must be 'once' for {norm_kind}, got {rounding!r}")
    if norm_bias is not None and (norm_kind != "layer_norm" or norm_weight is None):
        raise ValueError(
            f"norm_bias must be None, except for layer_norm with a norm_weight, got a bias for {norm_kind}"
        )
    tokens = rows // merge
    check_rows("weight_1", weight_1, (*weight_1.shape[:1], merge * width), x)
    inner = weight_1.shape[0] // (2 if activation in GATED else 1)
    check_rows("weight_2", weight_2, (*weight_2.shape[:1], inner), x)
    columns = weight_2.shape[0]
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("bias_1", bias_1, (weight_1.shape[0],)),
        ("bias_2", bias_2, (columns,)),
        ("normed", normed, (rows, width)),
        ("hidden", hidden, (tokens, inner)),
        ("out", out, (tokens, columns)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, x.dtype, x.device, contiguous=name == "normed")
    valid_count = get_valid_count(valid_rows, x.device)
    if normed is not None and row_index is not None and rows and normed.data_ptr() == x.data_ptr():
        raise ValueError("normed must not be x if rows are gathered; a row would be overwritten before it is read")
    if out is None:
        out = x.new_empty(tokens, columns)
    if not out.numel():
        return out
    how: dict[str, Any] = {"kind": norm_kind, "eps": eps, "rounding": rounding, "row_index": row_index}
    how |= {"normed": normed, "hidden": hidden}
    if not runs_kernel(x):
        projector_reference(
            x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, out, activation=activation, **how
        )
        return out
    weight_1, bias_1, activation = prepare_gates(weight_1, bias_1, activation)
    if config is None:
        config = choose_config(
            planned_rows(valid_rows, tokens),
            width,
            merge * width,
            inner,
            columns,
            dtype=x.dtype,
            activation=activation,
            device=x.device,
        )
    tensors = (x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, out)
    launch_projector(*tensors, config, activation=activation, valid_count=valid_count, **how)
    return out
