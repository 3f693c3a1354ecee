"""A packed batch: all the patches of a call, one after the other, and every fact about them.

Nothing below the batch pads, masks or asks which image a row belongs to.  The facts (positions, segment and window
boundaries, which rows become tokens and in which order) are worked out once, on the CPU, when the batch is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tritontower.config import BatchForm, PositionTable, TowerConfig
from tritontower.graph.ir import Workload
from tritontower.kernels.rowwise.positions import bilinear_taps, merge_block_positions, window_order
from tritontower.kernels.runtime.segments import Segments

from .digests import Digests
from .layout import Grid, ImageLayout
from .normalization import PIXEL_CENTER

__all__ = ["Grid", "PackedBatch", "expected_workload"]


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class PackedBatch:
    """Images or videos, as rows of patches in the order in which the tower's blocks work on them.

    Attributes:
        pixels: ``[patches, inner]``, float or uint8; columns are channel, frame, row and column of the patch.  A batch
            of still images holds one frame per patch, a batch of videos as many as the tower's patches span.  A class
            token is a patch of zeros, or of bytes that count zero: 128.
        positions: ``[patches, 2]`` int32: row and column of each patch in its tile.
        segments: the runs of patches that attend to each other.
        windows: the same in the blocks that attend within windows; ``None`` for a tower without.
        grids: per image or video, its temporal patches, rows and columns of patches.
        token_counts: per image, its tokens.
        tile_grids: temporal patches, rows and columns of patches of every tile.
        tile_counts: per image, its tiles.
        tiles: the rows of each tile, its class token included, whatever they attend to.
        rows_per_token: patches that become one token.
        form: what the batch is arranged for; towers of another form refuse it.
        original_sizes: per image, width and height as it came, pixels.
        processed_sizes: per image, width and height after resizing, pixels.
        content_hashes: per image, a digest of its pixels as they came; it may be taken only when it is asked for, and
            the batch keeps the image until then.
        position_index: ``[patches, taps]`` int32: rows of the position table that a patch's position is made of.
        position_weights: ``[patches, 4]`` fp32: what each of them counts; ``None`` where there is one tap.
        selection: ``[selected, 1]`` int32: the rows that make the tokens, in the order of the image; ``None``: all.
        class_rows: ``[tiles, 1]`` int32: the first row of each tile.
        assembly_index: ``[tokens, taps]`` int32: rows of the projector that a token is made of, −1 for the newline.
        assembly_weights: ``[tokens, taps]`` fp32: what each of them counts.
    """

    pixels: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    windows: Segments | None
    grids: tuple[Grid, ...]
    token_counts: tuple[int, ...]
    tile_grids: tuple[Grid, ...]
    tile_counts: tuple[int, ...]
    tiles: Segments
    rows_per_token: int
    form: BatchForm
    original_sizes: tuple[tuple[int, int], ...]
    processed_sizes: tuple[tuple[int, int], ...]
    content_hashes: tuple[str, ...] | Digests
    class_rows: torch.Tensor
    position_index: torch.Tensor | None = None
    position_weights: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    assembly_index: torch.Tensor | None = None
    assembly_weights: torch.Tensor | None = None

    @classmethod
    def pack(
        cls,
        config: TowerConfig,
        pixels: torch.Tensor,
        layouts: Sequence[ImageLayout],
        *,
        original_sizes: Sequence[tuple[int, int]],
        content_hashes: Sequence[str],
    ) -> "PackedBatch":
        """Packs the patches of tiles that are already in order: per temporal patch, merge block by merge block.

        Args:
            config: the tower that will take the batch.
            pixels: ``[patches, inner]`` for one frame per patch (still images) or for all that a patch spans; the
                tiles of all images one after the other, without class tokens.
            layouts: what each image becomes.
            original_sizes: width and height of each image as it came.
            content_hashes: digest of each image as it came.

        Raises:
            ValueError: the rows do not match the layouts, or a grid is not one that the tower can take.
        """
        grids = [grid for layout in layouts for grid in layout.tiles]
        _check(config, pixels, grids)
        if not len(layouts) == len(original_sizes) == len(content_hashes):
            raise ValueError(
                f"{len(layouts)} layouts, {len(original_sizes)} original sizes and {len(content_hashes)} content hashes "
                "must be as many"
            )
        arranged, places = _arranged(config, layouts)
        return replace(
            arranged,
            pixels=_placed(pixels, places, arranged.segments.total, PIXEL_CENTER if pixels.dtype == torch.uint8 else 0),
            original_sizes=tuple(original_sizes),
            content_hashes=content_hashes if isinstance(content_hashes, Digests) else tuple(content_hashes),
        )

    @classmethod
    def without_pixels(cls, config: TowerConfig, layouts: Sequence[ImageLayout]) -> "PackedBatch":
        """All the facts about images of these layouts, and no pixels: what a pass would take can be read off it."""
        return _arranged(config, layouts)[0]

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def side(self) -> int:
        """The largest row or column of any patch, plus one: how many positions a table must cover."""
        return int(self.positions.max()) + 1 if len(self.positions) else 0

    @cached_property
    def workload(self) -> Workload:
        """How much a pass over the batch has to do."""
        selected = self.segments.total if self.selection is None else len(self.selection)
        tokens = sum(self.token_counts)
        return Workload(
            patches=self.segments.total,
            tokens=tokens,
            scores=_scores(self.segments),
            window_scores=0 if self.windows is None else _scores(self.windows),
            selected=selected,
            merged=tokens if self.assembly_index is None else selected // self.rows_per_token,
            tiles=self.tiles.count,
        )

    def pinned(self) -> "PackedBatch":
        """The batch with its pixels in page-locked memory, out of which a GPU takes them by itself; needs a GPU."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on ``device``; the copies do not wait for it."""
        if self.pixels.device == self.positions.device == device:
            return self
        # A device's answer would have to be waited for.
        side = self.side
        facts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, fact in facts.items():
            if isinstance(fact, torch.Tensor):
                facts[name] = fact.to(device, non_blocking=True)
        moved = PackedBatch(**facts)
        moved.__dict__["side"] = side
        return moved


def _arranged(config: TowerConfig, layouts: Sequence[ImageLayout]) -> tuple[PackedBatch, torch.Tensor]:
    """A batch without pixels, and where in it each patch goes."""
    grids = [grid for layout in layouts for grid in layout.tiles]
    positions = merge_block_positions(grids, config.merge)
    places = _numbers(len(positions))
    windows: Segments | None = None
    if config.windows is not None:
        order, lengths = window_order(grids, config.merge, config.windows.side)
        order = _of_patches(order, config.rows_per_token)
        places[order] = _numbers(len(order))
        windows = Segments.from_lengths(length * config.rows_per_token for length in lengths)
    index, weights = _positions(config.position_table, positions, grids)
    tiles = [t * h * w for t, h, w in grids]
    lengths = [h * w for t, h, w in grids for _ in range(t)] if config.segments == "frame" else tiles
    if config.class_token:
        counts = torch.tensor(tiles, dtype=torch.int64, device="cpu")
        places = places + (_numbers(len(tiles)) + 1).repeat_interleave(counts)
        # Row 0 of the table is the class token's, and what was not written is 0.
        index = None if index is None else index + 1
        tiles = lengths = [tile + 1 for tile in tiles]
    rows = sum(tiles)
    selection, assembly_index, assembly_weights = _tokens(config, layouts, places)
    batch = PackedBatch(
        pixels=torch.empty(0, config.patch.still_inner, dtype=torch.float32, device="cpu"),
        positions=_placed(positions, places, rows),
        segments=Segments.from_lengths(lengths),
        windows=windows,
        grids=tuple(layout.grid for layout in layouts),
        token_counts=tuple(layout.tokens(config) for layout in layouts),
        tile_grids=tuple(grids),
        tile_counts=tuple(len(layout.tiles) for layout in layouts),
        tiles=Segments.from_lengths(tiles),
        rows_per_token=config.rows_per_token,
        form=config.batch_form,
        original_sizes=tuple(layout.processed_size for layout in layouts),
        processed_sizes=tuple(layout.processed_size for layout in layouts),
        content_hashes=("",) * len(layouts),
        class_rows=_first_rows(tiles),
        position_index=None if index is None else _placed(index, places, rows),
        position_weights=None if weights is None else _placed(weights, places, rows),
        selection=selection,
        assembly_index=assembly_index,
        assembly_weights=assembly_weights,
    )
    return batch, places


def _check(config: TowerConfig, pixels: torch.Tensor, grids: Sequence[Grid]) -> None:
    patch, merge, table = config.patch, config.merge, config.position_table
    patches = sum(t * h * w for t, h, w in grids)
    if pixels.ndim != 2 or pixels.shape[0] != patches or pixels.shape[1] not in (patch.still_inner, patch.inner):
        raise ValueError(
            f"pixels have shape {list(pixels.shape)}; grids {list(grids)} need [{patches}, {patch.still_inner}] for "
            f"still images or [{patches}, {patch.inner}] for clips"
        )
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(f"grid {(t, h, w)} must be positive, its rows and columns multiples of {merge}")
        if table is not None and table.sampling == "exact" and (t, h, w) != (1, table.side, table.side):
            raise ValueError(
                f"grid {(t, h, w)} must be {(1, table.side, table.side)}: the tower has no other positions"
            )


def _first_rows(lengths: Sequence[int]) -> torch.Tensor:
    """``[runs, 1]`` int32: where each of several runs of rows begins."""
    counts = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    return (counts.cumsum(0, dtype=torch.int32) - counts).unsqueeze(1)


def _of_patches(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """The patches of merge blocks, in the blocks' order."""
    return (blocks[:, None] * rows + _numbers(rows)).flatten()


def _numbers(count: int) -> torch.Tensor:
    """0, 1, … on the CPU, whatever torch's default device is."""
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _placed(rows: torch.Tensor, places: torch.Tensor, total: int, elsewhere: int = 0) -> torch.Tensor:
    """``rows`` at their places among ``total`` rows, the others ``elsewhere``."""
    if len(rows) == total and bool((places[1:] > places[:-1]).all()):
        return rows
    shape = (total, *rows.shape[1:])
    if rows.device.type == "cpu" and rows.dtype != torch.bfloat16:
        # Several times faster than torch, and in huge pages; what numpy has no name for, torch does.
        array = np.full(shape, elsewhere, rows.numpy().dtype)
        array[places.numpy()] = rows.numpy()
        return torch.from_numpy(array)
    placed = rows.new_full(shape, elsewhere)
    placed[places] = rows
    return placed


def _positions(
    table: PositionTable | None, positions: torch.Tensor, grids: Sequence[Grid]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows of the position table for every patch, and what each counts."""
    if table is None:
        return None, None
    if table.sampling == "exact":
        return (positions[:, :1] * table.side + positions[:, 1:]).int(), None
    return bilinear_taps(positions, grids, table.side)


def _tokens(
    config: TowerConfig, layouts: Sequence[ImageLayout], places: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Which rows enter the projector, and how what leaves it makes the tokens."""
    if not config.selects:
        return None, None, None
    per_token = config.rows_per_token
    if not config.newline:
        return places.int().unsqueeze(1), None, None
    indices = [torch.empty(0, config.assembly_taps, dtype=torch.int64, device="cpu")]
    shares = [torch.empty(0, config.assembly_taps, dtype=torch.float32, device="cpu")]
    ends = [0]
    for layout in layouts:
        merged = layout.patches // per_token
        index, share = _taps(layout, merged, config.assembly_taps)
        indices.append(torch.where(index < 0, index, index + ends[-1]))
        shares.append(share)
        ends.append(ends[-1] + merged)
    index = torch.cat(indices)
    # Padding around an image has rows too; they stay behind here, so that nothing is projected in vain.
    kept = torch.zeros(ends[-1], dtype=torch.bool, device="cpu")
    kept[index[index >= 0]] = True
    renumbered = kept.cumsum(0) - 1
    index = torch.where(index < 0, index, renumbered[index])
    selection = places[_of_patches(kept.nonzero().flatten(), per_token)]
    return selection.int().unsqueeze(1), index.int(), torch.cat(shares)


def _taps(layout: ImageLayout, merged: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layout's assembly, or the rows as they are, with ``taps`` columns; those that are added count nothing."""
    if layout.assembly is None:
        index, share = _numbers(merged).unsqueeze(1), None
    else:
        index, share = layout.assembly.index.long(), layout.assembly.weights
    if index.shape[1] == taps:
        return index, torch.ones_like(index, dtype=torch.float32) if share is None else share
    if index.shape[1] != 1:
        raise ValueError(f"an assembly with {index.shape[1]} taps does not fit a tower with {taps}")
    share = torch.zeros(len(index), taps, dtype=torch.float32, device="cpu")
    share[:, 0] = 1.0
    return index.expand(-1, taps), share


def _scores(segments: Segments) -> int:
    return sum(length * length for length in segments.lengths)


def expected_workload(config: TowerConfig, counts: Sequence[int]) -> Workload:
    """The workload of images of which only the patches are known: windows are whole, and no tile is cut or ended."""
    patches = sum(counts)
    tiles = (
        [count for count in counts if count]
        if config.num_patches is None
        else [config.num_patches] * (patches // config.num_patches)
    )
    class_rows = len(tiles) if config.class_token else 0
    window = 0 if config.windows is None else config.windows.side**2 * config.rows_per_token
    return Workload(
        patches=patches + class_rows,
        tokens=patches // config.rows_per_token + (class_rows if config.keep_class_token else 0),
        scores=sum((tile + bool(class_rows)) ** 2 for tile in tiles),
        window_scores=sum(tile * min(tile, window) for tile in tiles),
        selected=patches + (class_rows if config.keep_class_token else 0),
        merged=patches // config.rows_per_token,
        tiles=len(tiles),
    )
