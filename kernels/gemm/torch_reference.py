"""The linear layer with its epilogue on a CPU: the reference of :mod:`.linear`, and its CPU path."""

import torch

from .cpu import PackedWeight, compute_dtype, fewest_rows, product, row_chunks

__all__ = ["linear_reference"]

# How much of the product the reference carries to the epilogue at a time: it stays in the last cache, and its memory is
# used again for the next rows instead of being asked of the system.
_CHUNK_BYTES = 8 * 2**20


def _rows_reference(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if activation is None and residual is not None:
        return product(x, weights[0], biases[0], combine=("add", residual))
    if len(weights) == 2:
        gate = product(x, weights[0], biases[0], "silu")
        y = product(x, weights[1], biases[1], combine=("mul", gate))
    else:
        y = product(x, weights[0], biases[0], activation)
    return y if residual is None else y.add_(residual)


def _parts(tensor: torch.Tensor | None, activation: str | None) -> tuple[torch.Tensor | None, ...]:
    """The rows that are multiplied in one go: all of them, or gate and up."""
    if activation == "silu_gated":
        return (None, None) if tensor is None else tensor.chunk(2)
    if activation == "silu_gated_interleaved":
        # A copy of the weights in every call, which only tests of the kernels make on a CPU.
        return (None, None) if tensor is None else (tensor[::2], tensor[1::2])
    return (tensor,)


def _weights(weight: torch.Tensor, activation: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, PackedWeight):
        if len(weight.parts) != (2 if activation == "silu_gated" else 1):
            raise ValueError(
                f"the weight was packed in {len(weight.parts)} parts, which activation {activation!r} does not take; "
                "pack it with gated=True for silu_gated, and for nothing else"
            )
        return weight.parts
    # oneDNN multiplies by padded weight rows as well, but many times slower than it copies them.
    return tuple(part.to(dtype).contiguous() for part in _parts(weight, activation) if part is not None)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``; ``out`` may be ``residual``.  On the CPU a row's bits do not depend on the other rows.

    ``weight`` may be a :class:`.cpu.PackedWeight`: the same bits, sooner.

    Rows pass in chunks through the product and the epilogue.  oneDNN's fused operation does both in one pass; it also
    beats ``torch.nn.functional.linear`` at fp32 where that calls MKL on a CPU of another maker.
    """
    rows, dtype = x.shape[0], x.dtype
    biases = _parts(bias, activation)
    columns = weight.shape[0] // len(biases)
    out = x.new_empty(rows, columns) if out is None else out
    compute = compute_dtype(dtype) if x.device.type == "cpu" else dtype
    fewest = fewest_rows(compute) if x.device.type == "cpu" else 1
    weights = _weights(weight, activation, compute)
    biases = tuple(None if part is None else part.to(compute).contiguous() for part in biases)
    step = max(fewest, _CHUNK_BYTES // (weight.shape[0] * compute.itemsize))
    for chunk in row_chunks(rows, step, fewest):
        part, added = x[chunk], None if residual is None else residual[chunk]
        count = part.shape[0]
        if count < fewest:
            part = torch.nn.functional.pad(part, (0, 0, 0, fewest - count))
            added = None if added is None else torch.nn.functional.pad(added, (0, 0, 0, fewest - count))
        added = None if added is None else added.to(compute)
        # A strided x would be multiplied by another kernel of oneDNN's, with other bits.
        y = _rows_reference(part.to(compute).contiguous(), weights, biases, activation, added)
        out[chunk].copy_(y[:count])
    return out
