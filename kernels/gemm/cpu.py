"""Matrix products on a CPU: the fastest that torch has, with bits that do not depend on what else is multiplied.

torch multiplies fp32 matrices by MKL, which is half as fast as oneDNN on a CPU that is not Intel's, and multiplies a
handful of rows in another order than many.  oneDNN's fused linear, which torch keeps for its own compiler, has neither
fault and takes the epilogue along; where it is missing, what is here falls back to ``torch.nn.functional.linear``.
"""

import platform
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from ..rowwise.activations import activation_reference

__all__ = [
    "PackedWeight",
    "compute_dtype",
    "fewest_rows",
    "fused_attention_is_slow",
    "onednn_exponentiates",
    "onednn_multiplies",
    "onednn_packs",
    "pack",
    "product",
    "row_chunks",
]

# oneDNN's name of each activation it applies to the fp32 sums: (attribute, algorithm).
_POST_OPERATIONS = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "sigmoid": ("sigmoid", ""),
}


@lru_cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's fused oneDNN linear exists here and is right for ``dtype`` (fp16 needs a recent CPU).

    Right is also that a row has the bits it would have with other rows around it: in torch 2.11 an fp32 row does not.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-4, 5, (16, 16), generator=generator, device="cpu").to(dtype) for _ in range(2))
    expected = x.float() @ weight.float().T
    try:
        plain = torch.ops.mkldnn._linear_pointwise(x, weight, x[0], "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, weight, weight, None, "add")
    except (AttributeError, RuntimeError):
        # No such operation in this torch; none for this dtype, or no such instructions in this CPU.  The caller has
        # another product to take.
        return False
    # Small integers: every sum is exact, in whatever order.
    exact = torch.equal(plain.float(), (expected + x[0].float()).to(dtype).float()) and torch.equal(
        added.float(), (expected + weight.float()).to(dtype).float()
    )
    # Long sums of anything tell in which order they were taken.
    x, weight = (_noise(rows, 1280, generator).to(dtype) for rows in (64, 16))
    several, few = (torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "") for rows in (x, x[:2]))
    return exact and torch.equal(several[:2], few)


def _noise(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Normally distributed fp32 on the CPU, whatever torch's default dtype and device are."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


class PackedWeight(torch.Tensor):
    """A weight ``[N, K]`` in oneDNN's own order: it has a shape and a dtype, but only :func:`product` reads its values.

    oneDNN brings a plain weight into that order again in every product, which for some hundred rows costs a tenth to a
    quarter of it.  Made by :func:`pack`.

    Attributes:
        parts: the rows in one piece, or in the two halves of a gated product.
    """

    parts: tuple[torch.Tensor, ...]

    @staticmethod
    def __new__(cls, parts: tuple[torch.Tensor, ...]) -> Self:
        """``parts``: matrices that oneDNN has packed, of one width."""
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        weight: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype)
        weight.parts = parts
        return weight

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        """The shape; values have another order."""
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: object, arguments: object = (), named: object = None
    ) -> Any:
        """Refuses every operation."""
        raise TypeError(
            f"{operation} was asked for of a packed weight, which only linear products on the CPU can read; pass the "
            "plain weight"
        )


@lru_cache
def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether a weight of ``dtype`` can be packed here, and products by it have the bits of those by the plain one."""
    if not onednn_multiplies(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (_noise(rows, 96, generator).to(dtype) for rows in (48, 80))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        products = [torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in (weight, packed)]
    except (AttributeError, RuntimeError):  # as in `onednn_multiplies`
        return False
    return packed.is_mkldnn and torch.equal(*products)


def pack(weight: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
    """A copy of a CPU weight ``[N, K]`` in oneDNN's order, or the weight itself where there is no such thing.

    Args:
        weight: the plain weight.
        gated: it is ``[gate; up]``, whose halves are multiplied one by one.
    """
    if weight.device.type != "cpu" or not onednn_packs(weight.dtype):
        return weight
    return PackedWeight(
        tuple(
            torch.ops.mkldnn._reorder_linear_weight(part.detach().contiguous())
            for part in weight.chunk(2 if gated else 1)
        )
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in: fp32 for 16-bit floats the CPU has no fast product for (conversion costs far less)."""
    return dtype if onednn_multiplies(dtype) else torch.float32


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
def onednn_exponentiates(dtype: torch.dtype) -> bool:
    """Whether a product's ``sigmoid`` is an exponential far below zero, and rounded to bf16 no sooner than at the store.

    True of bf16 alone: fp16 has no numbers that small, and fp32 needs the last bits that a large shift takes away.
    """
    if dtype != torch.bfloat16 or not onednn_multiplies(dtype):
        return False
    exponents = -torch.arange(10, 84, 0.5, dtype=torch.float32, device="cpu")
    # 16 bits of an exponent: a multiple of a half and a small rest, whose sum bf16 could not hold.
    x = torch.stack([exponents, torch.full_like(exponents, -0.0078125)], dim=1).to(dtype)
    weight = torch.ones(32, 2, dtype=dtype, device="cpu")
    expected = torch.exp(x.double().sum(1, keepdim=True)).to(dtype).expand(-1, 32)
    try:
        weights = product(x, weight, None, "sigmoid")
    except RuntimeError:
        return False
    # One unit in the last place of bf16 is at most 2⁻⁷; e^0.0078 is as much, so a sum rounded to bf16 would be seen.
    return bool(((weights.double() / expected.double() - 1).abs() < 2**-7.5).all())


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
