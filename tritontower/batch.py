"""A packed batch: all the patches of a call, one after the other, and every fact about them.

Nothing below the batch pads, masks or asks which picture a row belongs to.  The facts (grids, positions, segment
boundaries) are worked out once, on the CPU, when the batch is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .config import TowerConfig
from .graph import Workload
from .kernels.positions import merge_block_positions
from .kernels.segments import Segments

__all__ = ["Grid", "PackedBatch"]

Grid = tuple[int, int, int]
"""Temporal patches, rows and columns of patches of one picture or clip."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class PackedBatch:
    """Pictures or clips, as rows of patches.

    Attributes:
        pixels: ``[patches, inner]``, float or uint8; columns are channel, frame, row and column of the patch.  A batch
            of still pictures holds one frame per patch, a batch of clips as many as the tower's patches span.
        positions: ``[patches, 2]`` int32: row and column of each patch in its picture.
        segments: the runs of patches that attend to each other.
        grids: per picture or clip, its temporal patches, rows and columns of patches.
        rows_per_token: patches that become one token.
        original_sizes: per picture, width and height as it came, pixels.
        processed_sizes: per picture, width and height after resizing, pixels.
        content_hashes: per picture, a digest of its pixels as they came.
    """

    pixels: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    grids: tuple[Grid, ...]
    rows_per_token: int
    original_sizes: tuple[tuple[int, int], ...]
    processed_sizes: tuple[tuple[int, int], ...]
    content_hashes: tuple[str, ...]

    @classmethod
    def pack(
        cls,
        config: TowerConfig,
        pixels: torch.Tensor,
        grids: Sequence[Grid],
        *,
        original_sizes: Sequence[tuple[int, int]],
        content_hashes: Sequence[str],
    ) -> "PackedBatch":
        """Packs patches that are already in order: per temporal patch, merge block by merge block.

        Args:
            config: the tower that will take the batch.
            pixels: ``[patches, inner]`` for one frame per patch (still pictures) or for all that a patch spans.
            grids: temporal patches, rows and columns of each picture.
            original_sizes: width and height of each picture as it came.
            content_hashes: digest of each picture as it came.

        Raises:
            ValueError: the rows do not match the grids, or a grid does not divide into tokens.
        """
        patch, merge = config.patch, config.projector.merge
        patches = sum(t * h * w for t, h, w in grids)
        if pixels.ndim != 2 or pixels.shape[0] != patches or pixels.shape[1] not in (patch.still_inner, patch.inner):
            raise ValueError(
                f"pixels have shape {list(pixels.shape)}; grids {list(grids)} need [{patches}, {patch.still_inner}] for "
                f"still pictures or [{patches}, {patch.inner}] for clips"
            )
        for t, h, w in grids:
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise ValueError(f"grid {(t, h, w)} must be positive, its rows and columns multiples of {merge}")
        if not len(grids) == len(original_sizes) == len(content_hashes):
            raise ValueError(
                f"{len(grids)} grids, {len(original_sizes)} original sizes and {len(content_hashes)} content hashes "
                "must be as many"
            )
        if config.segments == "frame":
            lengths = [h * w for t, h, w in grids for _ in range(t)]
        else:
            lengths = [t * h * w for t, h, w in grids]
        return cls(
            pixels=pixels,
            positions=merge_block_positions(grids, merge),
            segments=Segments.from_lengths(lengths),
            grids=tuple(grids),
            rows_per_token=merge * merge,
            original_sizes=tuple(original_sizes),
            processed_sizes=tuple((w * patch.size, h * patch.size) for _, h, w in grids),
            content_hashes=tuple(content_hashes),
        )

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens of each picture."""
        return tuple(t * h * w // self.rows_per_token for t, h, w in self.grids)

    @cached_property
    def side(self) -> int:
        """The largest row or column of any grid, plus one: how many positions a table must cover."""
        return max((max(h, w) for _, h, w in self.grids), default=0)

    @cached_property
    def workload(self) -> Workload:
        """How much a pass over the batch has to do."""
        return Workload(
            patches=self.segments.total,
            tokens=self.segments.total // self.rows_per_token,
            scores=sum(length * length for length in self.segments.lengths),
        )

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its pixels and positions on ``device``; the copy does not wait for it."""
        if self.pixels.device == device:
            return self
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )
