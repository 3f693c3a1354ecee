"""The files of a safetensors checkpoint: which there are, which may be opened, and what is wrong with one that is not.

A checkpoint is a folder with ``model.safetensors.index.json`` and its shards, or with one ``model.safetensors``.

Files are read with ``pread``: a memory-mapped file that shrinks while it is read (an interrupted download, a network
file system) kills the process with SIGBUS, this way it is an ordinary error.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ConfigError,
    UnsafeFormatError,
    UnsafePathError,
    list_names,
    shorten,
)
from .reader import read_json

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Prefixes",
    "WeightFiles",
    "check_shard_name",
    "explained",
    "open_safetensors",
    "refuse_pickles",
    "shards_with_prefix",
    "strip_prefix",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

Prefixes = Sequence[str] | Mapping[str, str]
"""Which stored names belong to the vision tower: prefixes to strip, or prefix → replacement."""

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERSION_HINT = (
    "Pickles can run code when they are read, so they are not. Ask the publisher for safetensors, use the repository's "
    "conversion (huggingface.co/spaces/safetensors/convert), or, if you trust the file: "
    "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
)


def strip_prefix(name: str, prefixes: Prefixes) -> str | None:
    """``name`` without the longest of ``prefixes`` that it begins with (or with its replacement); ``None`` if none."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            replacement = prefixes[prefix] if isinstance(prefixes, Mapping) else ""
            return replacement + name[len(prefix) :]
    return None


def check_shard_name(name: object) -> str:
    """``name`` if it is a plain file name that ends in ``.safetensors``.

    Raises:
        UnsafePathError: it is a path, or not a text at all.
    """
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or any(character in name for character in "/\\:\0")
        or not name.isprintable()
    ):
        raise UnsafePathError(
            f"{INDEX_NAME} names the shard {shorten(name)}; allowed is a file name without folders that ends in "
            ".safetensors"
        )
    return name


def shards_with_prefix(index: Path, prefixes: Prefixes) -> dict[str, list[str]]:
    """Shard → stored names of the vision tensors that the index file places there, in the index's order.

    Raises:
        CheckpointCorruptError: not a JSON object.
        CheckpointIncompleteError: no ``weight_map`` in it.
        UnsafePathError: any shard's name is a path.
    """
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointCorruptError(str(error)) from error
    if not isinstance(weight_map, dict):
        raise CheckpointIncompleteError(f"{index} has no weight_map, which says where each tensor is")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        check_shard_name(shard)
        if strip_prefix(name, prefixes) is not None:
            shards.setdefault(shard, []).append(name)
    return shards


def refuse_pickles(where: object, names: Iterable[str]) -> None:
    """Raises :class:`~tritontower.errors.UnsafeFormatError` if there are pickled weights among the file ``names``."""
    pickles = sorted(name for name in names if name.endswith((*_PICKLE_SUFFIXES, ".bin.index.json")))
    if pickles:
        raise UnsafeFormatError(
            f"{where} holds its weights only as pickles ({list_names(pickles, 3)}). {_CONVERSION_HINT}"
        )


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder, and which of them may be opened."""

    folder: Path
    allow_symlinks: bool

    def with_prefix(self, prefixes: Prefixes) -> dict[str, list[str]]:
        """File → names that it must hold, of the files that hold vision tensors."""
        if (self.folder / INDEX_NAME).exists():
            shards = shards_with_prefix(self.path(INDEX_NAME), prefixes)
            missing = sorted(shard for shard in shards if not (self.folder / shard).is_file())
            if missing:
                raise CheckpointIncompleteError(
                    f"{self.folder} lacks {len(missing)} shards with vision tensors: {list_names(missing)}; download "
                    "them again",
                    missing,
                )
            return shards
        if (self.folder / SINGLE_NAME).exists():
            return {SINGLE_NAME: []}
        names = [entry.name for entry in self.folder.iterdir()]
        others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
        if not others:
            refuse_pickles(self.folder, names)
        hint = f"; it holds {list_names(others, 3)}, which is another layout" if others else ""
        raise CheckpointNotFoundError(f"{self.folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")

    def path(self, name: str) -> Path:
        """The path of the file ``name``, if neither it nor a link that it is leads away."""
        path = self.folder / name
        if not path.is_symlink() or self.allow_symlinks:
            return path
        folder, target = self.folder.resolve(), path.resolve()
        if target.is_relative_to(folder):
            return path
        # The Hugging Face cache: snapshots/<commit>/[subfolder/]name → blobs/<hash>.
        for inner in (folder, *folder.parents):
            if inner.parent.name == "snapshots" and target.parent == (inner.parent.parent / "blobs").resolve():
                return path
        raise UnsafePathError(
            f"{path} is a symbolic link that leaves the folder; copy the file, or pass allow_symlinks=True if the link "
            "is yours"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what safetensors raises about ``path`` into an error that says what may be the cause."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointCorruptError(
            f"{path} is damaged, incomplete, or was changed while it was read: {shorten(str(error), 160)}; "
            "download it again"
        ) from error
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error


def open_safetensors(path: Path) -> Any:
    """A handle on the safetensors file ``path``, its header read and checked; it closes when nobody holds it any more.

    Raises:
        CheckpointCorruptError: it is something else, damaged or incomplete.
    """
    _sniff(path)
    with explained(path):
        return safe_open(str(path), framework="pt", device="cpu", backend="pread")


def _sniff(path: Path) -> None:
    """Recognises from the first bytes what safetensors would only call a header that is too large."""
    if not path.is_file():
        raise CheckpointCorruptError(f"{path} is not an ordinary file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror}") from error
    header = int.from_bytes(start[:8], "little")
    plausible = header <= _MAX_HEADER_BYTES and start[8:9] in (b"{", b"")
    if size < 8:
        problem = f"has {size} bytes, fewer than the 8 of a header's length; download it again"
    elif not plausible:
        problem = _impostor(start)
    elif 8 + header > size:
        problem = f"is incomplete: {size} bytes, but the header alone takes {8 + header}; download it again"
    else:
        return
    raise CheckpointCorruptError(f"{path} {problem}")


def _impostor(start: bytes) -> str:
    """What a file is that begins with ``start`` and cannot be safetensors."""
    if start.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull`, or download it from the hub"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, most likely an error page that was saved as the file; download it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"is a pickle under another name. {_CONVERSION_HINT}"
    return "is not a safetensors file: it does not begin with a header; download it again"
