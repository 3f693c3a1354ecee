"""Embeddings for SGLang's ``image_data`` and ``video_data``.

Read in SGLang 0.5.23, which has two forms for them.  ``{"format": "precomputed_embedding", "feature": rows}`` is the
documented one; it leaves the rows with the *model*, and only some models look whether what they got is ready: the others
run their encoder over it.  ``{"format": "processor_output", "precomputed_embeddings": rows}`` is served by the scheduler
(``_get_precomputed_embedding``) before any model is asked.  Here each model gets the documented form if it takes it.

The prompt must come as ``input_ids`` in which the placeholders are repeated already, since nothing is left that could::

    prompt = encode_prompt(tokenizer, text, embeddings, tower=tower)
    engine.generate(input_ids=prompt.placeholder_ids.tolist(), image_data=[to_sglang(tower, embeddings)])

Nothing of SGLang is imported here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError, shorten
from tritontower.tower import VisionTower

from .checks import NO_LANGUAGE_MODEL, Refusal, checked, grids, taken_form, whole_rows

__all__ = ["SGLANG_READ", "to_sglang"]

SGLANG_READ = "SGLang 0.5.23"
"""The release whose source the forms below were read in."""

Form = Literal["precomputed_embedding", "processor_output"]

INPUT_EMBEDS = (
    "put the image's rows among the text's embeddings (tritontower.prompt.merge_embeddings) and pass the result as "
    "input_embeds to an engine without radix cache"
)


@dataclass(frozen=True)
class _Host:
    """What SGLang's processor and model of one type take.

    Attributes:
        images: the form for images.
        with_grids: whether positions are made from the grids.
        video_seconds: whether a video's frame rate decides its positions.
    """

    images: Form = "processor_output"
    with_grids: bool = False
    video_seconds: bool = False


TAKEN: Mapping[str, _Host] = {
    "qwen2_vl": _Host(with_grids=True),
    "qwen2_5_vl": _Host(images="precomputed_embedding", with_grids=True, video_seconds=True),
    "qwen3_vl": _Host(with_grids=True),
    "qwen3_vl_moe": _Host(with_grids=True),
    "qwen3_5": _Host(with_grids=True),
    "qwen3_5_moe": _Host(with_grids=True),
    "gemma3": _Host(),
    "llava/pixtral": _Host(),
    "mistral3": _Host(),
    "params.json": _Host(),
}
"""Model type → what SGLang takes; a tower's name behind a slash is looked up first and then left out."""

TAKEN_FOR_PIXELS = "its model takes what comes in that form for pixels"
RUNS_ENCODER = "its processor passes rows on as pixels, and its model runs the encoder over them"
FALLBACK = "it runs the model through transformers, and its processor for that opens images only"
REFUSED: Mapping[str, Refusal] = {
    **NO_LANGUAGE_MODEL,
    "llava": (RUNS_ENCODER, INPUT_EMBEDS),
    "llava_next": (FALLBACK, INPUT_EMBEDS),
    "llava_onevision": (FALLBACK, INPUT_EMBEDS),
    "paligemma": (FALLBACK, INPUT_EMBEDS),
    "shieldgemma2": ("it has no such model", "run the classifier with transformers"),
}
"""Model type → what SGLang does instead of taking embeddings, and what works."""


def to_sglang(
    tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding], *, form: Form | None = None
) -> dict[str, Any]:
    """Embeddings of one request as the one item that ``image_data`` (``video_data``) may then hold.

    Args:
        tower: the tower that made them; its checkpoint is the model that SGLang runs.
        embeddings: all images of the request, or all its videos, in the order of their placeholders.
        form: insist on one of SGLang's two forms; by default the documented one if the model takes it.

    Returns:
        ``format``; the rows, ``[tokens of all, hidden_size · (1 + deepstack levels)]``, base rows first, on the CPU, under
        ``feature`` (``"precomputed_embedding"``) or ``precomputed_embeddings`` (``"processor_output"``, which has a
        ``modality`` too); for Qwen's models ``image_grid_thw`` (``video_grid_thw``) ``[images, 3]`` int64, in patches,
        and ``second_per_grid_ts`` where a video's positions depend on it.

    Raises:
        HostRefusalError: SGLang takes no embeddings of this model, or not in that form.
        UsageError: the embeddings do not fit the tower; images and videos together; a video does not know its times; there
            is no such form.
    """
    model_type = tower.family.model_type
    if form not in (None, *get_args(Form)):
        raise UsageError(f"form is {shorten(form)}; allowed: {', '.join(map(repr, get_args(Form)))}, or None")
    host = _host(model_type)
    given = checked(tower, embeddings)
    videos = given[0].is_video
    if any(embedding.is_video != videos for embedding in given):
        raise UsageError(
            "images and videos are items of two lists; call this once for each: image_data=[…], video_data=[…]"
        )
    taken = "processor_output" if videos else host.images
    wanted = form or taken
    if wanted not in ("processor_output", taken):
        raise HostRefusalError(SGLANG_READ, model_type, TAKEN_FOR_PIXELS, f"leave out form, or pass form={taken!r}")
    rows = torch.cat([whole_rows(embedding) for embedding in given])
    facts = _facts(host, given, videos) if host.with_grids else {}
    if wanted == "precomputed_embedding":
        return {"format": wanted, "feature": rows, **facts}
    kind = "video" if videos else "image"
    return {"format": wanted, "modality": kind, "precomputed_embeddings": rows, **facts}


def _host(model_type: str) -> _Host:
    return taken_form(SGLANG_READ, model_type, TAKEN, REFUSED, otherwise=INPUT_EMBEDS)


def _facts(host: _Host, given: Sequence[ImageEmbedding], videos: bool) -> dict[str, Any]:
    """What the model makes positions from."""
    if not videos:
        return {"image_grid_thw": grids(given)}
    if not host.video_seconds:
        return {"video_grid_thw": grids(given)}
    seconds = [video.seconds_per_grid for video in given]
    if None in seconds:
        raise UsageError(
            "a video does not know its times, without which SGLang would give it positions of its own choice; pass fps= or "
            "timestamps= to encode_video"
        )
    return {
        "video_grid_thw": grids(given),
        "second_per_grid_ts": torch.tensor(seconds, dtype=torch.float32, device="cpu"),
    }
