"""Linear layer with its epilogue: ``y = f(x Wᵀ + b) + r``.

Shapes: ``x [M, K]``, ``W [N, K]`` (the layout of ``torch.nn.Linear``), ``b [N]``, ``r`` and ``y [M, N]``.  The activation f
is one of :data:`.activations.ACTIVATIONS`, nothing, or gated: ``y = silu(x Wᵍᵃᵗᵉᵀ + bᵍᵃᵗᵉ) · (x Wᵘᵖᵀ + bᵘᵖ) + r`` with
N/2 columns.  The rows of W are then ``[gate; up]`` (``silu_gated``, the CPU's format), or alternate
(``silu_gated_interleaved``, the kernel's: row 2i is gate i, row 2i+1 is up i; see :func:`interleave_gated`).  A program
then reads one run of rows into one tile of sums, whose pairs of columns are in the same thread.

Sums, bias, activation and residual are fp32; there is one rounding, at the store.

One program owns one ``block_rows × block_columns`` tile of y and loops along K.  Programs are numbered so that
``group_rows`` row tiles share the columns they pass over while those are still in the L2 cache.  2·M·N·K FLOPs; W is read
once per group of row tiles, x once per column tile, mostly from L2.

Few rows (a single small image) give too few tiles for a whole GPU.  Then K is split into ``split`` parts: programs write
fp32 partial sums to a workspace ``[split, M, N]``, and a second kernel adds them in a fixed order and applies the
epilogue.  There are no atomics, so the result does not depend on timing.

A configuration can also select the vendor's library instead (:mod:`.vendor`).

The bits of a row depend on the configuration (above all on ``split``), never on the other rows.
"""

from typing import Any

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_matrix, check_rows, checked_output
from ..runtime.device_functions import activate
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import allocate_workspace, launch
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear_config import (
    EPILOGUES,
    GATED,
    LinearConfig,
    count_parts,
    default_config,
    epilogue_passes,
    part_length,
)
from .tiles import accumulate, can_use_descriptors, column_parts, first_row_and_column, store_zeros
from .torch_reference import linear_reference
from .vendor import can_use_vendor_gemm, launch_vendor_gemm

REDUCE_ROWS, REDUCE_COLUMNS = 4, 256
"""Tile of a program that adds partial sums."""


def interleave_gated(tensor: torch.Tensor) -> torch.Tensor:
    """Reorders a weight ``[N, K]`` or bias ``[N]``: ``[gate; up]`` → gate 0, up 0, gate 1, up 1, …"""
    if tensor.dim() < 1 or tensor.shape[0] % 2:
        raise ValueError(f"tensor must be [gate; up] with an even number of rows, got shape {tuple(tensor.shape)}")
    gate, up = tensor.chunk(2)
    return torch.stack((gate, up), 1).flatten(0, 1)


def prepare_gates(
    weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
    """Weight, bias and activation as the kernel reads them; copies the weight of ``silu_gated``."""
    if activation != "silu_gated":
        return weight, bias, activation
    return interleave_gated(weight), None if bias is None else interleave_gated(bias), "silu_gated_interleaved"


@triton.jit
def _finish(
    total, bias_ptr, residual_ptr, out_ptr, first_row, first_column, rows, columns, stride_rm, stride_om,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bias, activation, residual and the one rounding, for a tile of fp32 sums.
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    if ACTIVATION == "silu_gated_interleaved":
        if bias_ptr is not None:
            pair = 2 * first_column + tl.arange(0, 2 * BLOCK_COLUMNS)
            total += tl.load(bias_ptr + pair, mask=pair < 2 * columns, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(total, [BLOCK_ROWS, BLOCK_COLUMNS, 2]))
        y = activate(gate, "silu") * up
    else:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        y = activate(total, ACTIVATION)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row_offset = row.to(tl.int64)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row_offset * stride_rm + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset * stride_om + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, valid_count_ptr, rows, columns, inner,
    stride_xm, stride_wn, stride_rm, stride_om,
    ACTIVATION: tl.constexpr, IS_EVEN_K: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, PAIRED: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of out.  `columns` counts out's columns, each of which takes PAIRED adjacent
    # rows of weight (2 if gated).
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        store_zeros(out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = accumulate(
        x_ptr, weight_ptr, first_row, PAIRED * first_column, 0, inner, rows, PAIRED * columns, stride_xm, stride_wn,
        IS_EVEN_K, HAS_DESCRIPTORS, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    totals = column_parts(total, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS, PASSES)
    for index in tl.static_range(PASSES):
        _finish(
            totals[index], bias_ptr, residual_ptr, out_ptr, first_row,
            first_column + index * (BLOCK_COLUMNS // PASSES), rows, columns, stride_rm, stride_om,
            ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS // PASSES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _partial_kernel(
    x_ptr, weight_ptr, partial_ptr, valid_count_ptr, rows, columns, inner, per_part, stride_xm, stride_wn,
    IS_EVEN_K: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one tile of one part's sums: partial[part, rows, columns], over K from part × per_part, whole blocks.  A tile
    # without valid rows is not written, and not read later.
    part = tl.program_id(1)
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        return
    begin = part * per_part
    end = min(begin + per_part, inner)
    total = accumulate(
        x_ptr, weight_ptr, first_row, first_column, begin, end, rows, columns, stride_xm, stride_wn,
        IS_EVEN_K, HAS_DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    partial_row = part.to(tl.int64) * rows + row
    tl.store(partial_ptr + partial_row[:, None] * columns + column[None, :], total, mask=inside)


@triton.jit
def add_parts(
    partial_ptr, first_row, first_column, rows, columns, parts, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """The sum of one tile of partial sums ``[parts, rows, columns]``, first part first."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for part in tl.range(0, parts):
        offset = (row.to(tl.int64) + part * rows)[:, None] * columns + column[None, :]
        total += tl.load(partial_ptr + offset, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "parts"])
def _reduce_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, valid_count_ptr, rows, columns, parts, stride_rm, stride_om,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of out: adds its partial sums, first part first, and finishes it.
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        store_zeros(out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = add_parts(
        partial_ptr, first_row, PAIRED * first_column, rows, PAIRED * columns, parts, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS
    )
    _finish(
        total, bias_ptr, residual_ptr, out_ptr, first_row, first_column, rows, columns, stride_rm, stride_om,
        ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


def choose_config(
    rows: int,
    columns: int,
    inner: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    residual: bool,
    device: torch.device,
) -> LinearConfig:
    """The tuned configuration of the matmul on ``device``, or the default one."""
    constants = {"columns": columns, "inner": inner, "activation": activation, "residual": residual}
    found = lookup(LinearConfig, "gemm.linear", device, dtype, constants, {"rows": rows})
    architecture = configs.architecture(device)
    return found or default_config(rows, columns, inner, dtype=dtype, activation=activation, architecture=architecture)


def make_operands(
    x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, paired: int = 1
) -> tuple[Any, Any, bool]:
    """The kernel's x and W, and whether they are descriptors; ``paired``: weight rows for each column."""
    has_engine = configs.architecture(x.device) in ("sm_90", "sm_100", "interpreter")
    if config.operands == "pointers" or not has_engine or not can_use_descriptors(x, weight):
        return x, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    def block(matrix: torch.Tensor, rows: int) -> Any:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, config.block_inner])

    return block(x, config.block_rows), block(weight, paired * config.block_columns), True


def tile_grid(rows: int, columns: int, config: LinearConfig) -> tuple[int, ...]:
    """The grid of one program for each tile, and for each part of K if there are several."""
    return (triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_columns),)


def loop_options(config: LinearConfig, inner: int) -> dict[str, Any]:
    """Constants of a tile's loop along a K of ``inner``, and options of its launch."""
    return {
        "IS_EVEN_K": inner % config.block_inner == 0,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_INNER": config.block_inner,
        "GROUP_ROWS": config.group_rows,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def compute_partial_sums(
    x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, valid_count: torch.Tensor | None = None
) -> torch.Tensor | None:
    """fp32 ``[parts, M, N]``, whose sum over the parts is ``x Wᵀ``; ``None`` if K is not split."""
    (rows, inner), columns = x.shape, weight.shape[0]
    parts = count_parts(inner, config)
    if parts == 1:
        return None
    partial = allocate_workspace((parts, rows, columns), torch.float32, x.device)
    left, right, described = make_operands(x, weight, config)
    launch(_partial_kernel, (*tile_grid(rows, columns, config), parts),
        left, right, partial, valid_count, rows, columns, inner, part_length(inner, config), x.stride(0), weight.stride(0),
        HAS_DESCRIPTORS=described, **loop_options(config, inner),
    )  # fmt: skip
    return partial


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
    config: LinearConfig,
    valid_count: torch.Tensor | None = None,
) -> None:
    """``out = f(x Wᵀ + b) + r`` for validated, non-empty tensors; ``activation`` is not ``silu_gated``."""
    if config.vendor and can_use_vendor_gemm(x, activation):
        launch_vendor_gemm(x, weight, bias, residual, out, activation)
        return
    (rows, inner), columns = x.shape, out.shape[1]
    stride_rm = 0 if residual is None else residual.stride(0)
    kind = activation or "none"
    paired = 2 if activation == "silu_gated_interleaved" else 1
    partial = compute_partial_sums(x, weight, config, valid_count)
    if partial is None:
        left, right, described = make_operands(x, weight, config, paired)
        architecture = configs.architecture(x.device)
        passes = epilogue_passes(config, activation, architecture, residual=residual is not None)
        launch(_linear_kernel, tile_grid(rows, columns, config),
            left, right, bias, residual, out, valid_count, rows, columns, inner,
            x.stride(0), weight.stride(0), stride_rm, out.stride(0),
            ACTIVATION=kind, HAS_DESCRIPTORS=described, PAIRED=paired, PASSES=passes, **loop_options(config, inner),
        )  # fmt: skip
        return
    launch(_reduce_kernel, (triton.cdiv(rows, REDUCE_ROWS), triton.cdiv(columns, REDUCE_COLUMNS)),
        partial, bias, residual, out, valid_count, rows, columns, partial.shape[0], stride_rm, out.stride(0),
        ACTIVATION=kind, PAIRED=paired, BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLUMNS=REDUCE_COLUMNS, num_warps=4,
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
    valid_rows: ValidRows | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``: ``torch.nn.functional.linear``, an activation, and an addition, with one rounding.

    (The CPU reference also rounds before ``quick_gelu``, before the multiplication of a gated activation, and between an
    activation and a residual, as transformers does.)

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16; any row stride, last stride 1.
        weight: ``[N, K]`` of x's dtype; any row stride (padded to 16 elements, rows load faster).
        bias: ``[N]``.
        activation: one of :data:`EPILOGUES`; the gated ones halve the columns.  Where kernels run, ``silu_gated`` copies
            the weight in every call.
        residual: ``[M, N]`` (``[M, N/2]`` if gated), added after the activation; any row stride.
        out: output, shaped like the result; may be ``residual`` itself, and must not overlap ``x``.
        config: launch configuration; by default the tuned one for the shape and the device, or a safe one.
        valid_rows: planned rows, for which the configuration is selected, and valid rows.  Kernels write zeros in tiles
            without valid rows; the CPU reference and the vendor's library compute them.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: an unknown activation; wrong shapes; elements of a row that are not adjacent.
        TypeError: dtypes or devices that differ, or an unsupported dtype.
    """
    if activation is not None and activation not in EPILOGUES:
        raise ValueError(f"activation must be one of {', '.join(EPILOGUES)}, or None, got {activation!r}")
    check_float("x", x)
    check_matrix("x", x)
    rows, inner = x.shape
    check_rows("weight", weight, (*weight.shape[:1], inner), x)
    columns = weight.shape[0]
    check_rows("bias", bias, (columns,), x)
    if activation in GATED:
        if columns % 2:
            raise ValueError(f"weight must have an even number of rows for {activation}, got {columns}")
        columns //= 2
    check_rows("residual", residual, (rows, columns), x)
    out = checked_output(out, (rows, columns), x)
    valid_count = get_valid_count(valid_rows, x.device)
    if not out.numel():
        return out
    if not runs_kernel(x):
        return linear_reference(x, weight, bias, activation, residual, out)
    weight, bias, activation = prepare_gates(weight, bias, activation)
    if config is None:
        config = choose_config(
            planned_rows(valid_rows, rows), columns, inner,
            dtype=x.dtype, activation=activation, residual=residual is not None, device=x.device,
        )  # fmt: skip
    launch_linear(x, weight, bias, residual, out, activation, config, valid_count)
    return out
