"""LayerNorm, RMSNorm and Gemma's RMSNorm over rows, fused with a residual addition before it and with a row gather.

Per row ``x`` of ``D`` values, all in fp32:

* ``layer_norm``: ``(x - mean) · rsqrt(var + eps) · w + b``
* ``rms_norm``: ``x · rsqrt(mean(x²) + eps) · w``, rounded once, or also rounded to the activation dtype before the
  multiplication with ``w`` (``rounding="before_weight"``: Qwen2.5-VL and Pixtral in Hugging Face transformers)
* ``gemma_rms_norm``: ``x · rsqrt(mean(x²) + eps) · (1 + w)``

With a ``residual``, ``x`` is ``x + residual`` rounded to the activation dtype, and that sum is stored too.  With a
``row_index``, output row ``r`` is the norm of input row ``row_index[r]``.

Shapes: ``[N, D]``, any row stride.  One program owns ``rows`` whole rows and keeps them in registers: one read, an exact
two-pass variance.  A ``D`` that is the sum of two powers of two (1280 = 1024 + 256, 1152 = 1024 + 128) is held in two
blocks of just that size; any other is masked up to the next power of two.  If a launch is planned for more rows than are
valid (:mod:`..runtime.valid_rows`), a program without valid rows writes zeros.  Memory bound: reads ``N·D`` elements (twice
that with a residual) and writes as many; about 8 FLOPs per element.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import (
    ceil_div,
    check_float,
    check_not_overwritten,
    check_rows,
    check_tensor,
    checked_output,
    next_power_of_two,
)
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .common import row_chunks

NormKind = Literal["layer_norm", "rms_norm", "gemma_rms_norm"]
Rounding = Literal["once", "before_weight"]

MAX_WIDTH = 16384
"""The widest row that one program holds in registers."""
WARP_WIDTHS = (512, 2048)
"""Rows that one warp normalizes alone: no barrier, half the instructions; wider ones spend over 128 registers."""
CHUNK = 262144
"""fp32 elements per thread and chunk of the reference."""


def norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kind: str,
    eps: float,
    rounding: str = "once",
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
) -> None:
    """Writes the norm to ``out`` and the sum to ``residual_out``, one cache-sized chunk of rows at a time.

    A row's bits do not depend on the other rows: torch reduces each by itself, and all else is exactly rounded.
    """
    rows, width = out.shape
    if kind == "gemma_rms_norm":
        weight = 1.0 + weight.float()
    elif kind == "rms_norm" and rounding == "once":
        weight = weight.float()
    if residual is not None and row_index is not None:
        x = torch.add(x, residual, out=residual_out)
        residual = None
    for run in row_chunks(rows, width, CHUNK):
        if row_index is not None:
            chunk = x.index_select(0, row_index[run])
        elif residual is not None:
            assert residual_out is not None
            chunk = torch.add(x[run], residual[run], out=residual_out[run])
        else:
            chunk = x[run]
        if kind == "layer_norm":
            out[run].copy_(torch.nn.functional.layer_norm(chunk, (width,), weight, bias, eps))
            continue
        normalized = chunk.to(torch.float32, copy=True)
        normalized.mul_((normalized * normalized).mean(1, keepdim=True).add_(eps).rsqrt_())
        if rounding == "before_weight":
            torch.mul(normalized.to(chunk.dtype), weight, out=out[run])
        else:
            out[run].copy_(normalized.mul_(weight))


@triton.jit
def _load(
    x_ptr, residual_ptr, sum_ptr, source, valid, stride_xm, stride_rm, stride_sm, START: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # Loads the columns [START, START + BLOCK) of the rows `source` in fp32; adds, rounds and stores the residual's sum.
    column = START + tl.arange(0, BLOCK)[None, :]
    inside = valid[:, None] & (column < WIDTH)
    x = tl.load(x_ptr + source[:, None] * stride_xm + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + source[:, None] * stride_rm + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + source[:, None] * stride_sm + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _scale_and_store(
    x, weight_ptr, bias_ptr, out_ptr, row, valid, stride_om, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr,
):  # fmt: skip
    # Scales the normalized columns [START, START + BLOCK) and stores them.
    column = START + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if KIND == "gemma_rms_norm":
        weight += 1.0
    if ROUND_BEFORE_WEIGHT:
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    y = x * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    inside = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + row[:, None] * stride_om + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _center(x, mean, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # Subtracts the mean; columns outside the row stay zero.
    column = START + tl.arange(0, BLOCK)[None, :]
    return tl.where(column < WIDTH, x - mean[:, None], 0.0)


@triton.jit
def _clear(out_ptr, row, valid, stride, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # Stores zeros in the columns [START, START + BLOCK).
    column = START + tl.arange(0, BLOCK)[None, :]
    zeros = tl.zeros([row.shape[0], BLOCK], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * stride + column, zeros, mask=valid[:, None] & (column < WIDTH))


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, residual_ptr, sum_ptr, row_index_ptr, valid_rows_ptr, rows, stride_xm, stride_om, stride_rm, stride_sm, eps,
    KIND: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # One program owns ROWS whole rows, as a block of MAIN columns and, if TAIL > 0, a second one of TAIL columns.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    if valid_rows_ptr is not None:  # noqa: SIM102  (the first is decided at compile time)
        if tl.program_id(0) * ROWS >= tl.load(valid_rows_ptr):
            _clear(out_ptr, row, valid, stride_om, 0, MAIN, WIDTH)
            if TAIL > 0:
                _clear(out_ptr, row, valid, stride_om, MAIN, TAIL, WIDTH)
            if sum_ptr is not None:
                _clear(sum_ptr, row, valid, stride_sm, 0, MAIN, WIDTH)
                if TAIL > 0:
                    _clear(sum_ptr, row, valid, stride_sm, MAIN, TAIL, WIDTH)
            return
    source = row
    if row_index_ptr is not None:
        source = tl.load(row_index_ptr + row, mask=valid, other=0).to(tl.int64)

    main = _load(x_ptr, residual_ptr, sum_ptr, source, valid, stride_xm, stride_rm, stride_sm, 0, MAIN, WIDTH)
    if TAIL > 0:
        tail = _load(x_ptr, residual_ptr, sum_ptr, source, valid, stride_xm, stride_rm, stride_sm, MAIN, TAIL, WIDTH)

    if KIND == "layer_norm":
        total = tl.sum(main, axis=1)
        if TAIL > 0:
            total += tl.sum(tail, axis=1)
        mean = total / WIDTH
        main = _center(main, mean, 0, MAIN, WIDTH)
        if TAIL > 0:
            tail = _center(tail, mean, MAIN, TAIL, WIDTH)

    squares = tl.sum(main * main, axis=1)
    if TAIL > 0:
        squares += tl.sum(tail * tail, axis=1)
    scale = tl.rsqrt(squares / WIDTH + eps)[:, None]

    _scale_and_store(
        main * scale, weight_ptr, bias_ptr, out_ptr, row, valid, stride_om, 0, MAIN, WIDTH, KIND, ROUND_BEFORE_WEIGHT
    )
    if TAIL > 0:
        _scale_and_store(
            tail * scale,
            weight_ptr,
            bias_ptr,
            out_ptr,
            row,
            valid,
            stride_om,
            MAIN,
            TAIL,
            WIDTH,
            KIND,
            ROUND_BEFORE_WEIGHT,
        )


@dataclass(frozen=True)
class NormConfig:
    """Rows per program, and warps."""

    rows: int
    num_warps: int


def split_width(width: int) -> tuple[int, int]:
    """Splits ``width`` into two powers of two, or one and zero; any other width becomes the next power of two."""
    low = width & -width
    high = width - low
    if high & (high - 1):
        return next_power_of_two(width), 0
    return (high, low) if high else (low, 0)


def default_config(width: int, architecture: str) -> NormConfig:
    """One warp for a row of :data:`WARP_WIDTHS` values, else some 8 to 32 values per thread.

    The number of rows has no effect: the configuration decides the order of a row's sums, so a row's last bit would depend
    on how many others there are.
    """
    held = sum(split_width(width))
    if architecture == "interpreter":
        return NormConfig(rows=16, num_warps=4)
    if WARP_WIDTHS[0] <= held <= WARP_WIDTHS[1]:
        return NormConfig(rows=1, num_warps=1)
    lanes = 64 if architecture.startswith("gfx") else 32
    # A power of two, as every block must be: 1024 // 48 is not.
    rows = 1 << max(0, (1024 // held).bit_length() - 1)
    warps = min(16, max(4, held // (lanes * 16)))
    return NormConfig(rows=rows, num_warps=1 << (warps.bit_length() - 1))


def choose_config(
    width: int, kind: str, rows: int, *, dtype: torch.dtype, residual: bool, device: torch.device
) -> NormConfig:
    """Returns the tuned configuration for a launch on ``device``, or the default."""
    constants = {"width": width, "kind": kind, "residual": residual}
    found = lookup(NormConfig, "rowwise.norm", device, dtype, constants, {"rows": rows})
    return found or default_config(width, configs.architecture(device))


def launch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: NormConfig,
    *,
    kind: str,
    eps: float,
    rounding: str = "once",
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    valid_count: torch.Tensor | None = None,
) -> None:
    """Launches one program per ``config.rows`` rows, for valid, non-empty tensors."""
    rows, width = out.shape
    tensors = (x, weight, bias, out, residual, residual_out, row_index, valid_count)
    strides = (0 if tensor is None else tensor.stride(0) for tensor in (x, out, residual, residual_out))
    main, tail = split_width(width)
    constants = {"KIND": kind, "ROUND_BEFORE_WEIGHT": rounding == "before_weight", "ROWS": config.rows}
    launch(
        _norm_kernel,
        (ceil_div(rows, config.rows),),
        *tensors,
        rows,
        *strides,
        eps,
        **constants,
        WIDTH=width,
        MAIN=main,
        TAIL=tail,
        num_warps=config.num_warps,
    )


def _check_choice(kind: str, rounding: str, bias: torch.Tensor | None) -> None:
    if kind not in get_args(NormKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(NormKind))}, got {kind!r}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(get_args(Rounding))}, got {rounding!r}")
    if rounding == "before_weight" and kind != "rms_norm":
        raise ValueError(f"rounding must be 'once' for {kind}, got {rounding!r}")
    if bias is not None and kind != "layer_norm":
        raise ValueError(f"bias must be left out for {kind}; only layer_norm takes one")


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: NormKind,
    eps: float,
    rounding: Rounding = "once",
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: NormConfig | None = None,
    valid_rows: ValidRows | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalizes rows by one of the formulas of this module.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16, last stride 1, ``D`` at most :data:`MAX_WIDTH`.
        weight: ``[D]``, of ``x``'s dtype.
        bias: ``[D]``, of ``x``'s dtype; ``layer_norm`` only.
        kind: the formula.
        eps: added to the variance or to the mean square.
        rounding: ``"before_weight"`` also rounds the normalized row to ``x``'s dtype before multiplying by ``weight``.
        residual: ``[N, D]``, added to ``x`` first; the sum is rounded to ``x``'s dtype.
        residual_out: ``[N, D]``, output for that sum; neither ``x`` nor ``residual``, which other threads may still read.
        row_index: ``[M]`` int32, the input row of each output row; a permutation if there is a ``residual``.
        out: ``[M, D]`` (``[N, D]`` without ``row_index``), last stride 1; may be ``x`` itself unless rows are gathered.
        config: launch configuration.
        valid_rows: number of rows of ``out`` that count; the kernel may write zeros to the others, and to those of
            ``residual_out``.  Not together with both ``residual`` and ``row_index``.

    Returns:
        The normalized rows, or a pair of them and the sum if a ``residual`` was given.

    Raises ``ValueError`` for a shape or stride that does not fit, ``TypeError`` for a dtype or device.
    """
    _check_choice(kind, rounding, bias)
    check_float("x", x)
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x must be [N, D] with D from 1 to {MAX_WIDTH}, got shape {tuple(x.shape)}")
    count, width = x.shape
    check_rows("x", x, (count, width), x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, (width,), x.dtype, x.device, contiguous=True)
    rows = count
    if row_index is not None:
        rows = len(row_index)
        check_tensor("row_index", row_index, (rows,), torch.int32, x.device, contiguous=True)
        if residual is not None and rows != count:
            # Every row of the sum is stored by the program that reads it.
            raise ValueError(f"row_index must be a permutation of {count} rows with a residual, got {rows} entries")
        if out is not None:
            check_not_overwritten("x if rows are gathered", x, out)
    out = checked_output(out, (rows, width), x)
    if residual is not None:
        check_rows("residual", residual, (count, width), x)
        residual_out = checked_output(residual_out, (count, width), x, "residual_out")
        if x.numel() and residual_out.data_ptr() in (x.data_ptr(), residual.data_ptr()):
            raise ValueError("residual_out must be neither x nor residual; pass a tensor of its own")
        if valid_rows is not None and row_index is not None:
            raise ValueError(
                "row_index must be left out with valid_rows and a residual: the sum's order differs from out's"
            )
    elif residual_out is not None:
        raise ValueError("residual_out must be left out without a residual")
    if rows and not count:
        raise ValueError(f"x must have rows for the {rows} of row_index, got shape {tuple(x.shape)}")

    if rows:
        arguments: dict[str, Any] = {"kind": kind, "eps": eps, "rounding": rounding}
        arguments |= {"residual": residual, "residual_out": residual_out, "row_index": row_index}
        if runs_kernel(x):
            planned = planned_rows(valid_rows, rows)
            config = config or choose_config(
                width, kind, planned, dtype=x.dtype, residual=residual is not None, device=x.device
            )
            launch_norm(x, weight, bias, out, config, **arguments, valid_count=get_valid_count(valid_rows, x.device))
        else:
            norm_reference(x, weight, bias, out, **arguments)
    return out if residual_out is None else (out, residual_out)
