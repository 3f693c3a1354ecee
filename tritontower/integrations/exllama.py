"""Embeddings as ExLlamaV2 and ExLlamaV3 have them, and towers that stand in for their vision models.

Read in exllamav2 0.3.2 (``ExLlamaV2MMEmbedding``) and exllamav3 1.6.5 (``MMEmbedding``).  Both look embeddings up by
attributes, so that one object serves both::

    vision = ExLlamaV2Vision(tower)
    image = vision.get_image_embeddings(model, tokenizer, image)
    ids = tokenizer.encode(f"{image.text_alias} Describe this.", embeddings=[image])

Three things are other than with ExLlama's own vision models, and better: the same image has the same ids, so that the
key-value cache is found again; what a model has round an image are the tokens themselves instead of copies of their
embeddings (ExLlamaV2), so that no language model is needed; and behind Pixtral's last row of patches there is
``[IMG_END]`` alone, as transformers has it, not ``[IMG_BREAK][IMG_END]``.  Nothing of ExLlama is imported here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast, overload

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import UsageError, shorten
from tritontower.preprocessing.images.image import ImageInput
from tritontower.prompt import DEFAULT_BASE, TokenSpace, encode_prompt
from tritontower.tower import VisionTower

from .checks import checked

__all__ = ["ExLlamaEmbedding", "ExLlamaV2Vision", "ExLlamaV3Vision", "to_exllama"]

FIRST_IMAGE_ID = DEFAULT_BASE
"""Where ExLlama takes the vocabulary to end; ids below are looked up in the embedding table."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class ExLlamaEmbedding:
    """One image or video, under the names of ``ExLlamaV2MMEmbedding`` and of ``MMEmbedding``.

    Attributes:
        embeddings: ``[length, hidden_size]``; ExLlamaV2 gives the whole prompt their dtype.
        text_alias: what stands for it in a prompt.
        first_index: the first of its ids, which follow upon each other.
        token_list: what the prompt has for it: its ids, and the model's own tokens round and among them.
        thw_grid: temporal patches, rows and columns of patches; ``grid_thw`` in ExLlamaV3.
        mrope_merge_size: side of the square of patches that one token stands for.
        deepstack_embeddings: ``[length, hidden_size]`` each (ExLlamaV3); ``None`` where there are none.
        model: ExLlamaV2's language model, of which it reads ``config.vision_spatial_merge_size``; or what has just that.
        pre_tokens, post_tokens: rows of tokens round the image; 0, since they are no rows here.
        align, align_phase, align_lead: places at which the image has to begin (ExLlamaV3); none.
        metadata: sizes in pixels, and whatever an application notes there.
        source: the embedding with its ids, its rows those that are here.
    """

    embeddings: torch.Tensor
    text_alias: str
    first_index: int
    token_list: list[int]
    thw_grid: tuple[int, int, int]
    mrope_merge_size: int
    deepstack_embeddings: list[torch.Tensor] | None
    model: Any
    source: ImageEmbedding
    pre_tokens: int = 0
    post_tokens: int = 0
    align: int = 0
    align_phase: int = 0
    align_lead: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Rows of ``embeddings``."""
        return self.embeddings.shape[0]

    @property
    def mm_length(self) -> int:
        """Rows of ``embeddings``, in ExLlamaV3."""
        return self.length

    @property
    def last_index(self) -> int:
        """The id behind its last one."""
        return self.first_index + self.length

    @property
    def full_length(self) -> int:
        """Tokens that it takes in the prompt."""
        return len(self.token_list)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """``thw_grid``, in ExLlamaV3."""
        return self.thw_grid

    @property
    def token_string(self) -> torch.Tensor:
        """``token_list`` as ``[1, full_length]`` int64."""
        return torch.tensor([self.token_list], dtype=torch.long, device="cpu")

    def token_list_at(self, position: int) -> list[int]:
        """``token_list``; wherever it stands, since it begins at any place."""
        return self.token_list

    def get_ids(self) -> list[int]:
        """``token_list``, in ExLlamaV2."""
        return list(self.token_list)

    def get_ids_tensor(self) -> torch.Tensor:
        """``token_string``, in ExLlamaV2."""
        return self.token_string

    def get_vision_token_range(self) -> tuple[int, int]:
        """Its first id and the one behind its last."""
        return self.first_index, self.last_index

    def get_size_in_bytes(self) -> int:
        """Bytes of all its rows."""
        return sum(rows.nbytes for rows in (self.embeddings, *(self.deepstack_embeddings or ())))

    def release(self, space: TokenSpace) -> None:
        """Ends the view's use of its ids; call it once, when no cache holds keys and values of them any more.

        Args:
            space: where its ids come from, such as :attr:`ExLlamaV2Vision.space`.

        Raises:
            UsageError: the ids are not that space's, or were released before.
        """
        space.release(self.source)


@overload
def to_exllama(
    tower: VisionTower,
    embeddings: ImageEmbedding,
    *,
    tokenizer: Any = ...,
    space: TokenSpace | None = ...,
    model: Any = ...,
    dtype: torch.dtype | None = ...,
) -> ExLlamaEmbedding: ...


@overload
def to_exllama(
    tower: VisionTower,
    embeddings: Iterable[ImageEmbedding],
    *,
    tokenizer: Any = ...,
    space: TokenSpace | None = ...,
    model: Any = ...,
    dtype: torch.dtype | None = ...,
) -> list[ExLlamaEmbedding]: ...


def to_exllama(
    tower: VisionTower,
    embeddings: ImageEmbedding | Iterable[ImageEmbedding],
    *,
    tokenizer: Any = None,
    space: TokenSpace | None = None,
    model: Any = None,
    dtype: torch.dtype | None = torch.float16,
) -> ExLlamaEmbedding | list[ExLlamaEmbedding]:
    """Embeddings as ExLlama's generators, tokenizers and models take them.

    Args:
        tower: the tower that made them.
        embeddings: one, or several.
        tokenizer: ExLlama's, transformers', or a function from text to ids: puts what the model has round an image
            round the ids.  Without it there are the ids alone, and the caller's prompt has to have the rest.
        space: where ids come from: every view holds one use of its ids, until :meth:`ExLlamaEmbedding.release`.  May be
            left out if the embeddings have ids already, which then are the caller's to release.
        model: ExLlamaV2's language model, to be checked against the rows' width.
        dtype: of the rows; ExLlama computes in fp16.  ``None`` leaves them as they are.

    Returns:
        One view for one embedding, a list for several.  Rows stay on their device.

    Raises:
        UsageError: the embeddings do not fit the tower or the model; they have no ids and there is no space; ids that
            ExLlama would take for the vocabulary's; values that ``dtype`` does not hold.
        PromptError: the tokenizer does not know the model's tokens.
    """
    given = checked(tower, embeddings)
    width = getattr(getattr(model, "config", None), "hidden_size", tower.hidden_size)
    if width != tower.hidden_size:
        raise UsageError(
            f"the model's rows have {width} values, but the tower's {tower.hidden_size}; they do not belong together"
        )
    views: list[ExLlamaEmbedding] = []
    try:
        for embedding in given:
            views.append(_view(tower, embedding, tokenizer, space, model, dtype))
    except BaseException:
        if space is not None:
            space.release(*(view.source for view in views))
        raise
    return views[0] if isinstance(embeddings, ImageEmbedding) else views


class ExLlamaV2Vision:
    """A tower in the place of an ``ExLlamaV2VisionTower``.

    Attributes:
        tower: what encodes.
        space: where ids come from; shared by everything that shares a key-value cache.
    """

    def __init__(self, tower: VisionTower, *, space: TokenSpace | None = None) -> None:
        self.tower = tower
        self.space = space or TokenSpace(FIRST_IMAGE_ID)

    def get_image_embeddings(
        self,
        model: Any,
        tokenizer: Any,
        image: ImageInput,
        text_alias: str | None = None,
        embeddings_cpu: bool = True,
    ) -> ExLlamaEmbedding:
        """One image; the arguments are ExLlamaV2's, and an image may be whatever the tower takes.

        Raises:
            ImageError, UsageError, PromptError: as :meth:`VisionTower.encode` and :func:`to_exllama`.
        """
        (embedding,) = self.tower.encode([image])
        return self._seen(model, tokenizer, embedding, text_alias, embeddings_cpu)

    def get_video_embeddings(
        self,
        model: Any,
        tokenizer: Any,
        video: Sequence[ImageInput],
        text_alias: str | None = None,
        embeddings_cpu: bool = True,
    ) -> ExLlamaEmbedding:
        """One video of frames of one size; the arguments are ExLlamaV2's.

        Raises:
            ImageError, UsageError, PromptError: as :meth:`VisionTower.encode_video` and :func:`to_exllama`.
        """
        embedding = self.tower.encode_video(video)
        return self._seen(model, tokenizer, embedding, text_alias, embeddings_cpu)

    def _seen(
        self, model: Any, tokenizer: Any, embedding: ImageEmbedding, text_alias: str | None, embeddings_cpu: bool
    ) -> ExLlamaEmbedding:
        if embeddings_cpu:
            embedding = embedding.to("cpu")
        view = to_exllama(
            self.tower, embedding.with_alias(text_alias), tokenizer=tokenizer, space=self.space, model=model
        )
        # ExLlamaV2 has the height first.
        view.metadata["original_size"] = embedding.original_size[::-1]
        return view


class ExLlamaV3Vision:
    """A tower in the place of the vision model of an ExLlamaV3 architecture.

    Attributes:
        tower: what encodes.
        space: where ids come from; shared by everything that shares a key-value cache.
    """

    def __init__(self, tower: VisionTower, *, space: TokenSpace | None = None) -> None:
        self.tower = tower
        self.space = space or TokenSpace(FIRST_IMAGE_ID)

    @overload
    def get_image_embeddings(
        self, tokenizer: Any, image: list[Any], text_alias: None = ...
    ) -> list[ExLlamaEmbedding]: ...

    @overload
    def get_image_embeddings(
        self, tokenizer: Any, image: ImageInput, text_alias: str | None = ...
    ) -> ExLlamaEmbedding: ...

    def get_image_embeddings(
        self, tokenizer: Any, image: ImageInput | list[Any], text_alias: str | None = None
    ) -> ExLlamaEmbedding | list[ExLlamaEmbedding]:
        """One image, or a list of them, of any sizes and encoded together; the arguments are ExLlamaV3's.

        Raises:
            ImageError, UsageError, PromptError: as :meth:`VisionTower.encode` and :func:`to_exllama`; an alias for a list.
        """
        several = isinstance(image, list)
        if several and text_alias is not None:
            raise UsageError(f"text_alias {shorten(text_alias)} cannot stand for a list of images; leave it out")
        images = cast("list[ImageInput]", image if several else [image])
        embeddings = [found.to("cpu").with_alias(text_alias) for found in self.tower.encode(images)]
        if not embeddings:
            return []
        views = to_exllama(self.tower, embeddings, tokenizer=tokenizer, space=self.space)
        return views if several else views[0]


def _view(
    tower: VisionTower,
    embedding: ImageEmbedding,
    tokenizer: Any,
    space: TokenSpace | None,
    model: Any,
    dtype: torch.dtype | None,
) -> ExLlamaEmbedding:
    # The pooled vector is nothing that ExLlama reads, and may stay behind.
    rows = replace(embedding, pooled=None)
    rounded = rows.with_tensors({name: _rounded(tensor, dtype) for name, tensor in rows.tensors.items()})
    numbered = _with_ids(rounded, space)
    try:
        first = _first_id(numbered)
        numbered = numbered.with_alias(numbered.text_alias or f"<$EMB_{first}$>")
        token_list = _token_list(tower, numbered, tokenizer)
    except BaseException:
        if space is not None:
            space.release(numbered)
        raise
    merge = tower.config.merge
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_spatial_merge_size=merge, hidden_size=tower.hidden_size))
    return ExLlamaEmbedding(
        embeddings=numbered.embeddings,
        text_alias=str(numbered.text_alias),
        first_index=first,
        token_list=token_list,
        thw_grid=numbered.grid_thw,
        mrope_merge_size=merge,
        deepstack_embeddings=list(numbered.deepstack) or None,
        model=stand_in if model is None else model,
        source=numbered,
        metadata={
            "original_size": numbered.original_size,
            "preprocessed_size": numbered.processed_size,
            "patches_size": numbered.grid_thw[1:],
        },
    )


def _with_ids(embedding: ImageEmbedding, space: TokenSpace | None) -> ImageEmbedding:
    if space is None and not embedding.token_ids:
        raise UsageError("an embedding has no token ids yet; pass space=TokenSpace(), one for all that share a cache")
    return embedding if space is None else space.assign(embedding)


def _first_id(numbered: ImageEmbedding) -> int:
    """The first of an embedding's ids, if ExLlama takes them all for what they are."""
    ids = numbered.token_ids
    if ids != tuple(range(ids[0], ids[0] + len(ids))):
        raise UsageError("the token ids of an embedding do not follow upon each other; let TokenSpace.assign give them")
    if ids[0] < FIRST_IMAGE_ID:
        raise UsageError(
            f"token ids from {ids[0]} on: ExLlama takes ids below {FIRST_IMAGE_ID} for the vocabulary's; make the space "
            f"with a base of at least that"
        )
    return ids[0]


def _token_list(tower: VisionTower, embedding: ImageEmbedding, tokenizer: Any) -> list[int]:
    """The image's ids and the model's tokens round and among them, without what only the end of a prompt has."""
    layout = tower.prompt_layout
    if tokenizer is None or layout is None:
        return list(embedding.token_ids)
    alone = replace(layout, after_images=(), ending="")
    prompt = encode_prompt(
        _reader(tokenizer), str(embedding.text_alias), [embedding], layout=alone, add_special_tokens=False
    )
    return cast("list[int]", prompt.input_ids.tolist())


def _reader(tokenizer: Any) -> Any:
    """ExLlama's tokenizers as a function from text to ids; others as they are."""
    if callable(tokenizer) or not hasattr(tokenizer, "single_id"):
        return tokenizer
    encode: Callable[..., torch.Tensor] = tokenizer.encode
    return lambda text: encode(text, encode_special_tokens=True).flatten().tolist()


def _rounded(rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    rows = rows.detach()
    if dtype is None or rows.dtype == dtype:
        return rows
    rounded = rows.to(dtype)
    if not torch.isfinite(rounded).all() and torch.isfinite(rows).all():
        raise UsageError(
            f"the rows have values up to {float(rows.abs().max()):.0f}, and {dtype} holds {torch.finfo(dtype).max:.0f}; "
            "pass dtype=None, or torch.bfloat16 if the engine takes it"
        )
    return rounded
