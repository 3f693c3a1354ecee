"""Embeddings as inputs of an unchanged model of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import UsageError
from tritontower.integrations.checks import list_embeddings

from .vision_module import find_vision_holder, is_stacked, make_feature_output, takes_encoder_outputs

Embeddings = ImageEmbedding | Sequence[ImageEmbedding]


def encoder_outputs(model: Any, embeddings: Embeddings, *, videos: Embeddings = ()) -> dict[str, Any]:
    """Makes ``mm_encoder_outputs``, which a model takes instead of pixels.

    Pass everything else as the model's processor makes it: ``input_ids`` with one placeholder per row, and for Qwen
    models ``image_grid_thw`` and ``mm_token_type_ids``, from which they compute positions::

        outputs = encoder_outputs(model, tower.encode(images))
        model.generate(**inputs_without_pixels, mm_encoder_outputs=outputs)

    Args:
        model: of transformers 5.18 or later.
        embeddings, videos: of the images, and of the videos, in the order of their placeholders.

    Returns:
        ``{"image": …, "video": …}`` for the kinds that were given, with deepstack rows if the model takes them. A call of
        the model may change it: make a new one for each call.

    Raises:
        UsageError: transformers is too old; rows differ from the language model in width or deepstack levels.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: the model takes no images, or is not supported.
    """
    if not takes_encoder_outputs(model):
        raise UsageError(
            f"model must take mm_encoder_outputs, which came with transformers 5.18, got {type(model).__name__}; pass "
            "inputs_embeds instead, from tritontower.integrations.transformers.inputs_embeds"
        )
    holder, _ = find_vision_holder(model)
    return {
        kind: _make_output(holder, given) for kind, given in _check_kinds(holder, embeddings, videos).items() if given
    }


def inputs_embeds(
    model: Any, input_ids: torch.Tensor, embeddings: Embeddings, *, videos: Embeddings = ()
) -> torch.Tensor:
    """Makes a prompt's token embeddings, with the rows of its images and videos at their placeholders.

    Works with every version of transformers::

        rows = inputs_embeds(model, inputs["input_ids"], tower.encode(images))
        with added_deepstack(model, inputs["input_ids"], embeddings):  # needed by Qwen3-VL, no effect on others
            model.generate(**inputs_without_pixels, inputs_embeds=rows)

    Also pass ``input_ids`` and all other inputs except pixels, since positions and masks are computed from them.
    ``generate`` of Gemma 3 and PaliGemma takes no ``inputs_embeds``; calling the models does.

    Args:
        model: of transformers.
        input_ids: ``[batch, length]`` integers, one placeholder per row; only placeholders may exceed the vocabulary.
        embeddings, videos: of the images, and of the videos, in the order of their placeholders, prompt by prompt.

    Returns:
        ``[batch, length, width]`` in the dtype and on the device of the model's token embeddings.

    Raises:
        UsageError: the numbers of placeholders and rows differ; rows of another width.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: as in :func:`encoder_outputs`.
    """
    holder, _ = find_vision_holder(model)
    given = _check_kinds(holder, embeddings, videos)
    table = model.get_input_embeddings()
    ids = input_ids.to(table.weight.device)
    masks = {kind: _find_placeholders(holder, ids, kind, images) for kind, images in given.items()}
    with torch.no_grad():
        rows: torch.Tensor = table(ids.masked_fill(masks["image"] | masks["video"], 0))
        for kind, images in given.items():
            _put_rows(rows, masks[kind], [image.embeddings for image in images])
    return rows


@contextmanager
def added_deepstack(
    model: Any, input_ids: torch.Tensor, embeddings: Embeddings, *, videos: Embeddings = ()
) -> Iterator[None]:
    """Makes the language model add the images' deepstack rows after its first layers, within the context.

    Qwen3-VL needs it with ``inputs_embeds``, which contains no deepstack rows; without them it answers worse. It has no
    effect on models without deepstack. It applies to the forward pass that begins a prompt, which must be ``input_ids``.

    Args:
        model: of transformers; must not run in another thread meanwhile.
        input_ids, embeddings, videos: as for :func:`inputs_embeds`.

    Raises:
        UsageError: as :func:`inputs_embeds`; or a prompt of another shape than ``input_ids`` begins.
    """
    holder, _ = find_vision_holder(model)
    levels = _count_levels(holder)
    if not levels:
        yield
        return
    given = _check_kinds(holder, embeddings, videos)
    masks = {kind: _find_placeholders(holder, input_ids, kind, images) for kind, images in given.items()}
    where = masks["image"] | masks["video"]
    width = holder.config.get_text_config().hidden_size
    added = []
    for level in range(levels):
        rows = torch.zeros(*input_ids.shape, width, dtype=model.dtype, device=input_ids.device)
        for kind, images in given.items():
            _put_rows(rows, masks[kind], [image.deepstack[level] for image in images])
        added.append(rows[where])

    def add_arguments(_module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        cache = named.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return positional, named
        found = tuple(named["inputs_embeds"].shape[:2])
        if found != tuple(where.shape):
            raise UsageError(f"prompt must have shape {list(where.shape)} within added_deepstack, got {list(found)}")
        return positional, {**named, "visual_pos_masks": where, "deepstack_visual_embeds": added}

    hook = holder.language_model.register_forward_pre_hook(add_arguments, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _count_levels(holder: Any) -> int:
    return len(getattr(holder.config.vision_config, "deepstack_visual_indexes", None) or ())


def _make_output(holder: Any, embeddings: Sequence[ImageEmbedding]) -> Any:
    rows: Any = [image.embeddings for image in embeddings]
    if is_stacked(holder):
        rows = torch.stack([tile for image in embeddings for tile in image.embeddings.split(image.tile_tokens)])
    levels = [[image.deepstack[level] for image in embeddings] for level in range(_count_levels(holder))]
    return make_feature_output(holder, rows, levels)


def _check_kinds(holder: Any, embeddings: Embeddings, videos: Embeddings) -> dict[str, list[ImageEmbedding]]:
    """Lists images and videos, or raises if they differ from the language model in width or deepstack levels."""
    given = {"image": list_embeddings(embeddings), "video": list_embeddings(videos)}
    expected = holder.config.get_text_config().hidden_size, _count_levels(holder)
    for kind, images in given.items():
        for index, image in enumerate(images):
            found = image.embeddings.shape[1], len(image.deepstack)
            if found != expected:
                raise UsageError(
                    f"{kind} embedding {index} must have rows of width {expected[0]} and {expected[1]} deepstack levels, as "
                    f"the language model, got {found[0]} and {found[1]}; it must come from this model's tower"
                )
    return given


def _find_placeholders(
    holder: Any, input_ids: torch.Tensor, kind: str, embeddings: Sequence[ImageEmbedding]
) -> torch.Tensor:
    token = getattr(holder.config, f"{kind}_token_id", None)
    mask = torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token
    found, rows = int(mask.sum()), sum(image.num_tokens for image in embeddings)
    if found != rows:
        raise UsageError(f"input_ids must have {rows} placeholders for {kind} rows (token {token}), got {found}")
    return mask


def _put_rows(rows: torch.Tensor, mask: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    if parts:
        rows[mask] = torch.cat([part.to(rows.device, rows.dtype) for part in parts])
