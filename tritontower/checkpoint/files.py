"""Safetensors files of a checkpoint: which exist, which may be opened, and what is wrong with a bad one.

A checkpoint is a folder with ``model.safetensors.index.json`` and its shards, or with one ``model.safetensors``.  Mistral
publishes its own layout, often in the same folder and with other tensor names: ``consolidated.safetensors.index.json``
and its shards, or one ``consolidated.safetensors``, or numbered files without an index.

Files are read with ``pread``: a memory-mapped file that shrinks while it is read (an interrupted download, a network
file system) kills the process with SIGBUS; with ``pread`` it is an ordinary error.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

Layout = Literal["hf", "mistral"]
"""File names of Hugging Face transformers, or Mistral's own."""

SINGLE_NAMES: Final[Mapping[Layout, str]] = {"hf": "model.safetensors", "mistral": "consolidated.safetensors"}
"""Layout → the file with all tensors, if there are no shards."""

INDEX_NAMES: Final = {layout: f"{name}.index.json" for layout, name in SINGLE_NAMES.items()}
"""Layout → the file that maps tensors to shards."""

Prefixes = Mapping[str, str]
"""Stored prefix of the vision tower's tensors → its replacement.  ``""`` matches names that no other prefix matches."""

_WRAPPERS = frozenset({"model", "module", "base_model", "_orig_mod"})
"""Name prefixes added by transformers, DataParallel, PEFT and torch.compile."""

_SHARD_NAME = re.compile(r"[^/\\:]*\.safetensors")
_NUMBERED = re.compile(r"consolidated(?:-(?P<part>\d{5})-of-(?P<parts>\d{5})|\.(?P<rank>\d{2}))\.safetensors", re.ASCII)

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_INDEX_BYTES = 32 * 2**20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERSION_HINT = (
    "Reading a pickle can run code, so it is rejected. Ask the publisher for safetensors, use the repository's "
    "conversion (huggingface.co/spaces/safetensors/convert), or, if you trust the file: "
    "AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
)


def strip_prefix(name: str, prefixes: Prefixes) -> str | None:
    """Replaces the prefix of ``name``, after any wrappers; ``None`` if it is not a vision tensor.

    Wrappers (``model.``, ``module.``, ``base_model.``, ``_orig_mod.``) are removed one after the other until a prefix
    matches; the longest one applies.  A prefix may itself begin with a wrapper.  The prefix ``""`` matches any other name
    after removing all wrappers, but never tensors of a language model.

    Example: with ``{"vision_tower.": "tower."}`` both ``vision_tower.norm.weight`` and
    ``model.module.vision_tower.norm.weight`` become ``tower.norm.weight``.
    """
    rest = name
    while True:
        fitting = [prefix for prefix in prefixes if prefix and rest.startswith(prefix)]
        if fitting:
            prefix = max(fitting, key=len)
            return prefixes[prefix] + rest[len(prefix) :]
        wrapper, _, remainder = rest.partition(".")
        if wrapper not in _WRAPPERS or not remainder:
            break
        rest = remainder
    if "" not in prefixes or wrapper == "language_model":
        return None
    return prefixes[""] + rest


def list_shards(folder: Path, prefixes: Prefixes, layout: Layout = "hf") -> dict[str, list[str]]:
    """Maps each shard to its vision tensors' stored names, in the order of the folder's index."""
    index = folder / INDEX_NAMES[layout]
    try:
        weight_map = read_json(index, _MAX_INDEX_BYTES).get("weight_map")
    except ConfigError as error:
        raise CheckpointCorruptError(str(error)) from error
    if not isinstance(weight_map, dict):
        raise CheckpointIncompleteError(f"{index} must have a weight_map from tensors to shards")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.isprintable() or not _SHARD_NAME.fullmatch(shard):
            raise UnsafePathError(
                f"shards in {index.name} must be file names without folders that end in .safetensors, got "
                f"{shorten(shard)}"
            )
        if strip_prefix(name, prefixes) is not None:
            shards.setdefault(shard, []).append(name)
    return shards


def list_numbered_files(where: object, names: Iterable[str]) -> list[str]:
    """Lists Mistral's numbered files among ``names``, in order; used if there is no index.

    They are named ``consolidated-00001-of-00002.safetensors`` and so on, or ``consolidated.00.safetensors`` and so on.
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
        raise CheckpointAmbiguousError(f"{where} has numbered files of {len(sets)} sets ({examples}); keep one of them")
    ((parts, files),) = sets.items()
    numbers = range(1, int(parts) + 1) if parts else range(max(files) + 1)
    if len(numbers) != len(files) or any(number not in files for number in numbers):
        # Counted, not listed: the number of parts comes from a file's name, so it may be huge.
        raise CheckpointIncompleteError(
            f"{where} has {len(files)} of {len(numbers)} numbered files ({list_names(sorted(files.values()), 3)}); "
            "download the others"
        )
    return [files[number] for number in numbers]


def reject_pickles(where: object, names: Iterable[str]) -> None:
    """Raises :class:`~tritontower.errors.UnsafeFormatError` if there are pickled weights among ``names``."""
    pickles = sorted(name for name in names if name.endswith((*_PICKLE_SUFFIXES, ".bin.index.json")))
    if pickles:
        raise UnsafeFormatError(
            f"{where} has its weights only as pickles ({list_names(pickles, 3)}). {_CONVERSION_HINT}"
        )


def list_files(folder: Path, prefixes: Prefixes, layout: Layout = "hf") -> dict[str, list[str]]:
    """Maps each file to open to the vision tensors that the index requires in it (none without an index)."""
    index, single = INDEX_NAMES[layout], SINGLE_NAMES[layout]
    if (folder / index).exists():
        safe_path(folder, index)
        shards = list_shards(folder, prefixes, layout)
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise CheckpointIncompleteError(
                f"{folder} lacks {len(missing)} shards with vision tensors: {list_names(missing)}; download the "
                "checkpoint again",
                missing,
            )
        return shards
    if (folder / single).exists():
        return {single: []}
    names = [entry.name for entry in folder.iterdir()]
    numbered = list_numbered_files(folder, names) if layout == "mistral" else []
    if numbered:
        return {name: [] for name in numbered}
    others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
    if not others:
        reject_pickles(folder, names)
    hint = f"; it has {list_names(others, 3)}, which is another layout" if others else ""
    raise CheckpointNotFoundError(f"{folder} has neither {single} nor {index}{hint}")


def safe_path(folder: Path, name: str) -> Path:
    """Returns the path of the file ``name``; rejects a symbolic link that leaves the folder."""
    path, inside, target = folder / name, folder.resolve(), (folder / name).resolve()
    if not path.is_symlink() or target.is_relative_to(inside):
        return path
    # The Hugging Face cache: snapshots/<commit>/[subfolder/]name → blobs/<hash>.
    for inner in (inside, *inside.parents):
        if inner.parent.name == "snapshots" and target.parent == (inner.parent.parent / "blobs").resolve():
            return path
    raise UnsafePathError(f"{path} must not be a symbolic link that leaves the folder; copy the file into it")


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Converts errors of safetensors about ``path`` to typed errors with a likely cause."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointCorruptError(
            f"{path} is damaged, incomplete, or changed while it was read: {shorten(str(error), 160)}; "
            "download it again"
        ) from error
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from error


def open_safetensors(path: Path) -> Any:
    """Opens the safetensors file ``path`` and checks its header; the handle closes when it is garbage-collected."""
    with explain_read_errors(path):
        _check_header(path)
        return safe_open(str(path), framework="pt", device="cpu", backend="pread")


def _check_header(path: Path) -> None:
    """Checks the first bytes, because safetensors only reports a header that is too large."""
    if not path.is_file():
        raise CheckpointCorruptError(f"{path} is not an ordinary file")
    with path.open("rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    header = int.from_bytes(start[:8], "little")
    plausible = header <= _MAX_HEADER_BYTES and start[8:9] in (b"{", b"")
    if size < 8:
        problem = f"has {size} bytes, fewer than the 8 of a header's length; download it again"
    elif not plausible:
        problem = _describe_format(start)
    elif 8 + header > size:
        problem = f"is incomplete: {size} bytes, but the header alone takes {8 + header}; download it again"
    else:
        return
    raise CheckpointCorruptError(f"{path} {problem}")


def _describe_format(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the file itself; run `git lfs pull`, or download it from the hub"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, probably an error page saved as the file; download it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"is a pickle under another name. {_CONVERSION_HINT}"
    return "is not a safetensors file: it does not start with a header; download it again"
