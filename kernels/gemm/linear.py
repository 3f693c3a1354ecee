"""Linear layer with its epilogue: ``y = f(x Wᵀ + b) + r``.

Shapes: ``x [M, K]``, ``W [N, K]`` (the layout of ``torch.nn.Linear``), ``b [N]``, ``r`` and ``y [M, N]``.  The activation f
is one of :data:`.elementwise.ACTIVATIONS`, nothing, or gated: ``y = silu(x Wᵍᵃᵗᵉᵀ + bᵍᵃᵗᵉ) · (x Wᵘᵖᵀ + bᵘᵖ) + r`` with
N/2 columns.  The rows of W are then ``[gate; up]`` one below the other (``silu_gated``), or alternate
(``silu_gated_interleaved``: row 2i gate i, row 2i+1 up i; see :func:`interleave_gated`), which lets a program walk along
one run of rows with one tile of sums, whose pairs of columns lie in the same thread.

Sums, bias, activation and residual are fp32; there is one rounding, at the store.

One program owns one ``block_rows × block_columns`` tile of y and walks along K.  Programs are numbered so that
``group_rows`` row tiles share the columns they pass over while those are still in the L2 cache.  2·M·N·K FLOPs; W is read
once per group of row tiles, x once per column tile, mostly from L2.

Few rows (a single small image) make too few tiles for a whole GPU.  Then K is cut into ``split`` parts: programs write
fp32 partial sums to a workspace ``[split, M, N]``, and a second kernel adds them up in a fixed order and applies the
epilogue.  No atomics, so the result does not depend on timing.

A table of measured configurations may also send a product to the library that torch brings along (``vendor``, see
:mod:`.vendor_product`).

The bits of a row depend on the configuration (above all on ``split``), never on the other rows.
"""

from typing import Any

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.device_functions import activate
from ..runtime.dispatch import on_device_of_first, runs_kernel
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear_config import (
    EPILOGUES,
    GATED,
    LinearConfig,
    Operands,
    default_config,
    descriptor_tiles,
    epilogue_passes,
    part_length,
    parts_of,
)
from .tiles import accumulate, column_parts, descriptors_fit, first_row_and_column, store_zeros
from .torch_reference import linear_reference
from .vendor import can_use_vendor_gemm, launch_vendor_gemm

__all__ = [
    "EPILOGUES",
    "GATED",
    "REDUCE_COLUMNS",
    "REDUCE_ROWS",
    "LinearConfig",
    "Operands",
    "add_parts",
    "check_matrix",
    "choose_config",
    "compile_spec",
    "compile_specs",
    "default_config",
    "describe",
    "descriptor_tiles",
    "interleave_gated",
    "launch_linear",
    "linear",
    "operand_types",
    "operands",
    "partial_sums",
    "split_specs",
    "walk",
]


def interleave_gated(tensor: torch.Tensor) -> torch.Tensor:
    """``[gate; up]`` → gate 0, up 0, gate 1, up 1, …: weight ``[N, K]`` or bias ``[N]`` for ``silu_gated_interleaved``.

    Raises:
        ValueError: an odd number of rows.
    """
    if tensor.dim() < 1 or tensor.shape[0] % 2:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; [gate; up] has an even number of rows")
    gate, up = tensor.chunk(2)
    return torch.stack((gate, up), 1).flatten(0, 1)


@triton.jit
def _finish(
    total, up, BIAS, RESIDUAL, OUT, first_row, first_column, rows, columns, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Bias, activation, residual and the one rounding, for a tile of fp32 sums.
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    if ACTIVATION == "silu_gated_interleaved":
        if BIAS is not None:
            pair = 2 * first_column + tl.arange(0, 2 * BLOCK_COLUMNS)
            total += tl.load(BIAS + pair, mask=pair < 2 * columns, other=0.0).to(tl.float32)[None, :]
        total, up = tl.split(tl.reshape(total, [BLOCK_ROWS, BLOCK_COLUMNS, 2]))
    elif BIAS is not None:
        total += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "silu_gated":
            up += tl.load(BIAS + columns + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu_gated" or ACTIVATION == "silu_gated_interleaved":
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
    X, WEIGHT, BIAS, RESIDUAL, OUT, LIVE, rows, columns, inner, x_stride, weight_stride, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr, PAIRED: tl.constexpr, PASSES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT.  `columns` counts OUT's columns, each of which takes PAIRED adjacent
    # rows of WEIGHT (2 if interleaved).
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if LIVE is not None and first_row >= tl.load(LIVE):
        store_zeros(OUT, first_row, first_column, rows, columns, out_stride, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total, up = accumulate(
        X, WEIGHT, first_row, PAIRED * first_column, 0, inner, rows, PAIRED * columns, x_stride, weight_stride, columns,
        ACTIVATION == "silu_gated", EVEN, DESCRIPTORS, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    totals = column_parts(total, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS, PASSES)
    ups = column_parts(up, BLOCK_ROWS, PAIRED * BLOCK_COLUMNS, PASSES)
    for index in tl.static_range(PASSES):
        _finish(
            totals[index], ups[index], BIAS, RESIDUAL, OUT, first_row, first_column + index * (BLOCK_COLUMNS // PASSES),
            rows, columns, residual_stride, out_stride, ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS // PASSES,
        )  # fmt: skip


@triton.jit
def _partial_kernel(
    X, WEIGHT, PARTIAL, LIVE, rows, columns, inner, per_part, x_stride, weight_stride,
    EVEN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one tile of one part's sums: PARTIAL[part, rows, columns], over K from part × per_part, whole blocks.  Nobody
    # reads the sums of a tile that holds no row that counts.
    part = tl.program_id(1)
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if LIVE is not None and first_row >= tl.load(LIVE):
        return
    begin = part * per_part
    end = min(begin + per_part, inner)
    total, _ = accumulate(
        X, WEIGHT, first_row, first_column, begin, end, rows, columns, x_stride, weight_stride, 0,
        False, EVEN, DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    partial_row = part.to(tl.int64) * rows + row
    tl.store(PARTIAL + partial_row[:, None] * columns + column[None, :], total, mask=inside)


@triton.jit
def add_parts(
    PARTIAL, first_row, first_column, rows, columns, width, parts,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of one tile of the first ``columns`` columns of partial sums ``[parts, rows, width]``, first part first."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for part in tl.range(0, parts):
        offset = (row.to(tl.int64) + part * rows)[:, None] * width + column[None, :]
        total += tl.load(PARTIAL + offset, mask=inside, other=0.0)
    return total


@triton.jit
def _reduce_kernel(
    PARTIAL, BIAS, RESIDUAL, OUT, LIVE, rows, columns, parts, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of OUT: adds its partial sums, first part first, and finishes it.
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if LIVE is not None and first_row >= tl.load(LIVE):
        store_zeros(OUT, first_row, first_column, rows, columns, out_stride, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    width = PAIRED * columns
    if ACTIVATION == "silu_gated":
        width = 2 * columns
    total = add_parts(
        PARTIAL,
        first_row,
        PAIRED * first_column,
        rows,
        PAIRED * columns,
        width,
        parts,
        BLOCK_ROWS,
        PAIRED * BLOCK_COLUMNS,
    )
    up = total
    if ACTIVATION == "silu_gated":
        up = add_parts(
            PARTIAL + columns, first_row, first_column, rows, columns, width, parts, BLOCK_ROWS, BLOCK_COLUMNS
        )
    _finish(
        total, up, BIAS, RESIDUAL, OUT, first_row, first_column, rows, columns, residual_stride, out_stride,
        ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


REDUCE_ROWS, REDUCE_COLUMNS = 4, 256
"""The tile of a program that adds up partial sums."""


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
    """The tuned configuration of such a product on ``device``, or the default one."""
    constants = {"columns": columns, "inner": inner, "activation": activation, "residual": residual}
    return lookup(LinearConfig, "gemm.linear", device, dtype, constants, {"rows": rows}) or default_config(
        rows,
        columns,
        inner,
        dtype=dtype,
        activation=activation,
        residual=residual,
        architecture=configs.architecture(device),
    )


def operands(x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, paired: int = 1) -> tuple[Any, Any, bool]:
    """What a kernel is handed for x and W, and whether these are descriptors; ``paired``: weight rows for each column."""
    known = configs.architecture(x.device) in ("sm_90", "sm_100", "interpreter")
    if config.operands == "pointers" or not known or not descriptors_fit(x, weight):
        return x, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    def block(matrix: torch.Tensor, rows: int) -> Any:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, config.block_inner])

    return block(x, config.block_rows), block(weight, paired * config.block_columns), True


def walk(config: LinearConfig, *, even: bool) -> dict[str, Any]:
    """The constants of a tile's walk along K, which is ``even`` if K is a multiple of ``block_inner``."""
    return {
        "EVEN": even,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_INNER": config.block_inner,
        "GROUP_ROWS": config.group_rows,
    }


def partial_sums(
    x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, live: torch.Tensor | None = None
) -> torch.Tensor | None:
    """fp32 ``[parts, M, N]``, whose sum over the parts is ``x Wᵀ``; ``None`` where K is not split.

    Tiles of rows at or beyond ``live`` are not written.
    """
    (rows, inner), columns = x.shape, weight.shape[0]
    parts = parts_of(inner, config)
    if parts == 1:
        return None
    partial = torch.empty(parts, rows, columns, dtype=torch.float32, device=x.device)
    left, right, described = operands(x, weight, config)
    tiles = triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_columns)
    _partial_kernel[(tiles, parts)](
        left, right, partial, live, rows, columns, inner, part_length(inner, config), x.stride(0), weight.stride(0),
        DESCRIPTORS=described, **walk(config, even=inner % config.block_inner == 0),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partial


@on_device_of_first
def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None,
    config: LinearConfig,
    live: torch.Tensor | None = None,
) -> None:
    """``out = f(x Wᵀ + b) + r`` for validated, non-empty tensors; zeros in tiles of rows at or beyond ``live``.

    (A vendor's product computes those rows as well.)
    """
    if config.vendor and can_use_vendor_gemm(x, activation):
        launch_vendor_gemm(x, weight, bias, residual, out, activation)
        return
    (rows, inner), columns = x.shape, out.shape[1]
    residual_stride = 0 if residual is None else residual.stride(0)
    kind = activation or "none"
    paired = 2 if activation == "silu_gated_interleaved" else 1
    partial = partial_sums(x, weight, config, live)
    if partial is None:
        left, right, described = operands(x, weight, config, paired)
        architecture = configs.architecture(x.device)
        passes = epilogue_passes(config, activation, architecture, residual=residual is not None)
        _linear_kernel[(triton.cdiv(rows, config.block_rows) * triton.cdiv(columns, config.block_columns),)](
            left, right, bias, residual, out, live, rows, columns, inner,
            x.stride(0), weight.stride(0), residual_stride, out.stride(0),
            ACTIVATION=kind, DESCRIPTORS=described, PAIRED=paired, PASSES=passes,
            **walk(config, even=inner % config.block_inner == 0),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return
    _reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS), triton.cdiv(columns, REDUCE_COLUMNS))](
        partial, bias, residual, out, live, rows, columns, partial.shape[0], residual_stride, out.stride(0),
        ACTIVATION=kind, PAIRED=paired, BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLUMNS=REDUCE_COLUMNS, num_warps=4,
    )  # fmt: skip


def operand_types(
    element: str, pixels: str, config: LinearConfig, paired: int = 1
) -> tuple[dict[str, str], dict[str, bool]]:
    """Types of X and WEIGHT, and the constant that tells descriptors from pointers."""
    if config.operands == "pointers":
        return {"X": f"*{pixels}", "WEIGHT": f"*{element}"}, {"DESCRIPTORS": False}
    columns = paired * config.block_columns
    return {
        "X": f"tensordesc<{pixels}[{config.block_rows}, {config.block_inner}]>",
        "WEIGHT": f"tensordesc<{element}[{columns}, {config.block_inner}]>",
    }, {"DESCRIPTORS": True}


def describe(config: LinearConfig) -> str:
    """A configuration in the name of a :class:`CompileSpec`: blocks, warps and stages where operands are descriptors."""
    blocks = f"{config.block_rows}x{config.block_columns}x{config.block_inner}"
    if config.operands == "pointers":
        return blocks
    return f"{blocks} descriptors {config.num_warps} warps {config.num_stages} stages"


def compile_spec(
    dtype: torch.dtype,
    activation: str | None,
    config: LinearConfig,
    architecture: str,
    *,
    residual: bool = False,
    even: bool = True,
    live: bool = False,
) -> CompileSpec:
    """How :func:`launch_linear` launches an unsplit product; ``even``: K is a multiple of ``block_inner``."""
    element, kind = TRITON_TYPES[dtype], activation or "none"
    paired = 2 if activation == "silu_gated_interleaved" else 1
    types, described = operand_types(element, element, config, paired)
    pointers = types | dict.fromkeys(("BIAS", "OUT"), f"*{element}")
    pointers |= {"RESIDUAL": f"*{element}"} if residual else {}
    pointers |= {"LIVE": "*i32"} if live else {}
    sizes = ("rows", "columns", "inner", "x_stride", "weight_stride", "residual_stride", "out_stride")
    suffixes = (" residual" if residual else "") + ("" if even else " ragged") + (" live" if live else "")
    return CompileSpec(
        name=f"linear {element} {kind}{suffixes} {describe(config)}",
        kernel=_linear_kernel,
        signature=pointers | dict.fromkeys(sizes, "i32"),
        constants={
            **{name: None for name in ("RESIDUAL", "LIVE") if name not in pointers},
            "ACTIVATION": kind,
            "PAIRED": paired,
            "PASSES": epilogue_passes(config, activation, architecture, residual=residual),
            **described,
            **walk(config, even=even),
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
    sizes = ("rows", "columns", "inner", "per_part", "x_stride", "weight_stride")
    types, described = operand_types(element, element, config)
    partial = CompileSpec(
        name=f"linear {element} partial {describe(config)}",
        kernel=_partial_kernel,
        signature=types | {"PARTIAL": "*fp32"} | dict.fromkeys(sizes, "i32"),
        constants={"LIVE": None, **described, **walk(config, even=True)},
        divisible_by_16=sizes[1:],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_rows * config.block_columns,
    )
    reduce_sizes = ("rows", "columns", "parts", "residual_stride", "out_stride")
    pointers = dict.fromkeys(("BIAS", "RESIDUAL", "OUT"), f"*{element}") | {"LIVE": "*i32"}
    reduce = CompileSpec(
        name=f"linear {element} reduce gelu residual live {REDUCE_ROWS}x{REDUCE_COLUMNS}",
        kernel=_reduce_kernel,
        signature={"PARTIAL": "*fp32"} | pointers | dict.fromkeys(reduce_sizes, "i32"),
        constants={"ACTIVATION": "gelu", "PAIRED": 1, "BLOCK_ROWS": REDUCE_ROWS, "BLOCK_COLUMNS": REDUCE_COLUMNS},
        divisible_by_16=("columns", "residual_stride", "out_stride"),
        num_warps=4,
        num_stages=1,
        tensor_core=False,
        elements=REDUCE_ROWS * REDUCE_COLUMNS,
    )
    return [partial, reduce]


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: every epilogue in bf16, the costliest in fp16 and fp32, a ragged K, split K."""

    def config(dtype: torch.dtype, activation: str | None, rows: int, residual: bool = False) -> LinearConfig:
        return default_config(
            rows, 5120, 1280, dtype=dtype, activation=activation, residual=residual, architecture=architecture
        )

    def spec(dtype: torch.dtype, activation: str | None, rows: int, **options: bool) -> CompileSpec:
        chosen = config(dtype, activation, rows, options.get("residual", False))
        return compile_spec(dtype, activation, chosen, architecture, **options)

    bf16, many = torch.bfloat16, 16384
    specs = [spec(bf16, activation, many) for activation in (None, *EPILOGUES)]
    specs += [spec(bf16, None, rows, residual=True) for rows in (64, many)]
    specs += [spec(bf16, "gelu", many, residual=True)]
    specs += [spec(bf16, activation, 64) for activation in ("gelu", "silu_gated")]
    specs += [spec(bf16, None, 1024, even=False), spec(bf16, "gelu", many, live=True)]
    specs += [
        compile_spec(bf16, activation, tile, architecture, residual=residual)
        for activation, residual in (
            (None, False),
            (None, True),
            ("gelu_tanh", False),
            ("silu_gated_interleaved", False),
        )
        for tile in (descriptor_tiles(activation) if architecture in ("sm_90", "sm_100") else ())
    ]
    for dtype in (torch.float16, torch.float32):
        specs += [spec(dtype, activation, many) for activation in ("gelu", "silu_gated")]
        specs += [spec(dtype, None, many, residual=True)]
    return specs + split_specs(bf16, config(bf16, None, 64)) + split_specs(bf16, config(bf16, None, 256))[:1]


def check_matrix(name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int | None, ...], text: str) -> None:
    """Raises where ``tensor`` is not like x, not of this shape (``text`` says why it has to be), or has gaps in rows."""
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
    valid_rows: ValidRows | None = None,
) -> torch.Tensor:
    """``f(x Wᵀ + b) + r``: ``torch.nn.functional.linear``, an activation, and an addition, with one rounding.

    (The CPU reference rounds once more before ``quick_gelu``, before the product of a gated one, and between an
    activation and a residual, where transformers rounds too.)

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16; rows any distance apart, last stride 1.
        weight: ``[N, K]`` of x's dtype; rows any distance apart (padded to 16 elements they load faster).
        bias: ``[N]``.
        activation: one of :data:`EPILOGUES`; ``silu_gated`` takes ``weight`` as ``[gate; up]``, and
            ``silu_gated_interleaved`` as :func:`interleave_gated` arranges it; both halve the columns.
        residual: ``[M, N]`` (``[M, N/2]`` if gated), added after the activation; rows any distance apart.
        out: where to write, shaped like the result; may be ``residual`` itself, and must not overlap ``x``.
        config: how to launch the kernel; by default the tuned or a safe one for the shape and the device.
        valid_rows: for how many rows the configuration is chosen, and how many count: kernels write zeros (the CPU
            reference and a vendor's product the rows' values) where a whole tile of rows lies beyond them.

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
    check_matrix("x", x, x, (None, None), "it has to be [M, K]")
    rows, inner = x.shape
    if not inner:
        raise ValueError(f"x has shape {(rows, inner)}; it has to be [M, K] with K at least 1")
    check_matrix("weight", weight, x, (None, inner), f"x has {tuple(x.shape)} = [M, K], so it has to be [N, {inner}]")
    columns = weight.shape[0]
    if bias is not None:
        check_matrix(
            "bias", bias, x, (columns,), f"weight has {tuple(weight.shape)} = [N, K], so it has to be [{columns}]"
        )
    if activation in GATED:
        if columns % 2:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; {activation} needs a gate and an up row for each column, an "
                "even number of rows"
            )
        columns //= 2
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            check_matrix(name, tensor, x, (rows, columns), f"the result is {(rows, columns)}")
    live = get_valid_count(valid_rows, x.device)
    if out is None:
        out = x.new_empty(rows, columns)
    if not out.numel():
        return out
    if not runs_kernel(x):
        return linear_reference(x, weight, bias, activation, residual, out)
    if config is None:
        config = choose_config(
            planned_rows(valid_rows, rows),
            columns,
            inner,
            dtype=x.dtype,
            activation=activation,
            residual=residual is not None,
            device=x.device,
        )
    launch_linear(x, weight, bias, residual, out, activation, config, live)
    return out
