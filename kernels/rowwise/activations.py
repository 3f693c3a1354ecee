"""Activations and addition as separate operations, for graphs in which no GEMM epilogue contains them.

``activation``: ``y = f(x)`` with f one of

* ``quick_gelu``: ``x · sigmoid(1.702 x)``
* ``gelu``: ``x · Φ(x) = ½ x (1 + erf(x/√2))``
* ``gelu_tanh``: ``½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))``
* ``silu``: ``x · sigmoid(x)``

``add``: ``z = x + y``.  Both compute in fp32 and round once, at the store.

Shapes: ``[M, N]``, any row stride, last stride 1.  One program owns ``BLOCK`` adjacent elements of a row; contiguous
tensors count as one long row.  Both kernels are memory bound: they move 2 (``activation``) or 3 (``add``) × M × N
elements, and an activation takes about 10 to 25 instructions per element.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import ceil_div, check_float, check_rows, checked_output
from ..runtime.device_functions import activate
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

# torch processes a CPU tensor in vectors of 16 or 32 elements, unrolled twice, and the rest one by one, with a last bit that
# may differ.  A thread takes a contiguous share of at least one grain (`gelu`: an even share).
_VECTOR = 64
_GRAIN = 32768
CHUNK = 8 * _GRAIN
"""Elements per thread and chunk of the reference: they stay in the core's own cache."""


def _quick_gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    # torch has no quick_gelu, but silu(1.702x)/1.702 needs one transcendental function, and the fp32 scratch stays in cache.
    scaled = x.float() if x.dtype != torch.float32 else x.clone()
    torch.nn.functional.silu(scaled.mul_(1.702), inplace=True)
    out.copy_(scaled.mul_(1 / 1.702))


_REFERENCES: dict[str, Callable[..., Any]] = {
    "quick_gelu": _quick_gelu,
    "gelu": partial(torch.ops.aten.gelu.out, approximate="none"),
    "gelu_tanh": partial(torch.ops.aten.gelu.out, approximate="tanh"),
    "silu": torch.ops.aten.silu.out,
}


def _cut_into_vectors(numel: int, kind: str) -> Iterator[tuple[int, int]]:
    """Cuts ``range(numel)`` so that each thread's share of each piece is whole vectors, except in the last piece.

    An element's result then depends on its value alone, not on its position or the number of elements.
    """
    threads = torch.get_num_threads()
    even, grains = _VECTOR * threads, _GRAIN * threads
    start = 0
    while left := numel - start:
        if left >= grains:
            size = min(left, CHUNK * threads) // even * even
        elif left >= even and kind in ("gelu", "gelu_tanh"):
            size = left // even * even
        elif left >= _GRAIN:
            size = left // _GRAIN * _GRAIN
        else:
            size = left // _VECTOR * _VECTOR or left
        yield start, start + size
        start += size


def activation_reference(x: torch.Tensor, kind: str, out: torch.Tensor) -> torch.Tensor:
    """Computes ``f(x)`` in fp32, rounded once; ``out`` may be ``x``.  On the CPU a row's bits do not depend on other rows."""
    function = _REFERENCES[kind]
    if not x.is_contiguous() or not out.is_contiguous():
        dense = x.contiguous()
        return out.copy_(activation_reference(dense, kind, torch.empty_like(dense)))
    source, target = x.view(-1), out.view(-1)
    for start, stop in _cut_into_vectors(x.numel(), kind):
        if (stop - start) % _VECTOR == 0:
            function(source[start:stop], out=target[start:stop])
            continue
        padded = source.new_zeros(_VECTOR)
        padded[: stop - start] = source[start:stop]
        function(padded, out=padded)
        target[start:stop] = padded[: stop - start]
    return out


def activation_workspace_bytes(elements: int, kind: str | None) -> int:
    """Upper bound of the memory that :func:`activation_reference` allocates beside its output on a CPU, in bytes."""
    return min(elements, CHUNK * torch.get_num_threads()) * torch.float32.itemsize if kind == "quick_gelu" else 0


@triton.jit
def _locate_block(columns, BLOCK: tl.constexpr):
    # Returns the row and column offsets of this program; 64 bits, since one row may be a whole tensor.
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    start = (program - row * blocks).to(tl.int64) * BLOCK
    return row.to(tl.int64), start + tl.arange(0, BLOCK)


@triton.jit
def _activation_kernel(
    x_ptr, out_ptr, stride_xm, stride_om, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # One program owns BLOCK adjacent elements of one row.
    row, column = _locate_block(columns, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * stride_xm + column, mask=inside, other=0.0).to(tl.float32)
    y = activate(x, ACTIVATION)
    tl.store(out_ptr + row * stride_om + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, stride_xm, stride_ym, stride_om, columns, BLOCK: tl.constexpr):
    # One program owns BLOCK adjacent elements of one row.
    row, column = _locate_block(columns, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * stride_xm + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * stride_ym + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_om + column, (x + y).to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class ElementwiseConfig:
    """Adjacent elements per program, and warps."""

    block: int
    num_warps: int


def default_config(architecture: str) -> ElementwiseConfig:
    """16 bytes per thread and load (16-bit elements); few, long programs in the interpreter, where each is expensive."""
    if architecture == "interpreter":
        return ElementwiseConfig(block=16384, num_warps=4)
    return ElementwiseConfig(block=2048 if architecture.startswith("gfx") else 1024, num_warps=4)


# The kernels count the blocks of a row in 32 bits, and round up before they divide.
_LONGEST_ROW = 2**31 - 2**16


def flatten_rows(*tensors: torch.Tensor) -> tuple[int, int]:
    """Returns the rows and columns to launch: one long row if all are contiguous and 32 bits count its elements."""
    rows, columns = tensors[0].shape
    if rows * columns <= _LONGEST_ROW and all(tensor.is_contiguous() for tensor in tensors):
        return 1, rows * columns
    return rows, columns


def launch_activation(x: torch.Tensor, out: torch.Tensor, kind: str, config: ElementwiseConfig) -> None:
    """Launches one program per block of a row, for valid, non-empty tensors."""
    rows, columns = flatten_rows(x, out)
    grid = (rows * ceil_div(columns, config.block),)
    launch(
        _activation_kernel,
        grid,
        x,
        out,
        x.stride(0),
        out.stride(0),
        columns,
        ACTIVATION=kind,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def launch_add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, config: ElementwiseConfig) -> None:
    """Launches one program per block of a row, for valid, non-empty tensors."""
    rows, columns = flatten_rows(x, y, out)
    grid = (rows * ceil_div(columns, config.block),)
    strides = (x.stride(0), y.stride(0), out.stride(0))
    launch(_add_kernel, grid, x, y, out, *strides, columns, BLOCK=config.block, num_warps=config.num_warps)


def _check(x: torch.Tensor, out: torch.Tensor | None, **others: torch.Tensor) -> torch.Tensor:
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [M, N], got shape {tuple(x.shape)}")
    for name, tensor in {"x": x, **others}.items():
        check_rows(name, tensor, tuple(x.shape), x)
    return checked_output(out, tuple(x.shape), x)


def activation(x: torch.Tensor, kind: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Computes ``f(x)`` in fp32, rounded once.

    Args:
        x: ``[M, N]`` float32, float16 or bfloat16, last stride 1.
        kind: one of :data:`ACTIVATIONS`.
        out: output like ``x``, last stride 1; may be ``x`` itself; a new tensor by default.

    Raises:
        ValueError: the kind is unknown, or a shape or stride does not fit.
        TypeError: a dtype or device does not fit.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    out = _check(x, out)
    if not runs_kernel(x):
        return activation_reference(x, kind, out)
    if x.numel():
        launch_activation(x, out, kind, default_config(configs.architecture(x.device)))
    return out


def add(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Computes ``x + y`` in fp32, rounded once.

    Arguments and errors are those of :func:`activation`; ``y`` is like ``x``, and ``out`` may be either.
    """
    out = _check(x, out, y=y)
    if not runs_kernel(x):
        return torch.add(x, y, out=out)
    if x.numel():
        launch_add(x, y, out, default_config(configs.architecture(x.device)))
    return out
