"""Means of consecutive rows.

    out[n] = (x[n·count] + x[n·count + 1] + … + x[n·count + count − 1]) / count

summed in that order in fp32, divided, and rounded once.  If the patches of an ``s × s`` square are consecutive (as
:func:`.positions.merge_block_positions` orders them for merge = s), this is the average pooling of Gemma 3's projector:
``AvgPool2d(s)`` of transformers' ``Gemma3MultiModalProjector``, with ``count = s²``.

Shapes: x ``[N, D]``, out ``[N / count, D]``; any row stride, last stride 1.  One program owns a tile of
``rows × columns`` of out and loops over the ``count`` input rows of each.  Memory bound: reads ``N·D`` elements and writes
``N·D / count``; one FLOP per element read.
"""

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_not_overwritten, check_rows, checked_output
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from .common import INTERPRETER_TILE, TileConfig, locate_tile, row_chunks

CHUNK = 131072
"""fp32 sums per thread and chunk of the reference."""


def mean_rows_reference(x: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """Writes the means to ``out``, one cache-sized chunk of rows at a time.

    A row's bits are the kernel's and do not depend on the other rows: torch's own mean chooses the order of its sums by
    the shape of the whole tensor; here every sum is rounded by itself, in the order of the rows.
    """
    rows, width = out.shape
    for chunk in row_chunks(rows, width, CHUNK):
        members = x[chunk.start * count : chunk.stop * count]
        total = members[0::count].to(torch.float32, copy=True)
        for member in range(1, count):
            total.add_(members[member::count])
        out[chunk].copy_(total.div_(count))
    return out


@triton.jit(do_not_specialize=["rows"])
def _mean_rows_kernel(
    x_ptr, out_ptr, rows, width, stride_xm, stride_om,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of ROWS × COLUMNS of the output.
    row, column = locate_tile(width, ROWS, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    ptrs = x_ptr + (row * COUNT)[:, None] * stride_xm + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Unrolled, so that several loads are in flight before the first addition.
    for _ in tl.range(0, COUNT, loop_unroll_factor=4):
        total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        ptrs += stride_xm
    mean = tl.div_rn(total, tl.full([ROWS, COLUMNS], COUNT, tl.float32))
    tl.store(out_ptr + row[:, None] * stride_om + column[None, :], mean.to(out_ptr.dtype.element_ty), mask=inside)


def default_config(architecture: str) -> TileConfig:
    """Four means per thread: small programs, since there are few means."""
    if architecture == "interpreter":
        return INTERPRETER_TILE
    return TileConfig(rows=4, columns=128, num_warps=2 if architecture.startswith("gfx") else 4)


def launch_mean_rows(x: torch.Tensor, count: int, out: torch.Tensor, config: TileConfig) -> None:
    """Launches one program per tile of ``out``, for valid, non-empty tensors."""
    rows, width = out.shape
    options = {"COUNT": count, **config.constants, "num_warps": config.num_warps, "num_stages": 1}
    launch(_mean_rows_kernel, config.grid(rows, width), x, out, rows, width, x.stride(0), out.stride(0), **options)


def mean_rows(
    x: torch.Tensor, count: int, *, out: torch.Tensor | None = None, config: TileConfig | None = None
) -> torch.Tensor:
    """Computes the mean of every ``count`` consecutive rows, summed in fp32 and rounded once.

    Args:
        x: ``[N, D]`` float32, float16 or bfloat16, last stride 1, N a multiple of ``count``.
        count: rows of one mean, at least 1; the kernel is compiled for it.
        out: output ``[N / count, D]``, last stride 1; a new tensor by default; must not overlap ``x``.
        config: launch configuration.

    Raises:
        ValueError: a shape or stride does not fit, ``count`` does not divide the rows, or ``out`` is ``x``.
        TypeError: a dtype or device does not fit.
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [N, D], got shape {tuple(x.shape)}")
    if count < 1 or x.shape[0] % count:
        raise ValueError(f"count must be positive and divide the {x.shape[0]} rows of x, got {count}")
    check_rows("x", x, tuple(x.shape), x)
    shape = (x.shape[0] // count, x.shape[1])
    out = checked_output(out, shape, x)
    if not out.numel():
        return out
    check_not_overwritten("x", x, out)
    if not runs_kernel(x):
        return mean_rows_reference(x, count, out)
    launch_mean_rows(x, count, out, config or default_config(configs.architecture(x.device)))
    return out
