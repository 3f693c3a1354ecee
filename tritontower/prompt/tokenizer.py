"""From the parts of a prompt to token ids: tokenizers of several kinds, and texts with tokens and images among them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

from tritontower.errors import PromptError, UsageError, shorten

from .layout import Piece

__all__ = ["Part", "Run", "Vocabulary", "tokens_of"]


class Run(NamedTuple):
    """Rows of one image that follow upon each other in the prompt: a part of it, beside text and tokens."""

    image: int
    start: int
    length: int
    placeholder: int


Part = str | int | Run


@dataclass(frozen=True)
class Vocabulary:
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
    def of(cls, tokenizer: Any) -> "Vocabulary":
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


def tokens_of(parts: Sequence[Part], vocabulary: Vocabulary, special: bool) -> tuple[list[int], list[tuple[Run, int]]]:
    """The prompt as transformers has it, and where each run of rows begins in it."""
    found = _read_whole(parts, vocabulary, special) if vocabulary.reads_names else _read_pieces(parts, vocabulary)
    tokens: list[int] = []
    places: list[tuple[Run, int]] = []
    for each in found:
        if isinstance(each, Run):
            places.append((each, len(tokens)))
            tokens += [each.placeholder] * each.length
        else:
            tokens.append(each)
    return tokens, places


def _read_whole(parts: Sequence[Part], vocabulary: Vocabulary, special: bool) -> Iterator[int | Run]:
    """Tokenizes everything as one text, in which one placeholder stands for a run.

    Tokenizers join text across the edges of what is put into it (``\\n`` before an image with the ``\\n\\n`` that Gemma
    has there), and treat text behind a token unlike text at the beginning, so that pieces would not do.
    """
    runs = deque(part for part in parts if isinstance(part, Run))
    placeholders = {run.placeholder for run in runs}
    text = "".join(
        part if isinstance(part, str) else vocabulary.name(part.placeholder if isinstance(part, Run) else part)
        for part in parts
    )
    wanted = len(runs)
    for token in vocabulary.encode(text, special):
        if token not in placeholders:
            yield token
        elif runs and runs[0].placeholder == token:
            yield runs.popleft()
        else:
            raise PromptError(f"the tokenizer made token {token}, which stands for rows of an image, out of turn")
    if runs:
        raise PromptError(
            f"the tokenizer found {wanted - len(runs)} of {wanted} places for images in its text; it has to read "
            f"{shorten(vocabulary.name(runs[0].placeholder))} as one special token"
        )


def _read_pieces(parts: Sequence[Part], vocabulary: Vocabulary) -> Iterator[int | Run]:
    """Tokenizes the text between tokens and images, each piece by itself."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if not is_text:
            yield from cast("Iterator[int | Run]", group)
        elif text := "".join(map(str, group)):
            yield from vocabulary.encode(text, False)
