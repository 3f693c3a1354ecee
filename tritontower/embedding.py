"""What an image becomes: rows that a language model takes in place of token embeddings, and files of them.

Files are safetensors: the rows as tensors, everything else as JSON in the metadata.  Nothing in them can run code, and
nothing in them is believed before it is checked.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .batch.packed_batch import Grid
from .checkpoint.files import explained, open_safetensors
from .devices import parse_device
from .errors import CheckpointCorruptError, EmbeddingFileError, UsageError, shorten

__all__ = ["ImageEmbedding", "checked_alias", "load_embeddings", "save_embeddings"]

FORMAT = "tritontower.embeddings"
VERSION = "1"

FOREVER = 2**63
"""Seconds, from which on a time in a file is no time."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class ImageEmbedding:
    """The embeddings of one image or video, and what an engine needs to place them.

    Attributes:
        embeddings: ``[num_tokens, hidden_size]``, in the tower's dtype, in raster order (per temporal patch).
        grid_thw: temporal patches, rows and columns of *patches*; a token stands for a square of them.
        original_size: width and height as the image came, pixels.
        processed_size: width and height after resizing, pixels.
        content_hash: digest of the pixels as they came; equal images have equal ones.
        deepstack: ``[num_tokens, hidden_size]`` each, which the language model adds to the image's rows behind its first,
            second … layer (Qwen3-VL); empty for other towers.
        pooled: ``[tiles, width]``, one vector for the image (for each of its tiles or crops, where it has several);
            ``None`` for towers without.
        token_ids: the ids that stand for its rows in a prompt; empty until a token space assigns them.
        text_alias: the text that stands for it in a prompt, where it has one.
        bidirectional_spans: first row and the row behind the last of every run of rows that a language model lets attend
            to each other in both directions (Gemma 3: a tile's rows); empty where it has none.
        tile_tokens: rows of each tile, where the tiles stand one after the other; ``(num_tokens,)`` otherwise.
        seconds_per_grid: of a video whose frame rate is known, the time that one temporal patch spans.
        timestamps: of such a video, the middle of each temporal patch, seconds; empty otherwise.
        is_video: whether it is a video's; one of a single temporal patch, whose frame rate is not known, has nothing else
            that tells it from an image's.
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
        """Everything that is a tensor, by name: ``embeddings``, ``deepstack.0`` … and ``pooled``, where they are."""
        named = {"embeddings": self.embeddings}
        named |= {f"deepstack.{level}": rows for level, rows in enumerate(self.deepstack)}
        return named if self.pooled is None else {**named, "pooled": self.pooled}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "ImageEmbedding":
        """The same embedding with other tensors, under the names of :attr:`tensors`."""
        return replace(
            self,
            embeddings=tensors["embeddings"],
            deepstack=tuple(tensors[f"deepstack.{level}"] for level in range(len(self.deepstack))),
            pooled=tensors.get("pooled"),
        )

    def to(self, device: torch.device | str, *, copy: bool = False) -> "ImageEmbedding":
        """The same embedding with its tensors on ``device``; with ``copy``, in memory of their own in any case."""
        return self.with_tensors({name: tensor.to(device, copy=copy) for name, tensor in self.tensors.items()})

    def with_token_ids(self, ids: Sequence[int]) -> "ImageEmbedding":
        """The same embedding with the ids that stand for its rows.

        Raises:
            UsageError: not one whole number ≥ 0 for each row.
        """
        given = tuple(ids)
        if len(given) != self.num_tokens or not all(_is_count(number) for number in given):
            raise UsageError(
                f"{len(given)} token ids for an embedding of {self.num_tokens} rows; allowed: one whole number ≥ 0 per row"
            )
        return replace(self, token_ids=tuple(int(number) for number in given))

    def with_alias(self, alias: str | None) -> "ImageEmbedding":
        """The same embedding with the text that stands for it in a prompt, or without one.

        Raises:
            UsageError: not a text, or an empty one.
        """
        return replace(self, text_alias=checked_alias(alias))

    def save(self, path: str | Path) -> None:
        """Writes the embedding to a safetensors file; see :func:`save_embeddings`."""
        save_embeddings(path, [self])

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "ImageEmbedding":
        """Reads the one embedding in a file that :meth:`save` wrote.

        Raises:
            EmbeddingFileError: the file holds another number of embeddings than one.
            TowerError: as :func:`load_embeddings`.
        """
        found = load_embeddings(path, device=device)
        if len(found) != 1:
            raise EmbeddingFileError(f"{path} holds {len(found)} embeddings, not one; read it with load_embeddings")
        return found[0]


def checked_alias(alias: str | None) -> str | None:
    """``alias``, if it can stand for an image in a prompt.

    Raises:
        UsageError: not a text, or an empty one.
    """
    if alias is not None and (not isinstance(alias, str) or not alias):
        raise UsageError(f"text_alias is {shorten(alias)}; allowed: a text of at least one character, or None")
    return alias


# -- files ------------------------------------------------------------------------------------------------------------


def save_embeddings(path: str | Path, embeddings: Sequence[ImageEmbedding]) -> None:
    """Writes embeddings to one safetensors file, whole or not at all: what was there before stays until it is done.

    Args:
        path: the file; an ordinary file in its place is replaced, and its permissions stay.
        embeddings: any number, of any sizes and dtypes, also the same one several times.

    Raises:
        EmbeddingFileError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The format has no two tensors in one piece of memory, and embeddings may share theirs.
    tensors = {
        f"{index}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for index, embedding in enumerate(embeddings)
        for name, tensor in embedding.tensors.items()
    }
    facts = json.dumps([_facts(embedding) for embedding in embeddings])
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise EmbeddingFileError(f"{path} cannot be written: it is not an ordinary file")
    try:
        with TemporaryDirectory(prefix=".tritontower-", dir=target.parent) as folder:
            finished = Path(folder, target.name)
            # What writes safetensors keeps its files to their owner; a file has the rights that it had, or that all have.
            finished.touch()
            mode = stat.S_IMODE((target if target.exists() else finished).stat().st_mode)
            save_file(tensors, finished, metadata={"format": FORMAT, "version": VERSION, "embeddings": facts})
            finished.chmod(mode)
            finished.replace(target)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EmbeddingFileError(f"{path} cannot be written: {shorten(reason, 160)}") from error


def load_embeddings(path: str | Path, *, device: torch.device | str = "cpu") -> list[ImageEmbedding]:
    """Reads what :func:`save_embeddings` wrote, in its order.

    Everything that the file says is checked, since it may have come from a stranger: shapes, counts, and that the tensors
    are the ones that the metadata lists.  Values are not looked at.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        UsageError: torch knows no such device.
        BackendUnavailableError: it is not here.
        EmbeddingFileError: there is no such file, it is damaged or something else, or it contradicts itself.
    """
    where = parse_device(device)
    path = Path(path)
    if not path.exists():
        raise EmbeddingFileError(f"{path}: there is no such file")
    try:
        handle = open_safetensors(path)
        listed = _listed(path, handle.metadata() or {}, set(handle.keys()))
        with explained(path):
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (a handle, no mapping)
    except CheckpointCorruptError as error:
        raise EmbeddingFileError(str(error)) from error
    return [
        _embedding(_Facts(path, index, facts), {name: tensors[f"{index}.{name}"] for name in _names(facts)}).to(where)
        for index, facts in enumerate(listed)
    ]


def _facts(embedding: ImageEmbedding) -> dict[str, Any]:
    """All of an embedding but its tensors, as JSON."""
    return {
        "grid_thw": embedding.grid_thw,
        "original_size": embedding.original_size,
        "processed_size": embedding.processed_size,
        "content_hash": embedding.content_hash,
        "deepstack_levels": len(embedding.deepstack),
        "pooled": embedding.pooled is not None,
        "token_ids": embedding.token_ids,
        "text_alias": embedding.text_alias,
        "bidirectional_spans": embedding.bidirectional_spans,
        "tile_tokens": embedding.tile_tokens,
        "seconds_per_grid": embedding.seconds_per_grid,
        "timestamps": embedding.timestamps,
        "is_video": embedding.is_video,
    }


def _names(facts: Mapping[str, Any]) -> list[str]:
    """The names of an embedding's tensors, without its index."""
    levels = [f"deepstack.{level}" for level in range(facts["deepstack_levels"])]
    return ["embeddings", *levels, *(["pooled"] if facts["pooled"] else [])]


def _listed(path: Path, metadata: Mapping[str, str], stored: set[str]) -> list[dict[str, Any]]:
    """What the metadata says of every embedding, if it lists just the tensors that are there."""
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise EmbeddingFileError(
            f"{path} says that it is {shorten(metadata.get('format'))}, version {shorten(metadata.get('version'))}; only "
            f"{FORMAT!r}, version {VERSION!r}, is read"
        )
    try:
        listed = json.loads(metadata.get("embeddings", ""))
    except (ValueError, RecursionError) as error:
        raise EmbeddingFileError(f"{path}: the metadata is not JSON") from error
    if not isinstance(listed, list) or not all(isinstance(facts, dict) for facts in listed):
        raise EmbeddingFileError(f"{path}: the metadata is not a list of embeddings")
    expected: set[str] = set()
    for index, facts in enumerate(listed):
        levels, pooled = facts.get("deepstack_levels"), facts.get("pooled")
        # A few bytes could promise any number of tensors.
        if not _is_count(levels) or levels > len(stored) - len(expected) or not isinstance(pooled, bool):
            raise EmbeddingFileError(f"{path}: embedding {index} does not say which of the file's tensors it has")
        expected |= {f"{index}.{name}" for name in _names(facts)}
    if expected != stored:
        odd = sorted(expected ^ stored)[0]
        raise EmbeddingFileError(
            f"{path}: the metadata lists {len(expected)} tensors and the file holds {len(stored)}; {shorten(odd)} is only in "
            "one of them"
        )
    return listed


def _embedding(facts: "_Facts", tensors: dict[str, torch.Tensor]) -> ImageEmbedding:
    """An embedding out of a file, checked."""
    rows = tensors["embeddings"]
    levels = tuple(tensors[name] for name in tensors if name.startswith("deepstack."))
    pooled = tensors.get("pooled")
    if any(tensor.ndim != 2 or not tensor.is_floating_point() for tensor in tensors.values()):
        raise facts.error("its tensors", "matrices of a floating dtype")
    if any(level.shape != rows.shape or level.dtype != rows.dtype for level in levels):
        raise facts.error("its deepstack levels", f"of the shape {list(rows.shape)} and dtype of its rows")
    tokens = rows.shape[0]
    embedding = ImageEmbedding(
        embeddings=rows,
        grid_thw=facts.counts("grid_thw", exactly=3, minimum=1),
        original_size=facts.counts("original_size", exactly=2, minimum=1),
        processed_size=facts.counts("processed_size", exactly=2, minimum=1),
        content_hash=facts.text("content_hash"),
        deepstack=levels,
        pooled=pooled,
        token_ids=facts.counts("token_ids"),
        text_alias=facts.text("text_alias", optional=True),
        bidirectional_spans=facts.spans(tokens),
        tile_tokens=facts.counts("tile_tokens"),
        seconds_per_grid=facts.seconds("seconds_per_grid"),
        timestamps=tuple(facts.each_second("timestamps")),
        is_video=facts.flag("is_video"),
    )
    if len(embedding.token_ids) not in (0, tokens):
        raise facts.error("token_ids", f"none, or one for each of its {tokens} rows")
    if sum(embedding.tile_tokens) != tokens:
        raise facts.error("tile_tokens", f"numbers whose sum is its {tokens} rows")
    if len(embedding.timestamps) not in (0, embedding.grid_thw[0]):
        raise facts.error("timestamps", f"none, or one for each of its {embedding.grid_thw[0]} temporal patches")
    timed = embedding.timestamps or embedding.seconds_per_grid is not None
    if not embedding.is_video and (timed or embedding.grid_thw[0] > 1):
        raise facts.error("is_video", "true, since it has times or several temporal patches")
    return embedding


@dataclass(frozen=True)
class _Facts:
    """What a file says of one embedding, each value read with what it has to be."""

    path: Path
    index: int
    values: Mapping[str, Any]

    def error(self, what: str, allowed: str) -> EmbeddingFileError:
        return EmbeddingFileError(f"{self.path}: embedding {self.index}: {what} must be {allowed}")

    def counts(self, name: str, *, exactly: int | None = None, minimum: int = 0) -> Any:
        found = self.values.get(name)
        if (
            not isinstance(found, list)
            or (exactly is not None and len(found) != exactly)
            or not all(_is_count(number) and number >= minimum for number in found)
        ):
            how_many = "a list of" if exactly is None else f"{exactly}"
            raise self.error(name, f"{how_many} whole numbers ≥ {minimum}")
        return tuple(found)

    def text(self, name: str, *, optional: bool = False) -> Any:
        found = self.values.get(name)
        if isinstance(found, str) or (found is None and optional):
            return found
        raise self.error(name, "a text")

    def flag(self, name: str) -> bool:
        found = self.values.get(name)
        if isinstance(found, bool):
            return found
        raise self.error(name, "true or false")

    def spans(self, tokens: int) -> tuple[tuple[int, int], ...]:
        found = self.values.get("bidirectional_spans")
        spans = [tuple(span) for span in found if isinstance(span, list)] if isinstance(found, list) else None
        if spans is None or len(spans) != len(found or ()) or not all(_is_span(span, tokens) for span in spans):
            raise self.error("bidirectional_spans", f"pairs of rows, the first of 0 … {tokens} below the second")
        return tuple((first, last) for first, last in spans)

    def seconds(self, name: str) -> float | None:
        found = self.values.get(name)
        if found is None or _is_time(found):
            return found
        raise self.error(name, "a finite number of seconds ≥ 0, or nothing")

    def each_second(self, name: str) -> list[float]:
        found = self.values.get(name)
        if isinstance(found, list) and all(_is_time(number) for number in found):
            return found
        raise self.error(name, "a list of finite numbers of seconds ≥ 0")


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= int(number) < 2**63


def _is_span(span: tuple[Any, ...], tokens: int) -> bool:
    return len(span) == 2 and all(_is_count(row) for row in span) and span[0] < span[1] <= tokens


def _is_time(number: object) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < FOREVER
