"""Token ids of images: one for every row, beyond the vocabulary."""

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
from tritontower.errors import TokenSpaceExhaustedError, UsageError, shorten

__all__ = ["DEFAULT_BASE", "Ids", "TokenSpace", "ordered_by_ids", "sanitize_ids"]

REMEMBERED = 2**16
"""Released images whose ids are kept for them, in case they return: a server may run for years, its space may not grow."""

DEFAULT_BASE = 1_000_000_000
"""Where the ids of images begin: above every vocabulary, and low enough for a billion of them in 32 bits."""

Ids = torch.Tensor | Sequence[int]
"""Token ids: an integer tensor of any shape, or a sequence."""


@dataclass
class _Entry:
    first: int
    count: int
    uses: int


class TokenSpace:
    """Gives every row of every image a token id that nothing else has; for all prompts that share a key-value cache.

    The same image of the same size, encoded by the same tower, has the same ids, so that a prefix that holds it is
    found again.  A space belongs to one tower: it does not look at the rows.  It may be used from several threads.

    An image that returns after its ids were released gets them back, unless others have them by then: released ids are
    handed out again when no others are left, those released longest ago first, and images are forgotten when 65,536
    were released after them.

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
        self._idle: dict[object, None] = {}
        self._free = [(base, self.limit - base)]

    def assign(self, embedding: ImageEmbedding) -> ImageEmbedding:
        """The embedding with its token ids; each call counts as a use until it is released.

        Ids that it had before, of whatever space, do not count.  An embedding without a content hash is known by nothing:
        it gets a random one, under which what is returned, and only that, is the same image from then on.

        Raises:
            UsageError: it has no rows.
            TokenSpaceExhaustedError: so many ids in a row are neither free nor released.
        """
        if not embedding.content_hash:
            embedding = replace(embedding, content_hash=secrets.token_hex(32))
        key = _identity(embedding)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(self._take(embedding.num_tokens), embedding.num_tokens, 0)
                self._entries[key] = entry
            entry.uses += 1
            self._idle.pop(key, None)
        return embedding.with_token_ids(tuple(range(entry.first, entry.first + entry.count)))

    def release(self, *embeddings: ImageEmbedding) -> None:
        """Ends one use of the ids of each embedding; call it when no cache holds keys and values of them any more.

        Raises:
            UsageError: one's ids are not this space's, or another image's by now, or were released as often as they were
                assigned; then none is released.
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
        """Ids that are assigned and not released."""
        with self._lock:
            return sum(entry.count for entry in self._entries.values() if entry.uses)

    def _take(self, count: int) -> int:
        """The first of ``count`` ids in a row; forgets released images where that is the only way."""
        if count < 1:
            raise UsageError("an embedding without rows has no token ids")
        # From the end, where ids lie that nobody had yet; what was forgotten comes after them.
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
            f"no {count} token ids in a row are free between {self.base} and {self.limit}; release those that no cache "
            "holds any more, or make the space with int32=False"
        )

    def _forget(self, key: object) -> int:
        """Makes a released image's ids free, as one range with the free ones beside them; says which range."""
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
    """What two embeddings have alike if their rows, and what a language model makes of them, are the same."""
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


def ordered_by_ids(embeddings: Sequence[ImageEmbedding]) -> list[int]:
    """The numbers of the embeddings in the order of their token ids, each image once; those without rows are left out.

    Raises:
        UsageError: an embedding whose rows have no ids, or none in a row; two images that share ids.
    """
    firsts: dict[int, int] = {}
    for index, embedding in enumerate(embeddings):
        ids, rows = embedding.token_ids, embedding.num_tokens
        if not rows:
            continue
        if len(ids) != rows or tuple(ids) != tuple(range(ids[0], ids[0] + rows)):
            raise UsageError(
                f"embedding {index} has {len(ids)} token ids for {rows} rows; TokenSpace.assign gives each row one, in a row"
            )
        other = embeddings[firsts.setdefault(ids[0], index)]
        if other.num_tokens != rows or _told_apart(other, embedding):
            raise UsageError(f"embedding {index} has the token ids of another one; assign both in one space")
    ordered = [index for _, index in sorted(firsts.items())]
    for index, following in pairwise(ordered):
        if embeddings[index].token_ids[-1] >= (first := embeddings[following].token_ids[0]):
            raise UsageError(f"two embeddings have token id {first}; assign both in one space")
    return ordered


def _told_apart(first: ImageEmbedding, second: ImageEmbedding) -> bool:
    """Whether two embeddings say themselves that they are of different images."""
    return bool(first.content_hash and second.content_hash) and _identity(first) != _identity(second)


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
