"""Device functions of the products: which tile a program owns, and the walk of a tile along K.

Both ways to read the operands multiply the same blocks of K in the same order, so that they give the same bits:

* *pointers*: every thread computes the addresses of what it copies (``cp.async`` on NVIDIA).
* *descriptors*: one instruction names a block of a matrix to the copy engine (TMA, from Hopper on), which computes the
  addresses and fills up with zeros beyond the matrix.  :func:`descriptors_fit` says what it asks of a matrix.
"""

import torch

from ..runtime._triton import tl, triton
from ..runtime.device_functions import dot

__all__ = ["accumulate", "column_parts", "descriptors_fit", "first_row_and_column", "store_zeros"]


def descriptors_fit(*matrices: torch.Tensor) -> bool:
    """Whether the copy engine can read the matrices: 16-byte base and row stride, adjacent elements, no overlapping rows."""
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
    """Where a program's tile begins: GROUP row tiles go through all columns together, column by column."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    per_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // per_group
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    place = program - group * per_group
    return (first + place % height) * BLOCK_ROWS, (place // height) * BLOCK_COLUMNS


@triton.jit
def store_zeros(
    OUT, first_row, first_column, rows, columns, out_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Zeros into one tile of OUT: what a tile gets that holds no row that counts."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = OUT + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(pointers, tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], OUT.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def column_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A tile's columns in 1, 2 or 4 parts, from left to right.

    An epilogue that finishes one part after the other holds the registers of one: what it loads for the next part waits
    for the store of the one before.
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
def _load(pointers, inside, EVEN: tl.constexpr):
    # `inside` masks the end of K; a mask that is known to be full would still keep the loads from being vectorised.
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _operand(x, weight):
    # x in the weights' dtype; raw bytes count from 128.
    if x.dtype == tl.uint8:
        x = (x.to(tl.int16) - 128).to(tl.float32)
    return x.to(weight.dtype)


@triton.jit
def _step(
    x_rows, weight_rows, up_rows, k, end, total, up,
    GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # One block of K, `k`, up to `end`.
    x = _load(x_rows + k[None, :], (k < end)[None, :], EVEN)
    weight = _load(weight_rows + k[:, None], (k < end)[:, None], EVEN)
    x = _operand(x, weight)
    total = dot(x, weight, total)
    if GATED:
        up = dot(x, _load(up_rows + k[:, None], (k < end)[:, None], EVEN), up)
    return total, up


@triton.jit
def accumulate(
    X, WEIGHT, first_row, first_column, begin, end, rows, columns, x_stride, weight_stride, up_offset,
    GATED: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """fp32 sums over K from ``begin`` to ``end`` of one tile, and the same for weight rows ``up_offset`` further down.

    X has ``rows`` rows and WEIGHT ``columns``.  Pointers to rows beyond are clamped, not masked, which costs nothing in
    the loop; only a last block of K that is not full (``not EVEN``) is masked.  Descriptors (``DESCRIPTORS``) read
    zeros there, and ``end`` has to be the end of K or whole blocks away from ``begin``.  uint8 x counts from 128; x is
    cast to the weights' dtype.
    """
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = total
    if DESCRIPTORS:
        for start in tl.range(begin, end, BLOCK_INNER):
            weight = WEIGHT.load([first_column, start]).T
            x = _operand(X.load([first_row, start]), weight)
            total = dot(x, weight, total)
            if GATED:
                up = dot(x, WEIGHT.load([first_column + up_offset, start]).T, up)
    else:
        row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, BLOCK_COLUMNS), columns - 1).to(tl.int64)
        inner = tl.arange(0, BLOCK_INNER)
        x_rows = X + row[:, None] * x_stride
        weight_rows = WEIGHT + column[None, :] * weight_stride
        up_rows = WEIGHT + (column + up_offset)[None, :] * weight_stride
        full = begin + (end - begin) // BLOCK_INNER * BLOCK_INNER
        for start in tl.range(begin, full, BLOCK_INNER):
            total, up = _step(x_rows, weight_rows, up_rows, start + inner, end, total, up, GATED, True)
        if not EVEN:
            total, up = _step(x_rows, weight_rows, up_rows, full + inner, end, total, up, GATED, False)
    return total, up
