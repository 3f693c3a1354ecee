"""Opens a checkpoint: locates its files, reads its configuration, and makes its preprocessor."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.checkpoint.hub import fetch_shards, locate
from tritontower.errors import Limits, UsageError, shorten
from tritontower.preprocessing import Preprocessor, ProcessorSource

from .family import Family
from .feature_layers import with_features
from .registry import declared_dtype, open_config, read_family


class TowerCheckpoint:
    """A tower's folder, configuration and declared dtype; :meth:`open` gives access to its stored tensors."""

    can_prepack = True
    """False if the tensors that are read stay in use elsewhere, in the canonical order."""

    def __init__(
        self,
        family: Family,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        fetch: Callable[..., None] = lambda *arguments, **options: None,
    ) -> None:
        self.family, self.folder, self.dtype, self._fetch = family, folder, dtype, fetch
        self.identity = token_hex(32)
        """Digest that differs for any two sets of weights; final once the checkpoint has been opened."""

    def open(self) -> Checkpoint:
        """Fetches the weight files that are missing and opens all of them."""
        family = self.family
        self._fetch(self.folder, family.prefixes, layout=family.layout)
        # Before reading: if a file changes during the read, its content must not be cached under the new state.
        self.identity = files_identity(self.folder)
        return Checkpoint.open(self.folder, prefixes=family.prefixes, layout=family.layout)


def open_checkpoint(
    model: str | Path,
    *,
    feature_layer: int | Sequence[int] | None = None,
    feature_select: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **download: Any,
) -> TowerCheckpoint:
    """Locates a checkpoint and reads its configuration; the arguments are those of ``VisionTower.from_pretrained``."""
    folder = locate(model, token=token, local_files_only=local_files_only, **download)
    reader = open_config(folder)
    family = with_features(read_family(reader), feature_layer, feature_select)
    fetch = partial(fetch_shards, token=token, local_files_only=local_files_only)
    return TowerCheckpoint(family, folder, dtype=declared_dtype(reader), fetch=fetch)


def make_preprocessor(
    checkpoint: TowerCheckpoint,
    preprocessing: str = "hf",
    *,
    processor: Any = None,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> Preprocessor:
    """Makes the preprocessor named ``preprocessing``; the arguments are those of ``VisionTower.from_pretrained``."""
    family = checkpoint.family
    make_rule = family.resize_rules.get(preprocessing)
    if make_rule is None:
        known = " or ".join(map(repr, family.resize_rules))
        raise UsageError(f"preprocessing must be {known} for this tower, got {shorten(preprocessing)}")
    source = ProcessorSource(family.config, checkpoint.folder, limits or Limits(), processor, options or {})
    return Preprocessor(source, make_rule)


def files_identity(folder: Path) -> str:
    """Hashes path, size, inode and modification time of a folder's weight files; reads none of them.

    Headers would not do: all fine-tunes of a model have the same ones.  Two copies of a checkpoint get two identities,
    and so does a file that is replaced or written to.
    """
    entries = []
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        entries.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev])
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=32).hexdigest()
