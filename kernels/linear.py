"""Linear layer with its epilogue: ``y = f(x Wᵀ + b) + r``.

Shapes: ``x [M, K]``, ``W [N, K]`` (the layout of ``torch.nn.Linear``), ``b [N]``, ``r`` and ``y [M, N]``.  The activation f
is one of :data:`.elementwise.ACTIVATIONS`, nothing, or ``silu_gated``: W is then ``[gate; up]`` stacked on rows,
``y = silu(x Wᵍᵃᵗᵉᵀ + bᵍᵃᵗᵉ) · (x Wᵘᵖᵀ + bᵘᵖ) + r``, and y has N/2 columns.

Sums, bias, activation and residual are fp32; there is one rounding, at the store.

One program owns one ``block_rows × block_columns`` tile of y and walks along K.  Programs are numbered so that
``group_rows`` row tiles share the columns they pass over while those are still in the L2 cache.  2·M·N·K FLOPs; W is read
once per group of row tiles, x once per column tile, mostly from L2.

Few rows (a single small picture) make too few tiles for a whole GPU.  Then K is cut into ``split`` parts: programs write
fp32 partial sums to a workspace ``[split, M, N]``, and a second kernel adds them up in a fixed order and applies the
epilogue.  No atomics, so the result does not depend on timing.

The bits of a row depend on the configuration (above all on ``split``), never on the other rows.
"""

from dataclasses import dataclass, replace

import torch

from . import configs
from ._triton import tl, triton
from .configs import TRITON_TYPES, CompileSpec
from .device import activate, dot
from .dispatch import on_device_of_first, runs_kernel
from .elementwise import ACTIVATIONS
from .linear_reference import linear_reference

__all__ = [
    "EPILOGUES",
    "LinearConfig",
    "compile_spec",
    "compile_specs",
    "default_config",
    "launch_linear",
    "linear",
    "split_specs",
]

EPILOGUES = (*ACTIVATIONS, "silu_gated")
"""What ``activation`` may be, besides ``None``."""


@triton.jit
def grouped_tile(program, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """``(row tile, column tile)`` of a program: GROUP row tiles go through all columns together, column by column."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    per_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    group = program // per_group
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    place = program - group * per_group
    return first + place % height, place // height


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    # `inside` masks the end of K; a mask that is known to be full would still keep the loads from being vectorised.
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=inside, other=0)


@triton.jit
def _step(
    x_rows, weight_rows, up_rows, k, end, total, up,
    GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # One block of K, `k`, up to `end`.
    x = _load(x_rows + k[None, :], (k < end)[None, :], EVEN)
    weight = _load(weight_rows + k[:, None], (k < end)[:, None], EVEN)
    if x.dtype == tl.uint8:
        x = (x.to(tl.int16) - 128).to(tl.float32)
    x = x.to(weight.dtype)
    total = dot(x, weight, total)
    if GATED:
        up = dot(x, _load(up_rows + k[:, None], (k < end)[:, None], EVEN), up)
    return total, up


@triton.jit
def accumulate(
    X, WEIGHT, row, column, begin, end, x_stride, weight_stride, up_offset,
    GATED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """fp32 ``x[row, begin:end] · weight[column, begin:end]``, and the same with weight rows ``up_offset`` further down.

    ``row`` and ``column`` have to be rows that exist, in int64: clamped, not masked, which costs nothing in the loop.
    Only a last block of K that is not full (``not EVEN``) is masked.  uint8 x counts from 128; x is cast to the weights'
    dtype.
    """
    inner = tl.arange(0, BLOCK_INNER)
    x_rows = X + row[:, None] * x_stride
    weight_rows = WEIGHT + column[None, :] * weight_stride
    up_rows = WEIGHT + (column + up_offset)[None, :] * weight_stride
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = total
    full = begin + (end - begin) // BLOCK_INNER * BLOCK_INNER
    for start in tl.range(begin, full, BLOCK_INNER):
        total, up = _step(x_rows, weight_rows, up_rows, start + inner, end, total, up, GATED, True)
    if not EVEN:
        total, up = _step(x_rows, weight_rows, up_rows, full + inner, end, total, up, GATED, False)
    return total, up


@triton.jit
def _finish(
    total, up, BIAS, RESIDUAL, OUT, row, column, rows, columns, residual_stride, out_stride, ACTIVATION: tl.constexpr
):
    # Bias, activation, residual and the one rounding, for a tile of fp32 sums.
    if BIAS is not None:
        total += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu_gated":
        if BIAS is not None:
            up += tl.load(BIAS + columns + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        y = activate(total, "silu") * up
    else:
        y = activate(total, ACTIVATION)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row_offset = row.to(tl.int64)[:, None]
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + row_offset * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row_offset * out_stride + column[None, :], y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _linear_kernel(
    X, WEIGHT, BIAS, RESIDUAL, OUT, rows, columns, inner, x_stride, weight_stride, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT.  `columns` counts OUT's columns.
    row_tile, column_tile = grouped_tile(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    x_row = tl.minimum(row, rows - 1).to(tl.int64)
    weight_row = tl.minimum(column, columns - 1).to(tl.int64)
    total, up = accumulate(
        X, WEIGHT, x_row, weight_row, 0, inner, x_stride, weight_stride, columns,
        ACTIVATION == "silu_gated", EVEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    _finish(total, up, BIAS, RESIDUAL, OUT, row, column, rows, columns, residual_stride, out_stride, ACTIVATION)


@triton.jit
def _partial_kernel(
    X, WEIGHT, PARTIAL, rows, columns, inner, per_part, x_stride, weight_stride,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one tile of one part's sums: PARTIAL[part, rows, columns], over K from part × per_part.
    part = tl.program_id(1)
    row_tile, column_tile = grouped_tile(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    x_row = tl.minimum(row, rows - 1).to(tl.int64)
    weight_row = tl.minimum(column, columns - 1).to(tl.int64)
    begin = part * per_part
    end = min(begin + per_part, inner)
    total, _ = accumulate(
        X, WEIGHT, x_row, weight_row, begin, end, x_stride, weight_stride, columns,
        False, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    partial_row = part.to(tl.int64) * rows + row
    tl.store(PARTIAL + partial_row[:, None] * columns + column[None, :], total, mask=inside)


@triton.jit
def _reduce_kernel(
    PARTIAL, BIAS, RESIDUAL, OUT, rows, columns, parts, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT: adds its partial sums, first part first, and finishes it.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    width = columns
    if ACTIVATION == "silu_gated":
        width = 2 * columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = total
    for part in tl.range(0, parts):
        offset = (row.to(tl.int64) + part * rows)[:, None] * width + column[None, :]
        total += tl.load(PARTIAL + offset, mask=inside, other=0.0)
        if ACTIVATION == "silu_gated":
            up += tl.load(PARTIAL + offset + columns, mask=inside, other=0.0)
    _finish(total, up, BIAS, RESIDUAL, OUT, row, column, rows, columns, residual_stride, out_stride, ACTIVATION)


@dataclass(frozen=True)
class LinearConfig:
    """How a product is cut into programs.

    Block sizes are powers of two, at least 16; ``block_columns`` counts columns of y, so a gated tile multiplies twice as
    many weight rows.  ``split`` > 1 cuts K into that many parts (fewer, if K is short).
    """

    block_rows: int
    block_columns: int
    block_inner: int
    group_rows: int
    num_warps: int
    num_stages: int
    split: int = 1


_REDUCE_ROWS, _REDUCE_COLUMNS = 4, 256

# Programs that fill a GPU: two for each multiprocessor or compute unit of the usual part.
_PROGRAMS = {"sm_80": 216, "sm_89": 256, "sm_90": 264, "sm_100": 296, "gfx942": 608, "gfx950": 512}


def _tile(dtype: torch.dtype, activation: str | None, architecture: str, *, few: bool, wide: bool) -> LinearConfig:
    """Blocks, warps and stages: the largest tile whose epilogue does not spill (the erf of ``gelu`` needs the most)."""
    nvidia = architecture.startswith("sm_")
    gated = activation == "silu_gated"
    if dtype == torch.float32:
        # True fp32 products run on the ordinary units, whose operands are registers: small tiles.
        columns, inner = (32, 16) if gated else (64, 32)
        return LinearConfig(64, columns, inner, group_rows=8, num_warps=4, num_stages=3 if nvidia else 2)
    if not nvidia:
        columns = 64 if gated else 128
        return LinearConfig(64 if few else 128, columns, 64, group_rows=8, num_warps=4 if few else 8, num_stages=2)
    if architecture in ("sm_80", "sm_89"):
        columns, warps = (64 if gated else 128), (8 if activation == "gelu" and not few else 4)
        return LinearConfig(64 if few else 128, columns, 32, group_rows=8, num_warps=warps, num_stages=3)
    if few:
        return LinearConfig(64, 64 if gated else 128, 64, group_rows=8, num_warps=4, num_stages=4)
    return LinearConfig(128, 256 if wide else 128, 64, group_rows=8, num_warps=8, num_stages=3)


def _split(rows: int, width: int, inner: int, config: LinearConfig, programs: int) -> int:
    """Into how many parts to cut K so that few rows still fill the GPU.

    Depends on the row count only through "at most 64" and "at most 256", so that the bits of a row change as rarely as
    possible with what it is packed with.
    """
    if rows > 256:
        return 1
    tiles = -(-(64 if rows <= 64 else 256) // config.block_rows) * -(-width // config.block_columns)
    # Each part keeps at least 512 of K: a shorter one does not repay its share of the workspace traffic.
    return max(1, min(programs // tiles, inner // 512, 8))


def default_config(
    rows: int,
    columns: int,
    inner: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    residual: bool = False,
    architecture: str,
) -> LinearConfig:
    """A safe configuration for y ``[rows, columns]`` and K = ``inner``: no spills, and within shared memory.

    The bits of a row can differ between up to 64 rows, up to 256, and more: these take different ``split``.  Pass one
    configuration for all of them where that matters.
    """
    if architecture == "interpreter":
        return LinearConfig(128, 128, 128, group_rows=8, num_warps=4, num_stages=1)
    programs = _PROGRAMS[architecture]
    # The 128 × 256 tile reads less per FLOP, but only light epilogues fit beside it, and only large products fill a GPU.
    light = activation in (None, "quick_gelu", "gelu_tanh", "silu") and not residual
    wide = light and rows * columns >= programs * 128 * 256
    config = _tile(dtype, activation, architecture, few=rows <= 64, wide=wide)
    width = 2 * columns if activation == "silu_gated" else columns
    return replace(config, split=_split(rows, width, inner, config, programs))


@on_device_of_first
def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
    config: LinearConfig,
) -> None:
    """``out = f(x Wᵀ + b) + r`` for validated, non-empty tensors."""
    (rows, inner), columns = x.shape, out.shape[1]
    width = weight.shape[0]
    residual_stride = 0 if residual is None else residual.stride(0)
    kind = activation or "none"
    even = inner % config.block_inner == 0
    blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
    walk = {**blocks, "BLOCK_INNER": config.block_inner, "GROUP_ROWS": config.group_rows}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    row_tiles = triton.cdiv(rows, config.block_rows)
    per_part = triton.cdiv(triton.cdiv(inner, config.block_inner), config.split) * config.block_inner
    parts = triton.cdiv(inner, per_part)
    if parts == 1:
        _linear_kernel[(row_tiles * triton.cdiv(columns, config.block_columns),)](
            x, weight, bias, residual, out, rows, columns, inner,
            x.stride(0), weight.stride(0), residual_stride, out.stride(0),
            ACTIVATION=kind, EVEN=even, **walk, **options,
        )  # fmt: skip
        return
    partial = torch.empty(parts, rows, width, dtype=torch.float32, device=x.device)
    _partial_kernel[(row_tiles * triton.cdiv(width, config.block_columns), parts)](
        x, weight, partial, rows, width, inner, per_part, x.stride(0), weight.stride(0), EVEN=even, **walk, **options
    )
    _reduce_kernel[(triton.cdiv(rows, _REDUCE_ROWS), triton.cdiv(columns, _REDUCE_COLUMNS))](
        partial, bias, residual, out, rows, columns, parts, residual_stride, out.stride(0),
        ACTIVATION=kind, BLOCK_ROWS=_REDUCE_ROWS, BLOCK_COLUMNS=_REDUCE_COLUMNS, num_warps=4,
    )  # fmt: skip


def compile_spec(
    dtype: torch.dtype, activation: str | None, config: LinearConfig, *, residual: bool = False, even: bool = True
) -> CompileSpec:
    """How :func:`launch_linear` launches an unsplit product; ``even``: K is a multiple of ``block_inner``."""
    element = TRITON_TYPES[dtype]
    pointers = dict.fromkeys(("X", "WEIGHT", "BIAS", "OUT"), f"*{element}")
    sizes = ("rows", "columns", "inner", "x_stride", "weight_stride", "residual_stride", "out_stride")
    if residual:
        pointers["RESIDUAL"] = f"*{element}"
    epilogue = (activation or "none") + (" residual" if residual else "") + ("" if even else " ragged")
    return CompileSpec(
        name=f"linear {element} {epilogue} {config.block_rows}x{config.block_columns}x{config.block_inner}",
        kernel=_linear_kernel,
        signature=pointers | dict.fromkeys(sizes, "i32"),
        constants={
            **({} if residual else {"RESIDUAL": None}),
            "ACTIVATION": activation or "none",
            "EVEN": even,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
            "BLOCK_INNER": config.block_inner,
            "GROUP_ROWS": config.group_rows,
        },
        # A ragged K (588, 1176) is why rows are padded: the strides stay multiples of 16.
        divisible_by_16=tuple(size for size in sizes if size != "rows" and (even or size != "inner")),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_rows * config.block_columns,
    )


def split_specs(dtype: torch.dtype, config: LinearConfig) -> list[CompileSpec]:
    """The two kernels of a product whose K is split: partial sums, then their sum with a costly epilogue."""
    element = TRITON_TYPES[dtype]
    blocks = f"{config.block_rows}x{config.block_columns}x{config.block_inner}"
    sizes = ("rows", "columns", "inner", "per_part", "x_stride", "weight_stride")
    partial = CompileSpec(
        name=f"linear {element} partial {blocks}",
        kernel=_partial_kernel,
        signature={"X": f"*{element}", "WEIGHT": f"*{element}", "PARTIAL": "*fp32"} | dict.fromkeys(sizes, "i32"),
        constants={
            "EVEN": True,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
            "BLOCK_INNER": config.block_inner,
            "GROUP_ROWS": config.group_rows,
        },
        divisible_by_16=sizes[1:],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_rows * config.block_columns,
    )
    reduce_sizes = ("rows", "columns", "parts", "residual_stride", "out_stride")
    pointers = dict.fromkeys(("BIAS", "RESIDUAL", "OUT"), f"*{element}")
    reduce = CompileSpec(
        name=f"linear {element} reduce gelu residual {_REDUCE_ROWS}x{_REDUCE_COLUMNS}",
        kernel=_reduce_kernel,
        signature={"PARTIAL": "*fp32"} | pointers | dict.fromkeys(reduce_sizes, "i32"),
        constants={"ACTIVATION": "gelu", "BLOCK_ROWS": _REDUCE_ROWS, "BLOCK_COLUMNS": _REDUCE_COLUMNS},
        divisible_by_16=("columns", "residual_stride", "out_stride"),
        num_warps=4,
        num_stages=1,
        tensor_core=False,
        elements=_REDUCE_ROWS * _REDUCE_COLUMNS,
    )
    return [partial, reduce]


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: every epilogue in bf16, the costliest in fp16 and fp32, a ragged K, split K."""

    def config(dtype: torch.dtype, activation: str | None, rows: int, residual: bool = False) -> LinearConfig:
        return default_config(
            rows, 5120, 1280, dtype=dtype, activation=activation, residual=residual, architecture=architecture
        )

    bf16, many = torch.bfloat16, 16384
    specs = [compile_spec(bf16, activation, config(bf16, activation, many)) for activation in (None, *EPILOGUES)]
    specs += [compile_spec(bf16, None, config(bf16, None, rows, True), residual=True) for rows in (64, many)]
    specs += [compile_spec(bf16, "gelu", config(bf16, "gelu", many, True), residual=True)]
    specs += [compile_spec(bf16, activation, config(bf16, activation, 64)) for activation in ("gelu", "silu_gated")]
    specs += [compile_spec(bf16, None, config(bf16, None, 1024), even=False)]
    for dtype in (torch.float16, torch.float32):
        specs += [
            compile_spec(dtype, activation, config(dtype, activation, many)) for activation in ("gelu", "silu_gated")
        ]
        specs += [compile_spec(dtype, None, config(dtype, None, many, True), residual=True)]
    return specs + split_specs(bf16, config(bf16, None, 64)) + split_specs(bf16, config(bf16, None, 256))[:1]


def _check_matrix(
    name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int | None, ...], text: str
) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, but x is {like.dtype} on {like.device}; they have to agree"
        )
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {text}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``: ``torch.nn.functional.linear``, an activation, and an addition, with one rounding.

    (The CPU reference rounds once more before ``quick_gelu``, before the product of ``silu_gated``, and between an
    activation and a residual, where transformers rounds too.)

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16; rows any distance apart, last stride 1.
        weight: ``[N, K]`` of x's dtype; rows any distance apart (padded to 16 elements they load faster).
        bias: ``[N]``.
        activation: one of :data:`EPILOGUES`; ``silu_gated`` takes ``weight`` as ``[gate; up]`` and halves the columns.
        residual: ``[M, N]`` (``[M, N/2]`` if gated), added after the activation; rows any distance apart.
        out: where to write, shaped like the result; may be ``residual`` itself, and must not overlap ``x``.
        config: how to launch the kernel; the default is chosen for the shape and the device.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: an unknown activation; shapes that do not fit; elements of a row that are not adjacent.
        TypeError: dtypes or devices that differ, or a dtype that is none of the three.
    """
    if activation is not None and activation not in EPILOGUES:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(EPILOGUES)}, and None")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x is {x.dtype}; this operation takes float32, float16 and bfloat16")
    _check_matrix("x", x, x, (None, None), "it has to be [M, K]")
    rows, inner = x.shape
    if not inner:
        raise ValueError(f"x has shape {(rows, inner)}; it has to be [M, K] with K at least 1")
    _check_matrix("weight", weight, x, (None, inner), f"x has {tuple(x.shape)} = [M, K], so it has to be [N, {inner}]")
    columns = weight.shape[0]
    if bias is not None:
        _check_matrix(
            "bias", bias, x, (columns,), f"weight has {tuple(weight.shape)} = [N, K], so it has to be [{columns}]"
        )
    if activation == "silu_gated":
        if columns % 2:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; silu_gated needs [gate; up], an even number of rows"
            )
        columns //= 2
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            _check_matrix(name, tensor, x, (rows, columns), f"the result is {(rows, columns)}")
    if out is None:
        out = x.new_empty(rows, columns)
    if not out.numel():
        return out
    if not runs_kernel(x):
        return linear_reference(x, weight, bias, activation, residual, out)
    if config is None:
        config = default_config(
            rows,
            columns,
            inner,
            dtype=x.dtype,
            activation=activation,
            residual=residual is not None,
            architecture=configs.architecture(x.device),
        )
    launch_linear(x, weight, bias, residual, out, activation, config)
    return out
