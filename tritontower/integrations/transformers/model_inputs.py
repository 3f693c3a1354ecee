"""Finished embeddings for a model of transformers that stays as it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import UsageError
from tritontower.integrations.checks import listed

from .vision_module import family_of, feature_output, is_stacked, takes_encoder_outputs, vision_holder

__all__ = ["added_deepstack", "encoder_outputs", "inputs_embeds"]

Embeddings = ImageEmbedding | Sequence[ImageEmbedding]


def encoder_outputs(model: Any, embeddings: Embeddings, *, videos: Embeddings = ()) -> dict[str, Any]:
    """What a model takes as ``mm_encoder_outputs`` instead of pixels.

    Everything else is passed as the model's processor makes it: ``input_ids`` with one placeholder for each row, and for
    the Qwen models ``image_grid_thw`` and ``mm_token_type_ids``, which their positions come from::

        outputs = encoder_outputs(model, tower.encode(images))
        model.generate(**inputs_without_pixels, mm_encoder_outputs=outputs)

    Args:
        model: of transformers 5.18 or later.
        embeddings: of the images, in the order of their placeholders.
        videos: of the videos, in the order of theirs.

    Returns:
        ``{"image": …, "video": …}``, either of them only if there is something for it; with deepstack rows where the model
        takes them.  A call of the model may change it, so each call needs one of its own.

    Raises:
        UsageError: transformers is too old; rows are not as wide as the language model, or have other deepstack levels.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: the model takes no images, or not of a known family.
    """
    if not takes_encoder_outputs(model):
        import transformers

        raise UsageError(
            f"{type(model).__name__} of transformers {transformers.__version__} takes no mm_encoder_outputs, which came with "
            "5.18; pass inputs_embeds instead, from tritontower.integrations.transformers.inputs_embeds"
        )
    holder = vision_holder(model, family_of(model).prefixes)
    given = {"image": listed(embeddings), "video": listed(videos)}
    return {name: _output(holder, several) for name, several in given.items() if several}


def inputs_embeds(
    model: Any, input_ids: torch.Tensor, embeddings: Embeddings, *, videos: Embeddings = ()
) -> torch.Tensor:
    """A prompt's token embeddings, with those of its images and videos in place of their placeholders.

    For any version of transformers::

        rows = inputs_embeds(model, inputs["input_ids"], tower.encode(images))
        with added_deepstack(model, inputs["input_ids"], embeddings):  # needed by Qwen3-VL, empty for others
            model.generate(**inputs_without_pixels, inputs_embeds=rows)

    ``input_ids`` and what else comes without pixels is passed along, because positions and masks are made of it.  The
    ``generate`` of Gemma 3 and PaliGemma takes no ``inputs_embeds``, but the models themselves do when they are called.

    Args:
        model: of transformers.
        input_ids: ``[batch, length]`` whole numbers, one placeholder for each row; ids beyond the vocabulary may only be
            placeholders.
        embeddings: of the images, in the order of their placeholders, prompt by prompt.
        videos: of the videos.

    Returns:
        ``[batch, length, width]`` in the dtype and on the device of the model's token embeddings.

    Raises:
        UsageError: another number of placeholders than of rows; rows of another width.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: as in :func:`encoder_outputs`.
    """
    holder = vision_holder(model, family_of(model).prefixes)
    table = model.get_input_embeddings()
    ids = input_ids.to(table.weight.device)
    places = {token: ids == token for token in _placeholders(holder).values()}
    anything = torch.stack(list(places.values())).any(0)
    with torch.no_grad():
        rows: torch.Tensor = table(ids.masked_fill(anything, 0))
        for kind, several in (("image", listed(embeddings)), ("video", listed(videos))):
            _check(holder, several)
            _place(rows, _mask(holder, ids, kind, several), [one.embeddings for one in several])
    return rows


@contextmanager
def added_deepstack(
    model: Any, input_ids: torch.Tensor, embeddings: Embeddings, *, videos: Embeddings = ()
) -> Iterator[None]:
    """While it lasts, the language model adds the deepstack rows of the images behind its first layers.

    A Qwen3-VL that is called with ``inputs_embeds`` does not know of them, and answers worse.  For models without deepstack
    levels nothing happens.  Only the pass that begins a prompt is changed, and it has to be that of ``input_ids``.

    Args:
        model: of transformers; not called by another thread meanwhile.
        input_ids: ``[batch, length]``, as for :func:`inputs_embeds`.
        embeddings: of the images, likewise.
        videos: of the videos.

    Raises:
        UsageError: as :func:`inputs_embeds`; or a prompt that begins is longer or shorter than ``input_ids``.
    """
    holder = vision_holder(model, family_of(model).prefixes)
    images, videos = listed(embeddings), listed(videos)
    levels = _levels(holder)
    if not levels:
        yield
        return
    for several in (images, videos):
        _check(holder, several)
    masks = {"image": _mask(holder, input_ids, "image", images), "video": _mask(holder, input_ids, "video", videos)}
    where = masks["image"] | masks["video"]
    added = []
    for level in range(levels):
        width = holder.config.get_text_config().hidden_size
        rows = torch.zeros(*input_ids.shape, width, dtype=model.dtype, device=input_ids.device)
        for kind, several in (("image", images), ("video", videos)):
            _place(rows, masks[kind], [one.deepstack[level] for one in several])
        added.append(rows[where])

    def pass_along(_module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        cache = named.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return positional, named
        found = tuple(named["inputs_embeds"].shape[:2])
        if found != tuple(where.shape):
            raise UsageError(
                f"a prompt of shape {list(found)} begins while the deepstack rows of one of shape {list(where.shape)} are "
                "added; call the model with that prompt only"
            )
        return positional, {**named, "visual_pos_masks": where, "deepstack_visual_embeds": added}

    hook = holder.language_model.register_forward_pre_hook(pass_along, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _levels(holder: Any) -> int:
    return len(getattr(holder.config.vision_config, "deepstack_visual_indexes", None) or ())


def _output(holder: Any, embeddings: Sequence[ImageEmbedding]) -> Any:
    _check(holder, embeddings)
    rows: Any = [one.embeddings for one in embeddings]
    if is_stacked(holder):
        tiles = [tile for one in embeddings for tile in one.embeddings.split(one.tile_tokens)]
        rows = torch.stack(tiles)
    return feature_output(
        holder, rows, [[one.deepstack[level] for one in embeddings] for level in range(_levels(holder))]
    )


def _check(holder: Any, embeddings: Sequence[ImageEmbedding]) -> None:
    width, levels = holder.config.get_text_config().hidden_size, _levels(holder)
    for index, one in enumerate(embeddings):
        if one.embeddings.shape[1] != width:
            raise UsageError(
                f"embedding {index} has rows of {one.embeddings.shape[1]} numbers, but the language model's have {width}: it "
                "was made by another model's tower"
            )
        if len(one.deepstack) != levels:
            raise UsageError(
                f"embedding {index} has {len(one.deepstack)} deepstack levels, but the model adds {levels}: it was made by "
                "another model's tower"
            )


def _placeholders(holder: Any) -> dict[str, int]:
    """``"image"`` and, where the model takes videos, ``"video"`` → the token that stands for a row."""
    names = {kind: getattr(holder.config, f"{kind}_token_id", None) for kind in ("image", "video")}
    return {kind: token for kind, token in names.items() if token is not None}


def _mask(holder: Any, input_ids: torch.Tensor, kind: str, embeddings: Sequence[ImageEmbedding]) -> torch.Tensor:
    token = _placeholders(holder).get(kind)
    mask = torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token
    found, rows = int(mask.sum()), sum(one.num_tokens for one in embeddings)
    if found != rows:
        raise UsageError(
            f"the prompt has {found} placeholders for {kind} rows (token {token}), but the embeddings have {rows} rows"
        )
    return mask


def _place(rows: torch.Tensor, mask: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    if parts:
        rows[mask] = torch.cat([part.to(rows.device, rows.dtype) for part in parts])
