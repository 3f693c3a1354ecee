"""From a text and the embeddings of its images to what a language model takes: token ids, and rows in their place.

Every row of an image gets an id of its own (:class:`TokenSpace`), beyond the vocabulary: a key-value cache that is
searched by ids then finds the prefix again that holds the same image, and no other, and any piece of a prompt can be
embedded by itself (:func:`merge_embeddings`).  How a model's prompt has an image (markers round it, a token behind each
row of patches, time stamps of a video) is data, :class:`PromptLayout`; the tokens are those of transformers' processors
(``replace_image_token`` and ``replace_video_token`` of ``Qwen2VLProcessor``, ``Qwen3VLProcessor``, ``Gemma3Processor``,
``PixtralProcessor``, ``PaliGemmaProcessor``, ``LlavaProcessor`` and their variants), token for token.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, UsageError, list_names, shorten

from .layout import HasPromptLayout, PromptLayout, VideoLayout
from .merge import add_deepstack, merge_embeddings
from .token_ids import DEFAULT_BASE, TokenSpace, ordered_by_ids, sanitize_ids
from .tokenizer import Part, Run, Vocabulary, tokens_of

__all__ = [
    "DEFAULT_BASE",
    "EncodedPrompt",
    "PromptLayout",
    "TokenSpace",
    "VideoLayout",
    "add_deepstack",
    "encode_prompt",
    "merge_embeddings",
    "sanitize_ids",
]

UNKNOWN_ALIAS = re.compile(r"<\$EMB_[^$<>]*\$>")
"""How ExLlama names an image that was given no name."""


# -- text and images to ids -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        input_ids: ``[T]`` int64 on the CPU; rows of images have the ids of their embedding.
        placeholder_ids: ``[T]`` int64: the same as transformers' processor has it, one placeholder for all rows.
        token_types: ``[T]`` int64: 0 text, 1 image, 2 video; transformers' ``mm_token_type_ids``.
        embeddings: those that were given, in their order, all with token ids.  Where a space gave them, the prompt holds
            one use of the ids of each, until :meth:`release`.
        spans: for each embedding, the place of its first row and the place behind its last one; tokens between its rows
            (ends of rows, time stamps) lie within.
        bidirectional_spans: places whose tokens the language model lets see each other, start and end.
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
        """Ends the prompt's use of its embeddings' ids; call it once, when no cache holds keys and values of them any more.

        Args:
            space: the one that it was encoded with.

        Raises:
            UsageError: the ids are not that space's, or were released before; then none is released.
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
    """Tokenizes a text with images.

    An image stands in the text by its ``text_alias``, anywhere and once; what the model wants round an image is put
    there.  Images without an alias stand by the marker that transformers' processors know, as chat templates write it
    (``<|image_pad|>``, ``<image>``, ``[IMG]``, ``<start_of_image>``), in their order, images and videos each among
    themselves; what stands round the marker is then left as it is.  (So it is in transformers 5, and the time stamps of a
    Qwen3-VL video then lie between two more tokens, which the model was not trained with: give videos an alias.)

    Args:
        tokenizer: of transformers or of ``tokenizers``, which reads the text as a whole, special tokens by their names;
            or a function from text to token ids, which gets the pieces between the images and adds no tokens of its
            own (then every image needs an alias).
        text: the prompt, after the chat template.
        embeddings: its images and videos.
        layout: how the model's prompt has images.
        tower: instead of ``layout``, the tower that made the embeddings.
        space: gives ids to all embeddings, also to those that have some, such as a chat's from its last turn: one space
            for all prompts that share a key-value cache.  Every prompt holds one use of each of its embeddings, which
            :meth:`EncodedPrompt.release` ends.  Without a space the embeddings' own ids are taken, and nothing is counted.
        add_special_tokens: whether the tokenizer adds its own tokens; by default as the model's processor does it.  A
            chat template has written them already.

    Raises:
        PromptError: an alias that is not in the text, that is there twice, or that two embeddings have; a marker or an
            alias without an embedding; an embedding that does not fit the layout; a tokenizer of another model.
        UsageError: neither ``layout`` nor ``tower``, a tower without a language model, embeddings without ids and no
            space, two images with the same ids (of two spaces).
        TokenSpaceExhaustedError: the space has no ids left.
    """
    vocabulary = Vocabulary.of(tokenizer)
    layout = _with_numbers(_layout(layout, tower), vocabulary)
    images = tuple(embeddings)
    parts = _parts(text, images, layout, vocabulary)
    special = layout.special_tokens if add_special_tokens is None else add_special_tokens
    placeholders, places = tokens_of(parts, vocabulary, special)
    _check_vocabulary(placeholders, images, space)
    ids = _with_ids(images, space)
    placeholder_ids = torch.tensor(placeholders, dtype=torch.int64, device="cpu")
    rows = _places_of_rows(images, places)
    input_ids = placeholder_ids.clone()
    for image, where in zip(ids, rows, strict=True):
        input_ids[where] = torch.tensor(image.token_ids, device="cpu")
    return EncodedPrompt(
        input_ids=input_ids,
        placeholder_ids=placeholder_ids,
        token_types=_token_types(placeholder_ids, layout),
        embeddings=ids,
        spans=tuple((int(where[0]), int(where[-1]) + 1) for where in rows),
        bidirectional_spans=tuple(
            (int(where[start]), int(where[end - 1]) + 1)
            for image, where in zip(ids, rows, strict=True)
            for start, end in image.bidirectional_spans
        ),
    )


def _layout(layout: PromptLayout | None, tower: HasPromptLayout | None) -> PromptLayout:
    if (layout is None) == (tower is None):
        raise UsageError("pass either layout or tower: how a prompt has images is the language model's")
    found = layout if tower is None else tower.prompt_layout
    if found is None:
        raise UsageError("the tower comes without a language model, so nothing says how a prompt has images")
    return found


def _with_numbers(layout: PromptLayout, vocabulary: Vocabulary) -> PromptLayout:
    """The layout with the tokens behind rows of tokens by their ids."""
    if layout.row_break is None or layout.row_end is None:
        return layout
    return replace(layout, row_break=vocabulary.number(layout.row_break), row_end=vocabulary.number(layout.row_end))


def _with_ids(images: Sequence[ImageEmbedding], space: TokenSpace | None) -> tuple[ImageEmbedding, ...]:
    """The embeddings with ids, no two images with the same: one more use of the space's each, all or no one."""
    if space is None:
        missing = [index for index, image in enumerate(images) if not image.token_ids]
        if missing:
            raise UsageError(
                f"embedding {missing[0]} has no token ids; pass space=TokenSpace(), one and the same for all prompts that "
                "share a key-value cache"
            )
        ordered_by_ids(images)
        return tuple(images)
    assigned: list[ImageEmbedding] = []
    try:
        for image in images:
            assigned.append(space.assign(image))
    except BaseException:
        space.release(*assigned)
        raise
    return tuple(assigned)


def _check_vocabulary(tokens: Sequence[int], images: Sequence[ImageEmbedding], space: TokenSpace | None) -> None:
    own = [image.token_ids[0] for image in images if image.token_ids]
    base = min(own, default=DEFAULT_BASE) if space is None else space.base
    if tokens and max(tokens) >= base:
        raise PromptError(
            f"the tokenizer made token {max(tokens)}, and the ids of images begin at {base}; make the space with a "
            "base beyond the vocabulary"
        )


def _places_of_rows(images: Sequence[ImageEmbedding], places: Sequence[tuple[Run, int]]) -> list[torch.Tensor]:
    """Per image, the places of its rows in the prompt, ``[rows]`` int64."""
    found: list[list[torch.Tensor]] = [[] for _ in images]
    for run, place in places:
        found[run.image].append(torch.arange(place, place + run.length, device="cpu"))
    return [torch.cat(each) for each in found]


def _token_types(tokens: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    of_images = [token for token in (layout.placeholder, layout.row_break, layout.row_end) if token is not None]
    types = torch.isin(tokens, torch.tensor(of_images, device="cpu")).long()
    if layout.video is not None:
        types[tokens == layout.video.placeholder] = 2
    return types


# -- text to parts ----------------------------------------------------------------------------------------------------


def _is_video(index: int, embedding: ImageEmbedding, layout: PromptLayout) -> bool:
    """Whether it is a video.

    Raises:
        PromptError: it has no place in a prompt.
    """
    if not embedding.num_tokens:
        raise PromptError(f"embedding {index} has no rows, so nothing of it would stand in the prompt")
    rows, last = sum(embedding.tile_tokens), max((end for _, end in embedding.bidirectional_spans), default=0)
    if rows != embedding.num_tokens or last > embedding.num_tokens:
        raise PromptError(
            f"embedding {index} has {embedding.num_tokens} rows, but its tiles have {rows} and its spans end at {last}; "
            "where rows are changed, tile_tokens and bidirectional_spans have to be changed with them"
        )
    if embedding.is_video and layout.video is None:
        raise PromptError(f"embedding {index} is of a video, which this model's prompt has no place for")
    if not embedding.is_video and embedding.grid_thw[0] > 1:
        raise PromptError(
            f"embedding {index} has {embedding.grid_thw[0]} temporal patches and does not say that it is a video; make it "
            "with encode_video, or set is_clip"
        )
    return embedding.is_video


def _parts(text: str, images: Sequence[ImageEmbedding], layout: PromptLayout, vocabulary: Vocabulary) -> list[Part]:
    """The prompt: text, tokens, and rows of images, in order."""
    videos = [_is_video(index, image, layout) for index, image in enumerate(images)]
    markers = _markers(layout, vocabulary)
    aliases = _aliases(images, markers)
    named = set(aliases.values())
    waiting: dict[bool, deque[int]] = {False: deque(), True: deque()}
    for index, video in enumerate(videos):
        if index not in named:
            waiting[video].append(index)
    parts: list[Part] = []
    end = last = 0
    unused = dict(aliases)
    for start, name in _occurrences(text, [*aliases, *markers]):
        parts.append(_plain(text[end:start], layout, vocabulary))
        end = start + len(name)
        if name in aliases:
            if name not in unused:
                raise PromptError(
                    f"alias {shorten(name)} stands in the text twice; give the second one an alias of its own"
                )
            index = unused.pop(name)
            parts += _with_wrapping(images[index], index, videos[index], layout)
        else:
            queue = waiting[markers[name]]
            if not queue:
                raise PromptError(
                    f"{shorten(name)} stands in the text once too often: there is no embedding left for it"
                )
            index = queue.popleft()
            parts += _rows_of(images[index], index, videos[index], layout)
        last = len(parts)
    parts.append(_plain(text[end:], layout, vocabulary) + layout.ending)
    _check_all_used(unused, waiting, markers)
    parts[last:last] = layout.after_images
    return parts


def _markers(layout: PromptLayout, vocabulary: Vocabulary) -> dict[str, bool]:
    """The text of the tokens that stand for a whole image or video → whether it is a video."""
    if not vocabulary.reads_names:
        return {}
    markers = {vocabulary.name(layout.placeholder if layout.marker is None else layout.marker): False}
    # A tokenizer made before the model saw videos may not have the token.
    video = None if layout.video is None else vocabulary.name_of(layout.video.placeholder)
    return markers if video is None else {**markers, video: True}


def _aliases(images: Sequence[ImageEmbedding], markers: Mapping[str, bool]) -> dict[str, int]:
    """Alias → image; a marker is no alias."""
    aliases: dict[str, int] = {}
    for index, image in enumerate(images):
        alias = image.text_alias
        if alias is None or alias in markers:
            continue
        if not alias:
            raise PromptError(f"embedding {index} has an empty alias, which stands everywhere and nowhere in a text")
        if alias in aliases:
            raise PromptError(f"embeddings {aliases[alias]} and {index} have one alias, {shorten(alias)}")
        aliases[alias] = index
    return aliases


def _occurrences(text: str, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Where each name stands; of names that begin alike the longest that is there."""
    if not names:
        return
    longest_first = sorted(names, key=len, reverse=True)
    for match in re.finditer("|".join(map(re.escape, longest_first)), text):
        yield match.start(), match.group()


def _plain(text: str, layout: PromptLayout, vocabulary: Vocabulary) -> str:
    """Text between images, if it does not itself ask for one."""
    unknown = UNKNOWN_ALIAS.search(text)
    if unknown:
        raise PromptError(f"alias {shorten(unknown.group())} stands in the text, and no embedding has it")
    if vocabulary.reads_names and (name := vocabulary.name(layout.placeholder)) in text:
        raise PromptError(
            f"{shorten(name)} stands in the text: it is put there for the rows of an image, by nobody else"
        )
    return text


def _check_all_used(
    aliases: Mapping[str, int], waiting: Mapping[bool, Sequence[int]], markers: Mapping[str, bool]
) -> None:
    if aliases:
        raise PromptError(f"the text does not hold the alias of every image; missing: {list_names(list(aliases))}")
    for video, left in waiting.items():
        if left:
            known = [shorten(name) for name, of_video in markers.items() if of_video == video]
            raise PromptError(
                f"embedding {left[0]} has no alias, and the text no {' or '.join(known) or 'marker'} left to stand for it"
            )


def _with_wrapping(image: ImageEmbedding, index: int, video: bool, layout: PromptLayout) -> list[Part]:
    """An image as an alias stands for it: its rows, and what a chat template would have written round them."""
    around = layout.video if video and layout.video is not None else layout
    return [*around.before, *_rows_of(image, index, video, layout), *around.after]


def _rows_of(image: ImageEmbedding, index: int, video: bool, layout: PromptLayout) -> list[Part]:
    """An image's rows, and what the model wants among them."""
    if video and layout.video is not None:
        return _frames_of(image, index, layout.video)
    counts = (image.num_tokens,) if layout.between_tiles is None else image.tile_tokens
    parts: list[Part] = []
    start = 0
    for tile, count in enumerate(counts):
        if layout.between_tiles is not None and len(counts) > 1:
            parts.append(layout.between_tiles[min(tile, 2)])
        parts += [*layout.tile_before, *_lines_of(image, index, start, count, layout), *layout.tile_after]
        start += count
    return parts


def _lines_of(image: ImageEmbedding, index: int, start: int, count: int, layout: PromptLayout) -> list[Part]:
    """The rows of one tile, line by line where the model tells lines apart."""
    if layout.row_break is None or layout.row_end is None:
        return [Run(index, start, count, layout.placeholder)]
    lines, columns = (side // layout.merge for side in image.grid_thw[1:])
    if lines * columns != count:
        raise PromptError(
            f"embedding {index} has {count} rows, which are not the {lines} × {columns} tokens of its grid "
            f"{image.grid_thw}; it was made by another tower"
        )
    parts: list[Part] = []
    for line in range(lines):
        parts += [Run(index, start + line * columns, columns, layout.placeholder), layout.row_break]
    parts[-1] = layout.row_end
    return parts


def _frames_of(image: ImageEmbedding, index: int, layout: VideoLayout) -> list[Part]:
    """A video's rows, temporal patch by temporal patch where the model wants to know when."""
    if layout.timestamp is None:
        return [Run(index, 0, image.num_tokens, layout.placeholder)]
    frames = image.grid_thw[0]
    seconds = image.timestamps
    if len(seconds) != frames or image.num_tokens % frames:
        raise PromptError(
            f"embedding {index} is a video of {frames} temporal patches and {image.num_tokens} rows with {len(seconds)} "
            "time stamps; this model's prompt needs one for each patch: encode the video with fps or timestamps"
        )
    parts: list[Part] = []
    count = image.num_tokens // frames
    for frame, moment in enumerate(seconds):
        run = Run(index, frame * count, count, layout.placeholder)
        parts += [layout.timestamp.format(moment), *layout.frame_before, run, *layout.frame_after]
    return parts
