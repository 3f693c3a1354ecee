"""Device functions that several kernels share."""

from ._triton import INTERPRETED, tl, triton

INTERPRET = tl.constexpr(INTERPRETED)

SQRT_HALF = tl.constexpr(0.7071067811865476)

# sigmoid(u) is 1 / (1 + 2 ** (-log₂(e)·u)).  The constants below include -log₂(e), which saves one instruction.
SILU_EXPONENT = tl.constexpr(-1.4426950408889634)
QUICK_GELU_EXPONENT = tl.constexpr(-2.4554669595930156)  # u = 1.702·x
TANH_GELU_EXPONENT = tl.constexpr(-2.302208198144325)  # ½(1 + tanh v) is sigmoid(2v), with v = √(2/π)·(x + 0.044715·x³)
TANH_GELU_CUBIC = tl.constexpr(-0.1029432395800235)


@triton.jit
def dot(a, b, accumulator=None):
    """``a @ b (+ accumulator)`` in fp32: tensor cores for 16-bit operands, true fp32 for fp32 ones."""
    if INTERPRET:
        # numpy has no bf16; multiplying two 16-bit floats is exact in fp32, so the result is the same.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def times_sigmoid(x, exponent):
    """``x / (1 + 2 ** exponent)`` in fp32, finite wherever ``x`` is: an overflowing power takes ``x`` to zero."""
    # 1/d as (1/√d)²: one instruction and two multiplications, within 2 ulp.  Every form of division in Triton costs two
    # instructions more on NVIDIA (it guards a denominator above 2¹²⁶) and nine more on AMD.
    root = tl.rsqrt(1.0 + tl.exp2(exponent))
    return x * root * root


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation named ``ACTIVATION`` of an fp32 block: none, quick_gelu, gelu (erf), gelu_tanh, or silu."""
    if ACTIVATION == "none":
        return x
    elif ACTIVATION == "quick_gelu":
        return times_sigmoid(x, x * QUICK_GELU_EXPONENT)
    elif ACTIVATION == "silu":
        return times_sigmoid(x, x * SILU_EXPONENT)
    elif ACTIVATION == "gelu_tanh":
        return times_sigmoid(x, x * (x * x * TANH_GELU_CUBIC + TANH_GELU_EXPONENT))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
