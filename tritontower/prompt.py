"""From a text and the embeddings of its pictures to what a language model takes: token ids, and rows in their place.

Every row of a picture gets an id of its own (:class:`TokenSpace`), beyond the vocabulary: a key-value cache that is
searched by ids then finds the prefix again that holds the same picture, and no other, and any piece of a prompt can be
embedded by itself (:func:`merge_embeddings`).  How a model's prompt has a picture (markers round it, a token behind each
row of patches, time stamps of a clip) is data, :class:`PromptLayout`; the tokens are those of transformers' processors
(``replace_image_token`` and ``replace_video_token`` of ``Qwen2VLProcessor``, ``Qwen3VLProcessor``, ``Gemma3Processor``,
``PixtralProcessor``, ``PaliGemmaProcessor``, ``LlavaProcessor`` and their kin), token for token.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch

from .embedding import ImageEmbedding
from .errors import PromptError, TokenSpaceExhaustedError, UsageError, list_names, shorten
from .merging import add_deepstack, merge_embeddings
from .token_space import DEFAULT_BASE, TokenSpace, ordered_by_ids, sanitize_ids

__all__ = [
    "DEFAULT_BASE",
    "ClipLayout",
    "EncodedPrompt",
    "PromptLayout",
    "TokenSpace",
    "add_deepstack",
    "encode_prompt",
    "merge_embeddings",
    "sanitize_ids",
]

Piece = str | int
"""Text, which is tokenized together with what stands beside it, or one token by its id."""

UNKNOWN_ALIAS = re.compile(r"<\$EMB_[^$<>]*\$>")
"""How ExLlama names a picture that was given no name."""


# -- how a model's prompt has a picture -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipLayout:
    """How a prompt has a clip.

    Attributes:
        placeholder: the token that transformers repeats for the clip's rows.
        before, after: what a chat template writes round a clip; it comes with an alias.
        time_stamp: text before each temporal patch, its ``{}`` the seconds at its middle, such as
            ``"<{:.1f} seconds>"``; ``None`` where a clip's rows follow upon each other.
        frame_before, frame_after: what stands round the rows of each temporal patch, where there are time stamps.
    """

    placeholder: int
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    time_stamp: str | None = None
    frame_before: tuple[Piece, ...] = ()
    frame_after: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class PromptLayout:
    """How a prompt has pictures.

    Attributes:
        placeholder: the token that transformers repeats for a picture's rows.
        marker: the token that stands for a whole picture in a prompt written for transformers; ``None``: the placeholder.
        merge: side of the square of patches that one token stands for.
        before, after: what a chat template writes round a picture; it comes with an alias, while round a marker it is
            there already.
        view_before, view_after: what stands round the rows of each view, whoever wrote the prompt.
        between_views: where a picture has several views, the text before the first, the second, and every other one;
            ``None`` where views are not told apart.
        row_break, row_end: the token behind each row of tokens but the last, and behind the last; text has to be the name
            of one token.
        behind_pictures: what follows upon the last picture of a prompt, and stands at its beginning where there is none.
        ending: text at the end of a prompt.
        special_tokens: whether the tokenizer adds its own tokens, such as the one for the beginning.
        clip: how it has clips; ``None`` where it has none.
    """

    placeholder: int
    marker: int | None = None
    merge: int = 1
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    view_before: tuple[Piece, ...] = ()
    view_after: tuple[Piece, ...] = ()
    between_views: tuple[str, str, str] | None = None
    row_break: Piece | None = None
    row_end: Piece | None = None
    behind_pictures: tuple[Piece, ...] = ()
    ending: str = ""
    special_tokens: bool = True
    clip: ClipLayout | None = None


class HasPromptLayout(Protocol):
    """A tower, as far as a prompt needs it."""

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """How its language model's prompt has pictures; ``None`` for a tower that comes without a language model."""
        ...


class _Run(NamedTuple):
    """Rows of one picture that follow upon each other in the prompt: a part of it, beside text and tokens."""

    picture: int
    start: int
    length: int
    placeholder: int


_Part = str | int | _Run


# -- text and pictures to ids -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        input_ids: ``[T]`` int64 on the CPU; rows of pictures have the ids of their embedding.
        placeholder_ids: ``[T]`` int64: the same as transformers' processor has it, one placeholder for all rows.
        token_types: ``[T]`` int64: 0 text, 1 picture, 2 clip; transformers' ``mm_token_type_ids``.
        embeddings: those that were given, in their order, all with token ids.
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


@dataclass(frozen=True)
class _Vocabulary:
    """What is needed of a tokenizer.

    Attributes:
        encode: text, and whether to add special tokens → ids.
        name_of: id of a token → its text, ``None`` where there is none.
        id_of: text of one token → its id, ``None`` where there is none.
        reads_names: whether ``encode`` knows tokens by their text; if not, text is encoded in pieces between them.
    """

    encode: Callable[[str, bool], Sequence[int]]
    name_of: Callable[[int], str | None]
    id_of: Callable[[str], int | None]
    reads_names: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "_Vocabulary":
        """Of a tokenizer of transformers or of ``tokenizers``, or of a function from text to ids."""
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            return cls(
                lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"],
                lambda token: tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None,
                tokenizer.convert_tokens_to_ids,
                True,
            )
        if hasattr(tokenizer, "id_to_token"):
            return cls(
                lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids,
                tokenizer.id_to_token,
                tokenizer.token_to_id,
                True,
            )
        if not callable(tokenizer):
            raise UsageError(
                f"tokenizer is {shorten(tokenizer)}; allowed: a tokenizer of transformers or of tokenizers, or a function "
                "from text to token ids"
            )

        def only(text: str) -> int | None:
            ids = tokenizer(text)
            return ids[0] if len(ids) == 1 else None

        return cls(lambda text, special: tokenizer(text), lambda token: None, only, False)

    def name(self, token: int) -> str:
        """The text of a token.

        Raises:
            PromptError: there is no such token.
        """
        name = self.name_of(token)
        if name is None:
            raise PromptError(
                f"the tokenizer has no token {token}; the tokenizer and the tower belong to different models"
            )
        return name

    def number(self, piece: Piece) -> int:
        """The id of one token, by its id or its text.

        Raises:
            PromptError: there is no such token.
        """
        number = piece if isinstance(piece, int) else self.id_of(piece)
        # Some tokenizers answer with the token for unknown text.
        if number is None or (isinstance(piece, str) and self.reads_names and self.name_of(number) != piece):
            raise PromptError(f"{shorten(piece)} is not one token of the tokenizer, which belongs to another model")
        return number


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
    """Tokenizes a text with pictures.

    A picture stands in the text by its ``text_alias``, anywhere and once; what the model wants round a picture is put
    there.  Pictures without an alias stand by the marker that transformers' processors know, as chat templates write it
    (``<|image_pad|>``, ``<image>``, ``[IMG]``, ``<start_of_image>``), in their order, pictures and clips each among
    themselves; what stands round the marker is then left as it is.  (So it is in transformers 5, and the time stamps of a
    Qwen3-VL clip then lie between two more tokens, which the model was not trained with: give clips an alias.)

    Args:
        tokenizer: of transformers or of ``tokenizers``, which reads the text as a whole, special tokens by their names;
            or a function from text to token ids, which gets the pieces between the pictures and adds no tokens of its
            own (then every picture needs an alias).
        text: the prompt, after the chat template.
        embeddings: its pictures and clips.
        layout: how the model's prompt has pictures.
        tower: instead of ``layout``, the tower that made the embeddings.
        space: gives ids to embeddings that have none: one space for all prompts that share a key-value cache.
        add_special_tokens: whether the tokenizer adds its own tokens; by default as the model's processor does it.  A
            chat template has written them already.

    Raises:
        PromptError: an alias that is not in the text, that is there twice, or that two embeddings have; a marker or an
            alias without an embedding; an embedding that does not fit the layout; a tokenizer of another model.
        UsageError: neither ``layout`` nor ``tower``, a tower without a language model, embeddings without ids and no
            space, two pictures with the same ids (of two spaces).
        TokenSpaceExhaustedError: the space has no ids left.
    """
    vocabulary = _Vocabulary.of(tokenizer)
    layout = _with_numbers(_layout(layout, tower), vocabulary)
    pictures = tuple(embeddings)
    parts = _parts(text, pictures, layout, vocabulary)
    special = layout.special_tokens if add_special_tokens is None else add_special_tokens
    placeholders, places = _tokens(parts, vocabulary, special)
    _check_vocabulary(placeholders, pictures, space)
    ids = _with_ids(pictures, space)
    placeholder_ids = torch.tensor(placeholders, dtype=torch.int64)
    rows = _places_of_rows(pictures, places)
    input_ids = placeholder_ids.clone()
    for picture, where in zip(ids, rows, strict=True):
        input_ids[where] = torch.tensor(picture.token_ids)
    return EncodedPrompt(
        input_ids=input_ids,
        placeholder_ids=placeholder_ids,
        token_types=_token_types(placeholder_ids, layout),
        embeddings=ids,
        spans=tuple((int(where[0]), int(where[-1]) + 1) for where in rows),
        bidirectional_spans=tuple(
            (int(where[start]), int(where[end - 1]) + 1)
            for picture, where in zip(ids, rows, strict=True)
            for start, end in picture.bidirectional_spans
        ),
    )


def _layout(layout: PromptLayout | None, tower: HasPromptLayout | None) -> PromptLayout:
    if (layout is None) == (tower is None):
        raise UsageError("pass either layout or tower: how a prompt has pictures is the language model's")
    found = layout if tower is None else tower.prompt_layout
    if found is None:
        raise UsageError("the tower comes without a language model, so nothing says how a prompt has pictures")
    return found


def _with_numbers(layout: PromptLayout, vocabulary: _Vocabulary) -> PromptLayout:
    """The layout with the tokens behind rows of tokens by their ids."""
    if layout.row_break is None or layout.row_end is None:
        return layout
    return replace(layout, row_break=vocabulary.number(layout.row_break), row_end=vocabulary.number(layout.row_end))


def _with_ids(pictures: Sequence[ImageEmbedding], space: TokenSpace | None) -> tuple[ImageEmbedding, ...]:
    """The embeddings with ids, no two pictures with the same; those that had none get them, all or no one."""
    missing = [index for index, picture in enumerate(pictures) if not picture.token_ids]
    if missing and space is None:
        raise UsageError(
            f"embedding {missing[0]} has no token ids; pass space=TokenSpace(), one and the same for all prompts that "
            "share a key-value cache"
        )
    assigned: list[ImageEmbedding] = []
    try:
        for picture in pictures:
            assigned.append(picture if picture.token_ids or space is None else space.assign(picture))
        ordered_by_ids(assigned)
    except (TokenSpaceExhaustedError, UsageError):
        for index in missing:
            if index < len(assigned) and space is not None:
                space.release(assigned[index])
        raise
    return tuple(assigned)


def _check_vocabulary(tokens: Sequence[int], pictures: Sequence[ImageEmbedding], space: TokenSpace | None) -> None:
    lowest = [picture.token_ids[0] for picture in pictures if picture.token_ids]
    base = min(lowest if space is None else [*lowest, space.base], default=DEFAULT_BASE)
    if tokens and max(tokens) >= base:
        raise PromptError(
            f"the tokenizer made token {max(tokens)}, and the ids of pictures begin at {base}; make the space with a "
            "base beyond the vocabulary"
        )


def _places_of_rows(pictures: Sequence[ImageEmbedding], places: Sequence[tuple[_Run, int]]) -> list[torch.Tensor]:
    """Per picture, the places of its rows in the prompt, ``[rows]`` int64."""
    found: list[list[torch.Tensor]] = [[] for _ in pictures]
    for run, place in places:
        found[run.picture].append(torch.arange(place, place + run.length))
    return [torch.cat(each) for each in found]


def _token_types(tokens: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    of_pictures = [token for token in (layout.placeholder, layout.row_break, layout.row_end) if token is not None]
    types = torch.isin(tokens, torch.tensor(of_pictures)).long()
    if layout.clip is not None:
        types[tokens == layout.clip.placeholder] = 2
    return types


# -- text to parts ----------------------------------------------------------------------------------------------------


def _is_clip(index: int, embedding: ImageEmbedding, layout: PromptLayout) -> bool:
    """Whether it is a clip.

    Raises:
        PromptError: it has no place in a prompt.
    """
    if not embedding.num_tokens:
        raise PromptError(f"embedding {index} has no rows, so nothing of it would stand in the prompt")
    rows, last = sum(embedding.view_tokens), max((end for _, end in embedding.bidirectional_spans), default=0)
    if rows != embedding.num_tokens or last > embedding.num_tokens:
        raise PromptError(
            f"embedding {index} has {embedding.num_tokens} rows, but its views have {rows} and its spans end at {last}; "
            "where rows are changed, view_tokens and bidirectional_spans have to be changed with them"
        )
    if embedding.is_clip and layout.clip is None:
        raise PromptError(f"embedding {index} is of a clip, which this model's prompt has no place for")
    if not embedding.is_clip and embedding.grid_thw[0] > 1:
        raise PromptError(
            f"embedding {index} has {embedding.grid_thw[0]} temporal patches and does not say that it is a clip; make it "
            "with encode_video, or set is_clip"
        )
    return embedding.is_clip


def _parts(text: str, pictures: Sequence[ImageEmbedding], layout: PromptLayout, vocabulary: _Vocabulary) -> list[_Part]:
    """The prompt: text, tokens, and rows of pictures, in order."""
    clips = [_is_clip(index, picture, layout) for index, picture in enumerate(pictures)]
    markers = _markers(layout, vocabulary)
    aliases = _aliases(pictures, markers)
    named = set(aliases.values())
    waiting: dict[bool, deque[int]] = {False: deque(), True: deque()}
    for index, clip in enumerate(clips):
        if index not in named:
            waiting[clip].append(index)
    parts: list[_Part] = []
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
            parts += _with_wrapping(pictures[index], index, clips[index], layout)
        else:
            queue = waiting[markers[name]]
            if not queue:
                raise PromptError(
                    f"{shorten(name)} stands in the text once too often: there is no embedding left for it"
                )
            index = queue.popleft()
            parts += _rows_of(pictures[index], index, clips[index], layout)
        last = len(parts)
    parts.append(_plain(text[end:], layout, vocabulary) + layout.ending)
    _check_all_used(unused, waiting, markers)
    parts[last:last] = layout.behind_pictures
    return parts


def _markers(layout: PromptLayout, vocabulary: _Vocabulary) -> dict[str, bool]:
    """The text of the tokens that stand for a whole picture or clip → whether it is a clip."""
    if not vocabulary.reads_names:
        return {}
    markers = {vocabulary.name(layout.placeholder if layout.marker is None else layout.marker): False}
    # A tokenizer made before the model saw clips may not have the token.
    clip = None if layout.clip is None else vocabulary.name_of(layout.clip.placeholder)
    return markers if clip is None else {**markers, clip: True}


def _aliases(pictures: Sequence[ImageEmbedding], markers: Mapping[str, bool]) -> dict[str, int]:
    """Alias → picture; a marker is no alias."""
    aliases: dict[str, int] = {}
    for index, picture in enumerate(pictures):
        alias = picture.text_alias
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


def _plain(text: str, layout: PromptLayout, vocabulary: _Vocabulary) -> str:
    """Text between pictures, if it does not itself ask for one."""
    unknown = UNKNOWN_ALIAS.search(text)
    if unknown:
        raise PromptError(f"alias {shorten(unknown.group())} stands in the text, and no embedding has it")
    if vocabulary.reads_names and (name := vocabulary.name(layout.placeholder)) in text:
        raise PromptError(
            f"{shorten(name)} stands in the text: it is put there for the rows of a picture, by nobody else"
        )
    return text


def _check_all_used(
    aliases: Mapping[str, int], waiting: Mapping[bool, Sequence[int]], markers: Mapping[str, bool]
) -> None:
    if aliases:
        raise PromptError(f"the text does not hold the alias of every picture; missing: {list_names(list(aliases))}")
    for clip, left in waiting.items():
        if left:
            known = [shorten(name) for name, of_clip in markers.items() if of_clip == clip]
            raise PromptError(
                f"embedding {left[0]} has no alias, and the text no {' or '.join(known) or 'marker'} left to stand for it"
            )


def _with_wrapping(picture: ImageEmbedding, index: int, clip: bool, layout: PromptLayout) -> list[_Part]:
    """A picture as an alias stands for it: its rows, and what a chat template would have written round them."""
    around = layout.clip if clip and layout.clip is not None else layout
    return [*around.before, *_rows_of(picture, index, clip, layout), *around.after]


def _rows_of(picture: ImageEmbedding, index: int, clip: bool, layout: PromptLayout) -> list[_Part]:
    """A picture's rows, and what the model wants among them."""
    if clip and layout.clip is not None:
        return _frames_of(picture, index, layout.clip)
    counts = (picture.num_tokens,) if layout.between_views is None else picture.view_tokens
    parts: list[_Part] = []
    start = 0
    for view, count in enumerate(counts):
        if layout.between_views is not None and len(counts) > 1:
            parts.append(layout.between_views[min(view, 2)])
        parts += [*layout.view_before, *_lines_of(picture, index, start, count, layout), *layout.view_after]
        start += count
    return parts


def _lines_of(picture: ImageEmbedding, index: int, start: int, count: int, layout: PromptLayout) -> list[_Part]:
    """The rows of one view, line by line where the model tells lines apart."""
    if layout.row_break is None or layout.row_end is None:
        return [_Run(index, start, count, layout.placeholder)]
    lines, columns = (side // layout.merge for side in picture.grid_thw[1:])
    if lines * columns != count:
        raise PromptError(
            f"embedding {index} has {count} rows, which are not the {lines} × {columns} tokens of its grid "
            f"{picture.grid_thw}; it was made by another tower"
        )
    parts: list[_Part] = []
    for line in range(lines):
        parts += [_Run(index, start + line * columns, columns, layout.placeholder), layout.row_break]
    parts[-1] = layout.row_end
    return parts


def _frames_of(picture: ImageEmbedding, index: int, layout: ClipLayout) -> list[_Part]:
    """A clip's rows, temporal patch by temporal patch where the model wants to know when."""
    if layout.time_stamp is None:
        return [_Run(index, 0, picture.num_tokens, layout.placeholder)]
    frames = picture.grid_thw[0]
    seconds = picture.timestamps
    if len(seconds) != frames or picture.num_tokens % frames:
        raise PromptError(
            f"embedding {index} is a clip of {frames} temporal patches and {picture.num_tokens} rows with {len(seconds)} "
            "time stamps; this model's prompt needs one for each patch: encode the clip with fps or timestamps"
        )
    parts: list[_Part] = []
    count = picture.num_tokens // frames
    for frame, moment in enumerate(seconds):
        run = _Run(index, frame * count, count, layout.placeholder)
        parts += [layout.time_stamp.format(moment), *layout.frame_before, run, *layout.frame_after]
    return parts


# -- parts to tokens --------------------------------------------------------------------------------------------------


def _tokens(parts: Sequence[_Part], vocabulary: _Vocabulary, special: bool) -> tuple[list[int], list[tuple[_Run, int]]]:
    """The prompt as transformers has it, and where each run of rows begins in it."""
    found = _read_whole(parts, vocabulary, special) if vocabulary.reads_names else _read_pieces(parts, vocabulary)
    tokens: list[int] = []
    places: list[tuple[_Run, int]] = []
    for each in found:
        if isinstance(each, _Run):
            places.append((each, len(tokens)))
            tokens += [each.placeholder] * each.length
        else:
            tokens.append(each)
    return tokens, places


def _read_whole(parts: Sequence[_Part], vocabulary: _Vocabulary, special: bool) -> Iterator[int | _Run]:
    """Tokenizes everything as one text, in which one placeholder stands for a run.

    Tokenizers join text across the edges of what is put into it (``\\n`` before a picture with the ``\\n\\n`` that Gemma
    has there), and treat text behind a token unlike text at the beginning, so that pieces would not do.
    """
    runs = deque(part for part in parts if isinstance(part, _Run))
    placeholders = {run.placeholder for run in runs}
    text = "".join(
        part if isinstance(part, str) else vocabulary.name(part.placeholder if isinstance(part, _Run) else part)
        for part in parts
    )
    wanted = len(runs)
    for token in vocabulary.encode(text, special):
        if token not in placeholders:
            yield token
        elif runs and runs[0].placeholder == token:
            yield runs.popleft()
        else:
            raise PromptError(f"the tokenizer made token {token}, which stands for rows of a picture, out of turn")
    if runs:
        raise PromptError(
            f"the tokenizer found {wanted - len(runs)} of {wanted} places for pictures in its text; it has to read "
            f"{shorten(vocabulary.name(runs[0].placeholder))} as one special token"
        )


def _read_pieces(parts: Sequence[_Part], vocabulary: _Vocabulary) -> Iterator[int | _Run]:
    """Tokenizes the text between tokens and pictures, each piece by itself."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if not is_text:
            yield from cast("Iterator[int | _Run]", group)
        elif text := "".join(map(str, group)):
            yield from vocabulary.encode(text, False)
