"""Averages of rows that lie side by side.

    out[n] = (x[n·count] + x[n·count + 1] + … + x[n·count + count − 1]) / count

summed in that order in fp32, divided, and rounded once.  Where the patches of a ``s × s`` square lie side by side (as
:func:`.positions.merge_block_positions` orders them for merge = s), this is the average pooling of Gemma 3's projector:
``AvgPool2d(s)`` of transformers' ``Gemma3MultiModalProjector``, with ``count = s²``.

Shapes: x ``[N, D]``, out ``[N / count, D]``; rows any distance apart, elements of a row adjacent.  One program owns a
tile of ``rows × columns`` of out and walks the ``count`` rows behind each.  Bound by memory: reads ``N·D`` elements and
writes ``N·D / count``; one FLOP for each one read.
"""

from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = ["PoolingConfig", "compile_specs", "default_config", "launch_mean_rows", "mean_rows", "mean_rows_reference"]

_CHUNK = 131072  # fp32 sums per thread that the reference works on at a time: they stay in the core's own cache


def mean_rows_reference(x: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """The averages, written to ``out``, a cache-sized run of rows at a time.

    No row's bits depend on the other rows, and all are the kernel's: torch's own mean picks an order of the sums by the
    shape of the whole tensor, here every sum is a rounding of its own, in the order of the rows.
    """
    rows, width = out.shape
    step = max(1, _CHUNK * torch.get_num_threads() // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        members = x[start * count : stop * count]
        total = members[0::count].to(torch.float32, copy=True)
        for member in range(1, count):
            total.add_(members[member::count])
        out[start:stop].copy_(total.div_(count))
    return out


@triton.jit
def _mean_rows_kernel(
    X, OUT, rows, width, x_stride, out_stride, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # Owns a tile of ROWS × COLUMNS of OUT; neighboring programs write neighboring columns of the same rows.
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row_tile = program // column_tiles
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program - row_tile * column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    pointers = X + (row * COUNT)[:, None] * x_stride + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Unrolled, so that several loads are under way before the first of them is added.
    for _ in tl.range(0, COUNT, loop_unroll_factor=4):
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        pointers += x_stride
    mean = tl.div_rn(total, tl.full([ROWS, COLUMNS], COUNT, tl.float32))
    tl.store(OUT + row[:, None] * out_stride + column[None, :], mean.to(OUT.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class PoolingConfig:
    """The tile of averages of one program, powers of two, and its warps; none of it changes a bit of the result."""

    rows: int
    columns: int
    num_warps: int


def default_config(architecture: str) -> PoolingConfig:
    """Four averages a thread: small programs, since there are few averages; large ones in the interpreter."""
    if architecture == "interpreter":
        return PoolingConfig(rows=64, columns=2048, num_warps=4)
    return PoolingConfig(rows=4, columns=128, num_warps=2 if architecture.startswith("gfx") else 4)


@on_device_of_first
def launch_mean_rows(x: torch.Tensor, count: int, out: torch.Tensor, config: PoolingConfig) -> None:
    """The averages of validated, non-empty tensors, as :func:`mean_rows_reference`."""
    rows, width = out.shape
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(width, config.columns),)
    _mean_rows_kernel[grid](
        x,
        out,
        rows,
        width,
        x.stride(0),
        out.stride(0),
        COUNT=count,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
        num_stages=1,
    )


def _validate_rows(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be {shape}")
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def mean_rows(
    x: torch.Tensor, count: int, *, out: torch.Tensor | None = None, config: PoolingConfig | None = None
) -> torch.Tensor:
    """The mean of every ``count`` consecutive rows, summed in fp32 and rounded once.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16, last stride 1, N a multiple of ``count``.
        count: rows of one average, at least 1; the kernel is compiled for it.
        out: where to write, ``[N / count, D]`` of ``x``'s dtype, last stride 1; must not overlap ``x``.
        config: how to launch the kernel; the default is chosen for the device.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: shapes that do not fit, rows with gaps, rows that ``count`` does not divide, out being x.
        TypeError: dtypes or devices that differ, or a dtype that is none of the three.
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; mean_rows takes float32, float16 and bfloat16")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it has to be [N, D]")
    if count < 1:
        raise ValueError(f"count is {count}; an average needs at least one row")
    if x.shape[0] % count:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its {x.shape[0]} rows have to be a multiple of count, which is {count}"
        )
    _validate_rows("x", x, tuple(x.shape))
    shape = (x.shape[0] // count, x.shape[1])
    if out is None:
        out = x.new_empty(shape)
    elif out.dtype != x.dtype or out.device != x.device:
        raise TypeError(f"out is {out.dtype} on {out.device}; x is {x.dtype} on {x.device}, they have to agree")
    _validate_rows("out", out, shape)
    if not out.numel():
        return out
    if out.data_ptr() == x.data_ptr() != 0:  # 0 is the address of tensors without memory
        raise ValueError("out is x: a row would be overwritten before it is read")
    if not runs_kernel(x):
        return mean_rows_reference(x, count, out)
    launch_mean_rows(x, count, out, config or default_config(configs.architecture(x.device)))
    return out


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configuration: squares of 4 × 4 patches (Gemma 3) in every dtype, and two other squares.

    The width is no constant of the kernel: 1152 columns share their code with every multiple of 16.
    """
    return [
        _compile_spec(count, element, default_config(architecture))
        for count, element in ((16, "bf16"), (16, "fp16"), (16, "fp32"), (4, "bf16"), (9, "bf16"))
    ]


def _compile_spec(count: int, element: str, config: PoolingConfig) -> CompileSpec:
    sizes = ("width", "x_stride", "out_stride")
    return CompileSpec(
        name=f"mean of {count} rows {element} {config.rows}x{config.columns}",
        kernel=_mean_rows_kernel,
        signature=dict.fromkeys(("X", "OUT"), f"*{element}") | dict.fromkeys(("rows", *sizes), "i32"),
        constants={"COUNT": count, "ROWS": config.rows, "COLUMNS": config.columns},
        divisible_by_16=sizes,
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=config.rows * config.columns * count,
    )
