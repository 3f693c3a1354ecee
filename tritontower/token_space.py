"""Token ids of pictures: one for every row, beyond the vocabulary."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import overload

import torch

from .embedding import ImageEmbedding
from .errors import TokenSpaceExhaustedError, UsageError, shorten

__all__ = ["DEFAULT_BASE", "Ids", "TokenSpace", "sanitize_ids"]

DEFAULT_BASE = 1_000_000_000
"""Where the ids of pictures begin: above every vocabulary, and low enough for a billion of them in 32 bits."""

Ids = torch.Tensor | Sequence[int]
"""Token ids: an integer tensor of any shape, or a sequence."""


@dataclass
class _Entry:
    first: int
    count: int
    uses: int


class TokenSpace:
    """Gives every row of every picture a token id that nothing else has; for all prompts that share a key-value cache.

    The same picture of the same size, encoded by the same tower, has the same ids, so that a prefix that holds it is
    found again.  A space belongs to one tower: it does not look at the rows.  It may be used from several threads.

    Ids that were released are handed out again only when no others are left, those released longest ago first; until
    then the picture gets them back if it returns.

    Attributes:
        base: the first id; everything below it is left to the vocabulary.
        limit: the first id behind the space.
    """

    def __init__(self, base: int = DEFAULT_BASE, *, int32: bool = True) -> None:
        """A space from ``base`` up to what 32 bits hold, or 64 bits with ``int32=False``.

        Raises:
            UsageError: ``base`` is not positive, or leaves no room.
        """
        self.limit = 2**31 if int32 else 2**63
        if isinstance(base, bool) or not isinstance(base, int) or not 1 <= base < self.limit:
            raise UsageError(f"base is {shorten(base)}; allowed: 1 to {self.limit - 1}, beyond the vocabulary")
        self.base = base
        self._lock = Lock()
        self._entries: dict[object, _Entry] = {}
        self._keys: dict[int, object] = {}
        self._idle: dict[object, None] = {}
        self._free = [(base, self.limit - base)]

    def assign(self, embedding: ImageEmbedding) -> ImageEmbedding:
        """The embedding with its token ids; each call counts as a use until it is released.

        Raises:
            TokenSpaceExhaustedError: so many ids in a row are neither free nor released.
        """
        key = _identity(embedding)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(self._take(embedding.num_tokens), embedding.num_tokens, 0)
                self._entries[key], self._keys[entry.first] = entry, key
            entry.uses += 1
            self._idle.pop(key, None)
        return embedding.with_token_ids(tuple(range(entry.first, entry.first + entry.count)))

    def release(self, embedding: ImageEmbedding) -> None:
        """Ends one use of the embedding's ids; call it when no cache holds keys and values of them any more.

        Raises:
            UsageError: the ids are not this space's, or were released as often as they were assigned.
        """
        first = embedding.token_ids[0] if embedding.token_ids else None
        with self._lock:
            key = self._keys.get(first) if first is not None else None
            entry = self._entries.get(key)
            if entry is None or entry.uses == 0 or entry.count != len(embedding.token_ids):
                raise UsageError(f"token ids from {first} on are not in use in this space, which begins at {self.base}")
            entry.uses -= 1
            if entry.uses == 0:
                self._idle[key] = None

    @property
    def ids_in_use(self) -> int:
        """Ids that are assigned and not released."""
        with self._lock:
            return sum(entry.count for entry in self._entries.values() if entry.uses)

    def _take(self, count: int) -> int:
        """The first of ``count`` ids in a row; forgets released pictures where that is the only way."""
        if count < 1:
            raise UsageError("an embedding without rows has no token ids")
        while True:
            for place, (first, length) in enumerate(self._free):
                if length >= count:
                    self._free[place : place + 1] = [(first + count, length - count)] if length > count else []
                    return first
            if not self._idle:
                break
            self._forget(next(iter(self._idle)))
        raise TokenSpaceExhaustedError(
            f"no {count} token ids in a row are free between {self.base} and {self.limit}; release those that no cache "
            "holds any more, or make the space with int32=False"
        )

    def _forget(self, key: object) -> None:
        """Makes a released picture's ids free, as one range with the free ones beside them."""
        del self._idle[key]
        entry = self._entries.pop(key)
        del self._keys[entry.first]
        first, end = entry.first, entry.first + entry.count
        place = bisect_left(self._free, (first, 0))
        start = stop = place
        if place and sum(self._free[place - 1]) == first:
            start, first = place - 1, self._free[place - 1][0]
        if place < len(self._free) and self._free[place][0] == end:
            stop, end = place + 1, sum(self._free[place])
        self._free[start:stop] = [(first, end - first)]


def _identity(embedding: ImageEmbedding) -> object:
    """What two embeddings have alike if their rows, and what a language model makes of them, are the same."""
    if not embedding.content_hash:
        return object()
    return (
        embedding.content_hash,
        embedding.grid_thw,
        embedding.original_size,
        embedding.processed_size,
        tuple(embedding.embeddings.shape),
        embedding.timestamps,
        embedding.seconds_per_grid,
        embedding.is_clip,
    )


@overload
def sanitize_ids(input_ids: torch.Tensor, vocabulary_size: int, replacement: int) -> torch.Tensor: ...


@overload
def sanitize_ids(input_ids: Sequence[int], vocabulary_size: int, replacement: int) -> list[int]: ...


def sanitize_ids(input_ids: Ids, vocabulary_size: int, replacement: int) -> torch.Tensor | list[int]:
    """The ids with ``replacement`` for all that the vocabulary does not have: for embedding tables, samplers, drafts.

    Args:
        input_ids: a tensor of any shape, or a sequence.
        vocabulary_size: ids from 0 to below it are left as they are.
        replacement: one of them, such as the layout's placeholder, or padding.

    Raises:
        UsageError: ``replacement`` is not in the vocabulary.
    """
    if not 0 <= replacement < vocabulary_size:
        raise UsageError(
            f"replacement is {replacement}; allowed: 0 to {vocabulary_size - 1}, a token of the vocabulary"
        )
    if isinstance(input_ids, torch.Tensor):
        return torch.where((input_ids >= 0) & (input_ids < vocabulary_size), input_ids, replacement)
    return [token if 0 <= token < vocabulary_size else replacement for token in input_ids]
