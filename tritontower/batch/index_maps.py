"""Index tensors of a packed batch, as pure functions of the tower's configuration and the images' layouts.

All results are on the CPU, whatever torch's default device is.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tritontower.config import PositionTable, TowerConfig
from tritontower.kernels.rowwise.positions import bilinear_taps, window_order
from tritontower.kernels.runtime.segments import Segments

from .layout import Grid, ImageLayout


def order_rows(config: TowerConfig, grids: Sequence[Grid]) -> tuple[torch.Tensor, Segments | None]:
    """Returns the batch row of every patch, class tokens not counted, and the windows of a windowed tower."""
    rows = _arange(sum(t * h * w for t, h, w in grids))
    if config.windows is None:
        return rows, None
    blocks, lengths = window_order(grids, config.merge, config.windows.side)
    order = _expand_blocks(blocks, config.rows_per_token)
    rows[order] = _arange(len(order))
    return rows, Segments.from_lengths(length * config.rows_per_token for length in lengths)


def list_first_rows(lengths: Sequence[int]) -> torch.Tensor:
    """Returns ``[runs, 1]`` int32: the first row of each run of rows."""
    counts = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    return (counts.cumsum(0, dtype=torch.int32) - counts).unsqueeze(1)


def shift_by_class_tokens(rows: torch.Tensor, tiles: Sequence[int]) -> torch.Tensor:
    """Moves the rows of tiles of so many patches down by one class token per tile."""
    counts = torch.tensor(tiles, dtype=torch.int64, device="cpu")
    return rows + (_arange(len(tiles)) + 1).repeat_interleave(counts)


def scatter_rows(rows: torch.Tensor, places: torch.Tensor, total: int, fill: int = 0) -> torch.Tensor:
    """Returns ``total`` rows: ``rows`` at ``places``, ``fill`` elsewhere; ``rows`` itself where nothing moves."""
    if len(rows) == total and bool((places[1:] > places[:-1]).all()):
        return rows
    shape = (total, *rows.shape[1:])
    if rows.device.type == "cpu" and rows.dtype != torch.bfloat16:
        # Several times faster than torch, and in huge pages. numpy has no bfloat16.
        array = np.full(shape, fill, rows.numpy().dtype)
        array[places.numpy()] = rows.numpy()
        return torch.from_numpy(array)
    scattered = rows.new_full(shape, fill)
    scattered[places] = rows
    return scattered


def index_position_table(
    table: PositionTable | None, positions: torch.Tensor, grids: Sequence[Grid]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the rows of the position table for every patch, and their weights."""
    if table is None:
        return None, None
    if table.sampling == "exact":
        return (positions[:, :1] * table.side + positions[:, 1:]).int(), None
    return bilinear_taps(positions, grids, table.side)


def index_tokens(
    config: TowerConfig, layouts: Sequence[ImageLayout], places: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Returns the rows that enter the projector, and the index and weights that assemble its output to tokens."""
    if not config.selects:
        return None, None, None
    per_token = config.rows_per_token
    if not config.newline:
        return places.int().unsqueeze(1), None, None
    indices = [torch.empty(0, config.assembly_taps, dtype=torch.int64, device="cpu")]
    weights = [torch.empty(0, config.assembly_taps, dtype=torch.float32, device="cpu")]
    end = 0
    for layout in layouts:
        merged = layout.patches // per_token
        index, weight = _widen_assembly(layout, merged, config.assembly_taps)
        indices.append(torch.where(index < 0, index, index + end))
        weights.append(weight)
        end += merged
    index = torch.cat(indices)
    # Padding around an image has rows too. They are not selected, so nothing is projected in vain.
    used = torch.zeros(end, dtype=torch.bool, device="cpu")
    used[index[index >= 0]] = True
    renumbered = used.cumsum(0) - 1
    index = torch.where(index < 0, index, renumbered[index])
    selection = places[_expand_blocks(used.nonzero().flatten(), per_token)]
    return selection.int().unsqueeze(1), index.int(), torch.cat(weights)


def _widen_assembly(layout: ImageLayout, merged: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns index and weights with ``taps`` columns; added columns have weight 0."""
    if layout.assembly is None:
        index, weights = _arange(merged).unsqueeze(1), None
    else:
        index, weights = layout.assembly.index.long(), layout.assembly.weights
    if index.shape[1] == taps:
        return index, torch.ones_like(index, dtype=torch.float32) if weights is None else weights
    if index.shape[1] != 1:
        raise ValueError(f"assembly must have 1 or {taps} taps to fit the tower, got {index.shape[1]}")
    weights = torch.zeros(len(index), taps, dtype=torch.float32, device="cpu")
    weights[:, 0] = 1.0
    return index.expand(-1, taps), weights


def _expand_blocks(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    return (blocks[:, None] * rows + _arange(rows)).flatten()


def _arange(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")
