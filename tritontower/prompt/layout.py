"""Prompt layouts: the tokens that a model's prompt puts around and between the rows of an image or a video.

A layout is data. Each model file makes one from its checkpoint, and :func:`tritontower.prompt.encode_prompt` applies it.
"""

from dataclasses import dataclass
from typing import Protocol

Piece = str | int
"""Text, tokenized together with the text next to it, or one token by its id."""


@dataclass(frozen=True)
class VideoLayout:
    """Layout of a video in a prompt.

    Attributes:
        placeholder: token that transformers repeats for the video's rows.
        before, after: pieces that a chat template writes around a video; added where an alias stands for it.
        timestamp: text before each temporal patch, with ``{}`` for the seconds at its middle, such as
            ``"<{:.1f} seconds>"``; ``None`` if a video's rows are contiguous.
        frame_before, frame_after: pieces around the rows of each temporal patch; used with ``timestamp`` only.
    """

    placeholder: int
    before: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    timestamp: str | None = None
    frame_before: tuple[Piece, ...] = ()
    frame_after: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class PromptLayout:
    """Layout of images in a prompt.

    Attributes:
        placeholder: token that transformers repeats for an image's rows.
        marker: token that stands for a whole image in a prompt written for transformers; ``None``: the placeholder.
        merge: side of the square of patches that one token covers.
        before, after: pieces that a chat template writes around an image; added where an alias stands for it.
        tile_before, tile_after: pieces around the rows of each tile, with an alias and with a marker.
        between_tiles: for images of several tiles, the text before the first, the second and each later tile; ``None`` if
            tiles are not separated.
        row_break, row_end: token after each row of tokens except the last, and after the last; text must name one token.
        after_images: pieces after the last image of a prompt, or at the beginning of a prompt without images.
        ending: text at the end of a prompt.
        special_tokens: the tokenizer adds its own tokens, such as the one for the beginning.
        video: layout of videos; ``None`` if the model takes none.
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
    """The part of a tower that :func:`tritontower.prompt.encode_prompt` uses."""

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """Layout of the tower's language model; ``None`` for an encoder without one."""
