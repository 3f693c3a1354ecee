"""Embeddings for ExLlamaV2 and ExLlamaV3, and towers in place of their vision models.

Checked against the source of exllamav2 0.3.2 (``ExLlamaV2MMEmbedding``) and exllamav3 1.6.5 (``MMEmbedding``). Both read
embeddings by attributes, so that one class serves both::

    vision = ExLlamaV2Vision(tower)
    image = vision.get_image_embeddings(model, tokenizer, image)
    ids = tokenizer.encode(f"{image.text_alias} Describe this.", embeddings=[image])

Three things differ from ExLlama's own vision models. The same image gets the same ids, so that the key-value cache is
reused. The tokens around an image are the tokens themselves, not copies of their embeddings (ExLlamaV2), so that no
language model is needed. Pixtral's last row of patches ends in ``[IMG_END]`` as in transformers, not in
``[IMG_BREAK][IMG_END]``. This module does not import ExLlama.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, overload

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import UsageError, shorten
from tritontower.preprocessing.images.image import ImageInput
from tritontower.prompt import DEFAULT_BASE, TokenSpace, encode_prompt
from tritontower.prompt.token_ids import assign_ids
from tritontower.tower import VisionTower

from .checks import check_embeddings

__all__ = ["ExLlamaEmbedding", "ExLlamaV2Vision", "ExLlamaV3Vision", "to_exllama"]


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class ExLlamaEmbedding:
    """One image or video, with the attributes of ``ExLlamaV2MMEmbedding`` and of ``MMEmbedding``.

    Attributes:
        embeddings, deepstack_embeddings: ``[length, hidden_size]`` each; ExLlamaV2 converts the whole prompt to the dtype.
        text_alias: text that stands for it in a prompt.
        first_index: first of its consecutive ids.
        token_list: its tokens in a prompt: its ids, and the model's own tokens around and between them.
        thw_grid: temporal patches, rows and columns of patches.
        mrope_merge_size: side of the square of patches that one token covers.
        model: ExLlamaV2's language model, whose ``config.vision_spatial_merge_size`` it reads, or a replacement.
        source: the embedding with its ids; shares the rows.
        metadata: sizes in pixels; open to the application.
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
    # No tokens around the image are embedded (ExLlamaV2), and it may be anywhere in a prompt (ExLlamaV3).
    pre_tokens: int = 0
    post_tokens: int = 0
    align: int = 0
    align_phase: int = 0
    align_lead: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.embeddings.shape[0]

    @property
    def last_index(self) -> int:
        """First id after its own."""
        return self.first_index + self.length

    @property
    def full_length(self) -> int:
        """Number of its tokens in a prompt."""
        return len(self.token_list)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """ExLlamaV3's name of :attr:`thw_grid`."""
        return self.thw_grid

    @property
    def token_string(self) -> torch.Tensor:
        """:attr:`token_list` as ``[1, full_length]`` int64."""
        return torch.tensor([self.token_list], dtype=torch.long, device="cpu")

    # Names of ExLlamaV3.
    mm_length = length

    def token_list_at(self, position: int) -> list[int]:
        """Returns :attr:`token_list`, which is the same at every position."""
        return self.token_list

    def get_ids(self) -> list[int]:
        """Returns a copy of :attr:`token_list` (ExLlamaV2)."""
        return list(self.token_list)

    def get_ids_tensor(self) -> torch.Tensor:
        """Returns :attr:`token_string` (ExLlamaV2)."""
        return self.token_string

    def get_vision_token_range(self) -> tuple[int, int]:
        """Returns its first id, and the first id after its own."""
        return self.first_index, self.last_index

    def get_size_in_bytes(self) -> int:
        """Returns the bytes of all its rows."""
        return sum(rows.nbytes for rows in (self.embeddings, *(self.deepstack_embeddings or ())))

    def release(self, space: TokenSpace) -> None:
        """Releases its ids, once; raises :class:`UsageError` if ``space`` did not assign them or they were released."""
        space.release(self.source)


@overload
def to_exllama(tower: VisionTower, embeddings: ImageEmbedding, **options: Any) -> ExLlamaEmbedding: ...


@overload
def to_exllama(tower: VisionTower, embeddings: Iterable[ImageEmbedding], **options: Any) -> list[ExLlamaEmbedding]: ...


def to_exllama(  # type: ignore[misc]  # the overloads abbreviate the options
    tower: VisionTower,
    embeddings: ImageEmbedding | Iterable[ImageEmbedding],
    *,
    tokenizer: Any = None,
    space: TokenSpace | None = None,
    model: Any = None,
    dtype: torch.dtype | None = torch.float16,
) -> ExLlamaEmbedding | list[ExLlamaEmbedding]:
    """Converts embeddings to the views that ExLlama's generators, tokenizers and models take.

    Args:
        tower: the tower that made them.
        embeddings: one, or several.
        tokenizer: of ExLlama or transformers, or a function from text to ids; adds the model's tokens around the ids.
            Without it the view has the ids alone, and the prompt must contain the rest.
        space: assigns the ids; each view counts as one use until :meth:`ExLlamaEmbedding.release`. Optional if the
            embeddings have ids, which the caller then releases.
        model: ExLlamaV2's language model; its width is checked.
        dtype: of the rows; ExLlama computes in fp16. ``None`` keeps them.

    Returns:
        One view for one embedding, a list for several. Rows stay on their device.

    Raises:
        UsageError: the embeddings do not fit the tower or the model; no ids and no space; ids in ExLlama's range of the
            vocabulary; values beyond the range of ``dtype``.
        PromptError: the tokenizer lacks the model's tokens.
    """
    given = check_embeddings(tower, embeddings)
    width = getattr(getattr(model, "config", None), "hidden_size", tower.hidden_size)
    if width != tower.hidden_size:
        raise UsageError(f"model must have hidden_size {tower.hidden_size}, as the tower, got {width}")
    converted = [
        # ExLlama does not read the pooled vector.
        each.with_tensors({name: _convert(rows, dtype) for name, rows in each.tensors.items() if name != "pooled"})
        for each in given
    ]
    assigned = assign_ids(converted, space)
    try:
        views = [_make_view(tower, embedding, tokenizer, model) for embedding in assigned]
    except BaseException:
        if space is not None:
            space.release(*assigned)
        raise
    return views[0] if isinstance(embeddings, ImageEmbedding) else views


class ExLlamaV2Vision:
    """A tower with the methods of ``ExLlamaV2VisionTower``; they raise the errors of the tower and of :func:`to_exllama`.

    Attributes:
        tower: the tower.
        space: assigns ids; use one space for everything that shares a key-value cache.
    """

    def __init__(self, tower: VisionTower, *, space: TokenSpace | None = None) -> None:
        self.tower, self.space = tower, space or TokenSpace()

    def get_image_embeddings(
        self, model: Any, tokenizer: Any, image: ImageInput, text_alias: str | None = None, embeddings_cpu: bool = True
    ) -> ExLlamaEmbedding:
        """Encodes one image of any type that the tower takes."""
        (embedding,) = self.tower.encode([image])
        return self._view(model, tokenizer, embedding, text_alias, embeddings_cpu)

    def get_video_embeddings(
        self,
        model: Any,
        tokenizer: Any,
        video: Sequence[ImageInput],
        text_alias: str | None = None,
        embeddings_cpu: bool = True,
    ) -> ExLlamaEmbedding:
        """Encodes one video, a sequence of frames of one size."""
        return self._view(model, tokenizer, self.tower.encode_video(video), text_alias, embeddings_cpu)

    def _view(
        self, model: Any, tokenizer: Any, embedding: ImageEmbedding, alias: Any, on_cpu: bool
    ) -> ExLlamaEmbedding:
        embedding = (embedding.to("cpu") if on_cpu else embedding).with_alias(alias)
        view = to_exllama(self.tower, embedding, tokenizer=tokenizer, space=self.space, model=model)
        # ExLlamaV2 puts the height first.
        view.metadata["original_size"] = embedding.original_size[::-1]
        return view


class ExLlamaV3Vision:
    """A tower with the methods of the vision model of an ExLlamaV3 architecture; else as :class:`ExLlamaV2Vision`."""

    def __init__(self, tower: VisionTower, *, space: TokenSpace | None = None) -> None:
        self.tower, self.space = tower, space or TokenSpace()

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
        """Encodes one image, or a list of images of any sizes in one call; a list takes no alias."""
        several = isinstance(image, list)
        if several and text_alias is not None:
            raise UsageError(f"text_alias must be None for a list of images, got {shorten(text_alias)}")
        found = [embedding.to("cpu") for embedding in self.tower.encode(image if isinstance(image, list) else [image])]
        if not found:
            return []
        named = [embedding.with_alias(text_alias) for embedding in found]
        views = to_exllama(self.tower, named, tokenizer=tokenizer, space=self.space)
        return views if several else views[0]


def _make_view(tower: VisionTower, embedding: ImageEmbedding, tokenizer: Any, model: Any) -> ExLlamaEmbedding:
    first = embedding.token_ids[0]
    if first < DEFAULT_BASE:
        raise UsageError(f"token ids must be at least {DEFAULT_BASE}, or ExLlama reads them as text, got {first}")
    alias = embedding.text_alias or f"<$EMB_{first}$>"
    numbered = embedding.with_alias(alias)
    merge = tower.config.merge
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_spatial_merge_size=merge, hidden_size=tower.hidden_size))
    return ExLlamaEmbedding(
        embeddings=numbered.embeddings,
        text_alias=alias,
        first_index=first,
        token_list=_list_tokens(tower, numbered, tokenizer),
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


def _list_tokens(tower: VisionTower, embedding: ImageEmbedding, tokenizer: Any) -> list[int]:
    """Lists the image's ids and the model's tokens around them, without those that end a prompt."""
    layout = tower.prompt_layout
    if tokenizer is None or layout is None:
        return list(embedding.token_ids)
    if not callable(tokenizer) and hasattr(tokenizer, "single_id"):  # a tokenizer of ExLlama
        encode: Callable[..., torch.Tensor] = tokenizer.encode

        def tokenizer(text: str) -> Any:
            return encode(text, encode_special_tokens=True).flatten().tolist()

    alone = replace(layout, after_images=(), ending="")
    alias = str(embedding.text_alias)
    prompt = encode_prompt(tokenizer, alias, [embedding], layout=alone, add_special_tokens=False)
    ids: list[int] = prompt.input_ids.tolist()
    return ids


def _convert(rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    rows = rows.detach()
    if dtype is None or rows.dtype == dtype:
        return rows
    converted = rows.to(dtype)
    if not torch.isfinite(converted).all() and torch.isfinite(rows).all():
        limit, largest = torch.finfo(dtype).max, float(rows.abs().max())
        raise UsageError(f"rows must be at most {limit:.0f} for {dtype}, got {largest:.0f}; pass dtype=None")
    return converted
