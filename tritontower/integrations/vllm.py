"""Embeddings as vLLM's ``multi_modal_data``, in the form that each of its models takes.

Checked against the source of vLLM 0.33.0. The engine must be told to accept embeddings, and then loads no encoder::

    engine = LLM(model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0})
    engine.generate({"prompt": prompt, "multi_modal_data": to_vllm(tower, tower.encode(images))})

The prompt has one placeholder per image, which vLLM repeats. This module does not import vLLM.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError
from tritontower.tower import VisionTower

from .checks import NO_LANGUAGE_MODEL, Refusal, check_embeddings, find_form, join_rows, list_seconds, stack_grids

__all__ = ["VLLM_READ", "to_vllm"]

VLLM_READ = "vLLM 0.33.0"
"""Release whose source determined the forms below."""

PROMPT_EMBEDS = (
    "merge the image's rows into the text's embeddings (tritontower.prompt.merge_embeddings) and pass the result as "
    '{"prompt_embeds": rows} to an engine with enable_prompt_embeds=True'
)


# Forms. Rows: {"image": [rows, …]}, one matrix per image, of equal or of any numbers of rows. Grids: {"image":
# {"image_embeds": rows, "image_grid_thw": grids}} with the joined rows of all images, perhaps with the times of videos.
# The parser splits joined rows by the grids; missing or extra rows are not detected.
Form = Literal["rows", "equal rows", "grids", "grids and seconds", "grids and timestamps"]

# Model type → form; a name with the tower's type after a slash is looked up before the name without it.
TAKEN: Mapping[str, Form] = {
    "llava": "rows",
    "llava_next": "equal rows",
    "llava_onevision": "equal rows",
    "qwen2_vl": "grids",
    "qwen2_5_vl": "grids and seconds",
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "grids and timestamps"),
}

REFUSED: Mapping[str, Refusal] = {
    **NO_LANGUAGE_MODEL,
    "gemma3": (
        "its `_parse_and_validate_image_input` asserts that there are none",
        f"{PROMPT_EMBEDS}; image rows then lose the bidirectional attention that Gemma 3 was trained with",
    ),
    "shieldgemma2": ("it has no such model", "run the classifier with transformers"),
    "paligemma": ("its processor declares no field for them and drops them before the model", PROMPT_EMBEDS),
    "llava/pixtral": ("its `_parse_and_validate_image_input` raises for a Pixtral tower", PROMPT_EMBEDS),
    "mistral3": ("its processor accepts images only and its model makes pixel inputs of any input", PROMPT_EMBEDS),
    "params.json": ("its model for Mistral's own format takes pixels only", PROMPT_EMBEDS),
}


def to_vllm(tower: VisionTower, embeddings: ImageEmbedding | Iterable[ImageEmbedding]) -> dict[str, Any]:
    """Converts the embeddings of one request to ``multi_modal_data``.

    Args:
        tower: the tower that made them, of the checkpoint that vLLM runs.
        embeddings: the request's images and videos, each kind in the order of its placeholders.

    Returns:
        ``image`` and ``video``, if there are any, on the CPU. For Qwen models each is a dictionary of ``image_embeds``
        (``video_embeds``) ``[tokens of all, hidden_size * (1 + deepstack levels)]``, base rows first, ``image_grid_thw``
        (``video_grid_thw``) ``[images, 3]`` int64 in patches, and the times of videos that the model uses. For LLaVA
        models it is a list of ``[tokens, hidden_size]``.

    Raises:
        HostRefusalError: vLLM takes no embeddings of this model, or not these together.
        UsageError: the embeddings do not fit the tower (rows, width, deepstack levels), or a video has no times.
    """
    form = find_form(VLLM_READ, tower.family.model_type, TAKEN, REFUSED, otherwise=PROMPT_EMBEDS)
    given = check_embeddings(tower, embeddings)
    if form in ("rows", "equal rows"):
        counts = {embedding.num_tokens for embedding in given}
        if len(counts) > 1 and form == "equal rows":
            raise HostRefusalError(
                VLLM_READ,
                tower.family.model_type,
                f"all images of one input must have the same number of rows, got {', '.join(map(str, sorted(counts)))}",
                f"send images with different numbers of rows in requests that are not batched together, or {PROMPT_EMBEDS}",
            )
        return {"image": [join_rows([embedding]) for embedding in given]}
    data: dict[str, Any] = {}
    for kind in ("image", "video"):
        if some := [embedding for embedding in given if embedding.is_video == (kind == "video")]:
            data[kind] = {f"{kind}_embeds": join_rows(some), f"{kind}_grid_thw": stack_grids(some)}
    if "video" in data and form == "grids and seconds":
        data["video"]["second_per_grid_ts"] = list_seconds(some)
    elif "video" in data and form == "grids and timestamps":
        data["video"]["timestamps"] = [list(video.timestamps) for video in some]
        if not all(data["video"]["timestamps"]):
            raise UsageError(
                "videos must have timestamps, or vLLM rejects them; pass fps= or timestamps= to encode_video"
            )
    return data
