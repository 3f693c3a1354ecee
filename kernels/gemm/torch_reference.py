"""CPU path and torch reference of the linear layer with its epilogue (:mod:`.linear`)."""

import torch

from ..rowwise.activations import activation_workspace_bytes
from .cpu import PrepackedWeight, compute_dtype, matmul, min_matmul_rows, split_rows

# Rows per matmul: this many bytes stay in the last-level cache until the epilogue reads them, and their memory is reused
# for the next rows instead of coming from the system.
CHUNK_BYTES = 8 * 2**20


def _matmul_rows(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    activation: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if activation is None and residual is not None:
        return matmul(x, weights[0], biases[0], combine=("add", residual))
    if len(weights) == 2:
        gate = matmul(x, weights[0], biases[0], "silu")
        y = matmul(x, weights[1], biases[1], combine=("mul", gate))
    else:
        y = matmul(x, weights[0], biases[0], activation)
    return y if residual is None else y.add_(residual)


def _split_gates(tensor: torch.Tensor | None, activation: str | None) -> tuple[torch.Tensor | None, ...]:
    if activation == "silu_gated":
        return (None, None) if tensor is None else tensor.chunk(2)
    if activation == "silu_gated_interleaved":
        # Copies the weights in every call, which on a CPU only tests of the kernels do.
        return (None, None) if tensor is None else (tensor[::2], tensor[1::2])
    return (tensor,)


def _split_weight(weight: torch.Tensor, activation: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, PrepackedWeight):
        if len(weight.parts) != (2 if activation == "silu_gated" else 1):
            raise ValueError(
                f"weight must be prepacked for activation {activation!r}, got {len(weight.parts)} parts; prepack it with "
                "gated=True for silu_gated, and for nothing else"
            )
        return weight.parts
    # oneDNN also multiplies by padded weight rows, but many times slower than it copies them.
    return tuple(part.to(dtype).contiguous() for part in _split_gates(weight, activation) if part is not None)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``; ``out`` may be ``residual``.  On the CPU a row's bits do not depend on the other rows.

    ``weight`` may be a :class:`.cpu.PrepackedWeight`, which gives the same bits faster.  oneDNN's fused operation includes the epilogue; it is also faster than
    ``torch.nn.functional.linear`` at fp32 where that calls MKL on another vendor's CPU.
    """
    rows, dtype = x.shape[0], x.dtype
    biases = _split_gates(bias, activation)
    columns = weight.shape[0] // len(biases)
    out = x.new_empty(rows, columns) if out is None else out
    compute = compute_dtype(dtype) if x.device.type == "cpu" else dtype
    fewest = min_matmul_rows(compute) if x.device.type == "cpu" else 1
    weights = _split_weight(weight, activation, compute)
    biases = tuple(None if part is None else part.to(compute).contiguous() for part in biases)
    step = max(fewest, CHUNK_BYTES // (weight.shape[0] * compute.itemsize))
    for chunk in split_rows(rows, step, fewest):
        part, added = x[chunk], None if residual is None else residual[chunk]
        count = part.shape[0]
        if count < fewest:
            part = torch.nn.functional.pad(part, (0, 0, 0, fewest - count))
            added = None if added is None else torch.nn.functional.pad(added, (0, 0, 0, fewest - count))
        added = None if added is None else added.to(compute)
        # oneDNN multiplies a strided x by another kernel, with other bits.
        y = _matmul_rows(part.to(compute).contiguous(), weights, biases, activation, added)
        out[chunk].copy_(y[:count])
    return out


def linear_workspace_bytes(rows: int, width: int, inner: int, activation: str | None, dtype: torch.dtype) -> int:
    """Upper bound of the memory that :func:`linear_reference` allocates on a CPU, in bytes; ``width``: weight rows."""
    compute = compute_dtype(dtype)
    step = max(1, CHUNK_BYTES // (width * compute.itemsize))
    run, previous = min(rows, step), min(max(0, rows - step), step)
    columns = width // 2 if activation == "silu_gated" else width
    # The result of one run lives until that of the next exists; a gate lives beside the result it is multiplied into.
    taken = (run * width + previous * columns) * compute.itemsize
    taken += activation_workspace_bytes(run * columns, activation)
    if compute != dtype:
        taken += (run * (inner + columns) + width * inner) * compute.itemsize
    return taken
