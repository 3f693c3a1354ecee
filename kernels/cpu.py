"""Matrix products on a CPU: the fastest that torch has, with bits that do not depend on what else is multiplied.

torch multiplies fp32 matrices by MKL, which is half as fast as oneDNN on a CPU that is not Intel's, and multiplies a
handful of rows in another order than many.  oneDNN's fused linear, which torch keeps for its own compiler, has neither
fault and takes the epilogue along; where it is missing, what is here falls back to ``torch.nn.functional.linear``.
"""

import platform
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from .elementwise import activation_reference

__all__ = ["compute_dtype", "fewest_rows", "fused_attention_is_slow", "onednn_multiplies", "product", "row_chunks"]

# oneDNN's name of each activation it applies to the fp32 sums: (attribute, algorithm).
_POST_OPERATIONS = {None: ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


@lru_cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's fused oneDNN linear exists here and is right for ``dtype`` (fp16 needs a recent CPU)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-4, 5, (16, 16), generator=generator).to(dtype) for _ in range(2))
    expected = x.float() @ weight.float().T
    try:
        plain = torch.ops.mkldnn._linear_pointwise(x, weight, x[0], "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, weight, weight, None, "add")
    except (AttributeError, NotImplementedError, RuntimeError):
        # No such operation in this torch, none for this dtype, or no such instructions in this CPU: torch says each of
        # the three in its own way, and the caller has another product to take.
        return False
    # Small integers: every sum is exact, in whatever order.
    return torch.equal(plain.float(), (expected + x[0].float()).to(dtype).float()) and torch.equal(
        added.float(), (expected + weight.float()).to(dtype).float()
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in: fp32 for 16-bit floats the CPU has no fast product for (conversion costs far less)."""
    if onednn_multiplies(dtype) or not onednn_multiplies(torch.float32):
        return dtype
    return torch.float32


def fewest_rows(dtype: torch.dtype) -> int:
    """Below this many rows the CPU libraries take another route (matrix × vector, narrow tiles) with other bits."""
    return 2 if onednn_multiplies(dtype) else 8 * torch.get_num_threads()


def row_chunks(rows: int, step: int, fewest: int) -> Iterator[slice]:
    """Cuts ``range(rows)`` into ``step`` rows each; a rest of less than ``fewest`` rows joins the chunk before it."""
    start = 0
    while start < rows:
        stop = start + step if rows - start - step >= fewest else rows
        yield slice(start, stop)
        start = stop


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    combine: tuple[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b)``, or ``x Wᵀ + b`` added to or multiplied by another tensor; one rounding where oneDNN does it."""
    y: torch.Tensor
    if onednn_multiplies(x.dtype):
        pointwise = torch.ops.mkldnn._linear_pointwise
        if combine is not None:
            y = pointwise.binary(x, combine[1], weight, bias, combine[0])
            return y
        attribute, algorithm = _POST_OPERATIONS.get(activation, _POST_OPERATIONS[None])
        y = pointwise(x, weight, bias, attribute, [], algorithm)
        if activation in _POST_OPERATIONS:
            return y
    else:
        y = torch.nn.functional.linear(x, weight, bias)
        if combine is not None:
            return y.add_(combine[1]) if combine[0] == "add" else y.mul_(combine[1])
    return y if activation is None else activation_reference(y, activation, out=y)


@lru_cache
def fused_attention_is_slow() -> bool:
    """Whether attention by :func:`product` beats torch's fused attention on this CPU.

    The fused attention multiplies by MKL in every dtype, so it runs at half of oneDNN's speed on a CPU by AMD.  The
    maker decides, and no stopwatch: the two differ in the last bits, and the bits of a machine must not change by chance.
    """
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        maker = platform.processor()
    return "AuthenticAMD" in maker and onednn_multiplies(torch.float32)
