"""Embeddings as entries of SGLang's ``image_data`` and ``video_data``.

Checked against the source of SGLang 0.5.23, which has two forms. ``{"format": "precomputed_embedding", "feature": rows}``
is documented, but left to the *model*: only some models check for it, the others run their encoder on the rows.
``{"format": "processor_output", "precomputed_embeddings": rows}`` is handled by the scheduler
(``_get_precomputed_embedding``) before any model. Here each model gets the documented form if it supports it.

The prompt must be ``input_ids`` with repeated placeholders, because SGLang cannot repeat them for embeddings::

    prompt = encode_prompt(tokenizer, text, embeddings, tower=tower)
    engine.generate(input_ids=prompt.placeholder_ids.tolist(), image_data=[to_sglang(tower, embeddings)])

This module does not import SGLang.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError, shorten
from tritontower.tower import VisionTower

from .checks import NO_LANGUAGE_MODEL, Refusal, check_embeddings, find_form, join_rows, list_seconds, stack_grids

__all__ = ["SGLANG_READ", "to_sglang"]

SGLANG_READ = "SGLang 0.5.23"
"""Release whose source determined the forms below."""

Form = Literal["precomputed_embedding", "processor_output"]

INPUT_EMBEDS = (
    "merge the image's rows into the text's embeddings (tritontower.prompt.merge_embeddings) and pass the result as "
    "input_embeds to an engine without radix cache"
)


@dataclass(frozen=True)
class _Host:
    """Input that SGLang's processor and model of one type take: the form for images, and the entries for positions."""

    images: Form = "processor_output"
    with_grids: bool = False
    video_seconds: bool = False  # positions of a video depend on its frame rate


# Model type → input; a name with the tower's type after a slash is looked up before the name without it.
TAKEN: Mapping[str, _Host] = {
    **dict.fromkeys(("gemma3", "llava/pixtral", "mistral3", "params.json"), _Host()),
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _Host(with_grids=True)),
    "qwen2_5_vl": _Host(images="precomputed_embedding", with_grids=True, video_seconds=True),
}

FALLBACK: Refusal = (
    "it runs the model through transformers, and its processor for that accepts images only",
    INPUT_EMBEDS,
)
REFUSED: Mapping[str, Refusal] = {
    **NO_LANGUAGE_MODEL,
    **dict.fromkeys(("llava_next", "llava_onevision", "paligemma"), FALLBACK),
    "llava": ("its processor passes rows on as pixels, and its model runs the encoder on them", INPUT_EMBEDS),
    "shieldgemma2": ("it has no such model", "run the classifier with transformers"),
}


def to_sglang(
    tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding], *, form: Form | None = None
) -> dict[str, Any]:
    """Converts embeddings of one request to the single item that ``image_data`` (``video_data``) may contain.

    Args:
        tower: the tower that made them, of the checkpoint that SGLang runs.
        embeddings: all images of the request, or all its videos, in the order of their placeholders.
        form: one of SGLang's two forms; by default the documented one if the model supports it.

    Returns:
        ``format``; the rows, ``[tokens of all, hidden_size * (1 + deepstack levels)]``, base rows first, on the CPU, as
        ``feature`` (``"precomputed_embedding"``) or ``precomputed_embeddings`` (``"processor_output"``, which also has a
        ``modality``); for Qwen models ``image_grid_thw`` (``video_grid_thw``) ``[images, 3]`` int64 in patches, and
        ``second_per_grid_ts`` if a video's positions depend on it.

    Raises:
        HostRefusalError: SGLang takes no embeddings of this model, or not in that form.
        UsageError: the embeddings do not fit the tower or each other; a video without times; an unknown form.
    """
    model_type = tower.family.model_type
    if form not in (None, *get_args(Form)):
        raise UsageError(f"form must be {', '.join(map(repr, get_args(Form)))} or None, got {shorten(form)}")
    host = find_form(SGLANG_READ, model_type, TAKEN, REFUSED, otherwise=INPUT_EMBEDS)
    given = check_embeddings(tower, embeddings)
    kind = "video" if given[0].is_video else "image"
    if len({embedding.is_video for embedding in given}) > 1:
        raise UsageError(
            "embeddings must be all images or all videos; call this once for each of image_data, video_data"
        )
    supported = "processor_output" if kind == "video" else host.images
    wanted = form or supported
    if wanted not in ("processor_output", supported):
        reason = "its model takes input in that form for pixels"
        raise HostRefusalError(SGLANG_READ, model_type, reason, f"pass form={supported!r}, or none")
    rows = join_rows(given)
    grids: dict[str, Any] = {f"{kind}_grid_thw": stack_grids(given)} if host.with_grids else {}
    if kind == "video" and host.video_seconds:
        grids["second_per_grid_ts"] = list_seconds(given)
    if wanted == "precomputed_embedding":
        return {"format": wanted, "feature": rows, **grids}
    return {"format": wanted, "modality": kind, "precomputed_embeddings": rows, **grids}
