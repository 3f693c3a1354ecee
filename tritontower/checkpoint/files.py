"""The files of a safetensors checkpoint: which there are, which may be opened, and what is wrong with one that is not.

A checkpoint is a folder with ``model.safetensors.index.json`` and its shards, or with one ``model.safetensors``.  Mistral
publishes its own layout, often beside that one and with other tensor names: ``consolidated.safetensors.index.json`` and
its shards, or one ``consolidated.safetensors``, or numbered files without an index.

Files are read with ``pread``: a memory-mapped file that shrinks while it is read (an interrupted download, a network
file system) kills the process with SIGBUS, this way it is an ordinary error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open

from tritontower.errors import (
    CheckpointAmbiguousError,
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ConfigError,
    UnsafeFormatError,
    UnsafePathError,
    list_names,
    shorten,
)

from .config_reader import read_json

__all__ = [
    "INDEX_NAMES",
    "SINGLE_NAMES",
    "Layout",
    "Prefixes",
    "WeightFiles",
    "check_shard_name",
    "explained",
    "numbered_files",
    "open_safetensors",
    "refuse_pickles",
    "shards_with_prefix",
    "strip_prefix",
]

Layout = Literal["hf", "mistral"]
"""Whose names the files have: those of Hugging Face transformers, or Mistral's own."""

INDEX_NAMES: Final[Mapping[Layout, str]] = {
    "hf": "model.safetensors.index.json",
    "mistral": "consolidated.safetensors.index.json",
}
"""Layout → the file that says which shard holds which tensor."""

SINGLE_NAMES: Final[Mapping[Layout, str]] = {"hf": "model.safetensors", "mistral": "consolidated.safetensors"}
"""Layout → the file that holds everything, where there are no shards."""

Prefixes = Mapping[str, str]
"""Which stored names belong to the vision tower: how they begin → what that becomes.  ``""`` takes what nothing else does."""

_WRAPPERS = frozenset({"model", "module", "base_model", "_orig_mod"})
"""Components that training, compiling and saving put before a name: transformers, DataParallel, PEFT, torch.compile."""

_LANGUAGE_MODEL = "language_model"

_NUMBERED = re.compile(r"consolidated(?:-(?P<part>\d{5})-of-(?P<parts>\d{5})|\.(?P<rank>\d{2}))\.safetensors", re.ASCII)

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERSION_HINT = (
    "Pickles can run code when they are read, so they are not. Ask the publisher for safetensors, use the repository's "
    "conversion (huggingface.co/spaces/safetensors/convert), or, if you trust the file: "
    "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
)


def strip_prefix(name: str, prefixes: Prefixes) -> str | None:
    """``name`` with its root replaced, wherever wrappers put it; ``None`` if it is not of the vision tower.

    Wrappers (``model.``, ``module.``, ``base_model.``, ``_orig_mod.``) are dropped from the front, one after the other,
    until a root fits; of several the longest.  A root may itself begin with such a word.  The root ``""`` takes what is
    left of any other name when no more can be dropped, but never what belongs to a language model.

    Example: with ``{"vision_tower.": "tower."}`` both ``vision_tower.norm.weight`` and
    ``model.module.vision_tower.norm.weight`` become ``tower.norm.weight``.
    """
    rest = name
    while True:
        fitting = [root for root in prefixes if root and rest.startswith(root)]
        if fitting:
            root = max(fitting, key=len)
            return prefixes[root] + rest[len(root) :]
        wrapper, _, behind = rest.partition(".")
        if wrapper not in _WRAPPERS or not behind:
            break
        rest = behind
    if "" not in prefixes or wrapper == _LANGUAGE_MODEL:
        return None
    return prefixes[""] + rest


def check_shard_name(name: object, index: str = INDEX_NAMES["hf"]) -> str:
    """``name`` if it is a plain file name that ends in ``.safetensors``; ``index`` is the file that has it.

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
            f"{index} names the shard {shorten(name)}; allowed is a file name without folders that ends in .safetensors"
        )
    return name


def shards_with_prefix(folder: Path, prefixes: Prefixes, layout: Layout = "hf") -> dict[str, list[str]]:
    """Shard → stored names of the vision tensors that the folder's index places there, in the index's order.

    Raises:
        CheckpointNotFoundError: no index of this layout.
        CheckpointCorruptError: not a JSON object.
        CheckpointIncompleteError: no ``weight_map`` in it.
        UnsafePathError: any shard's name is a path.
    """
    index = folder / INDEX_NAMES[layout]
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointCorruptError(str(error)) from error
    if not isinstance(weight_map, dict):
        raise CheckpointIncompleteError(f"{index} has no weight_map, which says where each tensor is")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        check_shard_name(shard, index.name)
        if strip_prefix(name, prefixes) is not None:
            shards.setdefault(shard, []).append(name)
    return shards


def numbered_files(where: object, names: Iterable[str]) -> list[str]:
    """Those of the file ``names`` that are Mistral's numbered ones, in order: for where there is no index to list them.

    They are ``consolidated-00001-of-00002.safetensors`` and so on, or ``consolidated.00.safetensors`` and so on.

    Raises:
        CheckpointIncompleteError: a number is left out.
        CheckpointAmbiguousError: they are of two sets.
    """
    sets: dict[str, dict[int, str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            sets.setdefault(match["parts"] or "", {})[int(match["part"] or match["rank"])] = name
    if not sets:
        return []
    if len(sets) > 1:
        examples = list_names(sorted(min(files.values()) for files in sets.values()))
        raise CheckpointAmbiguousError(
            f"{where} holds numbered files of {len(sets)} sets ({examples}); keep one of them"
        )
    ((parts, files),) = sets.items()
    numbers = range(1, int(parts) + 1) if parts else range(max(files) + 1)
    if len(numbers) != len(files) or any(number not in files for number in numbers):
        # Counted, not listed: the number of parts is a file's name, which may say anything.
        raise CheckpointIncompleteError(
            f"{where} holds {len(files)} of {len(numbers)} numbered files ({list_names(sorted(files.values()), 3)}); "
            "download the others"
        )
    return [files[number] for number in numbers]


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

    def with_prefix(self, prefixes: Prefixes, layout: Layout = "hf") -> dict[str, list[str]]:
        """File → names that it must hold, of the files that hold vision tensors, or may where no index says which."""
        index, single = INDEX_NAMES[layout], SINGLE_NAMES[layout]
        if (self.folder / index).exists():
            self.path(index)
            shards = shards_with_prefix(self.folder, prefixes, layout)
            missing = sorted(shard for shard in shards if not (self.folder / shard).is_file())
            if missing:
                raise CheckpointIncompleteError(
                    f"{self.folder} lacks shards with vision tensors, {len(missing)} in all: {list_names(missing)}; download "
                    "the checkpoint again",
                    missing,
                )
            return shards
        if (self.folder / single).exists():
            return {single: []}
        names = [entry.name for entry in self.folder.iterdir()]
        numbered = numbered_files(self.folder, names) if layout == "mistral" else []
        if numbered:
            return {name: [] for name in numbered}
        others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
        if not others:
            refuse_pickles(self.folder, names)
        hint = f"; it holds {list_names(others, 3)}, which is another layout" if others else ""
        raise CheckpointNotFoundError(f"{self.folder} holds neither {single} nor {index}{hint}")

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
    """Recognizes from the first bytes what safetensors would only call a header that is too large."""
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
