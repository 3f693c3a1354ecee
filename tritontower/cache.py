"""Embeddings that were computed before: a least-recently-used cache bounded by bytes, and the keys it is asked by.

A key stands for everything that an embedding depends on.  Two images, two towers or two settings never share one: every
part of a key is framed by its length, digests are never shortened, and an image is known by its canonical pixels and
size, not by its file, so that a palette, a transparent color or swapped sides make another image.
"""

import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .config import TowerConfig
from .devices import parse_device
from .embedding import ImageEmbedding
from .errors import UsageError, is_out_of_memory, shorten
from .preprocessing import Bounds, Preprocessor
from .preprocessing.processor_config import VIDEO_FILES

__all__ = [
    "CacheStats",
    "EmbeddingCache",
    "embedding_key",
    "files_identity",
    "framed_digest",
    "preprocessing_identity",
    "tower_identity",
]


@dataclass(frozen=True)
class CacheStats:
    """What a cache has done and holds.

    Attributes:
        hits: embeddings that were asked for and there.
        misses: those that were not.
        evictions: those that had to go for others.
        bytes: what the tensors in it take.
        entries: how many embeddings it holds.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int
    entries: int


@dataclass(frozen=True)
class _Entry:
    embedding: ImageEmbedding
    ready: torch.cuda.Event | None
    """When the copy into the cache is done, on a GPU."""


class EmbeddingCache:
    """Keeps embeddings up to a number of bytes; what was not asked for the longest goes first.

    Several towers and any number of threads may share one.  What goes in and what comes out are copies: whoever changes an
    embedding changes only theirs.

    Args:
        max_bytes: what the tensors in it may take; an embedding larger than that, or for which the device has no memory
            left, is not kept.
        device: where they are kept.  On a GPU a hit costs no transfer; ``"cpu"`` spares the GPU's memory, and keeping an
            embedding there waits for the GPU.

    Raises:
        UsageError: a size that is not a whole number ≥ 0.
    """

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
            raise UsageError(f"max_bytes is {shorten(max_bytes)}; allowed: a whole number of bytes ≥ 0")
        self.max_bytes = max_bytes
        self.device = parse_device(device)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = Lock()

    def get(self, key: str, *, device: torch.device | str | None = None) -> ImageEmbedding | None:
        """A copy of the embedding under ``key``, on ``device`` or else where the cache is; ``None`` if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
        _wait_for(entry)
        return entry.embedding.to(device or self.device, copy=True)

    def put(self, key: str, embedding: ImageEmbedding) -> None:
        """Keeps a copy of ``embedding`` under ``key``, in place of what was there."""
        if embedding.nbytes > self.max_bytes:
            return
        try:
            entry = _entry(embedding.to(self.device, copy=True))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Whoever computed it goes on with it.
            return
        with self._lock:
            self._remove(key)
            while self._bytes + entry.embedding.nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))
                self._evictions += 1
            self._entries[key] = entry
            self._bytes += entry.embedding.nbytes

    def clear(self) -> None:
        """Forgets every embedding; the counts of hits, misses and evictions go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @property
    def stats(self) -> CacheStats:
        """What the cache has done and holds, at one moment."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.embedding.nbytes


def _entry(embedding: ImageEmbedding) -> _Entry:
    device = embedding.embeddings.device
    if device.type != "cuda":
        return _Entry(embedding, None)
    with torch.cuda.device(device):
        ready = torch.cuda.Event()
        ready.record()
    return _Entry(embedding, ready)


def _wait_for(entry: _Entry) -> None:
    """Makes this thread's stream wait for the copy into the cache, and the memory wait for the stream."""
    if entry.ready is None:
        return
    stream = torch.cuda.current_stream(entry.embedding.embeddings.device)
    stream.wait_event(entry.ready)
    for tensor in entry.embedding.tensors.values():
        tensor.record_stream(stream)


# -- keys -------------------------------------------------------------------------------------------------------------


def framed_digest(parts: Iterable[str | bytes]) -> str:
    """BLAKE2b-256 over ``parts``, each behind its length, in hexadecimal: equal exactly for equal sequences."""
    state = hashlib.blake2b(digest_size=32, person=b"tritontower-key")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def files_identity(folder: Path) -> str:
    """A digest of which weights a checkpoint's folder holds: path, size, inode and time of change of its weight files.

    Cheap, because nothing is read.  Headers would not do: every fine-tune of a model has the same ones.  Two copies of a
    checkpoint count as two; a file that is replaced, or written to, counts as another.
    """
    facts = []
    for path in sorted(folder.glob("*.safetensors")):
        found = path.stat()
        facts.append([str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev])
    return framed_digest([json.dumps(facts)])


def preprocessing_identity(preprocessor: Preprocessor) -> str:
    """A digest of everything that decides about an image's pixels and tiles beside the image and the call's bounds.

    That is the rule, its settings and options, and the processor's files.  A setting that is no plain value makes a digest
    of its own every time: such a preprocessor shares with nobody.
    """
    own = ("config", "folder", "limits", "given")
    settings = {
        field.name: getattr(preprocessor, field.name) for field in fields(preprocessor) if field.name not in own
    }
    given = preprocessor.given
    if given is not None:
        settings["given"] = [type(given).__qualname__, given.to_dict() if hasattr(given, "to_dict") else given]
    parts: list[str | bytes] = [type(preprocessor).__qualname__, _plain(settings)]
    for name in VIDEO_FILES:
        path = preprocessor.folder / name
        parts += [name, path.read_bytes() if path.is_file() else b""]
    return framed_digest(parts)


def tower_identity(
    weights: str, config: TowerConfig, preprocessor: Preprocessor, computes: tuple[torch.dtype, str, str]
) -> str:
    """A digest of everything that an embedding depends on beside the image and the call's bounds.

    Args:
        weights: of a checkpoint :func:`files_identity`, which tells any two apart; of other weights what nothing else has.
        config: the tower, its features included.
        preprocessor: what makes its batches.
        computes: the dtype, the kind of device, and what computes there.
    """
    return framed_digest(
        [
            weights,
            json.dumps(config.to_json(), sort_keys=True),
            preprocessing_identity(preprocessor),
            *map(str, computes),
        ]
    )


def embedding_key(tower: str, bounds: Bounds, content_hash: str) -> str:
    """The key of one image's embedding, out of its tower's identity, the call's bounds and the digest of its pixels."""
    given = sorted((name, value) for name, value in bounds.items() if value is not None)
    return framed_digest([tower, json.dumps(given, default=int), content_hash])


def _plain(settings: dict[str, Any]) -> str:
    try:
        return json.dumps(settings, sort_keys=True, default=_as_dict)
    except (TypeError, ValueError):
        return secrets.token_hex(32)


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no plain value")
