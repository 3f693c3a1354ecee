"""Where the patches stand, and the rotation angles that follow from it.

``merge_block_positions`` gives each patch's row and column, ``window_order`` an order in which the patches of a square
window stand side by side, ``bilinear_taps`` the four rows of a learned table that a place between its rows is made of.
``axial_frequencies`` gives the rotary frequencies of the two axes.  ``rotary_table`` puts positions and frequencies
together: row ``n`` of its tables holds the cosines and sines of
``[h·f_h[0], …, h·f_h[hd/4-1], w·f_w[0], …, w·f_w[hd/4-1]]`` with ``(h, w) = positions[n]``.

Shapes: positions ``[N, 2]`` int32, frequencies ``[hd/4]`` fp32 each, tables ``[N, hd/2]`` fp32.  An angle can be as large
as the grid's side in radians, and a GPU's fast sine is not accurate there, so the kernel does no trigonometry: torch
computes the ``side × hd/4`` distinct values of each axis, and one program gathers ``rows`` rows from them.  It writes
``4·N·hd`` bytes in all and reads its small tables out of cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = [
    "FrequencyLayout",
    "RotaryTableConfig",
    "axial_frequencies",
    "bilinear_taps",
    "compile_specs",
    "default_config",
    "launch_rotary_table",
    "merge_block_positions",
    "rotary_table",
    "rotary_table_reference",
    "window_order",
]

FrequencyLayout = Literal["halves", "alternating"]


def axial_frequencies(head_dim: int, theta: float, layout: FrequencyLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary frequencies of the vertical and the horizontal axis, ``[head_dim/4]`` fp32 on the CPU each.

    Args:
        head_dim: width of a head, a multiple of 4.
        theta: base of the geometric series.
        layout: ``"halves"`` (Qwen-VL): both axes take ``θ^(-2i/(hd/2))``; ``"alternating"`` (Pixtral): of the series
            ``θ^(-2j/hd)`` the vertical axis takes the even j, the horizontal axis the odd ones.

    Raises:
        ValueError: a head width that is no positive multiple of 4, or an unknown layout.
    """
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; two axes of cosine and sine pairs need a positive multiple of 4")
    if layout not in get_args(FrequencyLayout):
        raise ValueError(f"unknown frequency layout {layout!r}; known are {', '.join(get_args(FrequencyLayout))}")
    width = head_dim // 2 if layout == "halves" else head_dim
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if layout == "halves":
        return frequencies, frequencies
    return frequencies[0::2].contiguous(), frequencies[1::2].contiguous()


@lru_cache(maxsize=256)
def _frame_positions(height: int, width: int, merge: int) -> torch.Tensor:
    """One frame's positions: block raster, then the raster inside each ``merge × merge`` block."""
    raster = torch.arange(height * width, dtype=torch.int32, device="cpu")
    blocks = raster.view(height // merge, merge, width // merge, merge).transpose(1, 2).reshape(-1)
    return torch.stack((blocks // width, blocks % width), dim=1)


def _check_grids(grids: Sequence[tuple[int, int, int]], merge: int) -> None:
    if merge < 1:
        raise ValueError(f"merge is {merge}; blocks have a side of at least 1")
    for grid in grids:
        _, height, width = grid
        if min(grid) < 0 or height % merge or width % merge:
            raise ValueError(
                f"grid {tuple(grid)} (frames, rows, columns) cannot be cut into blocks of {merge} × {merge}"
            )


def merge_block_positions(grids: Sequence[tuple[int, int, int]], merge: int) -> torch.Tensor:
    """Row and column of every patch, ``[N, 2]`` int32 on the CPU, in the order in which the towers hold them.

    Args:
        grids: frames, rows and columns of patches of each image or video.
        merge: side of the square blocks whose patches follow each other; 1 is plain raster order.

    Raises:
        ValueError: a ``merge`` below 1, a negative grid, or one whose sides ``merge`` does not divide.
    """
    _check_grids(grids, merge)
    frames = [_frame_positions(height, width, merge).repeat(count, 1) for count, height, width in grids]
    return torch.cat(frames) if frames else torch.empty(0, 2, dtype=torch.int32, device="cpu")


def window_order(grids: Sequence[tuple[int, int, int]], merge: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """An order of the merge blocks in which those of every square window stand side by side.

    Windows follow each other in raster order, frame by frame, and so do the blocks in each; at the right and lower edges
    windows are smaller.  The order is that of ``get_vision_window_index`` of transformers, which pads the grid and leaves
    the padding out again (Qwen2.5-VL).

    Args:
        grids: frames, rows and columns of patches of each image or video.
        merge: side of the square blocks whose patches follow each other.
        side: side of a window, in merge blocks.

    Returns:
        ``[blocks]`` int64 on the CPU: for every place in the new order, the block's place in the old one.  And how many
        blocks each window has, none of them 0.

    Raises:
        ValueError: a ``merge`` or ``side`` below 1, a negative grid, or one whose sides ``merge`` does not divide.
    """
    _check_grids(grids, merge)
    if side < 1:
        raise ValueError(f"side is {side}; windows have a side of at least 1")
    orders = [torch.empty(0, dtype=torch.int64, device="cpu")]
    lengths: list[int] = []
    start = 0
    for frames, height, width in grids:
        order, frame_lengths = _frame_window_order(height // merge, width // merge, side)
        starts = torch.arange(start, start + frames * len(order), max(len(order), 1), device="cpu")
        orders.append((starts[:, None] + order).flatten())
        lengths += frame_lengths * frames
        start += frames * len(order)
    return torch.cat(orders), lengths


@lru_cache(maxsize=256)
def _frame_window_order(height: int, width: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """One frame's blocks window by window, and how many each window has."""
    raster = torch.arange(height * width, device="cpu").view(height, width)
    windows = [part.flatten() for band in raster.split(side) for part in band.split(side, dim=1) if part.numel()]
    return torch.cat([raster.new_empty(0), *windows]), [len(window) for window in windows]


def bilinear_taps(
    positions: torch.Tensor, grids: Sequence[tuple[int, int, int]], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four rows of a learned ``side × side`` table that the position of each patch is the weighted sum of.

    Every grid is stretched over the table from corner to corner, as ``torch.nn.functional.interpolate`` does with
    ``align_corners=True``; an axis with one patch stands at the table's beginning.  Places are worked out in fp64, so that
    the weights carry one rounding.

    Args:
        positions: ``[N, 2]`` int32 on the CPU, row and column of each patch, image by image.
        grids: frames, rows and columns of patches of each image or video.
        side: rows and columns of the table.

    Returns:
        ``[N, 4]`` int32, rows of the table (which is stored row by row), and ``[N, 4]`` fp32, what each of them counts.

    Raises:
        ValueError: a ``side`` below 1, or another number of positions than the grids have patches.
    """
    counts = [frames * height * width for frames, height, width in grids]
    if side < 1:
        raise ValueError(f"side is {side}; a table has a side of at least 1")
    if positions.shape != (sum(counts), 2):
        raise ValueError(f"positions have shape {tuple(positions.shape)}; these grids need {(sum(counts), 2)}")
    sizes = torch.tensor([grid[1:] for grid in grids], dtype=torch.int64, device="cpu").view(-1, 2)
    intervals = (sizes - 1).clamp(min=1).repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"), dim=0)
    # Multiplied before it is divided: a place that is a row of the table comes out as just that row.
    place = (positions.long() * (side - 1)).double() / intervals
    # The last place lies at the end of the last interval, not at the beginning of one that the table does not have.
    before = place.floor().clamp(max=max(side - 2, 0))
    fraction = place - before
    after = (before + 1).clamp(max=side - 1)
    taps = torch.stack((before, after), dim=2).int()
    shares = torch.stack((1.0 - fraction, fraction), dim=2)
    index = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    return index.flatten(1), weights.float().flatten(1)


@cache  # without end: a captured launch reads a table at its address for as long as it is replayed
def _memoized_axis_table(
    frequencies: tuple[float, ...], side: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(side, dtype=torch.float32, device="cpu")[:, None] * torch.tensor(frequencies, device="cpu")
    # Waited for: whoever asks next may be on another stream.
    return angles.cos().to(device), angles.sin().to(device)


def _axis_table(frequencies: torch.Tensor, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, ``[at least side, hd/4]`` each, of every coordinate on one axis; computed by torch on the CPU.

    They are kept, and the side is rounded up so that few are: no copy to the GPU then stands in a forward pass.
    """
    return _memoized_axis_table(tuple(frequencies.tolist()), max(64, 1 << (side - 1).bit_length()), device)


def rotary_table_reference(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    side: int,
    out_cos: torch.Tensor,
    out_sin: torch.Tensor,
) -> None:
    """Gathers from the per-axis tables: far fewer cosines than rows, and a row's bits cannot depend on the others."""
    quarter = out_cos.shape[1] // 2
    for axis in range(2):
        columns = slice(axis * quarter, (axis + 1) * quarter)
        for table, out in zip(_axis_table(frequencies[axis], side, positions.device), (out_cos, out_sin), strict=True):
            out[:, columns] = table.index_select(0, positions[:, axis])


@triton.jit
def _rotary_table_kernel(
    POSITIONS, COS_H, SIN_H, COS_W, SIN_W, OUT_COS, OUT_SIN, rows, position_stride, cos_stride, sin_stride,
    QUARTER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Owns ROWS rows of both tables.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    valid = row < rows
    inside = valid[:, None] & (column < QUARTER)
    for axis in tl.static_range(2):
        position = tl.load(POSITIONS + row * position_stride + axis, mask=valid, other=0)
        source = position[:, None] * QUARTER + column
        target = row[:, None]
        if axis == 0:
            cos = tl.load(COS_H + source, mask=inside)
            sin = tl.load(SIN_H + source, mask=inside)
        else:
            cos = tl.load(COS_W + source, mask=inside)
            sin = tl.load(SIN_W + source, mask=inside)
        tl.store(OUT_COS + target * cos_stride + axis * QUARTER + column, cos, mask=inside)
        tl.store(OUT_SIN + target * sin_stride + axis * QUARTER + column, sin, mask=inside)


@dataclass(frozen=True)
class RotaryTableConfig:
    """How many rows one program owns, and with how many warps."""

    rows: int
    num_warps: int


def default_config(architecture: str) -> RotaryTableConfig:
    """Small programs on a GPU; few and large ones in the interpreter, where each costs dearly."""
    return RotaryTableConfig(rows=256 if architecture == "interpreter" else 32, num_warps=4)


@on_device_of_first
def launch_rotary_table(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    side: int,
    out_cos: torch.Tensor,
    out_sin: torch.Tensor,
    config: RotaryTableConfig,
) -> None:
    """Fills both tables for validated, non-empty positions."""
    rows, quarter = len(positions), out_cos.shape[1] // 2
    tables = [table for axis in frequencies for table in _axis_table(axis, side, positions.device)]
    _rotary_table_kernel[(triton.cdiv(rows, config.rows),)](
        positions,
        *tables,
        out_cos,
        out_sin,
        rows,
        positions.stride(0),
        out_cos.stride(0),
        out_sin.stride(0),
        **_constants(quarter, config),
        num_warps=config.num_warps,
    )


def _constants(quarter: int, config: RotaryTableConfig) -> dict[str, Any]:
    return {"QUARTER": quarter, "BLOCK": 1 << (quarter - 1).bit_length(), "ROWS": config.rows}


def _validate(positions: torch.Tensor, frequencies: tuple[torch.Tensor, torch.Tensor], side: int) -> None:
    if positions.dtype != torch.int32 or any(axis.dtype != torch.float32 for axis in frequencies):
        raise TypeError(
            f"positions are {positions.dtype} and frequencies {[axis.dtype for axis in frequencies]}; they have to be "
            "int32 and float32"
        )
    if positions.dim() != 2 or positions.shape[1] != 2 or (positions.numel() and positions.stride(1) != 1):
        raise ValueError(
            f"positions have shape {tuple(positions.shape)} and strides {positions.stride()}; they have to be [N, 2] with "
            "last stride 1"
        )
    if len(frequencies) != 2 or any(axis.dim() != 1 or axis.shape != frequencies[0].shape for axis in frequencies):
        raise ValueError(
            f"frequencies have shapes {[tuple(axis.shape) for axis in frequencies]}; both have to be [hd/4]"
        )
    if side < 1:
        raise ValueError(f"side is {side}; it has to be one more than the largest coordinate")
    if not positions.is_cuda and positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < side:
        raise ValueError(
            f"positions lie in [{int(positions.min())}, {int(positions.max())}]; with side {side} they have to lie in "
            f"[0, {side - 1}]"
        )


def rotary_table(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    *,
    side: int,
    out_cos: torch.Tensor | None = None,
    out_sin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every row's rotation angles; bit-equal on the CPU to Hugging Face transformers.

    Args:
        positions: ``[N, 2]`` int32, row and column of each patch.
        frequencies: ``[hd/4]`` fp32 on the CPU for rows and for columns, as from :func:`axial_frequencies`.
        side: one more than the largest coordinate.  On a GPU it is the caller who vouches for that.
        out_cos: ``[N, hd/2]`` fp32 to write into, last stride 1.
        out_sin: like ``out_cos``.

    Returns:
        The two tables, ``[N, hd/2]`` fp32 on the device of ``positions``.

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) a position outside ``[0, side)``.
        TypeError: dtypes that do not fit.
    """
    _validate(positions, frequencies, side)
    expected = (len(positions), 2 * len(frequencies[0]))
    tables = []
    for name, table in (("out_cos", out_cos), ("out_sin", out_sin)):
        table = torch.empty(expected, dtype=torch.float32, device=positions.device) if table is None else table
        if table.dtype != torch.float32 or table.device != positions.device:
            raise TypeError(f"{name} is {table.dtype} on {table.device}; it has to be float32 on {positions.device}")
        if table.shape != expected or (table.numel() and table.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)} and strides {table.stride()}; {len(positions)} positions and "
                f"{len(frequencies[0])} frequencies an axis need {expected} with last stride 1"
            )
        tables.append(table)
    cos, sin = tables
    if cos.numel():
        if runs_kernel(positions):
            config = default_config(configs.architecture(positions.device))
            launch_rotary_table(positions, frequencies, side, cos, sin, config)
        else:
            rotary_table_reference(positions, frequencies, side, cos, sin)
    return cos, sin


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: head widths 64, 72 and 80."""
    config = default_config(architecture)
    strides = ("position_stride", "cos_stride", "sin_stride")
    tables = ("COS_H", "SIN_H", "COS_W", "SIN_W", "OUT_COS", "OUT_SIN")
    return [
        CompileSpec(
            name=f"rotary_table fp32 head_dim {head_dim}",
            kernel=_rotary_table_kernel,
            signature={"POSITIONS": "*i32"} | dict.fromkeys(tables, "*fp32") | dict.fromkeys(("rows", *strides), "i32"),
            constants=_constants(head_dim // 4, config),
            divisible_by_16=(),
            num_warps=config.num_warps,
            num_stages=1,
            tensor_core=False,
            elements=config.rows * head_dim,
        )
        for head_dim in (64, 72, 80)
    ]
