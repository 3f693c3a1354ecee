"""A least-recently-used cache of embeddings, bounded by bytes."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch

from .devices import parse_device
from .embedding import ImageEmbedding
from .errors import UsageError, is_integer, is_out_of_memory, shorten

__all__ = ["CacheStats", "EmbeddingCache"]


@dataclass(frozen=True)
class CacheStats:
    """Counters of a cache: lookups that found an embedding or none, evictions, and what is cached now."""

    hits: int
    misses: int
    evictions: int
    bytes: int
    entries: int


class _Entry(NamedTuple):
    embedding: ImageEmbedding
    ready: torch.cuda.Event | None
    """On a GPU, the end of the copy into the cache."""


class EmbeddingCache:
    """Caches embeddings up to a number of bytes and evicts the least recently used.

    Several towers and any number of threads may share a cache.  ``put`` and ``get`` copy, so changing an embedding never
    changes the cached one.

    Args:
        max_bytes: maximum memory of the cached tensors.  An embedding that is larger, or does not fit into the device's
            free memory, is not cached.
        device: device of the cached tensors.  On a GPU a hit needs no transfer; ``"cpu"`` saves GPU memory, but caching an
            embedding then waits for the GPU.

    Raises:
        UsageError: ``max_bytes`` is not an integer ≥ 0, or the device is unknown.
    """

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        if not is_integer(max_bytes) or max_bytes < 0:
            raise UsageError(f"max_bytes must be an integer ≥ 0, got {shorten(max_bytes)}")
        self.max_bytes = max_bytes
        self.device = parse_device(device)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = Lock()

    def get(self, key: str, *, device: torch.device | str | None = None) -> ImageEmbedding | None:
        """Returns a copy of the cached embedding, on ``device`` or else on the cache's device; ``None`` if absent."""
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
        """Caches a copy of ``embedding``, replacing an older one under the same key."""
        if embedding.nbytes > self.max_bytes:
            return
        try:
            copied = embedding.to(self.device, copy=True)
            ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            entry = _Entry(copied, ready)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The embedding itself exists, so the call that computed it goes on.
            return
        with self._lock:
            self._remove(key)
            while self._bytes + entry.embedding.nbytes > self.max_bytes:
                self._remove(next(iter(self._entries)))
                self._evictions += 1
            self._entries[key] = entry
            self._bytes += entry.embedding.nbytes

    def clear(self) -> None:
        """Removes every embedding; the counters of hits, misses and evictions continue."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @property
    def stats(self) -> CacheStats:
        """A consistent snapshot of the counters."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, self._bytes, len(self._entries))

    def __len__(self) -> int:
        return self.stats.entries

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._entries

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.embedding.nbytes


def _wait_for(entry: _Entry) -> None:
    """Makes this thread's stream wait for the copy into the cache, and the memory wait for the stream."""
    if entry.ready is None:
        return
    stream = torch.cuda.current_stream(entry.embedding.embeddings.device)
    stream.wait_event(entry.ready)
    for tensor in entry.embedding.tensors.values():
        tensor.record_stream(stream)
