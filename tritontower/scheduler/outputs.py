"""Embeddings of a forward pass: split by image, checked, cached, and copied to the caller's device."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Lock
from typing import Protocol

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.cache import EmbeddingCache
from tritontower.config import TowerConfig
from tritontower.embedding import ImageEmbedding
from tritontower.errors import NonFiniteOutputError, TowerError, is_out_of_memory


@dataclass(frozen=True)
class ItemError:
    """Result of an image that could not be encoded, with ``on_error="return"``; ``index`` is its position in the list."""

    index: int
    error: TowerError


def split_embeddings(
    config: TowerConfig, outputs: Mapping[str, torch.Tensor], batch: PackedBatch, *, bidirectional: bool = False
) -> list[ImageEmbedding]:
    """Splits the outputs of a forward pass by image.

    ``bidirectional``: the language model attends within a tile's rows in both directions.
    """

    def split(rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        # A view would keep, and pickle, the rows of the whole batch.
        return [part.clone() for part in rows.split(list(counts))] if len(batch) > 1 else [rows][: len(batch)]

    tokens = {name: split(rows, batch.images.token_counts) for name, rows in outputs.items() if name != "pooled"}
    pooled = split(outputs["pooled"], batch.images.tile_counts) if "pooled" in outputs else None
    levels = [tokens[f"deepstack.{level}"] for level in range(len(config.deepstack))]
    tiles = _count_tile_tokens(config, batch)
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


def _count_tile_tokens(config: TowerConfig, batch: PackedBatch) -> list[tuple[int, ...]]:
    """Counts the tokens of each tile; an image assembled from tiles has one entry with all of its tokens."""
    if batch.tokens.assembly_index is not None:
        return [(tokens,) for tokens in batch.images.token_counts]
    extra = 1 if config.keep_class_token else 0
    counts = [t * h * w // config.rows_per_token + extra for t, h, w in batch.images.tile_grids]
    ends = list(accumulate(batch.images.tile_counts, initial=0))
    return [tuple(counts[first:last]) for first, last in pairwise(ends)]


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether no tensor contains NaN or infinity; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class Event(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Waits until the device has reached it."""


def stage(tensor: torch.Tensor) -> tuple[torch.Tensor, Event]:
    """Starts a copy of a GPU's tensor to page-locked memory; returns that, and the event of its end."""
    staged = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return staged, torch.cuda.current_stream(tensor.device).record_event()


class HostCopies:
    """Copies tensors of a GPU to ordinary memory, through at most ``limit`` bytes (or one tensor) of page-locked memory.

    The host goes on while the GPU copies.  What a caller keeps is never page-locked: such memory cannot be swapped, and
    torch rounds it up to powers of two.
    """

    def __init__(
        self, limit: int = 64 * 2**20, stage: Callable[[torch.Tensor], tuple[torch.Tensor, Event]] = stage
    ) -> None:
        self._limit, self._stage = limit, stage
        self._pending: deque[tuple[torch.Tensor, Event, torch.Tensor]] = deque()
        self._lock = Lock()

    def start(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor that :meth:`finish` fills."""
        with self._lock:
            self._finish(self._limit - tensor.nbytes)
            target = torch.empty_like(tensor, device="cpu")
            self._pending.append((*self._stage(tensor), target))
            return target

    def finish(self) -> None:
        """Waits for all copies."""
        with self._lock:
            self._finish(0)

    def _finish(self, allowed: int) -> None:
        while self._pending and sum(staged.nbytes for staged, _, _ in self._pending) > allowed:
            staged, event, target = self._pending[0]
            event.synchronize()
            target.copy_(staged)
            # Last: Ctrl-C may come before, and the copy is then repeated.
            self._pending.popleft()


@dataclass(frozen=True, kw_only=True)
class OutputHandler:
    """Checks, caches and copies the embeddings of one call; ``key`` maps a digest to its key in the cache."""

    device: torch.device
    output_device: torch.device
    check_output: bool = False
    cache: EmbeddingCache | None = None
    key: Callable[[str], str] = str
    copies: HostCopies = field(default_factory=HostCopies)

    def look_up(self, digest: str) -> ImageEmbedding | NonFiniteOutputError | None:
        """Returns the cached embedding of an image; checks it, since the call that cached it may not have."""
        if self.cache is None:
            return None
        try:
            found = self.cache.get(self.key(digest), device=self.output_device)
            return None if found is None else self._find_error(found) or self._copy_out(found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Encode it again: a batch that does not fit can be halved, a copy cannot.
            return None

    def finish(self, embedding: ImageEmbedding, is_suspect: bool) -> ImageEmbedding | NonFiniteOutputError:
        """Checks an embedding of a forward pass if it ``is_suspect``, caches it and moves it to the output device."""
        if is_suspect and (error := self._find_error(embedding)):
            return error
        if self.cache is not None:
            self.cache.put(self.key(embedding.content_hash), embedding)
        return self._copy_out(embedding)

    def duplicate(self, embedding: ImageEmbedding) -> ImageEmbedding:
        """Returns a copy in memory of its own."""
        self.synchronize()
        return embedding.to(self.output_device, copy=True)

    def synchronize(self) -> None:
        """Waits for the copies to the CPU."""
        self.copies.finish()

    def _copy_out(self, embedding: ImageEmbedding) -> ImageEmbedding:
        if not embedding.embeddings.is_cuda or self.output_device.type != "cpu":
            return embedding.to(self.output_device)
        return embedding.with_tensors({name: self.copies.start(rows) for name, rows in embedding.tensors.items()})

    def _find_error(self, embedding: ImageEmbedding) -> NonFiniteOutputError | None:
        if not self.check_output or are_finite(embedding.tensors.values()):
            return None
        return NonFiniteOutputError(
            f"the embedding of an image of {embedding.original_size[0]} × {embedding.original_size[1]} pixels holds "
            f"NaN or infinity in {embedding.embeddings.dtype}; if that is float16, use bfloat16 or float32"
        )
