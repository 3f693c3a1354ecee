"""Embeddings for vLLM's ``multi_modal_data``, in the form that each of its models takes.

Read in vLLM 0.33.0.  The engine has to be told to take embeddings, and then need not load an encoder of its own::

    engine = LLM(model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0})
    engine.generate({"prompt": prompt, "multi_modal_data": to_vllm(tower, tower.encode(images))})

The prompt has one placeholder per image, which vLLM repeats itself.  Nothing of vLLM is imported here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError
from tritontower.tower import VisionTower

from .checks import NO_LANGUAGE_MODEL, Refusal, checked, grids, taken_form, whole_rows

__all__ = ["VLLM_READ", "to_vllm"]

VLLM_READ = "vLLM 0.33.0"
"""The release whose source the forms below were read in."""

PROMPT_EMBEDS = (
    "put the image's rows among the text's embeddings (tritontower.prompt.merge_embeddings) and pass the result as "
    '{"prompt_embeds": rows} to an engine with enable_prompt_embeds=True'
)


@dataclass(frozen=True)
class _Rows:
    """Takes ``{"image": [rows, …]}``: a matrix per image, counted by the parser, not checked against anything."""

    any_count: bool = True
    """Whether images of one call may have different numbers of rows."""


@dataclass(frozen=True)
class _Grids:
    """Takes ``{"image": {"image_embeds": rows, "image_grid_thw": grids}}``: all images' rows one after the other.

    The parser cuts the rows at the places that the grids give; rows too few or too many pass unnoticed.
    """

    times: Literal["second_per_grid_ts", "timestamps"] | None = None
    """What a video needs beside its rows and its grid."""


TILES = _Rows(any_count=False)
TAKEN: Mapping[str, _Rows | _Grids] = {
    "llava": _Rows(),
    "llava_next": TILES,
    "llava_onevision": TILES,
    "qwen2_vl": _Grids(),
    "qwen2_5_vl": _Grids(times="second_per_grid_ts"),
    "qwen3_vl": _Grids(times="timestamps"),
    "qwen3_vl_moe": _Grids(times="timestamps"),
    "qwen3_5": _Grids(times="timestamps"),
    "qwen3_5_moe": _Grids(times="timestamps"),
}
"""Model type → what vLLM takes; a tower's name behind a slash is looked up first and then left out."""

REFUSED: Mapping[str, Refusal] = {
    **NO_LANGUAGE_MODEL,
    "gemma3": (
        "its `_parse_and_validate_image_input` asserts that there are none",
        f"{PROMPT_EMBEDS}; an image's rows then no longer see each other in both directions, as Gemma 3 was trained",
    ),
    "shieldgemma2": ("it has no such model", "run the classifier with transformers"),
    "paligemma": (
        "its processor declares no field for them, so that they are dropped before the model sees them",
        PROMPT_EMBEDS,
    ),
    "llava/pixtral": ("its `_parse_and_validate_image_input` raises for a Pixtral tower", PROMPT_EMBEDS),
    "mistral3": (
        "its processor looks for images only and its model makes pixel inputs of whatever it gets",
        PROMPT_EMBEDS,
    ),
    "params.json": ("its model for Mistral's own format has no input but pixels", PROMPT_EMBEDS),
}
"""Model type → what vLLM does instead of taking embeddings, and what works."""


def to_vllm(tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> dict[str, Any]:
    """Embeddings of one request as ``multi_modal_data``.

    Args:
        tower: the tower that made them; its checkpoint is the model that vLLM runs.
        embeddings: of the request's images and videos, each kind in the order of its placeholders.

    Returns:
        ``image`` and ``video``, as far as there are any, on the CPU.  For Qwen's models each is a dictionary of
        ``image_embeds`` (``video_embeds``) ``[tokens of all, hidden_size · (1 + deepstack levels)]``, base rows first;
        ``image_grid_thw`` (``video_grid_thw``) ``[images, 3]`` int64, in patches; and the times that the model wants to
        know of videos.  For LLaVA's it is a list of ``[tokens, hidden_size]``.

    Raises:
        HostRefusalError: vLLM takes no embeddings of this model, or not these together.
        UsageError: the embeddings do not fit the tower (rows, width, deepstack levels), or a video does not know its times.
    """
    form = _form(tower.family.model_type)
    given = checked(tower, embeddings)
    if isinstance(form, _Rows):
        return {"image": _matrices(tower, form, given)}
    images = [embedding for embedding in given if not embedding.is_video]
    videos = [embedding for embedding in given if embedding.is_video]
    data: dict[str, Any] = {}
    if images:
        data["image"] = {"image_embeds": _joined(images), "image_grid_thw": grids(images)}
    if videos:
        data["video"] = {"video_embeds": _joined(videos), "video_grid_thw": grids(videos), **_times(form, videos)}
    return data


def _form(model_type: str) -> _Rows | _Grids:
    return taken_form(VLLM_READ, model_type, TAKEN, REFUSED, otherwise=PROMPT_EMBEDS)


def _matrices(tower: VisionTower, form: _Rows, embeddings: Sequence[ImageEmbedding]) -> list[torch.Tensor]:
    counts = {embedding.num_tokens for embedding in embeddings}
    if len(counts) > 1 and not form.any_count:
        raise HostRefusalError(
            VLLM_READ,
            tower.family.model_type,
            f"the model's input has one number of rows for all images, and these have {', '.join(map(str, sorted(counts)))}",
            f"send images of different numbers of rows in requests that are not worked off together, or {PROMPT_EMBEDS}",
        )
    return [whole_rows(embedding) for embedding in embeddings]


def _joined(embeddings: Sequence[ImageEmbedding]) -> torch.Tensor:
    return torch.cat([whole_rows(embedding) for embedding in embeddings])


def _times(form: _Grids, videos: Sequence[ImageEmbedding]) -> dict[str, Any]:
    if form.times is None:
        return {}
    timestamps = [list(video.timestamps) for video in videos]
    seconds = [video.seconds_per_grid for video in videos]
    if None in seconds if form.times == "second_per_grid_ts" else not all(timestamps):
        raise UsageError(
            "a video does not know its times, without which vLLM would refuse it or place it wrongly; pass fps= or "
            "timestamps= to encode_video"
        )
    return {
        form.times: timestamps
        if form.times == "timestamps"
        else torch.tensor(seconds, dtype=torch.float32, device="cpu")
    }
