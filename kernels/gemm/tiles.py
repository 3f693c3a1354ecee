"""Device functions of the matmuls: the tile of a program, and its loop along K.

Both ways to read the operands multiply the same blocks of K in the same order, so that they give the same bits:

* *pointers*: every thread computes the addresses of what it copies (``cp.async`` on NVIDIA).
* *descriptors*: one instruction names a block of a matrix to the copy engine (TMA, from Hopper on), which computes the
  addresses and pads with zeros outside the matrix.  :func:`can_use_descriptors` checks its requirements.
"""

import torch

from ..runtime._triton import tl, triton
from ..runtime.device_functions import dot


def can_use_descriptors(*matrices: torch.Tensor) -> bool:
    """Checks the copy engine's rules: 16-byte base and row stride, adjacent elements, no overlapping rows."""
    return all(
        matrix.data_ptr() % 16 == 0
        and matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.stride(0) >= matrix.shape[1]
        for matrix in matrices
    )


@triton.jit
def first_row_and_column(
    program, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """First row and column of a program's tile: GROUP row tiles pass over all columns together, column by column."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    per_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // per_group
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    place = program - group * per_group
    return (first + place % height) * BLOCK_ROWS, (place // height) * BLOCK_COLUMNS


@triton.jit
def store_zeros(
    out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Stores zeros in one tile: one that has no valid rows."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = out_ptr + row.to(tl.int64)[:, None] * stride_om + column[None, :]
    tl.store(pointers, tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def column_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Splits a tile's columns into 1, 2 or 4 parts, from left to right.

    An epilogue that processes the parts one after the other needs the registers of one.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        parts = (tile,)
    elif PARTS == 2:
        parts = _halves(tile, ROWS, COLUMNS)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        parts = _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)
    return parts


@triton.jit
def _load(pointers, inside, IS_EVEN_K: tl.constexpr):
    # `inside` masks the end of K; even a full mask would prevent vectorized loads.
    return tl.load(pointers) if IS_EVEN_K else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _operand(x, weight):
    # Casts x to the weights' dtype; raw bytes count from 128.
    if x.dtype == tl.uint8:
        x = (x.to(tl.int16) - 128).to(tl.float32)
    return x.to(weight.dtype)


@triton.jit
def _step(x_rows, weight_rows, k, end, total, IS_EVEN_K: tl.constexpr):
    # One block of K, `k`, up to `end`.
    x = _load(x_rows + k[None, :], (k < end)[None, :], IS_EVEN_K)
    weight = _load(weight_rows + k[:, None], (k < end)[:, None], IS_EVEN_K)
    return dot(_operand(x, weight), weight, total)


@triton.jit
def accumulate(
    x_ptr, weight_ptr, first_row, first_column, begin, end, rows, columns, stride_xm, stride_wn,
    IS_EVEN_K: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """fp32 sums of one tile over K from ``begin`` to ``end``; ``x`` has ``rows`` rows and ``weight`` has ``columns``.

    Pointers to rows outside are clamped, not masked, which costs nothing in the loop; only a last block of K that is not
    full (``not IS_EVEN_K``) is masked.  Descriptors (``HAS_DESCRIPTORS``) read zeros there, and ``end`` must be the end of
    K or whole blocks after ``begin``.  uint8 x counts from 128; x is cast to the weights' dtype.
    """
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    if HAS_DESCRIPTORS:
        for start in tl.range(begin, end, BLOCK_INNER):
            weight = weight_ptr.load([first_column, start]).T
            x = _operand(x_ptr.load([first_row, start]), weight)
            total = dot(x, weight, total)
    else:
        row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, BLOCK_COLUMNS), columns - 1).to(tl.int64)
        inner = tl.arange(0, BLOCK_INNER)
        x_rows = x_ptr + row[:, None] * stride_xm
        weight_rows = weight_ptr + column[None, :] * stride_wn
        full = begin + (end - begin) // BLOCK_INNER * BLOCK_INNER
        for start in tl.range(begin, full, BLOCK_INNER):
            total = _step(x_rows, weight_rows, start + inner, end, total, True)
        if not IS_EVEN_K:
            total = _step(x_rows, weight_rows, full + inner, end, total, False)
    return total
