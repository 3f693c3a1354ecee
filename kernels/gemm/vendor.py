"""A linear layer by the library that comes with torch: cuBLAS on NVIDIA, hipBLASLt on AMD.

For large products it is the one to beat: its kernels are written for each chip and multicast operands among the programs
of a cluster, which Triton does not.  Its epilogues are few, so what it lacks follows as a launch of its own, with a
rounding in between where transformers rounds too:

=====================  ===========================================================================
bias, or none          in the product
residual without bias  in the product: the result is the residual, multiplied by one and added to
``gelu_tanh``          in the product where there is a bias (on a GPU); else after it
other activations      after the product, in place
residual with those    after them
=====================  ===========================================================================

Which algorithm the library takes for a number of rows is its own business, so a row's bits may differ between packs of
different sizes.  All rows are computed, padding included, which stays finite if it was.  Therefore nothing but a table
of measured configurations, or a caller, chooses it.
"""

import torch

from ..rowwise.activations import activation as apply_activation
from ..rowwise.activations import add
from .linear_config import GATED

__all__ = ["launch_vendor_product", "on_gpu", "vendor_takes"]


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the fused operation has the GPU's meaning: on a CPU it is the other GELU."""
    return tensor.is_cuda


def vendor_takes(x: torch.Tensor, activation: str | None) -> bool:
    """Whether the library computes ``f(x Wᵀ + b)`` as it is defined here.

    It does not know gates, and where torch has been allowed TF32 it would not multiply fp32 in fp32.
    """
    if activation in GATED:
        return False
    return x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


@torch.no_grad()
def launch_vendor_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
) -> None:
    """``out = f(x Wᵀ + b) + r`` for validated, non-empty tensors that :func:`vendor_takes`.

    Allocates only where the residual is added after the product and lies in ``out`` already.
    """
    transposed = weight.t()
    if residual is not None and bias is None and activation is None:
        torch.addmm(residual, x, transposed, out=out)
        return
    aliased = residual is not None and residual.data_ptr() == out.data_ptr()
    y = torch.empty(out.shape, dtype=out.dtype, device=out.device) if aliased else out
    if bias is None:
        torch.mm(x, transposed, out=y)
    elif activation == "gelu_tanh" and on_gpu(x):
        torch.ops.aten._addmm_activation.out(bias, x, transposed, use_gelu=True, out=y)
        activation = None
    else:
        torch.addmm(bias, x, transposed, out=y)
    if activation is not None:
        apply_activation(y, activation, out=y)
    if residual is not None:
        add(y, residual, out=out)
