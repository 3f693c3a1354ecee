"""Content digests of a batch's images, computed on first access."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class HasDigest(Protocol):
    """A decoded image."""

    @property
    def digest(self) -> str:
        """Digest of the pixels, computed on first access."""


class Digests(Sequence[str]):
    """Digests of images, each computed on first access; the image is kept until then.

    Equal to a tuple of the same texts, and copied or pickled as a tuple.  Threads may share it.
    """

    def __init__(self, images: Iterable[HasDigest]) -> None:
        self._entries: list[str | HasDigest] = [vars(image).get("digest", image) for image in images]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        entry = self._entries[index]
        if not isinstance(entry, str):
            # Two threads may both compute it, with the same result.
            entry = self._entries[index] = entry.digest
        return entry

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, (tuple, Digests)) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)
