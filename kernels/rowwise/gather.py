"""Rows picked from a table by number: copied, weighed and summed, or added to other rows.

    out[n] = residual[n] + Σ_k weights[n, k] · source[index[n, k]]        index −1 stands for the row ``fill``

All in fp32 and rounded once, at the store; the taps ``k`` are summed in their order, and the residual comes last.
With one tap, no weights and no residual this copies rows, bit for bit.  It adds learned positions to patches (one tap,
or the four of a bilinear interpolation), drops or reorders rows, puts tiles together with a newline row behind each
line (``fill``), and shrinks a grid of features.

Shapes: source ``[P, D]``, index and weights ``[N]`` or ``[N, K]``, residual and out ``[N, D]``; rows any distance
apart, elements of a row adjacent.  One program owns a tile of ``rows × columns`` of out and reads the taps of its rows
itself.  Bound by memory: reads ``K·N·D`` elements (``(K+1)·N·D`` with a residual) and writes ``N·D``; 2 FLOPs for each
one read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = [
    "MAX_TAPS",
    "GatherConfig",
    "compile_specs",
    "default_config",
    "gather_rows",
    "gather_rows_reference",
    "launch_gather",
]

MAX_TAPS = 16
"""The most taps of one row (a bicubic interpolation has as many): the kernel is unrolled over them."""

_CHUNK = 131072  # elements per thread that the reference sums at a time: they stay in the core's own cache


def _runs(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK * torch.get_num_threads() // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _take(source: torch.Tensor, chosen: torch.Tensor, fill: torch.Tensor | None, out: torch.Tensor) -> None:
    """``out[n] = source[chosen[n]]``, or ``fill`` where that is negative; a source without rows is all ``fill``."""
    if fill is None:
        torch.index_select(source, 0, chosen, out=out)
        return
    if len(source):
        torch.index_select(source, 0, chosen.clamp(min=0), out=out)
    out[chosen < 0] = fill


def gather_rows_reference(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    fill: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The sum of rows, written to ``out``: a plain copy at once, anything else a cache-sized run of rows at a time.

    No row's bits depend on the other rows: every product and every sum is a rounding of its own.
    """
    rows, width = out.shape
    if weights is None and residual is None:
        _take(source, index.view(-1), fill, out)
        return out
    index = index.view(rows, -1)
    for run in _runs(rows, width):
        if weights is None:
            total = source.new_empty(run.stop - run.start, width)
            _take(source, index[run, 0], fill, total)
        else:
            total = _weighted_sum(source, index[run], weights.view(rows, -1)[run], fill)
        if residual is None:
            out[run].copy_(total)
        else:
            torch.add(total, residual[run], out=out[run])
    return out


def _weighted_sum(
    source: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, fill: torch.Tensor | None
) -> torch.Tensor:
    """``Σ_k weights[:, k] · source[index[:, k]]`` in fp32.

    Not ``addcmul``: a compiler may fuse its product and sum for some elements of a row and not for the last few.
    """
    shape = (len(index), source.shape[1])
    taken = source.new_empty(shape)
    total = source.new_empty(shape, dtype=torch.float32)
    product = torch.empty_like(total)
    for tap in range(index.shape[1]):
        term = product if tap else total
        _take(source, index[:, tap], fill, taken)
        term.copy_(taken).mul_(weights[:, tap, None])
        if tap:
            total.add_(product)
    return total


@triton.jit
def _chosen_rows(SOURCE, FILL, chosen, source_stride, column, inside, width):
    # The columns `column` of the rows `chosen`; of FILL where that is negative.
    pointers = SOURCE + chosen.to(tl.int64)[:, None] * source_stride + column[None, :]
    if FILL is None:
        values = tl.load(pointers, mask=inside, other=0.0)
    else:
        present = (chosen >= 0)[:, None]
        fill = tl.load(FILL + column, mask=column < width, other=0.0)
        values = tl.where(present, tl.load(pointers, mask=inside & present, other=0.0), fill[None, :])
    return values


@triton.jit
def _gather_kernel(
    SOURCE, INDEX, WEIGHTS, FILL, RESIDUAL, OUT, rows, width, source_stride, residual_stride, out_stride,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns a tile of ROWS × COLUMNS of OUT; neighboring programs write neighboring columns of the same rows.
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row_tile = program // column_tiles
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program - row_tile * column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    inside = valid[:, None] & (column < width)[None, :]
    if WEIGHTS is None:
        chosen = tl.load(INDEX + row, mask=valid, other=0)
        total = _chosen_rows(SOURCE, FILL, chosen, source_stride, column, inside, width)
    else:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for tap in tl.static_range(TAPS):
            chosen = tl.load(INDEX + row * TAPS + tap, mask=valid, other=0)
            weight = tl.load(WEIGHTS + row * TAPS + tap, mask=valid, other=0.0)
            values = _chosen_rows(SOURCE, FILL, chosen, source_stride, column, inside, width)
            total += weight[:, None] * values.to(tl.float32)
    if RESIDUAL is not None:
        residual = tl.load(RESIDUAL + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        total = total.to(tl.float32) + residual.to(tl.float32)
    tl.store(OUT + row[:, None] * out_stride + column[None, :], total.to(OUT.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class GatherConfig:
    """The tile of one program, powers of two, and its warps; none of it changes a bit of the result."""

    rows: int
    columns: int
    num_warps: int


def default_config(architecture: str) -> GatherConfig:
    """16 bytes per thread and load (16-bit elements), 256 bytes of each row: most widths are multiples of 128.

    In the interpreter, where each program costs dearly, few and large ones.
    """
    if architecture == "interpreter":
        return GatherConfig(rows=64, columns=2048, num_warps=4)
    return GatherConfig(rows=16 if architecture.startswith("gfx") else 8, columns=128, num_warps=4)


@on_device_of_first
def launch_gather(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    fill: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    config: GatherConfig,
) -> None:
    """The sum of rows of validated, non-empty tensors, as :func:`gather_rows_reference`."""
    rows, width = out.shape
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(width, config.columns),)
    _gather_kernel[grid](
        source,
        index,
        weights,
        fill,
        residual,
        out,
        rows,
        width,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        TAPS=index.numel() // rows,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )


def _validate_rows(name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}; source is {like.dtype} on {like.device}, they have to agree"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be {shape}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def _validate_taps(index: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor) -> None:
    if index.dtype != torch.int32 or index.device != source.device:
        raise TypeError(f"index is {index.dtype} on {index.device}; it has to be int32 on {source.device}")
    if index.dim() not in (1, 2) or not index.is_contiguous():
        raise ValueError(
            f"index has shape {tuple(index.shape)} and strides {index.stride()}; it has to be a contiguous [N] or "
            "[N, K]"
        )
    taps = index.shape[1] if index.dim() == 2 else 1
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"index has shape {tuple(index.shape)}, {taps} taps a row; there may be 1 to {MAX_TAPS}")
    if weights is None:
        if taps > 1:
            raise ValueError(
                f"index has shape {tuple(index.shape)}, {taps} taps a row, which need weights to be summed"
            )
        return
    if weights.dtype != torch.float32 or weights.device != source.device:
        raise TypeError(f"weights is {weights.dtype} on {weights.device}; it has to be float32 on {source.device}")
    if weights.shape != index.shape or not weights.is_contiguous():
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and strides {weights.stride()}; every tap of index "
            f"{tuple(index.shape)} has one, so it has to be contiguous and of that shape"
        )


def _validate_range(index: torch.Tensor, source: torch.Tensor, has_fill: bool) -> None:
    """Raises for a row number that ``source`` does not have; on a device only where looking would not wait for it."""
    rows = len(source)
    if not rows and not has_fill:
        raise ValueError(f"index asks for {len(index)} rows, but source is {tuple(source.shape)}: it has none")
    if index.device.type != "cpu":
        return
    lowest, highest = (int(bound) for bound in index.aminmax())
    if highest >= rows or lowest < -1:
        wrong = highest if highest >= rows else lowest
        raise ValueError(
            f"index holds {wrong}, but source {tuple(source.shape)} has rows 0 to {rows - 1} (and -1 is fill)"
        )
    if lowest == -1 and not has_fill:
        raise ValueError("index holds -1, which stands for fill, but there is none: pass fill, one row of [D]")


def gather_rows(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    fill: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: GatherConfig | None = None,
) -> torch.Tensor:
    """Sums the rows that ``index`` names, times ``weights``, and a residual; see the module's description.

    Args:
        source: ``[P, D]`` float32, float16 or bfloat16, last stride 1.  Every row that is named has to be finite where
            there are weights: a weight of 0 does not turn NaN into nothing.
        index: ``[N]`` or ``[N, K]`` int32, contiguous, each −1 (``fill``) or in ``[0, P)``; K at most :data:`MAX_TAPS`.
            The range is checked on the CPU only: on a GPU a number beyond it reads foreign memory, and −1 without
            ``fill`` does.
        weights: float32, shaped like ``index``, contiguous; may be left out where K is 1, and all of them then are 1.
        fill: ``[D]``, the row that −1 stands for.
        residual: ``[N, D]``, added last; last stride 1.
        out: ``[N, D]``, where to write, last stride 1 (rows any distance apart: some columns of a wider matrix, for
            one); may be ``residual`` itself, and must not otherwise overlap the inputs.
        config: how to launch the kernel; the default is chosen for the device.

    Returns:
        ``out``, or a new contiguous tensor ``[N, D]`` of ``source``'s dtype.

    Raises:
        ValueError: shapes that do not fit, rows with gaps, several taps without weights, out being source; on the CPU
            row numbers out of range.
        TypeError: dtypes or devices that do not fit.
    """
    if source.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"source is {source.dtype}; gather_rows takes float32, float16 and bfloat16")
    if source.dim() != 2:
        raise ValueError(f"source has shape {tuple(source.shape)}; it has to be [P, D]")
    _validate_rows("source", source, source, tuple(source.shape))
    _validate_taps(index, weights, source)
    shape = (len(index), source.shape[1])
    if fill is not None:
        _validate_rows("fill", fill, source, shape[1:])
    if residual is not None:
        _validate_rows("residual", residual, source, shape)
    out = source.new_empty(shape) if out is None else out
    _validate_rows("out", out, source, shape)
    if not out.numel():
        return out
    if out.data_ptr() == source.data_ptr() != 0:  # 0 is the address of tensors without memory
        raise ValueError("out is source: a row would be overwritten before it is read")
    _validate_range(index, source, fill is not None)
    if not runs_kernel(source):
        return gather_rows_reference(source, index, weights, fill, residual, out)
    config = config or default_config(configs.architecture(source.device))
    launch_gather(source, index, weights, fill, residual, out, config)
    return out


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configuration: copies, learned positions and bilinear taps, tiles with their newline, every dtype.

    The width is no constant of the kernel: 1024, 1152, 1280, 4096 and 5120 columns, multiples of 16, share their code.
    """
    variants = [
        (1, "bf16", ""),
        (1, "bf16", "FILL"),
        (1, "bf16", "RESIDUAL"),
        (4, "bf16", "WEIGHTS"),
        (4, "bf16", "WEIGHTS RESIDUAL"),
        (4, "bf16", "WEIGHTS FILL"),
        (4, "fp16", "WEIGHTS RESIDUAL"),
        (1, "fp32", "RESIDUAL"),
        (4, "fp32", "WEIGHTS FILL RESIDUAL"),
        (MAX_TAPS, "bf16", "WEIGHTS FILL RESIDUAL"),
    ]
    return [_compile_spec(*variant, default_config(architecture)) for variant in variants]


def _compile_spec(taps: int, element: str, present: str, config: GatherConfig) -> CompileSpec:
    pointers = dict.fromkeys(("SOURCE", "OUT", *present.split()), f"*{element}")
    fixed = {"INDEX": f"*{TRITON_TYPES[torch.int32]}"} | (
        {"WEIGHTS": f"*{TRITON_TYPES[torch.float32]}"} if "WEIGHTS" in pointers else {}
    )
    sizes = ("width", "source_stride", "residual_stride", "out_stride")
    return CompileSpec(
        name=" ".join(("gather", element, f"taps {taps}", *present.lower().split(), f"{config.rows}x{config.columns}")),
        kernel=_gather_kernel,
        signature=pointers | fixed | dict.fromkeys(("rows", *sizes), "i32"),
        constants={
            **dict.fromkeys(name for name in ("WEIGHTS", "FILL", "RESIDUAL") if name not in pointers),
            "TAPS": taps,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
        },
        divisible_by_16=sizes,
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=config.rows * config.columns,
    )
