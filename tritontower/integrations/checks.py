"""What every hand-over to another engine starts with: one list of embeddings, checked against the tower they came from.

Engines believe what they are given: a row too many or too few, or rows of another model's width, end in an assertion
inside a worker process, or in another image's rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from tritontower.config import TowerConfig
from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError
from tritontower.tower import VisionTower

__all__ = ["NO_LANGUAGE_MODEL", "Refusal", "checked", "grids", "listed", "taken_form", "whole_rows"]

Form = TypeVar("Form")

Refusal = tuple[str, str]
"""What an engine does instead of taking ready embeddings, and what works."""

WITHOUT_LANGUAGE_MODEL: Refusal = (
    "it is an encoder alone, without a language model",
    "load a checkpoint that has both",
)
NO_LANGUAGE_MODEL: Mapping[str, Refusal] = dict.fromkeys(
    ("clip", "clip_vision_model", "siglip", "siglip_vision_model"), WITHOUT_LANGUAGE_MODEL
)
"""Model types for which no engine that generates text has a use."""


def taken_form(
    host: str, model_type: str, taken: Mapping[str, Form], refused: Mapping[str, Refusal], *, otherwise: str
) -> Form:
    """What an engine takes for a model type; the whole name is looked up first, then the part before its tower's.

    Args:
        host: the engine and its release.
        model_type: as in :func:`tritontower.models.common.registry.model_types`.
        taken: model type → form.
        refused: model type → why not.
        otherwise: what works with a model that is in neither.

    Raises:
        HostRefusalError: it takes none.
    """
    for name in (model_type, model_type.partition("/")[0]):
        if name in taken:
            return taken[name]
        if name in refused:
            raise HostRefusalError(host, model_type, *refused[name])
    raise HostRefusalError(host, model_type, "nobody has looked how it would", otherwise)


def checked(tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> list[ImageEmbedding]:
    """The embeddings as a list, if every one of them can be the tower's.

    Raises:
        UsageError: there is none; an embedding's rows do not fit its grid, are not of the tower's width, or have another
            number of deepstack levels; the rows are of several dtypes.
    """
    given = listed(embeddings)
    if not given:
        raise UsageError("there is no embedding to hand over; pass one ImageEmbedding, or a list of them")
    for index, embedding in enumerate(given):
        _check(tower.config, embedding, index)
    dtypes = {str(embedding.embeddings.dtype) for embedding in given}
    if len(dtypes) > 1:
        raise UsageError(f"the embeddings are of several dtypes ({', '.join(sorted(dtypes))}); allowed: one for all")
    return given


def listed(embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> list[ImageEmbedding]:
    """One or several as a list.

    Raises:
        UsageError: something else is among them, such as the error that ``on_error="return"`` leaves.
    """
    given = [embeddings] if isinstance(embeddings, ImageEmbedding) else list(embeddings)
    for index, embedding in enumerate(given):
        if not isinstance(embedding, ImageEmbedding):
            raise UsageError(f"embedding {index} is a {type(embedding).__name__}; allowed: ImageEmbedding")
    return given


def whole_rows(embedding: ImageEmbedding) -> torch.Tensor:
    """``[num_tokens, hidden_size · (1 + deepstack levels)]`` on the CPU, the embedding itself first, then level by level.

    Engines hand tensors from process to process, which only the CPU's can be.
    """
    rows = embedding.embeddings.detach()
    levels = [level.detach() for level in embedding.deepstack]
    return (torch.cat((rows, *levels), dim=1) if levels else rows).cpu()


def grids(embeddings: Sequence[ImageEmbedding]) -> torch.Tensor:
    """``[images, 3]`` int64: temporal patches, rows and columns of *patches* of each."""
    return torch.tensor([embedding.grid_thw for embedding in embeddings], dtype=torch.int64, device="cpu")


def _check(config: TowerConfig, embedding: ImageEmbedding, index: int) -> None:
    rows = embedding.embeddings
    if rows.ndim != 2 or not rows.is_floating_point():
        raise UsageError(
            f"embedding {index} is a {rows.dtype} tensor of shape {list(rows.shape)}; allowed: [tokens, hidden_size] of a "
            "floating dtype"
        )
    if rows.shape[1] != config.hidden_size:
        raise UsageError(
            f"embedding {index} has rows of {rows.shape[1]} values, but this tower's have {config.hidden_size}; it was made "
            "by another one"
        )
    if len(embedding.deepstack) != len(config.deepstack):
        raise UsageError(
            f"embedding {index} has {len(embedding.deepstack)} deepstack levels, but this tower makes "
            f"{len(config.deepstack)}"
        )
    if any(level.shape != rows.shape or level.dtype != rows.dtype for level in embedding.deepstack):
        raise UsageError(f"the deepstack levels of embedding {index} are not of the shape and dtype of its rows")
    _check_count(config, embedding, index)


def _check_count(config: TowerConfig, embedding: ImageEmbedding, index: int) -> None:
    """Whether the rows are as many as the grid says, as far as the tower has that rule."""
    t, h, w = embedding.grid_thw
    found = embedding.num_tokens
    if t > 1 and not embedding.is_video:
        raise UsageError(f"embedding {index} has {t} temporal patches and does not say that it is a video; set is_clip")
    if len(embedding.timestamps) not in (0, t):
        raise UsageError(f"embedding {index} has {len(embedding.timestamps)} time stamps for {t} temporal patches")
    if sum(embedding.tile_tokens) != found:
        raise UsageError(f"embedding {index} has {found} rows, but its tiles have {sum(embedding.tile_tokens)} in all")
    if config.newline:
        # How tiles are put together depends on the image's size as well; the base tile is there in any case.
        fits, expected = found > (least := _rows_of_tile(config)), f"more than {least}"
    elif config.num_patches is not None:
        tile = _rows_of_tile(config)
        fits, expected = found > 0 and found % tile == 0, f"{tile} for each of its tiles"
    else:
        count = t * h * w // config.rows_per_token
        fits, expected = found == count, f"{count}"
    if not fits:
        raise UsageError(f"embedding {index} has {found} rows, but its grid {embedding.grid_thw} makes {expected}")


def _rows_of_tile(config: TowerConfig) -> int:
    """Tokens of one tile where every tile has as many."""
    return (config.num_patches or 0) // config.rows_per_token + (1 if config.keep_class_token else 0)
