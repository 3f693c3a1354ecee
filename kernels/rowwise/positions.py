"""Positions of patches, and tables derived from them.

``merge_block_positions`` returns the row and column of each patch, ``window_order`` an order in which the patches of a
square window are adjacent, ``bilinear_taps`` the four rows of a learned table that interpolate each position,
``axial_frequencies`` the rotary frequencies of the two axes.  ``rotary_table`` combines positions and frequencies: row
``n`` of its tables holds the cosines and sines of ``[h·f_h[0], …, h·f_h[hd/4-1], w·f_w[0], …, w·f_w[hd/4-1]]`` with
``(h, w) = positions[n]``.

Shapes: positions ``[N, 2]`` int32, frequencies ``[hd/4]`` fp32 each, tables ``[N, hd/2]`` fp32.  An angle can be as large
as the grid's side in radians, and a GPU's fast sine is not accurate there, so the kernel does no trigonometry: torch
computes the ``side × hd/4`` distinct values of each axis, and one program gathers ``rows`` rows from them.  It writes
``4·N·hd`` bytes in all and reads its small tables from cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import ceil_div, check_tensor, checked_output, next_power_of_two
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch

FrequencyLayout = Literal["halves", "alternating"]


def axial_frequencies(head_dim: int, theta: float, layout: FrequencyLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rotary frequencies of the vertical and the horizontal axis, ``[head_dim/4]`` fp32 on the CPU each.

    In the layout ``"halves"`` (Qwen-VL) both axes take ``θ^(-2i/(hd/2))``.  In ``"alternating"`` (Pixtral), of the series
    ``θ^(-2j/hd)`` the vertical axis takes the even j, the horizontal axis the odd ones.
    """
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(f"head_dim must be a positive multiple of 4, got {head_dim}")
    if layout not in get_args(FrequencyLayout):
        raise ValueError(f"layout must be one of {', '.join(get_args(FrequencyLayout))}, got {layout!r}")
    width = head_dim // 2 if layout == "halves" else head_dim
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if layout == "halves":
        return frequencies, frequencies
    return frequencies[0::2].contiguous(), frequencies[1::2].contiguous()


@lru_cache(maxsize=256)
def _frame_positions(height: int, width: int, merge: int) -> torch.Tensor:
    # One frame's positions: block raster, then the raster inside each merge × merge block.
    raster = torch.arange(height * width, dtype=torch.int32, device="cpu")
    blocks = raster.view(height // merge, merge, width // merge, merge).transpose(1, 2).reshape(-1)
    return torch.stack((blocks // width, blocks % width), dim=1)


def _check_grids(grids: Sequence[tuple[int, int, int]], merge: int) -> None:
    if merge < 1:
        raise ValueError(f"merge must be at least 1, got {merge}")
    for grid in grids:
        _, height, width = grid
        if min(grid) < 0 or height % merge or width % merge:
            raise ValueError(
                f"grid sides must be multiples of merge={merge}, got (frames, rows, columns) {tuple(grid)}"
            )


def merge_block_positions(grids: Sequence[tuple[int, int, int]], merge: int) -> torch.Tensor:
    """Returns row and column of every patch, ``[N, 2]`` int32 on the CPU, in the order of the towers' rows.

    ``grids`` are (frames, rows, columns).  The patches of a square block with sides of ``merge`` are consecutive.
    """
    _check_grids(grids, merge)
    frames = [_frame_positions(height, width, merge).repeat(count, 1) for count, height, width in grids]
    return torch.cat(frames) if frames else torch.empty(0, 2, dtype=torch.int32, device="cpu")


def window_order(grids: Sequence[tuple[int, int, int]], merge: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """Returns an order of the merge blocks in which those of every square window are consecutive.

    Windows are in raster order, frame by frame, and so are the blocks in each; at the right and lower edges windows are
    smaller.  The order is that of ``get_vision_window_index`` of transformers, which pads the grid and removes the padding
    again (Qwen2.5-VL).

    Returns ``[blocks]`` int64 on the CPU, the old index of each block in the new order; and the number of blocks of each
    window, whose ``side`` is in blocks; none of them 0.
    """
    _check_grids(grids, merge)
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
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
    # One frame's blocks window by window, and the number of blocks of each window.
    raster = torch.arange(height * width, device="cpu").view(height, width)
    windows = [part.flatten() for band in raster.split(side) for part in band.split(side, dim=1) if part.numel()]
    return torch.cat([raster.new_empty(0), *windows]), [len(window) for window in windows]


def bilinear_taps(
    positions: torch.Tensor, grids: Sequence[tuple[int, int, int]], side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the four rows of a learned ``side × side`` table whose weighted sum is the position of each patch.

    Every grid is stretched over the table from corner to corner, as ``torch.nn.functional.interpolate`` does with
    ``align_corners=True``; an axis with one patch uses the table's first row.  Coordinates are computed in fp64, so that
    the weights are rounded once.  Returns ``[N, 4]`` int32, rows of the table (stored row by row), and ``[N, 4]`` fp32,
    their weights.
    """
    counts = [frames * height * width for frames, height, width in grids]
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    if positions.shape != (sum(counts), 2):
        raise ValueError(f"positions must have shape {(sum(counts), 2)}, got {tuple(positions.shape)}")
    sizes = torch.tensor([grid[1:] for grid in grids], dtype=torch.int64, device="cpu").view(-1, 2)
    intervals = (sizes - 1).clamp(min=1).repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"), dim=0)
    # Multiplied before the division: a coordinate that is a row of the table is exactly that row.
    place = (positions.long() * (side - 1)).double() / intervals
    # The last coordinate is the end of the last interval, not the start of one after the table.
    before = place.floor().clamp(max=max(side - 2, 0))
    fraction = place - before
    after = (before + 1).clamp(max=side - 1)
    taps = torch.stack((before, after), dim=2).int()
    shares = torch.stack((1.0 - fraction, fraction), dim=2)
    index = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    return index.flatten(1), weights.float().flatten(1)


@cache  # unbounded: a captured launch reads a table at its address as long as it is replayed
def _memoized_axis_table(
    frequencies: tuple[float, ...], side: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(side, dtype=torch.float32, device="cpu")[:, None] * torch.tensor(frequencies, device="cpu")
    # A blocking copy: the next caller may be on another stream.
    return angles.cos().to(device), angles.sin().to(device)


def _axis_table(frequencies: torch.Tensor, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, ``[at least side, hd/4]`` each, of every coordinate on one axis; computed by torch on the CPU.

    The tables are cached, and the side is rounded up so that they are few: a forward pass then copies none to the GPU.
    """
    return _memoized_axis_table(tuple(frequencies.tolist()), max(64, next_power_of_two(side)), device)


def rotary_table_reference(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    side: int,
    out_cos: torch.Tensor,
    out_sin: torch.Tensor,
) -> None:
    """Gathers from the tables of each axis: far fewer cosines than rows, and a row's bits cannot depend on the others."""
    quarter = out_cos.shape[1] // 2
    for axis in range(2):
        columns = slice(axis * quarter, (axis + 1) * quarter)
        for table, out in zip(_axis_table(frequencies[axis], side, positions.device), (out_cos, out_sin), strict=True):
            out[:, columns] = table.index_select(0, positions[:, axis])


@triton.jit(do_not_specialize=["rows"])
def _rotary_table_kernel(
    positions_ptr, cos_h_ptr, sin_h_ptr, cos_w_ptr, sin_w_ptr, out_cos_ptr, out_sin_ptr,
    rows, stride_pm, stride_cm, stride_sm,
    QUARTER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # One program owns ROWS rows of both tables.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    valid = row < rows
    inside = valid[:, None] & (column < QUARTER)
    for axis in tl.static_range(2):
        position = tl.load(positions_ptr + row * stride_pm + axis, mask=valid, other=0)
        source = position[:, None] * QUARTER + column
        target = row[:, None]
        if axis == 0:
            cos = tl.load(cos_h_ptr + source, mask=inside)
            sin = tl.load(sin_h_ptr + source, mask=inside)
        else:
            cos = tl.load(cos_w_ptr + source, mask=inside)
            sin = tl.load(sin_w_ptr + source, mask=inside)
        tl.store(out_cos_ptr + target * stride_cm + axis * QUARTER + column, cos, mask=inside)
        tl.store(out_sin_ptr + target * stride_sm + axis * QUARTER + column, sin, mask=inside)


@dataclass(frozen=True)
class RotaryTableConfig:
    """Rows per program, and warps."""

    rows: int
    num_warps: int


def default_config(architecture: str) -> RotaryTableConfig:
    """Small programs on a GPU; few, large ones in the interpreter, where each is expensive."""
    return RotaryTableConfig(rows=256 if architecture == "interpreter" else 32, num_warps=4)


def launch_rotary_table(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    side: int,
    out_cos: torch.Tensor,
    out_sin: torch.Tensor,
    config: RotaryTableConfig,
) -> None:
    """Launches one program per ``config.rows`` rows, for valid, non-empty tensors."""
    rows, quarter = len(positions), out_cos.shape[1] // 2
    tables = [table for axis in frequencies for table in _axis_table(axis, side, positions.device)]
    strides = (positions.stride(0), out_cos.stride(0), out_sin.stride(0))
    constants = {"QUARTER": quarter, "BLOCK": next_power_of_two(quarter), "ROWS": config.rows}
    launch(
        _rotary_table_kernel,
        (ceil_div(rows, config.rows),),
        positions,
        *tables,
        out_cos,
        out_sin,
        rows,
        *strides,
        **constants,
        num_warps=config.num_warps,
    )


def _check_table(positions: torch.Tensor, frequencies: tuple[torch.Tensor, torch.Tensor], side: int) -> None:
    if positions.dim() != 2 or positions.shape[1] != 2:
        raise ValueError(f"positions must be [N, 2], got shape {tuple(positions.shape)}")
    check_tensor("positions", positions, tuple(positions.shape), torch.int32, positions.device)
    if any(axis.dtype != torch.float32 for axis in frequencies):
        raise TypeError(f"frequencies must be float32, got {[axis.dtype for axis in frequencies]}")
    if len(frequencies) != 2 or any(axis.dim() != 1 or axis.shape != frequencies[0].shape for axis in frequencies):
        raise ValueError(f"frequencies must be two [hd/4], got {[tuple(axis.shape) for axis in frequencies]}")
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    if positions.device.type == "cpu" and positions.numel():
        lowest, highest = (int(bound) for bound in positions.aminmax())
        if lowest < 0 or highest >= side:
            raise ValueError(f"positions must be 0 to {side - 1}, got {lowest} to {highest}; side is {side}")


def rotary_table(
    positions: torch.Tensor,
    frequencies: tuple[torch.Tensor, torch.Tensor],
    *,
    side: int,
    out_cos: torch.Tensor | None = None,
    out_sin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cosines and sines of every row's rotation angles; bit-equal on the CPU to Hugging Face transformers.

    Args:
        positions: ``[N, 2]`` int32, row and column of each patch.
        frequencies: ``[hd/4]`` fp32 on the CPU for rows and for columns, as from :func:`axial_frequencies`.
        side: one more than the largest coordinate; on a GPU it is not checked.
        out_cos: output ``[N, hd/2]`` fp32, last stride 1; a new tensor by default.
        out_sin: like ``out_cos``.

    Raises:
        ValueError: a shape or stride does not fit, or (on the CPU) a position is outside ``[0, side)``.
        TypeError: a dtype or device does not fit.
    """
    _check_table(positions, frequencies, side)
    shape = (len(positions), 2 * len(frequencies[0]))
    like = positions.new_empty(0, dtype=torch.float32)
    cos, sin = (checked_output(out, shape, like, name) for name, out in (("out_cos", out_cos), ("out_sin", out_sin)))
    if cos.numel():
        if runs_kernel(positions):
            config = default_config(configs.architecture(positions.device))
            launch_rotary_table(positions, frequencies, side, cos, sin, config)
        else:
            rotary_table_reference(positions, frequencies, side, cos, sin)
    return cos, sin
