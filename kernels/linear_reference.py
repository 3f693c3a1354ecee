"""The linear layer with its epilogue on a CPU: the reference of :mod:`.linear`, and its CPU path."""

import torch

from .cpu import compute_dtype, fewest_rows, product, row_chunks

__all__ = ["linear_reference"]

# How much of the product the reference carries to the epilogue at a time: it stays in the last cache, and its memory is
# used again for the next rows instead of being asked of the system.
_CHUNK_BYTES = 8 * 2**20


def _rows_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if activation is None and residual is not None:
        return product(x, weight, bias, combine=("add", residual))
    if activation == "silu_gated":
        half = weight.shape[0] // 2
        gate_bias, up_bias = (None, None) if bias is None else (bias[:half], bias[half:])
        gate = product(x, weight[:half], gate_bias, "silu")
        y = product(x, weight[half:], up_bias, combine=("mul", gate))
    else:
        y = product(x, weight, bias, activation)
    return y if residual is None else y.add_(residual)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``; ``out`` may be ``residual``.  On the CPU a row's bits do not depend on the other rows.

    Rows pass in chunks through the product and the epilogue.  oneDNN's fused operation does both in one pass; it also
    beats ``torch.nn.functional.linear`` at fp32 where that calls MKL on a CPU of another maker.
    """
    rows, dtype = x.shape[0], x.dtype
    columns = weight.shape[0] // 2 if activation == "silu_gated" else weight.shape[0]
    out = x.new_empty(rows, columns) if out is None else out
    compute = compute_dtype(dtype) if x.device.type == "cpu" else dtype
    fewest = fewest_rows(compute) if x.device.type == "cpu" else 1
    # oneDNN multiplies by padded weight rows as well, but many times slower than it copies them.
    weight = weight.to(compute).contiguous()
    bias = None if bias is None else bias.to(compute)
    step = max(fewest, _CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    for chunk in row_chunks(rows, step, fewest):
        part, added = x[chunk], None if residual is None else residual[chunk]
        count = part.shape[0]
        if count < fewest:
            part = torch.nn.functional.pad(part, (0, 0, 0, fewest - count))
            added = None if added is None else torch.nn.functional.pad(added, (0, 0, 0, fewest - count))
        added = None if added is None else added.to(compute)
        # A strided x would be multiplied by another kernel of oneDNN's, with other bits.
        y = _rows_reference(part.to(compute).contiguous(), weight, bias, activation, added)
        out[chunk].copy_(y[:count])
    return out
