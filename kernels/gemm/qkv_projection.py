"""Projection to queries, keys and values, with the rotary position embedding in its epilogue: ``y = R(x Wᵀ + b)``.

Shapes: ``x [M, K]``, ``W [3·H·hd, K]`` (q's rows, then k's, then v's, head after head), ``b [3·H·hd]``, y ``[M, 3·H·hd]``;
cosines and sines ``[M, hd/2]`` fp32.  R rotates each head of q and k by its row's angles and does not change v.

The two values that a rotation mixes are adjacent: row 2i of a head of W is the published row i, and row 2i + 1 the
published row i + hd/2 (:func:`reorder_heads`).  Both are then in the same thread, so the rotation needs no exchange
between threads and no separate pass over memory, as :mod:`.rope` does.  Attention gives the same result: ``q·kᵀ`` is a sum
over the columns of a head, q and k have the same order of columns, and v keeps its own.

Heads may be padded (``padded_head_dim``: 80 for 72), so that attention reads whole blocks.  The padding's weight rows are
zeros and it is not rotated; its values come from the bias.

q may be scaled (``query_scale``) by the factor that attention would multiply every score by.  This happens once, before q
is rounded, so it costs no accuracy; it saves :mod:`.fixed_max` a fifth of its loop.

Sums, bias, rotation and scaling are fp32; there is one rounding, at the store.  (The CPU reference also rounds before the
rotation, as transformers does.)

One program owns one ``block_rows × block_columns`` tile of y, as in :mod:`.linear`, and reads the cosines and sines of its
rows.  2·M·N·K FLOPs with N = 3·H·hd, and 3 for each value of q and k; moves x, W and y once, and the tables mostly from
the L2 cache.  Few rows split K as in :mod:`.linear`; the kernel that adds the parts rotates.
"""

import math
from dataclasses import replace

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_matrix, check_rows, check_tensor, checked_output
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear import (
    REDUCE_COLUMNS,
    REDUCE_ROWS,
    add_parts,
    compute_partial_sums,
    launch_linear,
    loop_options,
    make_operands,
    tile_grid,
)
from .linear_config import LinearConfig, epilogue_passes
from .linear_config import default_config as linear_config
from .tiles import accumulate, column_parts, first_row_and_column, store_zeros
from .torch_reference import linear_reference


def reorder_heads(
    tensor: torch.Tensor,
    *,
    heads: int,
    head_dim: int,
    padded_head_dim: int | None = None,
    pairs: bool = False,
    ones: bool = False,
) -> torch.Tensor:
    """Reorders the weight ``[3·H·hd, K]`` or bias ``[3·H·hd]`` of a fused projection for this file's kernels.

    Args:
        tensor: rows of q, then k, then v, head after head, each head in the published order.
        heads: H.
        head_dim: hd.
        padded_head_dim: rows of a head afterwards; those after ``head_dim`` are zeros.  ``None``: no padding.
        pairs: for q and k, row 2i ← row i and row 2i + 1 ← row i + hd/2 of each head.
        ones: sets the first padding row of each head of k and v to 1 (in a bias: these columns are then ones).
    """
    padded = head_dim if padded_head_dim is None else padded_head_dim
    if tensor.dim() not in (1, 2) or heads < 1 or head_dim < 1 or tensor.shape[0] != 3 * heads * head_dim:
        raise ValueError(
            f"tensor must have {3 * heads * head_dim} rows for {heads} heads of {head_dim}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if pairs and head_dim % 2:
        raise ValueError(f"head_dim must be even for pairs, got {head_dim}")
    if padded < head_dim:
        raise ValueError(f"padded_head_dim must be at least head_dim, {head_dim}, got {padded}")
    if ones and (padded == head_dim or tensor.dim() != 1):
        raise ValueError(
            f"tensor must be a bias with padding for ones, got shape {tuple(tensor.shape)} with head_dim {head_dim} and "
            f"padded_head_dim {padded}"
        )
    parts = tensor.reshape(3, heads, head_dim, *tensor.shape[1:])
    if pairs:
        halves = parts[:2].unflatten(2, (2, head_dim // 2))
        parts = torch.cat((halves.transpose(2, 3).flatten(2, 3), parts[2:]))
    reordered = tensor.new_zeros(3, heads, padded, *tensor.shape[1:])
    reordered[:, :, :head_dim] = parts
    if ones:
        reordered[1:, :, head_dim] = 1
    return reordered.flatten(0, 2)


def qkv_projection_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    *,
    heads: int,
    head_dim: int,
    padded_head_dim: int | None = None,
    query_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``R(x Wᵀ + b)``, rounded before the rotation and after it; on the CPU a row's bits do not depend on the others."""
    padded = head_dim if padded_head_dim is None else padded_head_dim
    out = linear_reference(x, weight, bias, None, None, out)
    if cosines is None or sines is None:
        if query_scale != 1:
            out[:, : heads * padded] *= query_scale
        return out
    rotated = out[:, : 2 * heads * padded].unflatten(1, (2 * heads, padded))[..., :head_dim].unflatten(-1, (-1, 2))
    # Multiplications and additions are separate, each exactly rounded: a fused one would depend on the row's place.
    first, second = rotated.to(torch.float32, copy=True).unbind(-1)
    cosine, sine = cosines.unsqueeze(1), sines.unsqueeze(1)
    results = (first * cosine - second * sine, second * cosine + first * sine)
    for place, result in enumerate(results):
        if query_scale != 1:
            result[:, :heads] *= query_scale
        rotated[..., place] = result
    return out


@triton.jit
def _finish(
    total, bias_ptr, cos_ptr, sin_ptr, out_ptr, first_row, first_column, rows, columns, pairs, query_scale,
    stride_cm, stride_sm, stride_om,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bias, rotation, scaling and the one rounding, for a tile of fp32 sums.  The first `pairs` pairs of columns are q's
    # and k's, so the first `pairs` columns are q's.
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_offset = row.to(tl.int64)[:, None]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if cos_ptr is not None:
        # Tiles begin at even columns, so a pair is never split between two, nor are UNIT neighbors between two heads.
        pair = first_column // 2 + tl.arange(0, BLOCK_COLUMNS // 2)
        place = tl.max_contiguous(tl.multiple_of(pair % (PADDED // 2), UNIT), UNIT)
        is_rotated = (pair < pairs) & (place < HEAD_DIM // 2)
        inside = (row < rows)[:, None] & is_rotated[None, :]
        cosine = tl.load(cos_ptr + row_offset * (stride_cm * UNIT) + place[None, :], mask=inside, other=1.0)
        sine = tl.load(sin_ptr + row_offset * (stride_sm * UNIT) + place[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(total, [BLOCK_ROWS, BLOCK_COLUMNS // 2, 2]))
        rotated = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        total = tl.reshape(rotated, [BLOCK_ROWS, BLOCK_COLUMNS])
    if query_scale is not None:
        total *= tl.where(column < pairs, query_scale, 1.0)[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row_offset * stride_om + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _qkv_projection_kernel(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr, valid_count_ptr, rows, columns, pairs, inner, query_scale,
    stride_xm, stride_wn, stride_cm, stride_sm, stride_om,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, IS_EVEN_K: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of out.  Strides of the tables are in units of UNIT elements, so that the
    # compiler can prove the alignment of wide loads.
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        store_zeros(out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = accumulate(
        x_ptr, weight_ptr, first_row, first_column, 0, inner, rows, columns, stride_xm, stride_wn,
        IS_EVEN_K, HAS_DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    totals = column_parts(total, BLOCK_ROWS, BLOCK_COLUMNS, PASSES)
    for index in tl.static_range(PASSES):
        _finish(
            totals[index], bias_ptr, cos_ptr, sin_ptr, out_ptr, first_row, first_column + index * (BLOCK_COLUMNS // PASSES),
            rows, columns, pairs, query_scale, stride_cm, stride_sm, stride_om, HEAD_DIM, PADDED, UNIT,
            BLOCK_ROWS, BLOCK_COLUMNS // PASSES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts"])
def _qkv_reduce_kernel(
    partial_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr, valid_count_ptr, rows, columns, pairs, parts, query_scale,
    stride_cm, stride_sm, stride_om,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of out: adds its partial sums, first part first, and finishes it.
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        store_zeros(out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = add_parts(partial_ptr, first_row, first_column, rows, columns, parts, BLOCK_ROWS, BLOCK_COLUMNS)
    _finish(
        total, bias_ptr, cos_ptr, sin_ptr, out_ptr, first_row, first_column, rows, columns, pairs, query_scale,
        stride_cm, stride_sm, stride_om, HEAD_DIM, PADDED, UNIT, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


def default_config(rows: int, columns: int, inner: int, *, dtype: torch.dtype, architecture: str) -> LinearConfig:
    """That of :mod:`.linear` without 128 × 256 tiles: the rotation's tables need more registers than a residual."""
    config = linear_config(rows, columns, inner, dtype=dtype, activation=None, architecture=architecture)
    return replace(config, block_columns=min(config.block_columns, 128))


def choose_config(
    rows: int, columns: int, inner: int, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> LinearConfig:
    """The tuned configuration of the projection on ``device``, or the default one."""
    constants = {"columns": columns, "inner": inner, "head_dim": head_dim}
    found = lookup(LinearConfig, "gemm.qkv_projection", device, dtype, constants, {"rows": rows})
    return found or default_config(rows, columns, inner, dtype=dtype, architecture=configs.architecture(device))


def launch_qkv_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    head_dim: int,
    padded_head_dim: int,
    query_scale: float = 1.0,
    valid_count: torch.Tensor | None = None,
) -> None:
    """``out = R(x Wᵀ + b)`` for validated, non-empty tensors; ``vendor`` applies only without rotation and scaling."""
    rotated = cosines is not None and sines is not None
    if not rotated and query_scale == 1:
        launch_linear(x, weight, bias, None, out, None, config, valid_count)
        return
    (rows, inner), columns = x.shape, out.shape[1]
    pairs = columns // 3
    table_strides = [0 if table is None else table.stride(0) for table in (cosines, sines)]
    # Neighbors of a table that are read at once, at most 16 bytes.
    unit = math.gcd(4, head_dim // 2, padded_head_dim // 2, *table_strides)
    heads = {"HEAD_DIM": head_dim, "PADDED": padded_head_dim, "UNIT": unit}
    strides = (*(stride // unit for stride in table_strides), out.stride(0))
    scale = None if query_scale == 1 else query_scale
    partial = compute_partial_sums(x, weight, config, valid_count)
    if partial is None:
        left, right, described = make_operands(x, weight, config)
        passes = epilogue_passes(config, None, configs.architecture(x.device), rotation=rotated)
        launch(_qkv_projection_kernel, tile_grid(rows, columns, config),
            left, right, bias, cosines, sines, out, valid_count, rows, columns, pairs, inner, scale,
            x.stride(0), weight.stride(0), *strides,
            HAS_DESCRIPTORS=described, PASSES=passes, **heads, **loop_options(config, inner),
        )  # fmt: skip
        return
    launch(_qkv_reduce_kernel, (triton.cdiv(rows, REDUCE_ROWS), triton.cdiv(columns, REDUCE_COLUMNS)),
        partial, bias, cosines, sines, out, valid_count, rows, columns, pairs, partial.shape[0], scale, *strides,
        **heads, BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLUMNS=REDUCE_COLUMNS, num_warps=4,
    )  # fmt: skip


def _check_heads(heads: int, head_dim: int, padded: int, is_rotated: bool, query_scale: float) -> None:
    if heads < 1 or head_dim < 1 or padded < head_dim:
        raise ValueError(
            "heads and head_dim must be at least 1 and padded_head_dim at least head_dim, got "
            f"{heads}, {head_dim} and {padded}"
        )
    if is_rotated and (head_dim % 2 or padded % 2):
        raise ValueError(f"head_dim and padded_head_dim must be even for a rotation, got {head_dim} and {padded}")
    if not torch.finfo(torch.float32).tiny <= query_scale < math.inf:
        raise ValueError(f"query_scale must be a positive, finite fp32 number, got {query_scale}")


def qkv_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    *,
    heads: int,
    head_dim: int,
    padded_head_dim: int | None = None,
    query_scale: float = 1.0,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
    valid_rows: ValidRows | None = None,
) -> torch.Tensor:
    """``x Wᵀ + b`` with q and k rotated (transformers: the ``qkv`` layer and ``apply_rotary_pos_emb_vision`` after it).

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16; any row stride, last stride 1.
        weight: ``[3·H·hd, K]`` of x's dtype (hd: ``padded_head_dim``), as :func:`reorder_heads` orders it with ``pairs``;
            any row stride.
        bias: ``[3·H·hd]``, in the same order.
        cosines: ``[M, head_dim/2]`` float32, cosine of each row's angles; ``None``, and ``sines`` too: no rotation.
        sines: ``[M, head_dim/2]`` float32, sine of each row's angles.
        heads: H, of each of q, k and v.
        head_dim: columns of a head without padding.
        padded_head_dim: columns of a head; ``None``: no padding.
        query_scale: factor of q after the rotation; ``scale · log2 e`` for an attention with ``queries_scaled``.
        out: output ``[M, 3·H·hd]``; any row stride; must not overlap ``x``.
        config: launch configuration; by default the tuned one for the shape and the device, or a safe one.
        valid_rows: planned rows, for which the configuration is selected, and valid rows.  Kernels write zeros in tiles
            without valid rows; the CPU reference computes them.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: wrong shapes, one table without the other, odd heads with a rotation, a scale that is not a positive
            number, elements of a row that are not adjacent.
        TypeError: wrong dtypes or devices.
    """
    padded = head_dim if padded_head_dim is None else padded_head_dim
    check_float("x", x)
    check_matrix("x", x)
    rows, inner = x.shape
    if (cosines is None) != (sines is None):
        raise ValueError("cosines and sines must both be given, or neither; got only one of them")
    _check_heads(heads, head_dim, padded, cosines is not None, query_scale)
    columns = 3 * heads * padded
    check_rows("weight", weight, (columns, inner), x)
    check_rows("bias", bias, (columns,), x)
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table is not None:
            check_tensor(name, table, (rows, head_dim // 2), torch.float32, x.device)
    out = checked_output(out, (rows, columns), x)
    valid_count = get_valid_count(valid_rows, x.device)
    if not out.numel():
        return out
    shape = {"head_dim": head_dim, "padded_head_dim": padded}
    if not runs_kernel(x):
        return qkv_projection_reference(
            x, weight, bias, cosines, sines, heads=heads, **shape, query_scale=query_scale, out=out
        )
    if config is None:
        config = choose_config(
            planned_rows(valid_rows, rows), columns, inner, head_dim=head_dim, dtype=x.dtype, device=x.device
        )
    launch_qkv_projection(
        x, weight, bias, cosines, sines, out, config, **shape, query_scale=query_scale, valid_count=valid_count
    )
    return out
