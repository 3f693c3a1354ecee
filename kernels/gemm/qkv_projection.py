"""Projection to queries, keys and values, with the rotary position embedding in its epilogue: ``y = R(x Wᵀ + b)``.

Shapes: ``x [M, K]``, ``W [3·H·hd, K]`` (q's rows, then k's, then v's, head after head), ``b [3·H·hd]``, y ``[M, 3·H·hd]``;
cosines and sines ``[M, hd/2]`` fp32.  R rotates each head of q and k by its row's angles and leaves v alone.

The two values that a rotation mixes stand side by side: row 2i of a head of W is the published row i, and row 2i + 1 the
published row i + hd/2 (:func:`reorder_heads`).  Both are then in the same thread, and the rotation costs no exchange and
no pass over memory of its own, which :mod:`.rope` needs.  Attention does not notice: ``q·kᵀ`` is a sum over the columns
of a head, q and k have the same order of columns, and v keeps its own.

Heads may be wider than they count (``padded_head_dim``: 80 for 72), so that attention finds whole blocks.  The padding's
weight rows are zeros and it is not rotated; what it holds is what the bias says.

q may be scaled on the way (``query_scale``).  What attention would multiply every score by, it multiplies q by, once, and
before q is rounded, so that it costs no accuracy; :mod:`.attention_fixed` saves a fifth of its loop by it.

Sums, bias, rotation and scaling are fp32; there is one rounding, at the store.  (The CPU reference rounds the product as
well, as transformers does.)

One program owns one ``block_rows × block_columns`` tile of y, as in :mod:`.linear`, and reads the angles' cosines and
sines of its rows.  2·M·N·K FLOPs with N = 3·H·hd, and 3 for each value of q and k; moves x, W and y once, and the tables
mostly from the L2 cache.  Few rows split K as they do in :mod:`.linear`; the kernel that adds up the parts rotates.
"""

import math
from dataclasses import replace

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear import (
    REDUCE_COLUMNS,
    REDUCE_ROWS,
    LinearConfig,
    add_parts,
    check_matrix,
    describe,
    launch_linear,
    operand_types,
    operands,
    partial_sums,
    walk,
)
from .linear import default_config as linear_config
from .linear_config import epilogue_passes
from .tiles import accumulate, column_parts, first_row_and_column, store_zeros
from .torch_reference import linear_reference

__all__ = [
    "choose_config",
    "compile_specs",
    "default_config",
    "launch_qkv_projection",
    "qkv_projection",
    "qkv_projection_reference",
    "reorder_heads",
]


def reorder_heads(
    tensor: torch.Tensor,
    *,
    heads: int,
    head_dim: int,
    padded_head_dim: int | None = None,
    pairs: bool = False,
    ones: bool = False,
) -> torch.Tensor:
    """The weight ``[3·H·hd, K]`` or bias ``[3·H·hd]`` of a fused projection, in the order that this file's kernels want.

    Args:
        tensor: rows of q, k and v one below the other, head after head, each head in the published order.
        heads: H.
        head_dim: hd.
        padded_head_dim: rows that a head gets; those beyond ``head_dim`` are zeros.  ``None``: as many as it has.
        pairs: for q and k, row 2i ← row i and row 2i + 1 ← row i + hd/2 of each head.
        ones: puts 1 into the first padding row of each head of k and v (of a bias: the columns then hold ones).

    Returns:
        A new contiguous tensor with ``3·H·padded_head_dim`` rows.

    Raises:
        ValueError: rows that are not ``3·H·hd``, an odd ``head_dim`` with ``pairs``, a ``padded_head_dim`` that is too
            small, ``ones`` without padding or for a weight.
    """
    padded = head_dim if padded_head_dim is None else padded_head_dim
    if tensor.dim() not in (1, 2) or heads < 1 or head_dim < 1 or tensor.shape[0] != 3 * heads * head_dim:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}; with {heads} heads of {head_dim} it has to be "
            f"[{3 * heads * head_dim}, K] or [{3 * heads * head_dim}]"
        )
    if pairs and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; pairs need an even one")
    if padded < head_dim:
        raise ValueError(f"padded_head_dim is {padded}; it has to be at least head_dim, {head_dim}")
    if ones and (padded == head_dim or tensor.dim() != 1):
        raise ValueError(
            f"ones go into the padding of a bias; tensor has shape {tuple(tensor.shape)}, head_dim is {head_dim} and "
            f"padded_head_dim {padded}"
        )
    parts = tensor.reshape(3, heads, head_dim, *tensor.shape[1:])
    if pairs:
        halves = parts[:2].unflatten(2, (2, head_dim // 2))
        parts = torch.cat((halves.transpose(2, 3).flatten(2, 3), parts[2:]))
    arranged = tensor.new_zeros(3, heads, padded, *tensor.shape[1:])
    arranged[:, :, :head_dim] = parts
    if ones:
        arranged[1:, :, head_dim] = 1
    return arranged.flatten(0, 2)


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
    turned = out[:, : 2 * heads * padded].unflatten(1, (2 * heads, padded))[..., :head_dim].unflatten(-1, (-1, 2))
    # Products and sums are separate, each exactly rounded: a fused one would depend on where the row stands.
    first, second = turned.to(torch.float32, copy=True).unbind(-1)
    cosine, sine = cosines.unsqueeze(1), sines.unsqueeze(1)
    results = (first * cosine - second * sine, second * cosine + first * sine)
    for place, result in enumerate(results):
        if query_scale != 1:
            result[:, :heads] *= query_scale
        turned[..., place] = result
    return out


@triton.jit
def _finish(
    total, BIAS, COSINES, SINES, OUT, first_row, first_column, rows, columns, pairs, query_scale,
    cosines_stride, sines_stride, out_stride,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bias, rotation, scaling and the one rounding, for a tile of fp32 sums.  The first `pairs` pairs of columns are q's and
    # k's, so the first `pairs` columns are q's.
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_offset = row.to(tl.int64)[:, None]
    if BIAS is not None:
        total += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if COSINES is not None:
        # Tiles begin at even columns, so a pair never lies across two of them, nor do UNIT neighbors lie across two heads.
        pair = first_column // 2 + tl.arange(0, BLOCK_COLUMNS // 2)
        place = tl.max_contiguous(tl.multiple_of(pair % (PADDED // 2), UNIT), UNIT)
        turns = (pair < pairs) & (place < HEAD_DIM // 2)
        inside = (row < rows)[:, None] & turns[None, :]
        cosine = tl.load(COSINES + row_offset * (cosines_stride * UNIT) + place[None, :], mask=inside, other=1.0)
        sine = tl.load(SINES + row_offset * (sines_stride * UNIT) + place[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(total, [BLOCK_ROWS, BLOCK_COLUMNS // 2, 2]))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        total = tl.reshape(turned, [BLOCK_ROWS, BLOCK_COLUMNS])
    if query_scale is not None:
        total *= tl.where(column < pairs, query_scale, 1.0)[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(OUT + row_offset * out_stride + column[None, :], total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _qkv_projection_kernel(
    X, WEIGHT, BIAS, COSINES, SINES, OUT, LIVE, rows, columns, pairs, inner, query_scale,
    x_stride, weight_stride, cosines_stride, sines_stride, out_stride,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT.  Strides of the tables come in units of UNIT elements: what the
    # compiler can so prove about addresses is how wide its loads get.
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if LIVE is not None and first_row >= tl.load(LIVE):
        store_zeros(OUT, first_row, first_column, rows, columns, out_stride, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total, _ = accumulate(
        X, WEIGHT, first_row, first_column, 0, inner, rows, columns, x_stride, weight_stride, 0,
        False, EVEN, DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    totals = column_parts(total, BLOCK_ROWS, BLOCK_COLUMNS, PASSES)
    for index in tl.static_range(PASSES):
        _finish(
            totals[index], BIAS, COSINES, SINES, OUT, first_row, first_column + index * (BLOCK_COLUMNS // PASSES),
            rows, columns, pairs, query_scale, cosines_stride, sines_stride, out_stride, HEAD_DIM, PADDED, UNIT,
            BLOCK_ROWS, BLOCK_COLUMNS // PASSES,
        )  # fmt: skip


@triton.jit
def _qkv_reduce_kernel(
    PARTIAL, BIAS, COSINES, SINES, OUT, LIVE, rows, columns, pairs, parts, query_scale,
    cosines_stride, sines_stride, out_stride,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT: adds its partial sums, first part first, and finishes it.
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if LIVE is not None and first_row >= tl.load(LIVE):
        store_zeros(OUT, first_row, first_column, rows, columns, out_stride, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = add_parts(PARTIAL, first_row, first_column, rows, columns, columns, parts, BLOCK_ROWS, BLOCK_COLUMNS)
    _finish(
        total, BIAS, COSINES, SINES, OUT, first_row, first_column, rows, columns, pairs, query_scale,
        cosines_stride, sines_stride, out_stride, HEAD_DIM, PADDED, UNIT, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


def default_config(rows: int, columns: int, inner: int, *, dtype: torch.dtype, architecture: str) -> LinearConfig:
    """A safe configuration for y ``[rows, columns]`` and K = ``inner``: that of :mod:`.linear`, but no tile of 128 × 256.

    The rotation's tables take more registers than a residual does.
    """
    config = linear_config(rows, columns, inner, dtype=dtype, activation=None, residual=True, architecture=architecture)
    return replace(config, block_columns=min(config.block_columns, 128))


def choose_config(
    rows: int, columns: int, inner: int, *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> LinearConfig:
    """The tuned configuration of such a projection on ``device``, or the default one."""
    constants = {"columns": columns, "inner": inner, "head_dim": head_dim}
    found = lookup(LinearConfig, "gemm.qkv_projection", device, dtype, constants, {"rows": rows})
    return found or default_config(rows, columns, inner, dtype=dtype, architecture=configs.architecture(device))


@on_device_of_first
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
    live: torch.Tensor | None = None,
) -> None:
    """``out = R(x Wᵀ + b)`` for validated, non-empty tensors; zeros in tiles of rows at or beyond ``live``.

    ``config.vendor`` counts only where nothing is rotated or scaled.
    """
    rotated = cosines is not None and sines is not None
    if not rotated and query_scale == 1:
        launch_linear(x, weight, bias, None, out, None, config, live)
        return
    (rows, inner), columns = x.shape, out.shape[1]
    pairs = columns // 3
    apart = [0 if table is None else table.stride(0) for table in (cosines, sines)]
    heads = _heads(head_dim, padded_head_dim, *apart)
    strides = (*(stride // heads["UNIT"] for stride in apart), out.stride(0))
    scale = None if query_scale == 1 else query_scale
    partial = partial_sums(x, weight, config, live)
    if partial is None:
        left, right, described = operands(x, weight, config)
        passes = epilogue_passes(config, None, configs.architecture(x.device), rotation=rotated)
        _qkv_projection_kernel[(triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_columns),)](
            left, right, bias, cosines, sines, out, live, rows, columns, pairs, inner, scale,
            x.stride(0), weight.stride(0), *strides,
            DESCRIPTORS=described, PASSES=passes, **heads, **walk(config, even=inner % config.block_inner == 0),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return
    _qkv_reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS), triton.cdiv(columns, REDUCE_COLUMNS))](
        partial, bias, cosines, sines, out, live, rows, columns, pairs, partial.shape[0], scale, *strides,
        **heads, BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLUMNS=REDUCE_COLUMNS, num_warps=4,
    )  # fmt: skip


def _heads(head_dim: int, padded: int, *strides: int) -> dict[str, int]:
    """The constants of the heads; UNIT: how many neighbors of a table are read at once, 16 bytes at most."""
    return {"HEAD_DIM": head_dim, "PADDED": padded, "UNIT": math.gcd(4, head_dim // 2, padded // 2, *strides)}


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: heads of 64, 72 as 80 (q scaled, with and without rotation), and 80 in bf16; fp16 and fp32;
    the sum of a split K.

    (The partial sums of a split K are :mod:`.linear`'s.)
    """
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16

    def config(dtype: torch.dtype) -> LinearConfig:
        return default_config(16384, 3840, 1280, dtype=dtype, architecture=architecture)

    return [
        _compile_spec(bf16, 64, 64, config(bf16), architecture),
        _compile_spec(bf16, 72, 80, config(bf16), architecture, scaled=True),
        _compile_spec(bf16, 72, 80, config(bf16), architecture, scaled=True, rotated=False),
        _compile_spec(bf16, 80, 80, config(bf16), architecture),
        _compile_spec(bf16, 80, 80, config(bf16), architecture, live=True),
        _compile_spec(fp16, 80, 80, config(fp16), architecture),
        _compile_spec(fp32, 80, 80, config(fp32), architecture),
        _reduce_spec(bf16, 72, 80),
    ]


def _head(element: str, head_dim: int, padded: int) -> str:
    return f"{element} head_dim {head_dim}" + ("" if padded == head_dim else f" of {padded}")


def _compile_spec(
    dtype: torch.dtype,
    head_dim: int,
    padded: int,
    config: LinearConfig,
    architecture: str,
    *,
    live: bool = False,
    scaled: bool = False,
    rotated: bool = True,
) -> CompileSpec:
    element = TRITON_TYPES[dtype]
    types, described = operand_types(element, element, config)
    arguments = types | dict.fromkeys(("BIAS", "OUT"), f"*{element}") | dict.fromkeys(("COSINES", "SINES"), "*fp32")
    arguments |= {"LIVE": "*i32", "query_scale": "fp32"}
    optional = {"LIVE": live, "query_scale": scaled, "COSINES": rotated, "SINES": rotated}
    absent = [name for name, present in optional.items() if not present]
    strides = ("x_stride", "weight_stride", "out_stride")
    said = [word for word, so in (("scaled", scaled), ("not rotated", not rotated), ("live", live)) if so]
    return CompileSpec(
        name=" ".join(["qkv_projection", _head(element, head_dim, padded), *said, describe(config)]),
        kernel=_qkv_projection_kernel,
        signature={name: kind for name, kind in arguments.items() if name not in absent}
        | dict.fromkeys(("rows", "columns", "pairs", "inner", "cosines_stride", "sines_stride", *strides), "i32"),
        constants={
            **dict.fromkeys(absent),
            **_heads(head_dim, padded),
            "PASSES": epilogue_passes(config, None, architecture, rotation=rotated),
            **described,
            **walk(config, even=True),
        },
        # Rows of the tables have 9 or 10 units.
        divisible_by_16=("columns", "pairs", "inner", *strides),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_rows * config.block_columns,
    )


def _reduce_spec(dtype: torch.dtype, head_dim: int, padded: int) -> CompileSpec:
    element = TRITON_TYPES[dtype]
    pointers = dict.fromkeys(("BIAS", "OUT"), f"*{element}") | dict.fromkeys(("PARTIAL", "COSINES", "SINES"), "*fp32")
    sizes = ("rows", "columns", "pairs", "parts", "cosines_stride", "sines_stride", "out_stride")
    return CompileSpec(
        name=f"qkv_projection reduce {_head(element, head_dim, padded)} scaled live {REDUCE_ROWS}x{REDUCE_COLUMNS}",
        kernel=_qkv_reduce_kernel,
        signature=pointers | {"LIVE": "*i32", "query_scale": "fp32"} | dict.fromkeys(sizes, "i32"),
        constants={
            **_heads(head_dim, padded),
            "BLOCK_ROWS": REDUCE_ROWS,
            "BLOCK_COLUMNS": REDUCE_COLUMNS,
        },
        divisible_by_16=("columns", "pairs", "out_stride"),
        num_warps=4,
        num_stages=1,
        tensor_core=False,
        elements=REDUCE_ROWS * REDUCE_COLUMNS,
    )


def _validate_heads(heads: int, head_dim: int, padded: int, tables: bool, query_scale: float) -> None:
    if heads < 1 or head_dim < 1 or padded < head_dim:
        raise ValueError(
            f"heads is {heads}, head_dim {head_dim} and padded_head_dim {padded}; there has to be a head, with at least "
            "one column, and the padding comes on top"
        )
    if tables and (head_dim % 2 or padded % 2):
        raise ValueError(f"head_dim is {head_dim} and padded_head_dim {padded}; to be rotated they have to be even")
    if not torch.finfo(torch.float32).tiny <= query_scale < math.inf:
        raise ValueError(f"query_scale must be a positive, finite fp32 number, got {query_scale}")


def _validate_table(name: str, table: torch.Tensor, x: torch.Tensor, head_dim: int) -> None:
    if table.dtype != torch.float32 or table.device != x.device:
        raise TypeError(f"{name} is {table.dtype} on {table.device}; it has to be torch.float32 on {x.device}")
    expected = (x.shape[0], head_dim // 2)
    if tuple(table.shape) != expected or (table.numel() and expected[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(table.shape)} and strides {table.stride()}; x has {tuple(x.shape)} and head_dim is "
            f"{head_dim}, so it has to be {expected} with last stride 1"
        )


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
        x: ``[M, K]`` float32, float16 or bfloat16; rows any distance apart, last stride 1.
        weight: ``[3·H·hd, K]`` of x's dtype (hd: ``padded_head_dim``), as :func:`reorder_heads` orders it with
            ``pairs``; rows any distance apart.
        bias: ``[3·H·hd]``, in the same order.
        cosines: ``[M, head_dim/2]`` float32, cosine of each row's angles; ``None``, and ``sines`` too: no rotation.
        sines: ``[M, head_dim/2]`` float32, sine of each row's angles.
        heads: H, of each of q, k and v.
        head_dim: columns of a head that count.
        padded_head_dim: columns that a head has; ``None``: as many as count.
        query_scale: what q is multiplied by, after the rotation; ``scale · log2 e`` for an attention that is told of it
            (``queries_scaled``).
        out: where to write, ``[M, 3·H·hd]``; rows any distance apart; must not overlap ``x``.
        config: how to launch the kernel; by default the tuned or a safe one for the shape and the device.
        valid_rows: for how many rows the configuration is chosen, and how many count: kernels write zeros (the CPU
            reference the rows' values) where a whole tile of rows lies beyond them.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: shapes that do not fit, one table without the other, odd heads to be rotated, a scale that is not a
            positive number, elements of a row that are not adjacent.
        TypeError: dtypes or devices that do not fit.
    """
    padded = head_dim if padded_head_dim is None else padded_head_dim
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; this operation takes float32, float16 and bfloat16")
    check_matrix("x", x, x, (None, None), "it has to be [M, K]")
    rows, inner = x.shape
    if not inner:
        raise ValueError(f"x has shape {(rows, inner)}; it has to be [M, K] with K at least 1")
    if (cosines is None) != (sines is None):
        raise ValueError("one of cosines and sines is missing; a rotation takes both, and none takes neither")
    _validate_heads(heads, head_dim, padded, cosines is not None, query_scale)
    columns = 3 * heads * padded
    text = f"x has {tuple(x.shape)} and there are 3 times {heads} heads of {padded} columns, so it has to be"
    check_matrix("weight", weight, x, (columns, inner), f"{text} [{columns}, {inner}]")
    if bias is not None:
        check_matrix("bias", bias, x, (columns,), f"{text} [{columns}]")
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table is not None:
            _validate_table(name, table, x, head_dim)
    if out is not None:
        check_matrix("out", out, x, (rows, columns), f"{text} [{rows}, {columns}]")
    live = get_valid_count(valid_rows, x.device)
    if out is None:
        out = x.new_empty(rows, columns)
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
    launch_qkv_projection(x, weight, bias, cosines, sines, out, config, **shape, query_scale=query_scale, live=live)
    return out
