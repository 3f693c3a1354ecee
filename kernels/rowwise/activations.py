"""Activations and addition as operations of their own, for graphs in which no GEMM epilogue has taken them in.

``activation``: ``y = f(x)`` with f one of

* ``quick_gelu``: ``x · sigmoid(1.702 x)``
* ``gelu``: ``x · Φ(x) = ½ x (1 + erf(x/√2))``
* ``gelu_tanh``: ``½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))``
* ``silu``: ``x · sigmoid(x)``

``add``: ``z = x + y``.  Both compute in fp32 and round once, at the store.

Shapes: ``[M, N]``, rows any distance apart, elements of a row adjacent.  One program owns ``BLOCK`` adjacent elements of
a row; tensors without gaps count as one long row.  Both kernels are bound by memory: they move 2 (``activation``) or 3
(``add``) × M × N elements, and an activation costs about 10 to 25 instructions an element on top.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.device_functions import activate
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ElementwiseConfig",
    "activation",
    "activation_reference",
    "activation_workspace_bytes",
    "add",
    "add_reference",
    "compile_specs",
    "default_config",
]

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

# How torch walks a CPU tensor: 16 or 32 elements at a time, unrolled twice, and what is left over one by one with a last
# bit that may differ.  A thread takes a contiguous share, and no less than a grain of it (`gelu`: an even share).
_VECTOR = 64
_GRAIN = 32768
_CHUNK = 8 * _GRAIN  # elements per thread that the reference works on at a time: they stay in the core's own cache


def _quick_gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    # torch has no quick_gelu, but silu(1.702x)/1.702 is one transcendental pass, and the fp32 scratch stays in cache.
    scaled = x.float() if x.dtype != torch.float32 else x.clone()
    torch.nn.functional.silu(scaled.mul_(1.702), inplace=True)
    out.copy_(scaled.mul_(1 / 1.702))


def _silu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.aten.silu.out(x, out=out)


def _gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.aten.gelu.out(x, approximate="none", out=out)


def _gelu_tanh(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


_REFERENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "quick_gelu": _quick_gelu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


def _vectorised_pieces(numel: int, kind: str) -> Iterator[tuple[int, int]]:
    """Cuts ``range(numel)`` so that each thread's share of each piece is whole vectors; only the last piece may not be.

    An element's result then depends on its value alone, not on where it stands, nor on how many others there are.
    """
    threads = torch.get_num_threads()
    even, grains = _VECTOR * threads, _GRAIN * threads
    start = 0
    while left := numel - start:
        if left >= grains:
            size = min(left, _CHUNK * threads) // even * even
        elif left >= even and kind in ("gelu", "gelu_tanh"):
            size = left // even * even
        elif left >= _GRAIN:
            size = left // _GRAIN * _GRAIN
        else:
            size = left // _VECTOR * _VECTOR or left
        yield start, start + size
        start += size


def activation_reference(x: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """``f(x)`` in fp32, rounded once; ``out`` may be ``x``.  On the CPU a row's bits do not depend on the other rows."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    function = _REFERENCES[kind]
    if not x.is_contiguous() or not out.is_contiguous():
        return out.copy_(activation_reference(x.contiguous(), kind))
    source, target = x.view(-1), out.view(-1)
    for start, stop in _vectorised_pieces(x.numel(), kind):
        if (stop - start) % _VECTOR == 0:
            function(source[start:stop], target[start:stop])
            continue
        padded = source.new_zeros(_VECTOR)
        padded[: stop - start] = source[start:stop]
        function(padded, padded)
        target[start:stop] = padded[: stop - start]
    return out


def add_reference(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x + y`` in fp32, rounded once; ``out`` may be ``x`` or ``y``."""
    return torch.add(x, y) if out is None else torch.add(x, y, out=out)


@triton.jit
def _piece(columns, BLOCK: tl.constexpr):
    # (row, column offsets) of this program; 64 bits, since one row may be a whole tensor.
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    start = (program - row * blocks).to(tl.int64) * BLOCK
    return row.to(tl.int64), start + tl.arange(0, BLOCK)


@triton.jit
def _activation_kernel(X, OUT, x_stride, out_stride, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    # Owns BLOCK adjacent elements of one row.
    row, column = _piece(columns, BLOCK)
    inside = column < columns
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = activate(x, ACTIVATION)
    tl.store(OUT + row * out_stride + column, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(X, Y, OUT, x_stride, y_stride, out_stride, columns, BLOCK: tl.constexpr):
    # Owns BLOCK adjacent elements of one row.
    row, column = _piece(columns, BLOCK)
    inside = column < columns
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * out_stride + column, (x + y).to(OUT.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class ElementwiseConfig:
    """How many adjacent elements one program owns, and with how many warps."""

    block: int
    num_warps: int


def default_config(architecture: str) -> ElementwiseConfig:
    """16 bytes per thread and load (16-bit elements); few, long programs in the interpreter, where each costs dearly."""
    if architecture == "interpreter":
        return ElementwiseConfig(block=16384, num_warps=4)
    return ElementwiseConfig(block=2048 if architecture.startswith("gfx") else 1024, num_warps=4)


# The kernels count the blocks of a row in 32 bits, and round up before they divide.
_LONGEST_ROW = 2**31 - 2**16


def _rows_and_columns(*tensors: torch.Tensor) -> tuple[int, int]:
    """How the kernels walk the tensors: as one long row where none of them has gaps and 32 bits count its elements."""
    rows, columns = tensors[0].shape
    if rows * columns <= _LONGEST_ROW and all(tensor.is_contiguous() for tensor in tensors):
        return 1, rows * columns
    return rows, columns


@on_device_of_first
def launch_activation(x: torch.Tensor, out: torch.Tensor, kind: str, config: ElementwiseConfig) -> None:
    """``out = f(x)`` for validated, non-empty tensors."""
    rows, columns = _rows_and_columns(x, out)
    grid = (rows * triton.cdiv(columns, config.block),)
    _activation_kernel[grid](
        x, out, x.stride(0), out.stride(0), columns, ACTIVATION=kind, BLOCK=config.block, num_warps=config.num_warps
    )


@on_device_of_first
def launch_add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, config: ElementwiseConfig) -> None:
    """``out = x + y`` for validated, non-empty tensors."""
    rows, columns = _rows_and_columns(x, y, out)
    grid = (rows * triton.cdiv(columns, config.block),)
    _add_kernel[grid](
        x,
        y,
        out,
        x.stride(0),
        y.stride(0),
        out.stride(0),
        columns,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def _validate(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, but x is {like.dtype} on {like.device}; they have to agree"
        )
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        raise TypeError(f"{name} is {tensor.dtype}; this operation takes float32, float16 and bfloat16")
    if tensor.dim() != 2 or tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; x has {tuple(like.shape)}, and both have to be [M, N]"
        )
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def activation(x: torch.Tensor, kind: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``f(x)``, computed in fp32 and rounded once.

    Args:
        x: ``[M, N]`` float32, float16 or bfloat16, last stride 1.
        kind: one of :data:`ACTIVATIONS`.
        out: where to write, of ``x``'s shape and dtype, last stride 1; may be ``x`` itself.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: an unknown kind; shapes that differ; elements of a row that are not adjacent.
        TypeError: dtypes or devices that differ, or a dtype that is none of the three.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}; known are {', '.join(ACTIVATIONS)}")
    _validate("x", x, x)
    if out is not None:
        _validate("out", out, x)
    if not runs_kernel(x):
        return activation_reference(x, kind, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel():
        launch_activation(x, out, kind, default_config(configs.architecture(x.device)))
    return out


def add(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x + y``, computed in fp32 and rounded once.

    Args:
        x: ``[M, N]`` float32, float16 or bfloat16, last stride 1.
        y: like ``x``.
        out: where to write, like ``x``; may be ``x`` or ``y`` itself.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: shapes that differ; elements of a row that are not adjacent.
        TypeError: dtypes or devices that differ, or a dtype that is none of the three.
    """
    _validate("x", x, x)
    _validate("y", y, x)
    if out is not None:
        _validate("out", out, x)
    if not runs_kernel(x):
        return add_reference(x, y, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel():
        launch_add(x, y, out, default_config(configs.architecture(x.device)))
    return out


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: every activation and the addition in bf16, and the costliest activation in fp16/fp32."""
    config = default_config(architecture)

    def spec(
        name: str, kernel: object, pointers: tuple[str, ...], element: str, constants: dict[str, object]
    ) -> CompileSpec:
        strides = tuple(f"{pointer.lower()}_stride" for pointer in pointers)
        return CompileSpec(
            name=f"{name} {element} {config.block}",
            kernel=kernel,
            signature=dict.fromkeys(pointers, f"*{element}") | dict.fromkeys((*strides, "columns"), "i32"),
            constants={**constants, "BLOCK": config.block},
            divisible_by_16=(*strides, "columns"),
            num_warps=config.num_warps,
            num_stages=1,
            tensor_core=False,
            elements=config.block,
        )

    kinds = [(kind, "bf16") for kind in ACTIVATIONS] + [("gelu", "fp16"), ("gelu", "fp32")]
    return [
        spec(f"activation {kind}", _activation_kernel, ("X", "OUT"), element, {"ACTIVATION": kind})
        for kind, element in kinds
    ] + [spec("add", _add_kernel, ("X", "Y", "OUT"), "bf16", {})]


def activation_workspace_bytes(elements: int, kind: str | None) -> int:
    """Upper bound of the memory that :func:`activation_reference` allocates beside its output on a CPU, in bytes."""
    return min(elements, _CHUNK * torch.get_num_threads()) * torch.float32.itemsize if kind == "quick_gelu" else 0
