"""Checks before every handoff: the embeddings must fit the tower that they came from.

Engines do not check what they receive. A missing row, or rows of another model, end in an assertion inside a worker
process, or in another image's rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from tritontower.config import TowerConfig
from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError
from tritontower.tower import VisionTower

Form = TypeVar("Form")

Refusal = tuple[str, str]
"""Reason why an engine takes no embeddings of a model, and an alternative."""

NO_LANGUAGE_MODEL: Mapping[str, Refusal] = dict.fromkeys(
    ("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
    ("it is an encoder alone, without a language model", "load a checkpoint that has both"),
)


def find_form(
    host: str, model_type: str, taken: Mapping[str, Form], refused: Mapping[str, Refusal], *, otherwise: str
) -> Form:
    """Finds the input form that an engine takes for a model type; tries the whole name, then the part before ``/``.

    Raises :class:`HostRefusalError` by ``refused``; ``otherwise`` is the alternative for types that are not listed.
    """
    for name in (model_type, model_type.partition("/")[0]):
        if name in taken:
            return taken[name]
        if name in refused:
            raise HostRefusalError(host, model_type, *refused[name])
    raise HostRefusalError(host, model_type, "the model type has not been checked for this engine", otherwise)


def check_embeddings(tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> list[ImageEmbedding]:
    """Returns the embeddings as a list, or raises :class:`UsageError` if one cannot come from the tower."""
    given = list_embeddings(embeddings)
    if not given:
        raise UsageError("embeddings must have at least one entry, got none")
    for index, embedding in enumerate(given):
        _check_rows(tower.config, embedding, index)
        _check_count(tower.config, embedding, index)
    dtypes = {str(embedding.embeddings.dtype) for embedding in given}
    if len(dtypes) > 1:
        raise UsageError(f"embeddings must have one dtype, got {', '.join(sorted(dtypes))}")
    return given


def list_embeddings(embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> list[ImageEmbedding]:
    """Returns one or several as a list; raises on other types, such as the errors that ``on_error="return"`` leaves."""
    given = [embeddings] if isinstance(embeddings, ImageEmbedding) else list(embeddings)
    for index, embedding in enumerate(given):
        if not isinstance(embedding, ImageEmbedding):
            raise UsageError(f"embedding {index} must be an ImageEmbedding, got {type(embedding).__name__}")
    return given


def join_rows(embeddings: Sequence[ImageEmbedding]) -> torch.Tensor:
    """Joins rows, ``[tokens of all, hidden_size * (1 + deepstack levels)]``, base rows first, then level by level.

    The result is on the CPU, since engines send tensors between processes.
    """
    rows = [torch.cat((embedding.embeddings, *embedding.deepstack), dim=1).detach().cpu() for embedding in embeddings]
    return torch.cat(rows)


def stack_grids(embeddings: Sequence[ImageEmbedding]) -> torch.Tensor:
    """Stacks grids, ``[images, 3]`` int64: temporal patches, rows and columns of *patches*."""
    return torch.tensor([embedding.grid_thw for embedding in embeddings], dtype=torch.int64, device="cpu")


def list_seconds(videos: Sequence[ImageEmbedding]) -> torch.Tensor:
    """Lists the seconds per temporal patch of each video, ``[videos]`` fp32, or raises if a video has no times."""
    seconds = [video.seconds_per_grid for video in videos]
    if None in seconds:
        raise UsageError("videos must have times, or the engine computes other positions; pass fps= to encode_video")
    return torch.tensor(seconds, dtype=torch.float32, device="cpu")


def _check_rows(config: TowerConfig, embedding: ImageEmbedding, index: int) -> None:
    rows, levels = embedding.embeddings, embedding.deepstack
    if rows.ndim != 2 or not rows.is_floating_point() or rows.shape[1] != config.hidden_size:
        expected = f"[tokens, {config.hidden_size}] of a floating dtype, from this tower"
        raise UsageError(f"embedding {index} must be {expected}, got {list(rows.shape)} {rows.dtype}")
    if len(levels) != len(config.deepstack):
        expected = f"{len(config.deepstack)} deepstack levels, from this tower"
        raise UsageError(f"embedding {index} must have {expected}, got {len(levels)}")
    if any(level.shape != rows.shape or level.dtype != rows.dtype for level in levels):
        raise UsageError(f"deepstack levels of embedding {index} must have the shape and dtype of its rows")


def _check_count(config: TowerConfig, embedding: ImageEmbedding, index: int) -> None:
    """Checks the number of rows against the grid, as far as the tower determines it."""
    t, h, w = embedding.grid_thw
    found = embedding.num_tokens
    if t > 1 and not embedding.is_video:
        raise UsageError(f"embedding {index} has {t} temporal patches but is_video is False; set is_video")
    if len(embedding.timestamps) not in (0, t):
        raise UsageError(f"embedding {index} must have {t} timestamps or none, got {len(embedding.timestamps)}")
    if sum(embedding.tile_tokens) != found:
        raise UsageError(f"embedding {index} has {found} rows, but its tiles have {sum(embedding.tile_tokens)}")
    tile = (config.num_patches or 0) // config.rows_per_token + (1 if config.keep_class_token else 0)
    if config.newline:
        # The number of rows also depends on the image's size; the base tile always exists.
        fits, expected = found > tile, f"more than {tile}"
    elif config.num_patches is not None:
        fits, expected = found > 0 and found % tile == 0, f"a multiple of {tile}"
    else:
        count = t * h * w // config.rows_per_token
        fits, expected = found == count, f"{count}"
    if not fits:
        raise UsageError(f"embedding {index} with grid {embedding.grid_thw} must have {expected} rows, got {found}")
