"""Rotary position embedding of queries and keys, in place.

With the two halves ``x₁, x₂`` of a head and the angles' cosines and sines ``c, s`` of its row (half-split layout,
``rotate_half`` in Hugging Face transformers):

    ``x₁ ← x₁·c - x₂·s``        ``x₂ ← x₂·c + x₁·s``

in fp32 with one rounding at the store; or, for towers defined that way (Pixtral in transformers), in the activation
dtype: cos and sin rounded to it, then each product, then the sum.

Shapes: q and k ``[T, H, hd]`` with any row and head stride, such as views of one ``[T, 3, H, hd]``; cos and sin
``[T, hd/2]`` fp32.  One program owns ``rows`` rows of ``heads`` heads of both q and k, and reads its cos and sin once.
Bound by memory: reads and writes ``2·T·H·hd`` elements; 3 FLOPs each.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = ["RopeConfig", "compile_specs", "default_config", "launch_rope", "rope_", "rope_reference_"]

_CHUNK = 262144  # elements per thread that the reference works on at a time: they stay in the core's own cache


def rope_reference_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation_dtype: torch.dtype = torch.float32
) -> None:
    """Rotates q and k in place, a cache-sized run of rows at a time; bit-equal to transformers on the CPU.

    Products and sums are separate, each exactly rounded, so no row's bits depend on the other rows.
    """
    rows, heads, head_dim = q.shape
    half = head_dim // 2
    step = max(1, _CHUNK * torch.get_num_threads() // (heads * head_dim))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        cosine, sine = cos[run].to(rotation_dtype), sin[run].to(rotation_dtype)
        cosine = torch.cat((cosine, cosine), dim=-1).unsqueeze(1)
        sine = torch.cat((-sine, sine), dim=-1).unsqueeze(1)
        for tensor in (q, k):
            x = tensor[run].to(rotation_dtype, copy=True)
            swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
            tensor[run].copy_(x.mul_(cosine).add_(swapped.mul_(sine)))


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rotate(
    X, cos, sin, row_offset, head_offset, valid, HALF: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    # Rotates one head of some rows in place.
    column = tl.arange(0, BLOCK)
    inside = valid[:, None] & (column < HALF)[None, :]
    first_pointer = X + row_offset[:, None] + head_offset + column[None, :]
    second_pointer = first_pointer + HALF
    first = tl.load(first_pointer, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_pointer, mask=inside, other=0.0).to(tl.float32)
    # With fp32 as DTYPE the roundings are no operations; with a 16-bit one the products are exact before theirs, and
    # fp32 is wide enough for the sum to come out as if it had been rounded only once.
    rotated_first = _rounded(first * cos, DTYPE) - _rounded(second * sin, DTYPE)
    rotated_second = _rounded(second * cos, DTYPE) + _rounded(first * sin, DTYPE)
    tl.store(first_pointer, rotated_first.to(X.dtype.element_ty), mask=inside)
    tl.store(second_pointer, rotated_second.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    Q, K, COS, SIN, rows, heads, q_row_stride, q_head_stride, k_row_stride, k_head_stride, cos_stride, sin_stride,
    DTYPE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # Owns ROWS rows of HEADS heads of q and of k.  Strides come in units of UNIT elements: what the compiler can so
    # prove about addresses is how wide its loads get (a head of 72 is 4.5 times 16, but 18 times 4).
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    cos = tl.load(COS + row[:, None] * cos_stride * UNIT + column[None, :], mask=inside, other=0.0)
    sin = tl.load(SIN + row[:, None] * sin_stride * UNIT + column[None, :], mask=inside, other=0.0)
    cos = _rounded(cos, DTYPE)
    sin = _rounded(sin, DTYPE)
    first_head = tl.program_id(1) * HEADS
    for offset in tl.static_range(HEADS):
        head = (first_head + offset).to(tl.int64)
        # As a limit on rows: Triton 3.9's interpreter does not take the conjunction with a scalar for a mask.
        present = row < tl.where(head < heads, rows, 0)
        _rotate(Q, cos, sin, row * q_row_stride * UNIT, head * q_head_stride * UNIT, present, HALF, BLOCK, DTYPE)
        _rotate(K, cos, sin, row * k_row_stride * UNIT, head * k_head_stride * UNIT, present, HALF, BLOCK, DTYPE)


@dataclass(frozen=True)
class RopeConfig:
    """How many rows and heads one program owns, and with how many warps."""

    rows: int
    heads: int
    num_warps: int


def default_config(architecture: str) -> RopeConfig:
    """Eight elements a thread and load; few, large programs in the interpreter, where each costs dearly."""
    if architecture == "interpreter":
        return RopeConfig(rows=64, heads=4, num_warps=4)
    return RopeConfig(rows=32 if architecture.startswith("gfx") else 16, heads=4, num_warps=4)


@on_device_of_first
def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation_dtype: torch.dtype,
    config: RopeConfig,
) -> None:
    """Rotates validated, non-empty q and k in place."""
    rows, heads, head_dim = q.shape
    strides = (*q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0))
    unit = math.gcd(16, head_dim // 2, *strides)
    _rope_kernel[(triton.cdiv(rows, config.rows), triton.cdiv(heads, config.heads))](
        q,
        k,
        cos,
        sin,
        rows,
        heads,
        *(stride // unit for stride in strides),
        **_constants(head_dim, unit, rotation_dtype, config),
        num_warps=config.num_warps,
        **_options(rotation_dtype),
    )


def _options(rotation_dtype: torch.dtype) -> dict[str, Any]:
    # The compiler knows that rounding the fp32 product of two bf16 values is a bf16 product, and would fuse that into the
    # sum: one rounding fewer than the definition has.
    return {"enable_fp_fusion": rotation_dtype == torch.float32}


def _constants(head_dim: int, unit: int, rotation_dtype: torch.dtype, config: RopeConfig) -> dict[str, Any]:
    half = head_dim // 2
    return {
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[rotation_dtype],
        "HALF": half,
        "BLOCK": 1 << (half - 1).bit_length(),
        "ROWS": config.rows,
        "HEADS": config.heads,
        "UNIT": unit,
    }


def _validate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation_dtype: torch.dtype
) -> None:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or k.dtype != q.dtype or k.device != q.device:
        raise TypeError(
            f"q is {q.dtype} on {q.device} and k is {k.dtype} on {k.device}; they have to agree, and be float32, float16 "
            "or bfloat16"
        )
    if rotation_dtype not in (torch.float32, q.dtype):
        raise TypeError(f"rotation_dtype is {rotation_dtype}; it has to be torch.float32 or the dtype of q, {q.dtype}")
    if q.dim() != 3 or q.shape != k.shape or q.shape[2] == 0 or q.shape[2] % 2:
        raise ValueError(f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; both have to be [T, H, hd] with hd even")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.numel() and tensor.stride(2) != 1:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a head have to "
                "be adjacent (last stride 1)"
            )
    expected = (q.shape[0], q.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.device != q.device:
            raise TypeError(f"{name} is {table.dtype} on {table.device}; it has to be float32 on {q.device}")
        if table.shape != expected or (table.numel() and expected[1] > 1 and table.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)} and strides {table.stride()}; q is {tuple(q.shape)}, so it has "
                f"to be {expected} with last stride 1"
            )


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rotation_dtype: torch.dtype = torch.float32,
) -> None:
    """Rotates q and k in place.

    Args:
        q: ``[T, H, hd]`` float32, float16 or bfloat16, hd even, last stride 1.
        k: like ``q``, not overlapping it.
        cos: ``[T, hd/2]`` float32, cosine of each row's angles.
        sin: ``[T, hd/2]`` float32, sine of each row's angles.
        rotation_dtype: what products and sums are rounded to: ``torch.float32``, or ``q``'s dtype.

    Raises:
        ValueError: shapes or strides that do not fit.
        TypeError: dtypes or devices that do not fit.
    """
    _validate(q, k, cos, sin, rotation_dtype)
    if q.numel() == 0:
        return
    if runs_kernel(q):
        launch_rope(q, k, cos, sin, rotation_dtype, default_config(configs.architecture(q.device)))
    else:
        rope_reference_(q, k, cos, sin, rotation_dtype)


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: head widths 64, 72 and 80, and each way to round."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    variants = [
        (bf16, fp32, 64),
        (bf16, fp32, 72),
        (bf16, fp32, 80),
        (bf16, bf16, 64),
        (fp16, fp32, 80),
        (fp32, fp32, 80),
    ]
    return [_compile_spec(*variant, default_config(architecture)) for variant in variants]


def _compile_spec(dtype: torch.dtype, rotation_dtype: torch.dtype, head_dim: int, config: RopeConfig) -> CompileSpec:
    element = TRITON_TYPES[dtype]
    strides = ("q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride", "cos_stride", "sin_stride")
    return CompileSpec(
        name=f"rope {element} in {TRITON_TYPES[rotation_dtype]} head_dim {head_dim}",
        kernel=_rope_kernel,
        signature=dict.fromkeys(("Q", "K"), f"*{element}")
        | dict.fromkeys(("COS", "SIN"), "*fp32")
        | dict.fromkeys(("rows", "heads", *strides), "i32"),
        constants=_constants(head_dim, math.gcd(16, head_dim // 2), rotation_dtype, config),
        divisible_by_16=(),
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=2 * config.rows * config.heads * head_dim,
        options=_options(rotation_dtype),
    )
