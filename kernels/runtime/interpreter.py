"""Patches for Triton's interpreter, so that it computes what a GPU computes.

*bf16 stores.*  The interpreter keeps bf16 as bit patterns in ``numpy.uint16``.  Triton 3.6 to 3.9 convert fp32 to bf16 by
dropping the low half, where every GPU rounds to nearest even, and do arithmetic on the bit patterns.  The kernels here
never compute in bf16 (they load, widen to fp32, compute, and cast once at the store), so only the conversion is patched.

*Matrix multiplication.*  ``tl.dot`` becomes ``numpy.matmul``, whose library sums a row in an order that depends on the
row's place in the tile.  Tensor cores process every row of a tile alike, which is why an image's embedding does not
depend on the rest of its batch.  The patch therefore sums every element in one fixed order.
"""

from typing import Any

import numpy as np

from ._triton import tl


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds fp32 ``values`` to bf16 bit patterns (uint16): ties to even, NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Half of the last kept place, minus one unless the kept part is odd: the carry then rounds to nearest even.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def patch_interpreter() -> None:
    """Replaces the interpreter's fp32 → bf16 conversion and its ``tl.dot``; a second call changes nothing."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "computes_like_a_gpu", False):
        return
    convert, multiply = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float16, tl.float32, tl.float64):
            return interpreter.TensorHandle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return convert(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32 or b.data.dtype != np.float32 or a.data.ndim != 2:
            return multiply(self, a, b, accumulator, *options)
        # Without `optimize`, einsum multiplies and adds by itself along contiguous rows, never through a BLAS.
        left, right = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
        total = np.einsum("mk,kn->mn", left, right, optimize=False)
        return interpreter.TensorHandle(total + accumulator.data, accumulator.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.computes_like_a_gpu = True
