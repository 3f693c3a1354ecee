"""Encodes a text and the embeddings of its images into token ids.

Every row of an image gets its own id beyond the vocabulary (:class:`TokenSpace`). A key-value cache that is indexed by
ids then reuses a prefix with the same image only, and any chunk of a prompt can be embedded on its own
(:func:`merge_embeddings`). The tokens around and between rows come from the model's :class:`PromptLayout`. They equal
those of transformers' processors, token for token (``replace_image_token`` and ``replace_video_token``).
"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, UsageError, list_names, shorten

from .layout import HasPromptLayout, PromptLayout, VideoLayout
from .token_ids import DEFAULT_BASE, TokenSpace, assign_ids
from .tokenizer import Part, Run, Vocabulary, tokenize_parts


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class EncodedPrompt:
    """A tokenized prompt.

    Attributes:
        input_ids: ``[T]`` int64 on the CPU; image rows have the ids of their embedding.
        placeholder_ids: ``[T]`` int64, the ids of transformers' processor: one placeholder token for all rows.
        token_types: ``[T]`` int64: 0 text, 1 image, 2 video (transformers' ``mm_token_type_ids``).
        embeddings: the given embeddings in their order, with token ids. If a space assigned the ids, the prompt counts as
            one use of each embedding until :meth:`release`.
        spans: start and end (exclusive) of each embedding; includes the tokens between its rows.
        bidirectional_spans: start and end of tokens that attend to each other in both directions.
    """

    input_ids: torch.Tensor
    placeholder_ids: torch.Tensor
    token_types: torch.Tensor
    embeddings: tuple[ImageEmbedding, ...]
    spans: tuple[tuple[int, int], ...]
    bidirectional_spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    def release(self, space: TokenSpace) -> None:
        """Releases the prompt's ids; call it once, when no cache holds their keys and values any more.

        Releases nothing and raises :class:`UsageError` if ``space`` did not assign them or they were released before.
        """
        space.release(*self.embeddings)


def encode_prompt(
    tokenizer: Any,
    text: str,
    embeddings: Iterable[ImageEmbedding],
    *,
    layout: PromptLayout | None = None,
    tower: HasPromptLayout | None = None,
    space: TokenSpace | None = None,
    add_special_tokens: bool | None = None,
) -> EncodedPrompt:
    """Tokenizes a text with images and videos.

    An image is placed where its ``text_alias`` is in the text, which must occur exactly once; the layout's tokens are
    added around it. Images without an alias are placed, in order, at the markers of transformers' processors, as chat
    templates write them (``<|image_pad|>``, ``<image>``, ``[IMG]``, ``<start_of_image>``); videos likewise. The text
    around a marker is left as it is. (In transformers 5 a Qwen3-VL video at a marker thus gets its timestamps between
    two extra tokens, which the model was not trained with: give videos an alias.)

    Args:
        tokenizer: of transformers or of ``tokenizers``, which reads the text as a whole; or a function from text to ids,
            which gets the pieces between the images and adds no special tokens (then every image needs an alias).
        text: the prompt, after the chat template.
        embeddings: its images and videos.
        layout, tower: the model's prompt layout, or the tower that made the embeddings.
        space: assigns ids to all embeddings, also to those that have some. Use one space for all prompts that share a
            key-value cache, and call :meth:`EncodedPrompt.release` for each. Without a space the embeddings' own ids are
            used, and nothing is counted.
        add_special_tokens: let the tokenizer add its own tokens; by default as the model's processor does. A chat template
            has already written them.

    Raises:
        PromptError: text, embeddings, layout and tokenizer do not fit each other.
        UsageError: neither or both of ``layout`` and ``tower``; a tower without a language model; ids that are missing or
            shared.
        TokenSpaceExhaustedError: the space has no ids left.
    """
    vocabulary = Vocabulary.wrap(tokenizer)
    if (layout is None) == (tower is None):
        raise UsageError("exactly one of layout and tower must be given")
    layout = layout if tower is None else tower.prompt_layout
    if layout is None:
        raise UsageError("tower must have a language model, got an encoder alone; pass layout instead")
    if layout.row_break is not None and layout.row_end is not None:
        row_break, row_end = vocabulary.require_id(layout.row_break), vocabulary.require_id(layout.row_end)
        layout = replace(layout, row_break=row_break, row_end=row_end)
    images = tuple(embeddings)
    for index, image in enumerate(images):
        _check_embedding(index, image, layout)
    parts = _place_images(text, images, layout, vocabulary)
    special = layout.special_tokens if add_special_tokens is None else add_special_tokens
    tokens, starts = tokenize_parts(parts, vocabulary, special)
    own = [image.token_ids[0] for image in images if image.token_ids]
    base = min(own, default=DEFAULT_BASE) if space is None else space.base
    if tokens and max(tokens) >= base:
        raise PromptError(
            f"tokens of text must be below {base}, where the ids of images begin, got {max(tokens)}; make the space with a "
            "base beyond the vocabulary"
        )
    images = assign_ids(images, space)
    positions: list[list[int]] = [[] for _ in images]
    for run, start in starts:
        positions[run.image] += range(start, start + run.length)
    placeholder_ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    input_ids = placeholder_ids.clone()
    bidirectional: list[tuple[int, int]] = []
    for image, rows in zip(images, positions, strict=True):
        input_ids[rows] = torch.tensor(image.token_ids, device="cpu")
        bidirectional += [(rows[start], rows[end - 1] + 1) for start, end in image.bidirectional_spans]
    spans = tuple((rows[0], rows[-1] + 1) for rows in positions)
    image_tokens = [token for token in (layout.placeholder, layout.row_break, layout.row_end) if token is not None]
    token_types = torch.isin(placeholder_ids, torch.tensor(image_tokens, device="cpu")).long()
    if layout.video is not None:
        token_types[placeholder_ids == layout.video.placeholder] = 2
    return EncodedPrompt(input_ids, placeholder_ids, token_types, images, spans, tuple(bidirectional))


def _check_embedding(index: int, embedding: ImageEmbedding, layout: PromptLayout) -> None:
    count = embedding.num_tokens
    if not count:
        raise PromptError(f"embedding {index} has no rows, so a prompt has no place for it")
    rows, last = sum(embedding.tile_tokens), max((end for _, end in embedding.bidirectional_spans), default=0)
    if rows != count or last > count:
        raise PromptError(
            f"embedding {index} has {count} rows, but its tiles have {rows} and its bidirectional spans end at {last}"
        )
    if embedding.is_video and layout.video is None:
        raise PromptError(f"embedding {index} is a video, but this model's prompts take images only")
    if not embedding.is_video and (frames := embedding.grid_thw[0]) > 1:
        raise PromptError(f"embedding {index} has {frames} temporal patches but is_video is False; set is_video")


def _place_images(
    text: str, images: Sequence[ImageEmbedding], layout: PromptLayout, vocabulary: Vocabulary
) -> list[Part]:
    """Splits the text at its aliases and markers, and puts the images' rows and tokens there."""
    markers = _list_markers(layout, vocabulary)
    waiting, aliases = _queue_images(images, markers)
    # Of names that begin alike, the longest that matches counts.
    names = sorted(waiting, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")
    parts: list[Part] = []
    end = after_last_image = 0
    for match in pattern.finditer(text):
        name = match.group()
        parts.append(_check_text(text[end : match.start()], layout, vocabulary))
        end = match.end()
        if not waiting[name]:
            raise PromptError(
                f"the text has more {shorten(name)} than there are embeddings for it; give each image its own alias"
            )
        index = waiting[name].popleft()
        parts += _lay_out(images[index], index, layout, wrapped=name in aliases)
        after_last_image = len(parts)
    parts.append(_check_text(text[end:], layout, vocabulary) + layout.ending)
    if unused := [name for name in aliases if waiting[name]]:
        raise PromptError(f"the text must contain the alias of every image; missing: {list_names(unused)}")
    for name in markers.values():
        if left := waiting[name]:
            raise PromptError(f"embedding {left[0]} has no alias, and the text has no {shorten(name)} left for it")
    parts[after_last_image:after_last_image] = layout.after_images
    return parts


def _list_markers(layout: PromptLayout, vocabulary: Vocabulary) -> dict[bool, str]:
    """Maps ``is_video`` to the text of the token that stands for a whole image or video."""
    if not vocabulary.reads_names:
        return {}
    markers = {False: vocabulary.require_name(layout.placeholder if layout.marker is None else layout.marker)}
    # A tokenizer made before the model took videos may lack the token.
    video = None if layout.video is None else vocabulary.find_name(layout.video.placeholder)
    return markers if video is None else {**markers, True: video}


def _queue_images(
    images: Sequence[ImageEmbedding], markers: dict[bool, str]
) -> tuple[dict[str, deque[int]], list[str]]:
    """Maps each alias and marker to the images it stands for; also lists the aliases, of which markers are none."""
    waiting: dict[str, deque[int]] = {name: deque() for name in markers.values()}
    aliases: list[str] = []
    for index, image in enumerate(images):
        alias = image.text_alias
        if alias is None or alias in markers.values():
            if image.is_video not in markers:
                raise PromptError(f"embedding {index} has no alias, and the tokenizer has no marker; give it an alias")
            waiting[markers[image.is_video]].append(index)
        elif not alias:
            raise PromptError(f"embedding {index} has an empty alias; give it a text that occurs in the prompt")
        elif alias in waiting:
            raise PromptError(f"embeddings {waiting[alias][0]} and {index} have the same alias, {shorten(alias)}")
        else:
            waiting[alias] = deque([index])
            aliases.append(alias)
    return waiting, aliases


def _check_text(text: str, layout: PromptLayout, vocabulary: Vocabulary) -> str:
    """Returns text between images, or raises if it still asks for one."""
    # ExLlama's name for an image that was given no alias.
    if unknown := re.search(r"<\$EMB_[^$<>]*\$>", text):
        raise PromptError(f"alias {shorten(unknown.group())} is in the text, but no embedding has it")
    if vocabulary.reads_names and (name := vocabulary.require_name(layout.placeholder)) in text:
        raise PromptError(f"the text must not contain {shorten(name)}, which is inserted for the rows of images")
    return text


def _lay_out(image: ImageEmbedding, index: int, layout: PromptLayout, *, wrapped: bool) -> list[Part]:
    """Lays out an image's rows; ``wrapped`` adds the tokens that a chat template writes around it."""
    around: PromptLayout | VideoLayout = layout
    parts: list[Part] = []
    if image.is_video and layout.video is not None:
        around = layout.video
        parts = _lay_out_frames(image, index, around)
    else:
        counts = (image.num_tokens,) if layout.between_tiles is None else image.tile_tokens
        for tile, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            if layout.between_tiles is not None and len(counts) > 1:
                parts.append(layout.between_tiles[min(tile, 2)])
            lines = _lay_out_lines(image, index, end - count, count, layout)
            parts += [*layout.tile_before, *lines, *layout.tile_after]
    return [*around.before, *parts, *around.after] if wrapped else parts


def _lay_out_lines(image: ImageEmbedding, index: int, start: int, count: int, layout: PromptLayout) -> list[Part]:
    """Lays out the rows of one tile, line by line if the model marks the ends of lines."""
    if layout.row_break is None or layout.row_end is None:
        return [Run(index, start, count, layout.placeholder)]
    lines, columns = (side // layout.merge for side in image.grid_thw[1:])
    if lines * columns != count:
        raise PromptError(
            f"embedding {index} has {count} rows, but its grid makes {lines} × {columns}; encode it with this model's tower"
        )
    parts: list[Part] = []
    for line in range(lines):
        parts += [Run(index, start + line * columns, columns, layout.placeholder), layout.row_break]
    parts[-1] = layout.row_end
    return parts


def _lay_out_frames(image: ImageEmbedding, index: int, layout: VideoLayout) -> list[Part]:
    """Lays out a video's rows, with a timestamp before each temporal patch if the model reads them."""
    if layout.timestamp is None:
        return [Run(index, 0, image.num_tokens, layout.placeholder)]
    frames, seconds = image.grid_thw[0], image.timestamps
    if len(seconds) != frames or image.num_tokens % frames:
        raise PromptError(
            f"embedding {index} is a video of {frames} temporal patches and {image.num_tokens} rows with {len(seconds)} "
            "timestamps, but this model needs one per patch; encode the video with fps or timestamps"
        )
    parts: list[Part] = []
    count = image.num_tokens // frames
    for frame, moment in enumerate(seconds):
        run = Run(index, frame * count, count, layout.placeholder)
        parts += [layout.timestamp.format(moment), *layout.frame_before, run, *layout.frame_after]
    return parts
