"""Content digests of a batch's images, computed on first access."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, overload

import numpy as np


class HasDigest(Protocol):
    """A decoded image with pixels and a digest that is computed on first access."""

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The pixels."""

    @property
    def digest(self) -> str:
        """The digest of the pixels."""


class Digests(Sequence[str]):
    """Digests of images, each computed on first access; the image is kept until then.

    Equal to a tuple of the same texts, and copied or pickled as a tuple.  Threads may share it.
    """

    def __init__(self, images: Iterable[HasDigest]) -> None:
        self._entries: list[str | HasDigest] = [vars(image).get("digest", image) for image in images]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the images that are still kept."""
        return sum(entry.array.nbytes for entry in list(self._entries) if not isinstance(entry, str))

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
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

    def __repr__(self) -> str:
        return f"<digests of {len(self)} images; {self.kept_bytes} bytes of pixels kept>"

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)
