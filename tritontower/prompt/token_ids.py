"""Token ids of image rows: one per row, beyond the vocabulary."""

import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock
from typing import overload

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import TokenSpaceExhaustedError, UsageError, is_integer, shorten

# Number of released images whose ids stay reserved for them; the limit keeps the space of a long-running server small.
REMEMBERED = 2**16

DEFAULT_BASE = 1_000_000_000
"""First id of images: above every vocabulary, with room for a billion ids in 32 bits."""

Ids = torch.Tensor | Sequence[int]
"""Token ids: an integer tensor of any shape, or a sequence."""


@dataclass
class _Entry:
    first: int
    count: int
    uses: int = 0


class TokenSpace:
    """Assigns a unique token id to every row of every image, for all prompts that share a key-value cache.

    The same image at the same size gets the same ids, so that a cached prefix with it is found again. A space belongs to
    one tower, since it does not compare rows. It is thread-safe.

    An image that returns after its release gets its former ids, unless they were reassigned: released ids are reused
    only when no others are left, the oldest release first. An image is forgotten after 65,536 later releases.

    Attributes:
        base: first id; the ids below belong to the vocabulary.
        limit: first id after the space.
    """

    def __init__(self, base: int = DEFAULT_BASE, *, int32: bool = True) -> None:
        """Creates a space from ``base``, which is at least 1, to the end of int32, or of int64 with ``int32=False``."""
        self.limit = 2**31 if int32 else 2**63
        if not is_integer(base) or not 1 <= base < self.limit:
            raise UsageError(f"base must be 1 to {self.limit - 1}, beyond the vocabulary, got {shorten(base)}")
        self.base = base
        self._lock = Lock()
        self._entries: dict[object, _Entry] = {}
        self._idle: dict[object, None] = {}
        self._free = [(base, self.limit - base)]

    def assign(self, embedding: ImageEmbedding) -> ImageEmbedding:
        """Returns the embedding with its token ids; each call counts as one use until it is released.

        Previous ids of the embedding are ignored. An embedding without a content hash gets a random one, so that only the
        returned embedding and its copies count as the same image. Raises :class:`TokenSpaceExhaustedError` if no range of
        that many ids is free or released.
        """
        if not embedding.content_hash:
            embedding = replace(embedding, content_hash=secrets.token_hex(32))
        key = _identity(embedding)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(self._take(embedding.num_tokens), embedding.num_tokens)
            entry.uses += 1
            self._idle.pop(key, None)
        return embedding.with_token_ids(tuple(range(entry.first, entry.first + entry.count)))

    def release(self, *embeddings: ImageEmbedding) -> None:
        """Ends one use of each embedding's ids; call it when no cache holds their keys and values any more.

        Releases nothing and raises :class:`UsageError` if one is not in use: by another space, reassigned, or released.
        """
        uses = Counter(map(_identity, embeddings))
        with self._lock:
            for embedding in embeddings:
                key, ids = _identity(embedding), embedding.token_ids
                entry = self._entries.get(key)
                if entry is None or entry.uses < uses[key] or ids[:1] != (entry.first,) or len(ids) != entry.count:
                    which = f"token ids from {ids[0]} on" if ids else "the token ids of an embedding that has none"
                    raise UsageError(
                        f"{which} are not in use for this image in the space that begins at {self.base}; release what "
                        "assign or encode_prompt returned, once"
                    )
            for key, count in uses.items():
                entry = self._entries[key]
                entry.uses -= count
                if entry.uses == 0:
                    self._idle[key] = None
                    if len(self._idle) > REMEMBERED:
                        self._forget(next(iter(self._idle)))

    @property
    def ids_in_use(self) -> int:
        """Number of ids that are assigned and not released."""
        with self._lock:
            return sum(entry.count for entry in self._entries.values() if entry.uses)

    def _take(self, count: int) -> int:
        """Takes ``count`` consecutive ids and returns the first; forgets released images only if it must."""
        if count < 1:
            raise UsageError("embedding must have rows to get token ids, got none")
        # From the end, where unused ids are; forgotten ranges come before them.
        places = range(len(self._free) - 1, -1, -1)
        while True:
            for place in places:
                first, length = self._free[place]
                if length >= count:
                    self._free[place : place + 1] = [(first + count, length - count)] if length > count else []
                    return first
            if not self._idle:
                break
            place = self._forget(next(iter(self._idle)))
            places = range(place, place + 1)
        raise TokenSpaceExhaustedError(
            f"no {count} consecutive token ids are free between {self.base} and {self.limit}; release those that no cache "
            "uses any more, or make the space with int32=False"
        )

    def _forget(self, key: object) -> int:
        """Frees a released image's ids, merges the range with free neighbors, and returns its index."""
        del self._idle[key]
        entry = self._entries.pop(key)
        first, end = entry.first, entry.first + entry.count
        place = bisect_left(self._free, (first, 0))
        start = stop = place
        if place and sum(self._free[place - 1]) == first:
            start, first = place - 1, self._free[place - 1][0]
        if place < len(self._free) and self._free[place][0] == end:
            stop, end = place + 1, sum(self._free[place])
        self._free[start:stop] = [(first, end - first)]
        return start


def _identity(embedding: ImageEmbedding) -> object:
    """Returns a key that is equal if the rows, and their treatment by a language model, are equal."""
    return (
        embedding.content_hash,
        embedding.grid_thw,
        embedding.original_size,
        embedding.processed_size,
        tuple(embedding.embeddings.shape),
        embedding.timestamps,
        embedding.seconds_per_grid,
        embedding.is_video,
    )


def assign_ids(images: Sequence[ImageEmbedding], space: TokenSpace | None) -> tuple[ImageEmbedding, ...]:
    """Assigns ids from the space, to all images or to none; without a space checks the images' own ids."""
    if space is None:
        if missing := [index for index, image in enumerate(images) if not image.token_ids]:
            raise UsageError(
                f"embedding {missing[0]} has no token ids; pass space=TokenSpace(), one for all prompts that share a cache"
            )
        order_by_ids(images)
        return tuple(images)
    assigned: list[ImageEmbedding] = []
    try:
        for image in images:
            assigned.append(space.assign(image))
    except BaseException:
        space.release(*assigned)
        raise
    return tuple(assigned)


def order_by_ids(embeddings: Sequence[ImageEmbedding]) -> list[int]:
    """Returns indices of the embeddings ordered by checked token ids, each image once, without those that have no rows."""
    firsts: dict[int, int] = {}
    for index, embedding in enumerate(embeddings):
        ids, rows = embedding.token_ids, embedding.num_tokens
        if not rows:
            continue
        if len(ids) != rows or tuple(ids) != tuple(range(ids[0], ids[0] + rows)):
            raise UsageError(
                f"token ids of embedding {index} must be {rows} consecutive ids, one per row, got {len(ids)} ids; let "
                "TokenSpace.assign give them"
            )
        other = embeddings[firsts.setdefault(ids[0], index)]
        hashed = bool(other.content_hash and embedding.content_hash)
        if other.num_tokens != rows or (hashed and _identity(other) != _identity(embedding)):
            raise UsageError(f"embedding {index} has the token ids of another one; assign both in one space")
    ordered = [index for _, index in sorted(firsts.items())]
    for index, following in pairwise(ordered):
        if embeddings[index].token_ids[-1] >= (first := embeddings[following].token_ids[0]):
            raise UsageError(f"two embeddings have token id {first}; assign both in one space")
    return ordered


@overload
def sanitize_ids(input_ids: torch.Tensor, vocabulary_size: int, replacement: int) -> torch.Tensor: ...


@overload
def sanitize_ids(input_ids: Sequence[int], vocabulary_size: int, replacement: int) -> list[int]: ...


def sanitize_ids(input_ids: Ids, vocabulary_size: int, replacement: int) -> torch.Tensor | list[int]:
    """Replaces all ids outside the vocabulary: for embedding tables, samplers and draft models.

    Args:
        input_ids: a tensor of any shape, or a sequence.
        vocabulary_size: ids from 0 to below it are kept.
        replacement: an id in the vocabulary, such as the layout's placeholder, or padding.
    """
    if not 0 <= replacement < vocabulary_size:
        raise UsageError(f"replacement must be in the vocabulary, 0 to {vocabulary_size - 1}, got {replacement}")
    if isinstance(input_ids, torch.Tensor):
        return torch.where((input_ids >= 0) & (input_ids < vocabulary_size), input_ids, replacement)
    return [token if 0 <= token < vocabulary_size else replacement for token in input_ids]
