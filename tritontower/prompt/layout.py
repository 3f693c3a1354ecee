"""How a model's prompt has an image: markers round it, a token behind each row of patches, time stamps of a video.

This is data, which a tower's family makes out of the checkpoint; :func:`tritontower.prompt.encode_prompt` goes by it.
"""

from dataclasses import dataclass
from typing import Protocol

__all__ = ["HasPromptLayout", "Piece", "PromptLayout", "VideoLayout"]

Piece = str | int
"""Text, which is tokenized together with what stands beside it, or one token by its id."""


@dataclass(frozen=True)
class VideoLayout:
    """How a prompt has a video.

    Attributes:
        placeholder: the token that transformers repeats for the video's rows.
        before, after: what a chat template writes round a video; it comes with an alias.
        timestamp: text before each temporal patch, its ``{}`` the seconds at its middle, such as
            ``"<{:.1f} seconds>"``; ``None`` where a video's rows follow upon each other.
        frame_before, frame_after: what stands round the rows of each temporal patch, where there are time stamps.
    """

    placeholder: int
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    timestamp: str | None = None
    frame_before: tuple[Piece, ...] = ()
    frame_after: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class PromptLayout:
    """How a prompt has images.

    Attributes:
        placeholder: the token that transformers repeats for an image's rows.
        marker: the token that stands for a whole image in a prompt written for transformers; ``None``: the placeholder.
        merge: side of the square of patches that one token stands for.
        before, after: what a chat template writes round an image; it comes with an alias, while round a marker it is
            there already.
        tile_before, tile_after: what stands round the rows of each tile, whoever wrote the prompt.
        between_tiles: where an image has several tiles, the text before the first, the second, and every other one;
            ``None`` where tiles are not told apart.
        row_break, row_end: the token behind each row of tokens but the last, and behind the last; text has to be the name
            of one token.
        after_images: what follows upon the last image of a prompt, and stands at its beginning where there is none.
        ending: text at the end of a prompt.
        special_tokens: whether the tokenizer adds its own tokens, such as the one for the beginning.
        video: how it has videos; ``None`` where it has none.
    """

    placeholder: int
    marker: int | None = None
    merge: int = 1
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    tile_before: tuple[Piece, ...] = ()
    tile_after: tuple[Piece, ...] = ()
    between_tiles: tuple[str, str, str] | None = None
    row_break: Piece | None = None
    row_end: Piece | None = None
    after_images: tuple[Piece, ...] = ()
    ending: str = ""
    special_tokens: bool = True
    video: VideoLayout | None = None


class HasPromptLayout(Protocol):
    """A tower, as far as a prompt needs it."""

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """How its language model's prompt has images; ``None`` for a tower that comes without a language model."""
        ...
