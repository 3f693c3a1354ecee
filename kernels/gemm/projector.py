"""Projector: the MLP that turns a tower's patches into the language model's tokens.

``y = W₂ f(W₁ merge(norm(x)) + b₁) + b₂``; ``merge`` puts ``m`` consecutive rows side by side, which is a view.

Shapes: ``x [N, D]``, ``W₁ [H, m·D]``, ``W₂ [O, H]``, y ``[N/m, O]``.  With a ``row_index`` the rows are gathered first
(Qwen2.5-VL computes in window order and projects in image order).

Three launches, each owning what its file says: the norm writes its rows (in their new order) into ``normed``, where they
lie merged already; the first product applies b₁ and f in its epilogue and writes ``hidden``; the second writes y.  The two
products stay apart: a tile of y needs all of H, so one kernel would either hold ``block_rows × O`` sums (1.8 MB at
128 × 3584, more than any register file) or compute ``hidden`` once per column tile.  ``hidden`` costs little: at 4096
tokens, H = 5120 and bf16, writing and reading it takes about 4 % of the time of the products, and few tokens keep it in
the L2 cache.  Few tokens are bound by reading the weights; there the products split K over more programs
(:mod:`.linear`), into an fp32 workspace that is added up in a fixed order.

FLOPs: 2·(N/m)·(m·D·H + H·O).  Bytes: both weights once; 2·N·D + N·D for the norm; N·D + 2·(N/m)·H + (N/m)·O.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch

from ..rowwise import norm as norms
from ..rowwise.norm import NormKind, Rounding
from ..runtime import config as configs
from ..runtime.config import CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear import EPILOGUES, GATED, LinearConfig, compile_spec, launch_linear, split_specs
from .linear import choose_config as choose_linear
from .linear import default_config as linear_config
from .torch_reference import linear_reference

__all__ = [
    "ProjectorConfig",
    "choose_config",
    "compile_specs",
    "default_config",
    "launch_projector",
    "projector_mlp",
    "projector_reference",
]


def _gather(x: torch.Tensor, row_index: torch.Tensor | None, normed: torch.Tensor | None) -> torch.Tensor:
    """The rows of ``x`` without gaps, in the order of ``row_index``: what is merged when there is no norm."""
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
    """Writes the projected rows to ``out``; on the CPU a token's bits do not depend on the other tokens."""
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
    """How the three launches are cut into programs."""

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
    """The defaults of the norm over ``width`` and of the products ``merged`` → ``hidden`` → ``columns``."""
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
    """The tuned configurations of the norm and of both products on ``device``, or the default ones."""
    return ProjectorConfig(
        norms.default_config(width, configs.architecture(device)),
        choose_linear(tokens, hidden, merged, dtype=dtype, activation=activation, residual=False, device=device),
        choose_linear(tokens, columns, hidden, dtype=dtype, activation=None, residual=False, device=device),
    )


@on_device_of_first
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
    live: torch.Tensor | None = None,
) -> None:
    """The projector of validated, non-empty tensors, as :func:`projector_reference`; zeros in tiles beyond ``live``."""
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
    launch_linear(rows.view(out.shape[0], -1), weight_1, bias_1, None, hidden, activation, config.first, live)
    launch_linear(hidden, weight_2, bias_2, None, out, None, config.second, live)


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The products of Qwen2-VL's merger (5120 → 5120 → 3584, bf16) at 4096, 256 and 64 tokens; norms: see :mod:`.norm`."""
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


def _check(
    name: str, tensor: torch.Tensor, x: torch.Tensor, shape: tuple[int | None, ...], *, dense: bool = False
) -> None:
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}; they have to agree"
        )
    if tensor.dim() != len(shape) or any(
        want not in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it has to be [{wanted}]")
    if tensor.numel() and ((tensor.shape[-1] > 1 and tensor.stride(-1) != 1) or (dense and not tensor.is_contiguous())):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it has to "
            + ("be contiguous" if dense else "have its rows' elements side by side (last stride 1)")
        )


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
    """``W₂ f(W₁ merge(norm(x)) + b₁) + b₂`` (transformers: ``PatchMerger``, ``LlavaMultiModalProjector``, and their variants).

    ``x`` is rounded to its dtype after the norm and after the activation.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16; rows any distance apart.
        norm_weight: ``[D]``; ``None`` leaves the norm out.
        norm_bias: ``[D]``, for ``layer_norm``.
        weight_1: ``[H, merge·D]`` (``[2·H, merge·D]`` if ``activation`` is gated).
        bias_1: one value per row of ``weight_1``.
        weight_2: ``[O, H]``.
        bias_2: ``[O]``.
        merge: how many consecutive rows make a token.
        norm_kind: a kind of :func:`.norm.norm`; ``eps`` and ``rounding`` belong to it.
        eps: see ``norm_kind``.
        rounding: see ``norm_kind``.
        activation: one of :data:`.linear.EPILOGUES`, or ``None``.
        row_index: ``[M]`` int32: row r of what is merged is row ``row_index[r]`` of ``x`` (N below is then M).
        normed: scratch ``[N, D]``, contiguous; may be ``x`` itself unless rows are gathered.
        hidden: scratch ``[N/merge, H]``.
        out: where to write, ``[N/merge, O]``; rows any distance apart; must not overlap ``hidden``.
        config: how to launch the kernels; by default the tuned or a safe one for the shape and the device.
        valid_rows: of the tokens (not of the rows of ``x``): for how many the configuration is chosen, and how many count.
            Kernels write zeros (the CPU reference the tokens' values) where a whole tile lies beyond them.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: shapes that do not fit, a number of rows that ``merge`` does not divide, an unknown name.
        TypeError: dtypes or devices that do not fit.
    """
    if activation is not None and activation not in EPILOGUES:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(EPILOGUES)}, and None")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; this operation takes float32, float16 and bfloat16")
    _check("x", x, x, (None, None))
    width = x.shape[1]
    if row_index is not None and (row_index.dtype != torch.int32 or row_index.device != x.device):
        raise TypeError(f"row_index is {row_index.dtype} on {row_index.device}; it has to be int32 on {x.device}")
    if row_index is not None and (row_index.dim() != 1 or not row_index.is_contiguous()):
        raise ValueError(
            f"row_index has shape {tuple(row_index.shape)}; it has to be one contiguous vector of row numbers"
        )
    rows = x.shape[0] if row_index is None else len(row_index)
    if merge < 1 or rows % merge:
        raise ValueError(f"{rows} rows cannot be merged by {merge}; the number of rows has to be a multiple of merge")
    for name, choice, known in (("norm", norm_kind, get_args(NormKind)), ("rounding", rounding, get_args(Rounding))):
        if choice not in known:
            raise ValueError(f"unknown {name} {choice!r}; known are {', '.join(known)}")
    if rounding == "before_weight" and norm_kind != "rms_norm":
        raise ValueError(f"rounding 'before_weight' belongs to rms_norm; {norm_kind} rounds once")
    if norm_bias is not None and norm_kind != "layer_norm":
        raise ValueError(f"{norm_kind} has no bias; only layer_norm takes one")
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_bias was given without norm_weight; there is no norm to add it in")
    tokens = rows // merge
    _check("weight_1", weight_1, x, (None, merge * width))
    inner = weight_1.shape[0] // (2 if activation in GATED else 1)
    _check("weight_2", weight_2, x, (None, inner))
    columns = weight_2.shape[0]
    for name, vector, size in (
        ("norm_weight", norm_weight, width),
        ("norm_bias", norm_bias, width),
        ("bias_1", bias_1, weight_1.shape[0]),
        ("bias_2", bias_2, columns),
    ):
        if vector is not None:
            _check(name, vector, x, (size,))
    live = get_valid_count(valid_rows, x.device)
    if normed is not None:
        _check("normed", normed, x, (rows, width), dense=True)
        if row_index is not None and rows and normed.data_ptr() == x.data_ptr():
            raise ValueError("normed is x, but rows are gathered: a row would be overwritten before it is read")
    if hidden is not None:
        _check("hidden", hidden, x, (tokens, inner))
    if out is not None:
        _check("out", out, x, (tokens, columns))
    else:
        out = x.new_empty(tokens, columns)
    if not out.numel():
        return out
    tensors = (x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2, out)
    if not runs_kernel(x):
        projector_reference(
            *tensors,
            kind=norm_kind,
            eps=eps,
            rounding=rounding,
            activation=activation,
            row_index=row_index,
            normed=normed,
            hidden=hidden,
        )
        return out
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
    launch_projector(
        *tensors,
        config,
        kind=norm_kind,
        eps=eps,
        rounding=rounding,
        activation=activation,
        row_index=row_index,
        normed=normed,
        hidden=hidden,
        live=live,
    )
    return out
