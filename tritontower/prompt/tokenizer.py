"""Tokenization of prompts: adapters for several tokenizer libraries, and text with tokens and image rows in it."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

from tritontower.errors import PromptError, UsageError, shorten

from .layout import Piece


class Run(NamedTuple):
    """Consecutive rows of one image in a prompt."""

    image: int
    start: int
    length: int
    placeholder: int


Part = str | int | Run


@dataclass(frozen=True)
class Vocabulary:
    """Adapter for one tokenizer; the functions that find a token return ``None`` if there is no such token."""

    encode: Callable[[str, bool], Sequence[int]]  # text, and a flag to add special tokens
    find_name: Callable[[int], str | None]
    find_id: Callable[[str], int | None]
    reads_names: bool  # recognizes tokens by their text; otherwise it gets the pieces of text between them

    @classmethod
    def wrap(cls, tokenizer: Any) -> "Vocabulary":
        """Wraps a tokenizer of transformers or of ``tokenizers``, or a function from text to ids."""
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
                f"tokenizer must be of transformers or of tokenizers, or map text to token ids, got {shorten(tokenizer)}"
            )

        def find_id(text: str) -> int | None:
            ids = tokenizer(text)
            return ids[0] if len(ids) == 1 else None

        return cls(lambda text, special: tokenizer(text), lambda token: None, find_id, False)

    def require_name(self, token: int) -> str:
        """Returns the text of a token, or raises :class:`PromptError`."""
        if (name := self.find_name(token)) is None:
            raise PromptError(f"the tokenizer has no token {token}; it must belong to the same model as the tower")
        return name

    def require_id(self, piece: Piece) -> int:
        """Returns the id of a token given by its id or its text, or raises :class:`PromptError`."""
        token = piece if isinstance(piece, int) else self.find_id(piece)
        # Some tokenizers return the token for unknown text.
        if token is None or (isinstance(piece, str) and self.reads_names and self.find_name(token) != piece):
            raise PromptError(
                f"{shorten(piece)} is not one token of the tokenizer; it must belong to the same model as the tower"
            )
        return token


def tokenize_parts(
    parts: Sequence[Part], vocabulary: Vocabulary, special: bool
) -> tuple[list[int], list[tuple[Run, int]]]:
    """Returns the tokens as in transformers, one placeholder per row, and the position of each run's first row."""
    tokenize = _tokenize_whole if vocabulary.reads_names else _tokenize_pieces
    tokens: list[int] = []
    starts: list[tuple[Run, int]] = []
    for item in tokenize(parts, vocabulary, special):
        if isinstance(item, Run):
            starts.append((item, len(tokens)))
            tokens += [item.placeholder] * item.length
        else:
            tokens.append(item)
    return tokens, starts


def _tokenize_whole(parts: Sequence[Part], vocabulary: Vocabulary, special: bool) -> Iterator[int | Run]:
    """Tokenizes all parts as one text, with one placeholder per run.

    Tokenizing pieces would give other tokens: tokenizers merge text across the edges of an insertion (``\\n`` before an
    image with the ``\\n\\n`` that Gemma writes there), and treat text after a token unlike text at the beginning.
    """
    runs = deque(part for part in parts if isinstance(part, Run))
    placeholders = {run.placeholder for run in runs}
    text = "".join(
        part if isinstance(part, str) else vocabulary.require_name(part.placeholder if isinstance(part, Run) else part)
        for part in parts
    )
    wanted = len(runs)
    for token in vocabulary.encode(text, special):
        if token not in placeholders:
            yield token
        elif runs and runs[0].placeholder == token:
            yield runs.popleft()
        else:
            raise PromptError(f"the tokenizer made an extra token {token}, which is reserved for the rows of an image")
    if runs:
        raise PromptError(
            f"the tokenizer found {wanted - len(runs)} of {wanted} image placeholders in its text; it must read "
            f"{shorten(vocabulary.require_name(runs[0].placeholder))} as one special token"
        )


def _tokenize_pieces(parts: Sequence[Part], vocabulary: Vocabulary, _special: bool) -> Iterator[int | Run]:
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if not is_text:
            yield from cast("Iterator[int | Run]", group)
        elif text := "".join(map(str, group)):
            yield from vocabulary.encode(text, False)
