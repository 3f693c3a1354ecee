"""A pass's rows, cut into the embeddings of its images, and the names that a call gives them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.embedding import ImageEmbedding, checked_alias
from tritontower.errors import UsageError, shorten

__all__ = ["aliases_of", "embeddings_of"]


def embeddings_of(
    config: TowerConfig, outputs: Mapping[str, torch.Tensor], batch: PackedBatch, *, bidirectional: bool = False
) -> list[ImageEmbedding]:
    """The rows of a pass, image by image.

    Args:
        config: the tower.
        outputs: what it made of the batch, by name.
        batch: the batch.
        bidirectional: whether a language model lets the rows of a tile attend to each other in both directions.
    """

    def parts(rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        # A tile would keep, and take along when it is pickled, the rows of the whole pack.
        return [part.clone() for part in rows.split(list(counts))] if len(batch) > 1 else [rows][: len(batch)]

    tokens = {name: parts(rows, batch.images.token_counts) for name, rows in outputs.items() if name != "pooled"}
    pooled = parts(outputs["pooled"], batch.images.tile_counts) if "pooled" in outputs else None
    levels = [tokens[f"deepstack.{level}"] for level in range(len(config.deepstack))]
    tiles = _tile_tokens(config, batch)
    return [
        ImageEmbedding(
            embeddings=rows,
            grid_thw=batch.images.grids[index],
            original_size=batch.images.original_sizes[index],
            processed_size=batch.images.processed_sizes[index],
            content_hash=batch.images.content_hashes[index],
            deepstack=tuple(level[index] for level in levels),
            pooled=None if pooled is None else pooled[index],
            tile_tokens=tiles[index],
            bidirectional_spans=tuple(pairwise(accumulate(tiles[index], initial=0))) if bidirectional else (),
        )
        for index, rows in enumerate(tokens["embeddings"])
    ]


def _tile_tokens(config: TowerConfig, batch: PackedBatch) -> list[tuple[int, ...]]:
    """Per image the tokens of its tiles; of one that is put together of tiles, all of its tokens."""
    if batch.tokens.assembly_index is not None:
        return [(tokens,) for tokens in batch.images.token_counts]
    extra = 1 if config.keep_class_token else 0
    counts = [t * h * w // config.rows_per_token + extra for t, h, w in batch.images.tile_grids]
    ends = list(accumulate(batch.images.tile_counts, initial=0))
    return [tuple(counts[first:last]) for first, last in pairwise(ends)]


def aliases_of(text_alias: str | Sequence[str | None] | None, images: int) -> Sequence[str | None]:
    """An alias, or ``None``, for every image.

    Raises:
        UsageError: no alias and no list of them, another number of aliases than images, or one that cannot be.
    """
    aliases = [text_alias] if isinstance(text_alias, str) else text_alias
    if aliases is None:
        return [None] * images
    if not isinstance(aliases, Sequence):
        raise UsageError(
            f"text_alias is {shorten(aliases)}; allowed: a text for one image, a list with one for each, or None"
        )
    if len(aliases) != images:
        raise UsageError(f"text_alias has {len(aliases)} aliases for {images} images; allowed: one for each, or None")
    return [checked_alias(alias) for alias in aliases]
