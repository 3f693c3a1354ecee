"""A linear layer by the vendor's GEMM library that comes with torch: cuBLAS on NVIDIA, hipBLASLt on AMD.

It is the baseline for large matrices: its kernels are written for each chip and multicast operands within a cluster of
programs, which Triton does not.  It has few epilogues, so the others follow as a separate launch, with a rounding in
between where transformers also rounds:

=====================  ===============================================================================
bias, or none          in the GEMM
residual without bias  in the GEMM: the residual times one is its accumulator's initial value
``gelu_tanh``          in the GEMM where there is a bias (on a GPU); else after it
other activations      after the GEMM, in place
residual with those    after them
=====================  ===============================================================================

The library selects its algorithm by the number of rows, so a row's bits may differ between batches of different sizes.
It computes all rows, including padding, which stays finite if it was.  Therefore only a table of measured
configurations, or a caller, selects it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

from ..rowwise.activations import activation as apply_activation
from ..rowwise.activations import add
from ..runtime.launch import allocate_workspace, call_library
from .linear_config import GATED

_REDUCTIONS = {
    torch.float16: "allow_fp16_reduced_precision_reduction",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
}
_reduction_lock = Lock()


@contextmanager
def full_precision_reduction(dtype: torch.dtype) -> Iterator[None]:
    """Makes cuBLAS sum the parts of a split matmul of 16-bit matrices in fp32, which torch by default leaves open.

    torch has one flag per dtype and process.  It changes only for the call, and one thread at a time: another thread's own
    matmuls may meanwhile be summed in fp32 as well, never less precisely.
    """
    name = _REDUCTIONS.get(dtype)
    if name is None:
        yield
        return
    flags = torch.backends.cuda.matmul
    with _reduction_lock:
        allowed, split = getattr(flags, name), getattr(flags, f"{name}_split_k")
        setattr(flags, name, (False, split))
        try:
            yield
        finally:
            setattr(flags, name, (allowed, split))


def on_gpu(tensor: torch.Tensor) -> bool:
    """Tells if the fused operation computes the tanh form of GELU; on a CPU it is the erf form."""
    return tensor.device.type != "cpu"


def can_use_vendor_gemm(x: torch.Tensor, activation: str | None) -> bool:
    """Tells if the library computes ``f(x Wᵀ + b)``: not with gates, nor in fp32 if TF32 is allowed in torch."""
    if activation in GATED:
        return False
    return x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


def _multiply(function: Callable[..., Any], *arguments: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
    with full_precision_reduction(out.dtype):
        function(*arguments, out=out, **options)


@torch.no_grad()
def launch_vendor_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
) -> None:
    """``out = f(x Wᵀ + b) + r`` for validated tensors; allocates only if the residual is ``out`` and added afterwards."""
    transposed = weight.t()
    aliased = residual is not None and residual.data_ptr() == out.data_ptr()
    if residual is not None and bias is None and activation is None:
        call_library(_multiply, torch.addmm, residual, x, transposed, out=out)
        return
    y = allocate_workspace(out.shape, out.dtype, out.device) if aliased else out
    if bias is None:
        call_library(_multiply, torch.mm, x, transposed, out=y)
    elif activation == "gelu_tanh" and on_gpu(x):
        gelu_tanh = torch.ops.aten._addmm_activation.out
        call_library(_multiply, gelu_tanh, bias, x, transposed, use_gelu=True, out=y)
        activation = None
    else:
        call_library(_multiply, torch.addmm, bias, x, transposed, out=y)
    if activation is not None:
        apply_activation(y, activation, out=y)
    if residual is not None:
        add(y, residual, out=out)
