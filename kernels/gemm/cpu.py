"""Matrix multiplication on a CPU by torch's fastest library, with bits that do not depend on the other rows.

torch multiplies fp32 matrices by MKL, which is slower than oneDNN on a CPU that is not Intel's.  MKL also sums a few
rows in another order than many.  oneDNN's fused linear, which torch keeps for its own compiler, has neither problem and
includes the epilogue.  Without it, these functions fall back to ``torch.nn.functional.linear``.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from ..rowwise.activations import activation_reference

# oneDNN's name of each activation it applies to the fp32 sums: (attribute, algorithm).
_POST_OPERATIONS = {
    None: ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


@lru_cache
def has_onednn_matmul(dtype: torch.dtype) -> bool:
    """Probes torch's fused oneDNN linear: it must exist and be correct for ``dtype`` (fp16 needs a recent CPU).

    A row's bits must also not depend on the other rows; in torch 2.11 those of an fp32 row do.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-4, 5, (16, 16), generator=generator, device="cpu").to(dtype) for _ in range(2))
    expected = x.float() @ weight.float().T
    try:
        plain = torch.ops.mkldnn._linear_pointwise(x, weight, x[0], "none", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, weight, weight, None, "add")
    except (AttributeError, RuntimeError):
        # This torch lacks the operation, or this dtype or CPU does.  The caller falls back to another matmul.
        return False
    # Small integers: every sum is exact, in whatever order.
    exact = torch.equal(plain.float(), (expected + x[0].float()).to(dtype).float()) and torch.equal(
        added.float(), (expected + weight.float()).to(dtype).float()
    )
    # Long sums of random numbers reveal the order of summation.
    x, weight = (_noise(rows, 1280, generator).to(dtype) for rows in (64, 16))
    several, few = (torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "") for rows in (x, x[:2]))
    return exact and torch.equal(several[:2], few)


def _noise(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    # Explicit, since torch's default dtype and device may be others.
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


class PrepackedWeight(torch.Tensor):
    """A weight ``[N, K]`` in oneDNN's block layout; it has a shape and a dtype, but only :func:`matmul` reads its values.

    oneDNN reorders a plain weight in every matmul, which takes a tenth to a quarter of its time for some hundred rows.
    """

    parts: tuple[torch.Tensor, ...]
    """All rows, or the two halves of a gated weight."""

    @staticmethod
    def __new__(cls, parts: tuple[torch.Tensor, ...]) -> Self:
        """Wraps ``parts``, matrices of one width."""
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        weight: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype)
        weight.parts = parts
        return weight

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"PrepackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: object, arguments: object = (), named: object = None
    ) -> Any:
        raise TypeError(
            f"{operation} must get a plain weight, got a prepacked one; only linear layers on the CPU can read it"
        )


@lru_cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Probes prepacking of ``dtype``: a matmul by the prepacked weight must have the bits of one by the plain weight."""
    if not has_onednn_matmul(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (_noise(rows, 96, generator).to(dtype) for rows in (48, 80))
    try:
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight)
        results = [torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in (weight, prepacked)]
    except (AttributeError, RuntimeError):  # as in `has_onednn_matmul`
        return False
    return prepacked.is_mkldnn and torch.equal(*results)


def prepack(weight: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
    """Copies a CPU weight ``[N, K]`` to oneDNN's block layout, if :func:`can_prepack`; ``gated``: each half by itself."""
    if weight.device.type != "cpu" or not can_prepack(weight.dtype):
        return weight
    parts = weight.detach().chunk(2 if gated else 1)
    return PrepackedWeight(tuple(torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in parts))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in: fp32 if the CPU has no fast matmul for ``dtype`` (conversion costs far less)."""
    return dtype if has_onednn_matmul(dtype) else torch.float32


def min_matmul_rows(dtype: torch.dtype) -> int:
    """Number of rows below which the CPU libraries use another kernel (matrix × vector, narrow tiles) with other bits."""
    return 2 if has_onednn_matmul(dtype) else 8 * torch.get_num_threads()


def split_rows(rows: int, step: int, fewest: int) -> Iterator[slice]:
    """Cuts ``range(rows)`` into chunks of ``step``; a rest of fewer than ``fewest`` rows joins the chunk before it."""
    start = 0
    while start < rows:
        stop = start + step if rows - start - step >= fewest else rows
        yield slice(start, stop)
        start = stop


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    combine: tuple[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b)``, or ``x Wᵀ + b`` combined (``add``, ``mul``) with a tensor; oneDNN rounds once."""
    y: torch.Tensor
    if has_onednn_matmul(x.dtype):
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
def amd_family() -> int:
    """The family number of AMD's CPUs (25: Zen 3 and 4, 26: Zen 5); 0 for others, and where the system does not tell."""
    try:
        found = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    family = re.search(r"AuthenticAMD\s+cpu family\s*: (\d+)", found)
    return int(family[1]) if family else 0


def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to attend in: fp32 if that is at least as fast as torch's fused attention in ``dtype``."""
    return torch.float32 if amd_family() else compute_dtype(dtype)


def is_fused_attention_slow() -> bool:
    """Tells if fp32 attention by :func:`matmul` is faster than torch's fused attention on this CPU.

    oneDNN multiplies twice as fast as MKL from AMD's Zen 5 on, and equally fast before.  The CPU decides, not a
    measurement: the two differ in the last bits, and the bits of a machine must not change by chance.
    """
    return amd_family() >= 26 and has_onednn_matmul(torch.float32)
