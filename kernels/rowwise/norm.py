"""LayerNorm, RMSNorm and Gemma's RMSNorm over rows, with the residual addition in front and a row gather folded in.

Per row ``x`` of ``D`` values, all in fp32:

* ``layer_norm``: ``(x - mean) · rsqrt(var + eps) · w + b``
* ``rms_norm``: ``x · rsqrt(mean(x²) + eps) · w``, rounded once, or rounded to the activation dtype before the product
  with ``w`` as well (``rounding="before_weight"``: Qwen2.5-VL and Pixtral in Hugging Face transformers)
* ``gemma_rms_norm``: ``x · rsqrt(mean(x²) + eps) · (1 + w)``

With a ``residual``, ``x`` is ``x + residual`` rounded to the activation dtype, and that sum is stored too.  With a
``row_index``, output row ``r`` is the norm of input row ``row_index[r]``.

Shapes: ``[N, D]``, rows any distance apart.  One program owns ``rows`` whole rows and keeps them in registers: one read,
an exact two-pass variance.  A ``D`` that is the sum of two powers of two (1280 = 1024 + 256, 1152 = 1024 + 128) is held
in two blocks of just that size; any other is masked up to the next power of two.  Where a launch is planned for more rows
than there are (:mod:`.valid_rows`), a program whose rows are all beyond writes zeros.  Bound by memory: reads ``N·D`` (twice
that with a residual) and writes as much; about 8 FLOPs an element.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows

__all__ = [
    "MAX_WIDTH",
    "NormConfig",
    "NormKind",
    "Rounding",
    "choose_config",
    "compile_specs",
    "default_config",
    "launch_norm",
    "norm",
    "norm_reference",
]

NormKind = Literal["layer_norm", "rms_norm", "gemma_rms_norm"]
Rounding = Literal["once", "before_weight"]

MAX_WIDTH = 16384
"""The widest row that one program holds in registers."""

_CHUNK = 262144  # fp32 elements per thread that the reference works on at a time: they stay in the core's own cache


def _normalize_chunk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kind: str,
    eps: float,
    rounding: str,
) -> None:
    """Norm of a few rows, written to ``out``; ``weight`` is fp32 unless its product is rounded separately."""
    if kind == "layer_norm":
        out.copy_(torch.nn.functional.layer_norm(x, (x.shape[1],), weight, bias, eps))
        return
    normalized = x.float() if x.dtype != torch.float32 else x.clone()
    normalized.mul_((normalized * normalized).mean(1, keepdim=True).add_(eps).rsqrt_())
    if rounding == "before_weight":
        torch.mul(normalized.to(x.dtype), weight, out=out)
    else:
        out.copy_(normalized.mul_(weight))


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
    """Writes the norm to ``out`` and the sum to ``residual_out``, a cache-sized run of rows at a time.

    No row's bits depend on the other rows: torch reduces each by itself, and everything else is exactly rounded.
    """
    rows, width = out.shape
    if kind == "gemma_rms_norm":
        weight = 1.0 + weight.float()
    elif kind == "rms_norm" and rounding == "once":
        weight = weight.float()
    if residual is not None and row_index is not None:
        x = torch.add(x, residual, out=residual_out)
        residual = None
    step = max(1, _CHUNK * torch.get_num_threads() // width)
    for start in range(0, rows, step):
        run = slice(start, start + step)
        if row_index is not None:
            chunk = x.index_select(0, row_index[run])
        elif residual is not None:
            assert residual_out is not None
            chunk = torch.add(x[run], residual[run], out=residual_out[run])
        else:
            chunk = x[run]
        _normalize_chunk(chunk, weight, bias, out[run], kind, eps, rounding)


@triton.jit
def _read(
    X, RESIDUAL, SUM, source, valid, x_stride, residual_stride, sum_stride, START: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # The columns [START, START + BLOCK) of the rows `source` in fp32, with the residual added, rounded and stored.
    column = START + tl.arange(0, BLOCK)[None, :]
    inside = valid[:, None] & (column < WIDTH)
    x = tl.load(X + source[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + source[:, None] * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + source[:, None] * sum_stride + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _write(
    x, WEIGHT, BIAS, OUT, row, valid, out_stride, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr,
):  # fmt: skip
    # Scales the normalized columns [START, START + BLOCK) and stores them.
    column = START + tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if KIND == "gemma_rms_norm":
        weight += 1.0
    if ROUND_BEFORE_WEIGHT:
        x = x.to(OUT.dtype.element_ty).to(tl.float32)
    y = x * weight[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    inside = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(OUT + row[:, None] * out_stride + column[None, :], y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _centered(x, mean, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # x - mean, with the columns beyond the row kept at zero.
    column = START + tl.arange(0, BLOCK)[None, :]
    return tl.where(column < WIDTH, x - mean[:, None], 0.0)


@triton.jit
def _clear(OUT, row, valid, stride, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # Zeros in the columns [START, START + BLOCK).
    column = START + tl.arange(0, BLOCK)[None, :]
    zeros = tl.zeros([row.shape[0], BLOCK], OUT.dtype.element_ty)
    tl.store(OUT + row[:, None] * stride + column, zeros, mask=valid[:, None] & (column < WIDTH))


@triton.jit
def _norm_kernel(
    X, WEIGHT, BIAS, OUT, RESIDUAL, SUM, ROW_INDEX, LIVE, rows, x_stride, out_stride, residual_stride, sum_stride, eps,
    KIND: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Owns ROWS whole rows, as a block of HEAD columns and, where TAIL > 0, a second one of TAIL columns.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    if LIVE is not None:  # noqa: SIM102  (the compiler decides the first, the program the second)
        if tl.program_id(0) * ROWS >= tl.load(LIVE):
            _clear(OUT, row, valid, out_stride, 0, HEAD, WIDTH)
            if TAIL > 0:
                _clear(OUT, row, valid, out_stride, HEAD, TAIL, WIDTH)
            if SUM is not None:
                _clear(SUM, row, valid, sum_stride, 0, HEAD, WIDTH)
                if TAIL > 0:
                    _clear(SUM, row, valid, sum_stride, HEAD, TAIL, WIDTH)
            return
    source = row
    if ROW_INDEX is not None:
        source = tl.load(ROW_INDEX + row, mask=valid, other=0).to(tl.int64)

    head = _read(X, RESIDUAL, SUM, source, valid, x_stride, residual_stride, sum_stride, 0, HEAD, WIDTH)
    if TAIL > 0:
        tail = _read(X, RESIDUAL, SUM, source, valid, x_stride, residual_stride, sum_stride, HEAD, TAIL, WIDTH)

    if KIND == "layer_norm":
        total = tl.sum(head, axis=1)
        if TAIL > 0:
            total += tl.sum(tail, axis=1)
        mean = total / WIDTH
        head = _centered(head, mean, 0, HEAD, WIDTH)
        if TAIL > 0:
            tail = _centered(tail, mean, HEAD, TAIL, WIDTH)

    squares = tl.sum(head * head, axis=1)
    if TAIL > 0:
        squares += tl.sum(tail * tail, axis=1)
    scale = tl.rsqrt(squares / WIDTH + eps)[:, None]

    _write(head * scale, WEIGHT, BIAS, OUT, row, valid, out_stride, 0, HEAD, WIDTH, KIND, ROUND_BEFORE_WEIGHT)
    if TAIL > 0:
        _write(tail * scale, WEIGHT, BIAS, OUT, row, valid, out_stride, HEAD, TAIL, WIDTH, KIND, ROUND_BEFORE_WEIGHT)


@dataclass(frozen=True)
class NormConfig:
    """How many rows one program owns, and with how many warps."""

    rows: int
    num_warps: int


def _blocks(width: int) -> tuple[int, int]:
    """``width`` as one or two powers of two if it is that, else the next power of two (which is masked) and nothing."""
    low = width & -width
    high = width - low
    if high & (high - 1):
        return 1 << width.bit_length(), 0
    return (high, low) if high else (low, 0)


def default_config(width: int, architecture: str) -> NormConfig:
    """Some 8 to 32 values a thread.

    The number of rows in all has no say: which lane adds up what follows from the configuration, so a row's last bit
    would depend on how many others there are.
    """
    held = sum(_blocks(width))
    if architecture == "interpreter":
        return NormConfig(rows=16, num_warps=4)
    lanes = 64 if architecture.startswith("gfx") else 32
    # A power of two, as every block is: 1024 // 48 is none.
    rows = 1 << max(0, (1024 // held).bit_length() - 1)
    warps = min(16, max(4, held // (lanes * 16)))
    return NormConfig(rows=rows, num_warps=1 << (warps.bit_length() - 1))


def choose_config(
    width: int, kind: str, rows: int, *, dtype: torch.dtype, residual: bool, device: torch.device
) -> NormConfig:
    """What the tables of tuned configurations say of a launch, or the default."""
    constants = {"width": width, "kind": kind, "residual": residual}
    found = lookup(NormConfig, "rowwise.norm", device, dtype, constants, {"rows": rows})
    return found or default_config(width, configs.architecture(device))


@on_device_of_first
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
    live: torch.Tensor | None = None,
) -> None:
    """The norm of validated, non-empty tensors, as :func:`norm_reference`; ``live``: see :func:`.valid_rows.get_valid_count`."""
    rows, width = out.shape
    head, tail = _blocks(width)
    _norm_kernel[(triton.cdiv(rows, config.rows),)](
        x,
        weight,
        bias,
        out,
        residual,
        residual_out,
        row_index,
        live,
        rows,
        x.stride(0),
        out.stride(0),
        residual.stride(0) if residual is not None else 0,
        residual_out.stride(0) if residual_out is not None else 0,
        eps,
        KIND=kind,
        ROUND_BEFORE_WEIGHT=rounding == "before_weight",
        WIDTH=width,
        HEAD=head,
        TAIL=tail,
        ROWS=config.rows,
        num_warps=config.num_warps,
    )


def _validate_rows(name: str, tensor: torch.Tensor, x: torch.Tensor, rows: int) -> None:
    expected = (rows, x.shape[1])
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x is {tuple(x.shape)}, so it has to be {expected}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}; x is {x.dtype} on {x.device}, they have to agree"
        )
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def _validate_vector(name: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    if vector.shape != x.shape[1:] or not vector.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)} and strides {vector.stride()}; rows of {x.shape[1]} values need a "
            f"contiguous [{x.shape[1]}]"
        )
    if vector.dtype != x.dtype or vector.device != x.device:
        raise TypeError(
            f"{name} is {vector.dtype} on {vector.device}; x is {x.dtype} on {x.device}, they have to agree"
        )


def _validate_choice(kind: str, rounding: str, bias: torch.Tensor | None) -> None:
    if kind not in get_args(NormKind):
        raise ValueError(f"unknown norm {kind!r}; known are {', '.join(get_args(NormKind))}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"unknown rounding {rounding!r}; known are {', '.join(get_args(Rounding))}")
    if rounding == "before_weight" and kind != "rms_norm":
        raise ValueError(f"rounding 'before_weight' belongs to rms_norm; {kind} rounds once")
    if bias is not None and kind != "layer_norm":
        raise ValueError(f"{kind} has no bias; only layer_norm takes one")


def _validate_row_index(row_index: torch.Tensor, x: torch.Tensor, has_residual: bool) -> None:
    if row_index.dtype != torch.int32 or row_index.device != x.device:
        raise TypeError(f"row_index is {row_index.dtype} on {row_index.device}; it has to be int32 on {x.device}")
    if row_index.dim() != 1 or not row_index.is_contiguous():
        raise ValueError(
            f"row_index has shape {tuple(row_index.shape)}; it has to be one contiguous row number per output row"
        )
    if has_residual and len(row_index) != x.shape[0]:
        raise ValueError(
            f"row_index has {len(row_index)} entries for {x.shape[0]} rows of x; with a residual it has to be a "
            "permutation, since every row of the sum is stored by the program that reads it"
        )


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
    """Normalizes rows; see the module's description for the formulas.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16, last stride 1, ``D`` at most :data:`MAX_WIDTH`.
        weight: ``[D]``, of ``x``'s dtype.
        bias: ``[D]``, of ``x``'s dtype; ``layer_norm`` only.
        kind: which norm.
        eps: added to the variance or to the mean square.
        rounding: ``"before_weight"`` rounds the normalized row to ``x``'s dtype before it is multiplied by ``weight``.
        residual: ``[N, D]``, added to ``x`` first; the sum is rounded to ``x``'s dtype.
        residual_out: ``[N, D]``, where that sum goes; neither ``x`` nor ``residual``, which other threads may still read.
        row_index: ``[M]`` int32, the input row of each output row; a permutation when there is a ``residual``.
        out: ``[M, D]`` (``[N, D]`` without ``row_index``), last stride 1; may be ``x`` itself unless rows are gathered.
        config: launch configuration of the kernel; the default for ``D`` and the device if not given.
        valid_rows: how many of the rows of ``out`` count; a kernel may write zeros to those beyond (and to those of
            ``residual_out``).  Not together with both ``residual`` and ``row_index``.

    Returns:
        The normalized rows, and the sum beside them when a ``residual`` was given.

    Raises:
        ValueError: shapes that do not fit, rows with gaps, an unknown kind or rounding, or a bias that the kind lacks.
        TypeError: dtypes or devices that differ, or a dtype that is none of the three.
    """
    _validate_choice(kind, rounding, bias)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; norm takes float32, float16 and bfloat16")
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {tuple(x.shape)}; norm takes [N, D] with 1 <= D <= {MAX_WIDTH}")
    _validate_rows("x", x, x, x.shape[0])
    _validate_vector("weight", weight, x)
    if bias is not None:
        _validate_vector("bias", bias, x)
    if row_index is not None:
        _validate_row_index(row_index, x, residual is not None)
        if out is not None and out.numel() and out.data_ptr() == x.data_ptr():
            raise ValueError("out is x, but rows are gathered: a row would be overwritten before it is read")
    rows = x.shape[0] if row_index is None else len(row_index)
    out = x.new_empty(rows, x.shape[1]) if out is None else out
    _validate_rows("out", out, x, rows)
    if residual is not None:
        _validate_rows("residual", residual, x, x.shape[0])
        residual_out = x.new_empty(x.shape) if residual_out is None else residual_out
        _validate_rows("residual_out", residual_out, x, x.shape[0])
        if x.numel() and residual_out.data_ptr() in (x.data_ptr(), residual.data_ptr()):
            raise ValueError("residual_out is x or residual; the sum needs rows of its own")
        if valid_rows is not None and row_index is not None:
            raise ValueError(
                "valid_rows counts rows of out, but the sum's rows are in another order: leave row_index out"
            )
    elif residual_out is not None:
        raise ValueError("residual_out was given without a residual: there is no sum to store")
    if rows and x.shape[0] == 0:
        raise ValueError(f"row_index asks for {rows} rows, but x is {tuple(x.shape)}: it has none")

    if rows:
        arguments: dict[str, Any] = {
            "kind": kind,
            "eps": eps,
            "rounding": rounding,
            "residual": residual,
            "residual_out": residual_out,
            "row_index": row_index,
        }
        if runs_kernel(x):
            config = config or choose_config(
                x.shape[1],
                kind,
                planned_rows(valid_rows, rows),
                dtype=x.dtype,
                residual=residual is not None,
                device=x.device,
            )
            launch_norm(x, weight, bias, out, config, **arguments, live=get_valid_count(valid_rows, x.device))
        else:
            norm_reference(x, weight, bias, out, **arguments)
    return out if residual_out is None else (out, residual_out)


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: the towers' widths, each norm, with and without residual, gather and masked columns."""
    variants = [
        ("layer_norm", "once", 1280, "bf16", "BIAS"),
        ("layer_norm", "once", 1280, "bf16", "BIAS RESIDUAL SUM"),
        ("layer_norm", "once", 1280, "bf16", "BIAS RESIDUAL SUM LIVE"),
        ("layer_norm", "once", 1152, "bf16", "BIAS RESIDUAL SUM"),
        ("layer_norm", "once", 1024, "fp16", "BIAS RESIDUAL SUM"),
        ("layer_norm", "once", 768, "fp32", "BIAS"),
        ("layer_norm", "once", 1408, "bf16", "BIAS"),
        ("rms_norm", "before_weight", 1280, "bf16", "RESIDUAL SUM"),
        ("rms_norm", "before_weight", 1280, "bf16", "ROW_INDEX"),
        ("rms_norm", "before_weight", 5120, "bf16", ""),
        ("gemma_rms_norm", "once", 1152, "bf16", ""),
        ("layer_norm", "once", MAX_WIDTH, "bf16", "BIAS"),
    ]
    return [_compile_spec(*variant, architecture) for variant in variants]


def _compile_spec(kind: str, rounding: str, width: int, element: str, present: str, architecture: str) -> CompileSpec:
    config = default_config(width, architecture)
    head, tail = _blocks(width)
    optional = ("BIAS", "RESIDUAL", "SUM", "ROW_INDEX", "LIVE")
    pointers = ("X", "WEIGHT", "OUT", *present.split())
    strides = ("x_stride", "out_stride", "residual_stride", "sum_stride")
    return CompileSpec(
        name=f"{kind} {element} {width} {present.lower()}".strip(),
        kernel=_norm_kernel,
        signature=dict.fromkeys(pointers, f"*{element}")
        | {name: "*i32" for name in ("ROW_INDEX", "LIVE") if name in pointers}
        | dict.fromkeys(("rows", *strides), "i32")
        | {"eps": "fp32"},
        constants=dict.fromkeys(name for name in optional if name not in pointers)
        | {
            "KIND": kind,
            "ROUND_BEFORE_WEIGHT": rounding == "before_weight",
            "WIDTH": width,
            "HEAD": head,
            "TAIL": tail,
            "ROWS": config.rows,
        },
        divisible_by_16=strides,
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=config.rows * width,
    )
