"""Rotary position embedding of queries and keys, in place.

With the two halves ``x₁, x₂`` of a head and the cosines and sines ``c, s`` of its row's angles (half-split layout,
``rotate_half`` in Hugging Face transformers):

    ``x₁ ← x₁·c - x₂·s``        ``x₂ ← x₂·c + x₁·s``

in fp32 with one rounding at the store; or, for towers defined that way (Pixtral in transformers), in the activation
dtype: cos and sin are rounded to it, then each multiplication, then the sum.

Shapes: q and k ``[T, H, hd]`` with any row and head stride, such as views of one ``[T, 3, H, hd]``; cos and sin
``[T, hd/2]`` fp32.  One program owns ``rows`` rows of ``heads`` heads of both q and k, and reads its cos and sin once.
Memory bound: reads and writes ``2·T·H·hd`` elements; 3 FLOPs each.
"""

import math
from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import ceil_div, check_float, check_rows, check_tensor, next_power_of_two
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from .common import row_chunks

CHUNK = 262144
"""Elements per thread and chunk of the reference."""


def rope_reference_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation_dtype: torch.dtype = torch.float32
) -> None:
    """Rotates q and k in place, one cache-sized chunk of rows at a time; bit-equal to transformers on the CPU.

    Multiplications and additions are separate and exactly rounded, so a row's bits do not depend on the other rows.
    """
    rows, heads, head_dim = q.shape
    half = head_dim // 2
    for run in row_chunks(rows, heads * head_dim, CHUNK):
        cosine, sine = cos[run].to(rotation_dtype), sin[run].to(rotation_dtype)
        cosine = torch.cat((cosine, cosine), dim=-1).unsqueeze(1)
        sine = torch.cat((-sine, sine), dim=-1).unsqueeze(1)
        for tensor in (q, k):
            x = tensor[run].to(rotation_dtype, copy=True)
            swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
            tensor[run].copy_(x.mul_(cosine).add_(swapped.mul_(sine)))


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rotate(
    x_ptr, cos, sin, row_offset, head_offset, valid, HALF: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    # Rotates one head of ROWS rows in place.
    column = tl.arange(0, BLOCK)
    inside = valid[:, None] & (column < HALF)[None, :]
    first_ptrs = x_ptr + row_offset[:, None] + head_offset + column[None, :]
    second_ptrs = first_ptrs + HALF
    first = tl.load(first_ptrs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptrs, mask=inside, other=0.0).to(tl.float32)
    # With fp32 as DTYPE the roundings do nothing.  With a 16-bit DTYPE the multiplications are exact before their rounding,
    # and fp32 is wide enough for the sum to be as if it had been rounded only once.
    rotated_first = _round(first * cos, DTYPE) - _round(second * sin, DTYPE)
    rotated_second = _round(second * cos, DTYPE) + _round(first * sin, DTYPE)
    tl.store(first_ptrs, rotated_first.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(second_ptrs, rotated_second.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, rows, heads, stride_qm, stride_qh, stride_km, stride_kh, stride_cm, stride_sm,
    DTYPE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # One program owns ROWS rows of HEADS heads of q and of k.  Strides are in units of UNIT elements: the divisibility that
    # the compiler can prove decides the width of its loads (a head of 72 is 4.5 times 16, but 18 times 4).
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    cos = tl.load(cos_ptr + row[:, None] * stride_cm * UNIT + column[None, :], mask=inside, other=0.0)
    sin = tl.load(sin_ptr + row[:, None] * stride_sm * UNIT + column[None, :], mask=inside, other=0.0)
    cos = _round(cos, DTYPE)
    sin = _round(sin, DTYPE)
    first_head = tl.program_id(1) * HEADS
    for offset in tl.static_range(HEADS):
        head = (first_head + offset).to(tl.int64)
        # As a limit on rows: Triton 3.9's interpreter does not accept a mask combined with a scalar.
        present = row < tl.where(head < heads, rows, 0)
        _rotate(q_ptr, cos, sin, row * stride_qm * UNIT, head * stride_qh * UNIT, present, HALF, BLOCK, DTYPE)
        _rotate(k_ptr, cos, sin, row * stride_km * UNIT, head * stride_kh * UNIT, present, HALF, BLOCK, DTYPE)


@dataclass(frozen=True)
class RopeConfig:
    """Rows and heads per program, and warps."""

    rows: int
    heads: int
    num_warps: int


def default_config(architecture: str) -> RopeConfig:
    """Eight elements per thread and load; few, large programs in the interpreter, where each is expensive."""
    if architecture == "interpreter":
        return RopeConfig(rows=64, heads=4, num_warps=4)
    return RopeConfig(rows=32 if architecture.startswith("gfx") else 16, heads=4, num_warps=4)


def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotation_dtype: torch.dtype,
    config: RopeConfig,
) -> None:
    """Launches one program per ``config.rows`` rows and ``config.heads`` heads, for valid, non-empty tensors."""
    rows, heads, head_dim = q.shape
    strides = (*q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0))
    unit = math.gcd(16, head_dim // 2, *strides)
    half = head_dim // 2
    options = {
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[rotation_dtype],
        "HALF": half,
        "BLOCK": next_power_of_two(half),
        "ROWS": config.rows,
        "HEADS": config.heads,
        "UNIT": unit,
        # The compiler would replace a rounded fp32 multiplication of two bf16 values by a bf16 one, and fuse it into the
        # sum: one rounding fewer than the definition has.
        "enable_fp_fusion": rotation_dtype == torch.float32,
    }
    grid = (ceil_div(rows, config.rows), ceil_div(heads, config.heads))
    strides = tuple(stride // unit for stride in strides)
    launch(_rope_kernel, grid, q, k, cos, sin, rows, heads, *strides, **options, num_warps=config.num_warps)


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
        cos: ``[T, hd/2]`` float32, cosine of each row's angles, last stride 1.
        sin: like ``cos``, their sine.
        rotation_dtype: dtype to which multiplications and sums are rounded: ``torch.float32``, or ``q``'s dtype.

    Raises:
        ValueError: a shape or stride does not fit.
        TypeError: a dtype or device does not fit.
    """
    check_float("q", q)
    if rotation_dtype not in (torch.float32, q.dtype):
        raise TypeError(f"rotation_dtype must be torch.float32 or {q.dtype}, that of q, got {rotation_dtype}")
    if q.dim() != 3 or q.shape[2] == 0 or q.shape[2] % 2:
        raise ValueError(f"q must be [T, H, hd] with hd even, got shape {tuple(q.shape)}")
    for name, tensor in (("q", q), ("k", k)):
        check_rows(name, tensor, tuple(q.shape), q)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (q.shape[0], q.shape[2] // 2), torch.float32, q.device)
    if q.numel() == 0:
        return
    if runs_kernel(q):
        launch_rope(q, k, cos, sin, rotation_dtype, default_config(configs.architecture(q.device)))
    else:
        rope_reference_(q, k, cos, sin, rotation_dtype)
