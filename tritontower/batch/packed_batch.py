"""PackedBatch: the patches of all images of a call, one after the other, with their metadata.

Below the batch there is no padding and no mask.  Positions, segments, windows and the assembly of tokens are computed
once, on the CPU, when the batch is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tritontower.config import BatchForm, TowerConfig
from tritontower.graph.ir import Workload
from tritontower.kernels.gemm.aligned_rows import align_rows, include_padding
from tritontower.kernels.gemm.patch_projection import PIXEL_CENTER
from tritontower.kernels.rowwise.positions import merge_block_positions
from tritontower.kernels.runtime.segments import Segments

from . import index_maps
from .digests import Digests
from .layout import Grid, ImageLayout

__all__ = ["AttentionIndices", "Grid", "ImageInfo", "PackedBatch", "TokenIndices", "expected_workload"]


@dataclass(frozen=True)
class ImageInfo:
    """Metadata of each image or video of a batch, in order; always on the host.

    Sizes are width and height, pixels.  A grid is temporal patches, rows and columns of patches.

    Attributes:
        tile_grids: grid of every tile.
        tile_counts: tiles per image.
        content_hashes: digest of the decoded pixels.  It may be computed on first access; the batch keeps the image
            until then.
    """

    grids: tuple[Grid, ...]
    token_counts: tuple[int, ...]
    tile_grids: tuple[Grid, ...]
    tile_counts: tuple[int, ...]
    original_sizes: tuple[tuple[int, int], ...]
    processed_sizes: tuple[tuple[int, int], ...]
    content_hashes: tuple[str, ...] | Digests


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class AttentionIndices:
    """Positions of the rows, and the runs of rows that attend to each other.

    Attributes:
        positions: ``[patches, 2]`` int32: row and column of each patch in its tile.
        side: number of positions that a rotary table covers.  Stored, because reading it from a GPU would synchronize.
        segments: runs of patches that attend to each other.
        windows: the same for windowed blocks; ``None`` for a tower without windows.
        tiles: rows of each tile, its class token included.
        position_index: ``[patches, taps]`` int32: rows of the position table that are summed.
        position_weights: ``[patches, 4]`` fp32: their weights; ``None`` for one tap.
    """

    positions: torch.Tensor
    side: int
    segments: Segments
    windows: Segments | None
    tiles: Segments
    position_index: torch.Tensor | None = None
    position_weights: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenIndices:
    """Mapping of patch rows to tokens.

    Attributes:
        rows_per_token: patches that become one token.
        class_rows: ``[tiles, 1]`` int32: first row of each tile.
        selection: ``[selected, 1]`` int32: rows that enter the projector, in image order; ``None``: all.
        assembly_index: ``[tokens, taps]`` int32: projector rows combined into each token; −1 is the newline embedding.
        assembly_weights: ``[tokens, taps]`` fp32: weight of each row in the sum.
    """

    rows_per_token: int
    class_rows: torch.Tensor
    selection: torch.Tensor | None = None
    assembly_index: torch.Tensor | None = None
    assembly_weights: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Images or videos as rows of patches, in the order in which the tower's blocks process them.

    Attributes:
        pixels: ``[patches, inner]``, float or uint8; columns are channel, frame, row and column of the patch.  Still
            images have one frame per patch, videos as many as the tower's patches span.  A class token is a patch of
            zeros, or of bytes 128, which count as zero.
        form: the configuration for which the batch is arranged; towers of another form reject it.
        workload: sizes of a forward pass over the batch.
    """

    pixels: torch.Tensor
    images: ImageInfo
    attention: AttentionIndices
    tokens: TokenIndices
    form: BatchForm
    workload: Workload = field(init=False)

    def __post_init__(self) -> None:
        # Once, here: a forward pass reads it several times, and a video has thousands of windows.
        attention, tokens = self.attention, self.tokens
        patches, count = attention.segments.total, sum(self.images.token_counts)
        selected = patches if tokens.selection is None else len(tokens.selection)
        windows = () if attention.windows is None else attention.windows.lengths
        workload = Workload(
            patches=patches,
            tokens=count,
            scores=sum(length**2 for length in attention.segments.lengths),
            window_scores=sum(length**2 for length in windows),
            selected=selected,
            merged=count if tokens.assembly_index is None else selected // tokens.rows_per_token,
            tiles=attention.tiles.count,
        )
        object.__setattr__(self, "workload", workload)

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
        """Packs the patches of tiles in merge-block order, one temporal patch after the other.

        ``pixels`` is ``[patches, inner]``, for one frame per patch (still images) or for all frames of a patch, without
        class tokens.  The other arguments have one entry per image.

        Raises:
            ValueError: the rows do not match the layouts, or the tower cannot take a grid.
        """
        _check_pixels(config, pixels, [grid for layout in layouts for grid in layout.tiles])
        if not len(layouts) == len(original_sizes) == len(content_hashes):
            raise ValueError(
                f"original_sizes and content_hashes must have one entry per layout, got {len(layouts)} layouts, "
                f"{len(original_sizes)} original sizes and {len(content_hashes)} content hashes"
            )
        return _arrange(config, pixels, layouts, original_sizes, content_hashes)

    @classmethod
    def without_pixels(cls, config: TowerConfig, layouts: Sequence[ImageLayout]) -> "PackedBatch":
        """Makes the metadata alone; used to compute the cost of a forward pass in advance."""
        pixels = torch.empty(0, config.patch.still_inner, dtype=torch.float32, device="cpu")
        return _arrange(config, pixels, layouts, [layout.processed_size for layout in layouts], [""] * len(layouts))

    def __len__(self) -> int:
        return len(self.images.grids)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Graph-input name → tensor, of those that the batch has."""
        return {"pixels": self.pixels, **_list_tensors(self.attention), **_list_tensors(self.tokens)}

    def pinned(self) -> "PackedBatch":
        """Returns the batch with its pixels in aligned, page-locked rows, for asynchronous copies to a GPU; needs a GPU."""
        return replace(self, pixels=align_rows(self.pixels, pinned=True))

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the batch with its tensors on ``device``; the copies are asynchronous."""
        if self.pixels.device == self.attention.positions.device == device:
            return self

        def move(record: Any) -> Any:
            tensors = _list_tensors(record).items()
            return replace(record, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors})

        pixels = include_padding(self.pixels).to(device, non_blocking=True)[:, : self.pixels.shape[1]]
        return replace(self, pixels=pixels, attention=move(self.attention), tokens=move(self.tokens))


def _list_tensors(record: AttentionIndices | TokenIndices) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(record).items() if isinstance(value, torch.Tensor)}


def _arrange(
    config: TowerConfig,
    pixels: torch.Tensor,
    layouts: Sequence[ImageLayout],
    original_sizes: Sequence[tuple[int, int]],
    content_hashes: Sequence[str],
) -> PackedBatch:
    grids = [grid for layout in layouts for grid in layout.tiles]
    positions = merge_block_positions(grids, config.merge)
    places, windows = index_maps.order_rows(config, grids)
    index, weights = index_maps.index_position_table(config.position_table, positions, grids)
    tiles = [t * h * w for t, h, w in grids]
    lengths = [h * w for t, h, w in grids for _ in range(t)] if config.segments == "frame" else tiles
    if config.class_token:
        places = index_maps.shift_by_class_tokens(places, tiles)
        # Row 0 of the table belongs to the class token; rows that are not written are 0.
        index = None if index is None else index + 1
        tiles = lengths = [tile + 1 for tile in tiles]
    rows = sum(tiles)
    selection, assembly_index, assembly_weights = index_maps.index_tokens(config, layouts, places)
    fill = PIXEL_CENTER if pixels.dtype == torch.uint8 else 0
    return PackedBatch(
        pixels=index_maps.scatter_rows(pixels, places, rows, fill) if len(pixels) else pixels,
        images=ImageInfo(
            grids=tuple(layout.grid for layout in layouts),
            token_counts=tuple(layout.tokens(config) for layout in layouts),
            tile_grids=tuple(grids),
            tile_counts=tuple(len(layout.tiles) for layout in layouts),
            original_sizes=tuple(original_sizes),
            processed_sizes=tuple(layout.processed_size for layout in layouts),
            content_hashes=content_hashes if isinstance(content_hashes, Digests) else tuple(content_hashes),
        ),
        attention=AttentionIndices(
            positions=index_maps.scatter_rows(positions, places, rows),
            side=max((max(h, w) for _, h, w in grids), default=0),
            segments=Segments.from_lengths(lengths),
            windows=windows,
            tiles=Segments.from_lengths(tiles),
            position_index=None if index is None else index_maps.scatter_rows(index, places, rows),
            position_weights=None if weights is None else index_maps.scatter_rows(weights, places, rows),
        ),
        tokens=TokenIndices(
            rows_per_token=config.rows_per_token,
            class_rows=index_maps.list_first_rows(tiles),
            selection=selection,
            assembly_index=assembly_index,
            assembly_weights=assembly_weights,
        ),
        form=config.batch_form,
    )


def _check_pixels(config: TowerConfig, pixels: torch.Tensor, grids: Sequence[Grid]) -> None:
    patch, merge, table = config.patch, config.merge, config.position_table
    patches = sum(t * h * w for t, h, w in grids)
    if pixels.ndim != 2 or pixels.shape[0] != patches or pixels.shape[1] not in (patch.still_inner, patch.inner):
        raise ValueError(
            f"pixels for grids {list(grids)} must have shape [{patches}, {patch.still_inner}] for still images or "
            f"[{patches}, {patch.inner}] for videos, got {list(pixels.shape)}"
        )
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(f"grid must be positive, its rows and columns multiples of {merge}, got {(t, h, w)}")
        if table is not None and table.sampling == "exact" and (t, h, w) != (1, table.side, table.side):
            raise ValueError(
                f"grid must be {(1, table.side, table.side)}, the tower has no other positions, got {(t, h, w)}"
            )


def expected_workload(config: TowerConfig, counts: Sequence[int]) -> Workload:
    """Estimates the workload of images from their patch counts alone: windows are whole, and tiles are not padded."""
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
