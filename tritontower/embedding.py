"""Embeddings of images and videos, and their files.

Files are safetensors: the rows as tensors, everything else as JSON in the metadata.  Reading a file runs no code, and
all of its metadata is checked.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
        """Returns the same embedding with the token ids of its rows.

        Raises:
            UsageError: not one integer ≥ 0 for each row.
        """
        given = tuple(ids)
        if len(given) != self.num_tokens or not all(map(_is_count, given)):
            raise UsageError(
                f"ids must be one integer ≥ 0 for each of {self.num_tokens} rows, got {len(given)} ids: {given[:3]} …"
            )
        return replace(self, token_ids=tuple(map(int, given)))

    def with_alias(self, alias: str | None) -> "ImageEmbedding":
        """Returns the same embedding with the text that stands for it in a prompt, or without one.

        Raises:
            UsageError: not a text, or an empty one.
        """
        return replace(self, text_alias=check_alias(alias))

    def save(self, path: str | Path) -> None:
        """Writes the embedding to a safetensors file; see :func:`save_embeddings`."""
        save_embeddings(path, [self])

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "ImageEmbedding":
        """Reads the one embedding in a file that :meth:`save` wrote.

        Raises:
            EmbeddingFileError: the file does not contain exactly one embedding.
            TowerError: as :func:`load_embeddings`.
        """
        found = load_embeddings(path, device=device)
        if len(found) != 1:
            raise EmbeddingFileError(f"{path} must hold one embedding, got {len(found)}; use load_embeddings")
        return found[0]


def check_alias(alias: str | None) -> str | None:
    """Returns ``alias``, or raises ``UsageError`` if it is not a text or empty."""
    if alias is not None and (not isinstance(alias, str) or not alias):
        raise UsageError(f"text_alias must be a text of at least one character, or None, got {shorten(alias)}")
    return alias


# -- files ------------------------------------------------------------------------------------------------------------


def save_embeddings(path: str | Path, embeddings: Sequence[ImageEmbedding]) -> None:
    """Writes embeddings to one safetensors file, atomically: an existing file stays until the new one is complete.

    Args:
        path: the file; an existing one is replaced and its permissions are kept.
        embeddings: any number, of any sizes and dtypes; the same one may occur several times.

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

    Args:
        path: the file.
        device: device of the tensors.

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
    return [
        _EntryReader(path, index, entry).read({name: tensors[f"{index}.{name}"] for name in _names(entry)}).to(where)
        for index, entry in enumerate(entries)
    ]


def _to_entry(embedding: ImageEmbedding) -> dict[str, Any]:
    """Returns everything except the tensors as JSON values."""
    tensors = ("embeddings", "deepstack", "pooled")
    entry = {field.name: getattr(embedding, field.name) for field in fields(embedding) if field.name not in tensors}
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


@dataclass(frozen=True)
class _EntryReader:
    """Reads the metadata of one embedding and checks every value."""

    path: Path
    index: int
    values: Mapping[str, Any]

    def read(self, tensors: dict[str, torch.Tensor]) -> ImageEmbedding:
        rows = tensors["embeddings"]
        levels = tuple(tensors[name] for name in tensors if name.startswith("deepstack."))
        if any(tensor.ndim != 2 or not tensor.is_floating_point() for tensor in tensors.values()):
            raise self.error("its tensors", "matrices of a floating dtype")
        if any(level.shape != rows.shape or level.dtype != rows.dtype for level in levels):
            raise self.error("its deepstack levels", f"of the shape {list(rows.shape)} and dtype of its rows")
        tokens = rows.shape[0]
        embedding = ImageEmbedding(
            embeddings=rows,
            grid_thw=self.counts("grid_thw", exactly=3, minimum=1),
            original_size=self.counts("original_size", exactly=2, minimum=1),
            processed_size=self.counts("processed_size", exactly=2, minimum=1),
            content_hash=self.value("content_hash", str, "a text"),
            deepstack=levels,
            pooled=tensors.get("pooled"),
            token_ids=self.counts("token_ids"),
            text_alias=self.value("text_alias", (str, type(None)), "a text"),
            bidirectional_spans=self.spans(tokens),
            tile_tokens=self.counts("tile_tokens"),
            seconds_per_grid=self.seconds(),
            timestamps=self.timestamps(),
            is_video=self.value("is_video", bool, "true or false"),
        )
        if len(embedding.token_ids) not in (0, tokens):
            raise self.error("token_ids", f"none, or one for each of its {tokens} rows")
        if sum(embedding.tile_tokens) != tokens:
            raise self.error("tile_tokens", f"numbers whose sum is its {tokens} rows")
        if len(embedding.timestamps) not in (0, embedding.grid_thw[0]):
            raise self.error("timestamps", f"none, or one for each of its {embedding.grid_thw[0]} temporal patches")
        timed = embedding.timestamps or embedding.seconds_per_grid is not None
        if not embedding.is_video and (timed or embedding.grid_thw[0] > 1):
            raise self.error("is_video", "true, since it has times or several temporal patches")
        return embedding

    def error(self, what: str, allowed: str) -> EmbeddingFileError:
        return EmbeddingFileError(f"{self.path}: embedding {self.index}: {what} must be {allowed}")

    def value(self, name: str, kinds: type | tuple[type, ...], allowed: str) -> Any:
        found = self.values.get(name)
        if not isinstance(found, kinds):
            raise self.error(name, allowed)
        return found

    def counts(self, name: str, *, exactly: int | None = None, minimum: int = 0) -> Any:
        found = self.value(name, list, f"a list of {exactly or ''} integers ≥ {minimum}")
        if exactly not in (None, len(found)) or not all(_is_count(number) and number >= minimum for number in found):
            raise self.error(name, f"a list of {exactly or ''} integers ≥ {minimum}")
        return tuple(found)

    def spans(self, tokens: int) -> tuple[tuple[int, int], ...]:
        allowed = f"pairs of rows, the first of 0 … {tokens} below the second"
        spans = self.value("bidirectional_spans", list, allowed)
        for span in spans:
            if not (isinstance(span, list) and len(span) == 2 and all(map(_is_count, span))):
                raise self.error("bidirectional_spans", allowed)
            if not span[0] < span[1] <= tokens:
                raise self.error("bidirectional_spans", allowed)
        return tuple((first, last) for first, last in spans)

    def seconds(self) -> float | None:
        found = self.values.get("seconds_per_grid")
        if found is not None and not _is_time(found):
            raise self.error("seconds_per_grid", "a finite number of seconds ≥ 0, or null")
        return found

    def timestamps(self) -> tuple[float, ...]:
        found = self.value("timestamps", list, "a list of finite numbers of seconds ≥ 0")
        if not all(map(_is_time, found)):
            raise self.error("timestamps", "a list of finite numbers of seconds ≥ 0")
        return tuple(found)


def _is_count(number: object) -> TypeGuard[int]:
    return is_integer(number) and 0 <= int(number) < 2**63


def _is_time(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < MAX_SECONDS
