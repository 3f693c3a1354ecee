"""Embeddings of images and videos, and their files.

Files are safetensors: the rows as tensors, everything else as JSON in the metadata.  Reading a file runs no code, and
all of its metadata is checked.
"""

import json
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch

from .batch.packed_batch import Grid
from .checkpoint.files import explain_read_errors, open_safetensors
from .devices import parse_device
from .errors import CheckpointCorruptError, EmbeddingFileError, UsageError, is_integer, shorten

__all__ = ["ImageEmbedding", "load_embeddings", "save_embeddings"]

FORMAT = "tritontower.embeddings"
VERSION = "1"

MAX_SECONDS = 2**63
"""Exclusive upper limit of a time in a file."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class ImageEmbedding:
    """The embeddings of one image or video, with the metadata that an engine needs to place them.

    Attributes:
        embeddings: ``[num_tokens, hidden_size]``, in the tower's dtype, in raster order (per temporal patch).
        grid_thw: temporal patches, rows and columns of *patches*; a token stands for a square of them.
        original_size: width and height of the input, pixels.
        processed_size: width and height after resizing, pixels.
        content_hash: digest of the decoded pixels; equal for equal images.
        deepstack: ``[num_tokens, hidden_size]`` each, added to the image's rows after the first, second … layer of the
            language model (Qwen3-VL); empty for other towers.
        pooled: ``[tiles, width]``, one vector per tile; ``None`` for towers without pooling.
        token_ids: the ids of its rows in a prompt; empty until a token space assigns them.
        text_alias: the text that stands for it in a prompt, if it has one.
        bidirectional_spans: first row and end row (exclusive) of each run of rows that a language model attends to in
            both directions (Gemma 3: a tile's rows); empty if there is none.
        tile_tokens: rows of each tile, if the tiles follow one another; ``(num_tokens,)`` otherwise.
        seconds_per_grid: for a video of known frame rate, the duration of one temporal patch.
        timestamps: for such a video, the middle of each temporal patch, seconds; empty otherwise.
        is_video: whether it is a video's.  Needed because a video of one temporal patch and unknown frame rate looks like
            an image.
    """

    embeddings: torch.Tensor
    grid_thw: Grid
    original_size: tuple[int, int]
    processed_size: tuple[int, int]
    content_hash: str
    deepstack: tuple[torch.Tensor, ...] = ()
    pooled: torch.Tensor | None = None
    token_ids: tuple[int, ...] = ()
    text_alias: str | None = None
    bidirectional_spans: tuple[tuple[int, int], ...] = ()
    tile_tokens: tuple[int, ...] = ()
    seconds_per_grid: float | None = None
    timestamps: tuple[float, ...] = ()
    is_video: bool = False

    def __post_init__(self) -> None:
        if not self.tile_tokens:
            object.__setattr__(self, "tile_tokens", (self.num_tokens,))

    def __repr__(self) -> str:
        # A dataclass's own would print every number.
        rows = f"{list(self.embeddings.shape)} {self.embeddings.dtype} on {self.embeddings.device}"
        extras = [f"{len(self.deepstack)} deepstack levels"] if self.deepstack else []
        extras += [] if self.pooled is None else ["pooled"]
        extras += [] if self.text_alias is None else [f"alias {self.text_alias!r}"]
        return f"<ImageEmbedding {', '.join([rows, f'grid {self.grid_thw}', *extras])}>"

    @property
    def num_tokens(self) -> int:
        """Rows of ``embeddings``: the tokens that the image takes in a prompt."""
        return self.embeddings.shape[0]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Name → tensor: ``embeddings``, ``deepstack.0`` … and ``pooled``, as far as they exist."""
        named = {"embeddings": self.embeddings}
        named |= {f"deepstack.{level}": rows for level, rows in enumerate(self.deepstack)}
        return named if self.pooled is None else {**named, "pooled": self.pooled}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "ImageEmbedding":
        """Returns the same embedding with other tensors, under the names of :attr:`tensors`."""
        return replace(
            self,
            embeddings=tensors["embeddings"],
            deepstack=tuple(tensors[f"deepstack.{level}"] for level in range(len(self.deepstack))),
            pooled=tensors.get("pooled"),
        )

    def to(self, device: torch.device | str, *, copy: bool = False) -> "ImageEmbedding":
        """Returns the same embedding on ``device``; ``copy`` always allocates new memory."""
        return self.with_tensors({name: tensor.to(device, copy=copy) for name, tensor in self.tensors.items()})

    def with_token_ids(self, ids: Sequence[int]) -> "ImageEmbedding":
        """Returns the same embedding with the token ids of its rows, one integer ≥ 0 for each."""
        given = tuple(ids)
        if len(given) != self.num_tokens or not all(map(_is_count, given)):
            raise UsageError(
                f"ids must be one integer ≥ 0 for each of {self.num_tokens} rows, got {len(given)} ids: {given[:3]} …"
            )
        return replace(self, token_ids=tuple(map(int, given)))

    def with_alias(self, alias: str | None) -> "ImageEmbedding":
        """Returns the same embedding with the text that stands for it in a prompt, or without one."""
        return replace(self, text_alias=check_alias(alias))

    def save(self, path: str | Path) -> None:
        """Writes the embedding to a safetensors file; see :func:`save_embeddings`."""
        save_embeddings(path, [self])

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "ImageEmbedding":
        """Reads the one embedding in a file that :meth:`save` wrote; errors are those of :func:`load_embeddings`."""
        found = load_embeddings(path, device=device)
        if len(found) != 1:
            raise EmbeddingFileError(f"{path} must hold one embedding, got {len(found)}; use load_embeddings")
        return found[0]


def check_alias(alias: str | None) -> str | None:
    """Returns ``alias``, or raises ``UsageError`` if it is not a text or empty."""
    if alias is not None and (not isinstance(alias, str) or not alias):
        raise UsageError(f"text_alias must be a text of at least one character, or None, got {shorten(alias)}")
    return alias


def save_embeddings(path: str | Path, embeddings: Sequence[ImageEmbedding]) -> None:
    """Writes embeddings of any sizes and dtypes to one safetensors file; the same one may occur several times.

    An existing file stays until the new one is complete, which gets its permissions.

    Raises:
        EmbeddingFileError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Embeddings may share memory, which safetensors does not allow.
    tensors = {
        f"{index}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for index, embedding in enumerate(embeddings)
        for name, tensor in embedding.tensors.items()
    }
    entries = json.dumps([_to_entry(embedding) for embedding in embeddings])
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise EmbeddingFileError(f"{path} cannot be written: it is not an ordinary file")
    try:
        with TemporaryDirectory(prefix=".tritontower-", dir=target.parent) as folder:
            finished = Path(folder, target.name)
            # safetensors writes files that only the owner can read; keep the permissions of the old file or the default.
            finished.touch()
            mode = stat.S_IMODE((target if target.exists() else finished).stat().st_mode)
            save_file(tensors, finished, metadata={"format": FORMAT, "version": VERSION, "embeddings": entries})
            finished.chmod(mode)
            finished.replace(target)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EmbeddingFileError(f"{path} cannot be written: {shorten(reason, 160)}") from error


def load_embeddings(path: str | Path, *, device: torch.device | str = "cpu") -> list[ImageEmbedding]:
    """Reads the embeddings that :func:`save_embeddings` wrote, in order.

    The file may come from a stranger, so all metadata is checked: shapes, counts, and the list of tensors.  The values of
    the tensors are not checked.

    Raises:
        UsageError: torch has no such device.
        BackendUnavailableError: the device does not exist here.
        EmbeddingFileError: the file is missing, damaged, of another format, or contradicts itself.
    """
    where = parse_device(device)
    path = Path(path)
    if not path.exists():
        raise EmbeddingFileError(f"{path}: there is no such file")
    try:
        handle = open_safetensors(path)
        entries = _read_entries(path, handle.metadata() or {}, set(handle.keys()))
        with explain_read_errors(path):
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle, no mapping)
    except CheckpointCorruptError as error:
        raise EmbeddingFileError(str(error)) from error
    found = []
    for index, entry in enumerate(entries):
        try:
            embedding = _read_entry(entry, {name: tensors[f"{index}.{name}"] for name in _names(entry)})
        except ValueError as error:
            raise EmbeddingFileError(f"{path}: embedding {index}: {error}") from error
        found.append(embedding.to(where))
    return found


def _to_entry(embedding: ImageEmbedding) -> dict[str, Any]:
    """Returns everything except the tensors as JSON values."""
    entry = {name: getattr(embedding, name) for name in _RULES}
    return {**entry, "deepstack_levels": len(embedding.deepstack), "pooled": embedding.pooled is not None}


def _names(entry: Mapping[str, Any]) -> list[str]:
    """Lists the names of an embedding's tensors, without its index."""
    levels = [f"deepstack.{level}" for level in range(entry["deepstack_levels"])]
    return ["embeddings", *levels, *(["pooled"] if entry["pooled"] else [])]


def _read_entries(path: Path, metadata: Mapping[str, str], stored: set[str]) -> list[dict[str, Any]]:
    """Returns the metadata of each embedding, if it lists exactly the stored tensors."""
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise EmbeddingFileError(
            f"{path} must be of format {FORMAT!r}, version {VERSION!r}, got {shorten(metadata.get('format'))}, version "
            f"{shorten(metadata.get('version'))}"
        )
    try:
        entries = json.loads(metadata.get("embeddings", ""))
    except (ValueError, RecursionError) as error:
        raise EmbeddingFileError(f"{path}: the metadata is not JSON") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise EmbeddingFileError(f"{path}: the metadata is not a list of embeddings")
    expected: set[str] = set()
    for index, entry in enumerate(entries):
        levels, pooled = entry.get("deepstack_levels"), entry.get("pooled")
        # A few bytes could promise any number of tensors.
        if not _is_count(levels) or levels > len(stored) - len(expected) or not isinstance(pooled, bool):
            raise EmbeddingFileError(f"{path}: embedding {index} does not say which of the file's tensors it has")
        expected |= {f"{index}.{name}" for name in _names(entry)}
    if expected != stored:
        odd = sorted(expected ^ stored)[0]
        raise EmbeddingFileError(
            f"{path}: the metadata lists {len(expected)} tensors and the file holds {len(stored)}; {shorten(odd)} is only in "
            "one of them"
        )
    return entries


def _read_entry(values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> ImageEmbedding:
    """Makes an embedding of its metadata and tensors; raises ``ValueError`` if they are invalid or do not fit together."""
    rows = tensors["embeddings"]
    levels = tuple(tensors[name] for name in tensors if name.startswith("deepstack."))
    if any(tensor.ndim != 2 or not tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError("its tensors must be matrices of a floating dtype")
    if any(level.shape != rows.shape or level.dtype != rows.dtype for level in levels):
        raise ValueError(f"its deepstack levels, also tensors, must be {list(rows.shape)} of the dtype of its rows")
    for name, (is_valid, allowed) in _RULES.items():
        # The rules of the later names rely on the earlier ones.
        if not is_valid(values.get(name), rows.shape[0], values):
            raise ValueError(f"{name} must be {allowed}")
    metadata = {name: _freeze(values.get(name)) for name in _RULES}
    return ImageEmbedding(embeddings=rows, deepstack=levels, pooled=tensors.get("pooled"), **metadata)


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _is_count(number: object) -> TypeGuard[int]:
    return is_integer(number) and 0 <= int(number) < 2**63


def _is_time(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < MAX_SECONDS


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are_sizes(value: Any, length: int) -> bool:
    return _are_counts(value) and len(value) == length and 0 not in value


def _are_spans(spans: object, rows: int) -> bool:
    return isinstance(spans, list) and all(
        _are_counts(span) and len(span) == 2 and span[0] < span[1] <= rows for span in spans
    )


def _are_times(times: object, patches: int) -> bool:
    return isinstance(times, list) and all(map(_is_time, times)) and len(times) in (0, patches)


def _is_kind(is_video: object, entry: Mapping[str, Any]) -> bool:
    looks_like_video = entry["timestamps"] or entry.get("seconds_per_grid") is not None or entry["grid_thw"][0] > 1
    return isinstance(is_video, bool) and (is_video or not looks_like_video)


_RULES: dict[str, tuple[Callable[[Any, int, Mapping[str, Any]], bool], str]] = {
    "grid_thw": (lambda grid, *_: _are_sizes(grid, 3), "three integers ≥ 1"),
    "original_size": (lambda size, *_: _are_sizes(size, 2), "two integers ≥ 1"),
    "processed_size": (lambda size, *_: _are_sizes(size, 2), "two integers ≥ 1"),
    "content_hash": (lambda digest, *_: isinstance(digest, str), "a text"),
    "token_ids": (lambda ids, rows, _: _are_counts(ids) and len(ids) in (0, rows), "no or one integer ≥ 0 per row"),
    "text_alias": (lambda alias, *_: isinstance(alias, (str, type(None))), "a text, or null"),
    "bidirectional_spans": (
        lambda spans, rows, _: _are_spans(spans, rows),
        "pairs of rows, the first below the second",
    ),
    "tile_tokens": (
        lambda counts, rows, _: _are_counts(counts) and sum(counts) == rows,
        "counts that add up to its rows",
    ),
    "seconds_per_grid": (lambda time, *_: time is None or _is_time(time), "a finite number of seconds ≥ 0, or null"),
    "timestamps": (
        lambda times, _, entry: _are_times(times, entry["grid_thw"][0]),
        "no or one time ≥ 0 per temporal patch",
    ),
    "is_video": (lambda flag, _, entry: _is_kind(flag, entry), "a boolean, true for times or several temporal patches"),
}
"""Metadata of an embedding: a check of the value, given the number of rows and the other values, and what is allowed."""
