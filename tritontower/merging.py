"""Rows of pictures put where a prompt has their token ids: in the embeddings of its text, and in hidden states."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from .embedding import ImageEmbedding
from .errors import PromptError, UsageError
from .kernels.splice import splice_rows
from .token_space import DEFAULT_BASE, Ids

__all__ = ["add_deepstack", "merge_embeddings"]


def merge_embeddings(
    text_embeddings: torch.Tensor,
    input_ids: Ids,
    embeddings: Iterable[ImageEmbedding],
    *,
    base: int = DEFAULT_BASE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts the rows of pictures where a prompt has their ids.

    Any piece of a prompt will do, cut anywhere: an id says by itself which row it stands for.

    Args:
        text_embeddings: ``[..., T, D]``: of :func:`sanitize_ids`' ids; what it holds at the places of pictures is not
            looked at.
        input_ids: ``[..., T]``, ids as :func:`encode_prompt` makes them.  Ids on a GPU are waited for; on the CPU nothing
            is.
        embeddings: those that the ids stand for; others may be among them.  Rows elsewhere are moved, those of another
            dtype are rounded to ``text_embeddings``'.
        base: the first id that is not the vocabulary's: the space's, where it has another than usual.
        out: where to write, of ``text_embeddings``' shape and dtype, rows contiguous; may be ``text_embeddings``.

    Returns:
        ``out``; or a new tensor; or, where ``input_ids`` has no picture, ``text_embeddings`` itself.

    Raises:
        PromptError: an id that no embedding has.
        UsageError: embeddings without ids, with ids below ``base`` or with each other's; shapes that do not fit.
    """
    rows = [(embedding, embedding.embeddings) for embedding in embeddings]
    return _splice(text_embeddings, input_ids, rows, base, add=False, out=out)


def add_deepstack(
    hidden: torch.Tensor,
    input_ids: Ids,
    embeddings: Iterable[ImageEmbedding],
    level: int,
    *,
    base: int = DEFAULT_BASE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds a deepstack level to the rows of pictures, behind the language model's block of that number (Qwen3-VL).

    Args:
        hidden: ``[..., T, D]``, the hidden states behind block ``level``.
        input_ids, embeddings, base, out: as for :func:`merge_embeddings`.
        level: from 0.

    Raises:
        PromptError, UsageError: as :func:`merge_embeddings`; an embedding does not have the level.
    """
    pictures = list(embeddings)
    for index, picture in enumerate(pictures):
        if not 0 <= level < len(picture.deepstack):
            raise UsageError(
                f"level is {level}; embedding {index} has {len(picture.deepstack)} deepstack levels, from 0"
            )
    rows = [(picture, picture.deepstack[level]) for picture in pictures]
    return _splice(hidden, input_ids, rows, base, add=True, out=out)


@torch.no_grad()
def _splice(
    text: torch.Tensor,
    input_ids: Ids,
    pictures: Sequence[tuple[ImageEmbedding, torch.Tensor]],
    base: int,
    *,
    add: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    ids = torch.as_tensor(input_ids)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise UsageError(f"input_ids are {ids.dtype}; they have to be integers")
    if text.dim() < 2 or text.shape[:-1] != ids.shape:
        raise UsageError(
            f"text has shape {list(text.shape)} and input_ids {list(ids.shape)}; they have to be [..., T, D] and [..., T]"
        )
    if out is not None and (out.shape != text.shape or out.dtype != text.dtype or not out.is_contiguous()):
        raise UsageError(
            f"out is {out.dtype} {list(out.shape)}; it has to be {text.dtype} {list(text.shape)}, and contiguous"
        )
    ids = ids.cpu().long().reshape(-1)
    places = ((ids < 0) | (ids >= base)).nonzero().view(-1)
    if not len(places):
        return text if out is None or out is text else out.copy_(text)
    width = text.shape[-1]
    numbers, rows = _rows_wanted(ids[places], _ranges(pictures, base, width), base, text.device)
    index = torch.full(ids.shape, -1, dtype=torch.int32)
    index[places] = numbers
    index = index.to(text.device, non_blocking=True)
    if out is not None:
        splice_rows(text.reshape(-1, width), rows, index, add=add, out=out.view(-1, width))
        return out
    return splice_rows(text.reshape(-1, width), rows, index, add=add).view(text.shape)


def _rows_wanted(
    wanted: torch.Tensor, ranges: Sequence[tuple[int, torch.Tensor]], base: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which row each of these ids stands for, ``[ids]`` int32, and the rows, ``[rows, D]`` on ``device``.

    Of each picture only the rows from the first to the last that is asked for, which are few in a piece of a prompt.
    """
    firsts = torch.tensor([first for first, _ in ranges], dtype=torch.int64)
    lengths = torch.tensor([len(rows) for _, rows in ranges], dtype=torch.int64)
    picture = torch.searchsorted(firsts, wanted, right=True) - 1
    nearest = picture.clamp(min=0)
    # Without any picture there is nothing to look up in.
    known = (picture >= 0) & (wanted < (firsts + lengths)[nearest]) if ranges else torch.zeros_like(wanted).bool()
    if not bool(known.all()):
        unknown = wanted[~known].unique()
        raise PromptError(
            f"input_ids hold {len(unknown)} ids that no embedding has, such as {int(unknown[0])}; pass the embeddings of "
            f"all pictures in this piece of the prompt (ids below {base} are the vocabulary's)"
        )
    row = wanted - firsts[picture]
    low = lengths.scatter_reduce(0, picture, row, "amin")
    high = torch.full_like(lengths, -1).scatter_reduce(0, picture, row, "amax")
    taken = [
        rows[start : end + 1].to(device, non_blocking=True)
        for (_, rows), start, end in zip(ranges, low.tolist(), high.tolist(), strict=True)
        if end >= 0
    ]
    counts = (high - low + 1).clamp(min=0)
    numbers = (row - low[picture] + (counts.cumsum(0) - counts)[picture]).int()
    return numbers, taken[0] if len(taken) == 1 else torch.cat(taken)


def _ranges(
    pictures: Sequence[tuple[ImageEmbedding, torch.Tensor]], base: int, width: int
) -> list[tuple[int, torch.Tensor]]:
    """First id and rows of every picture, each picture once."""
    ranges: dict[int, torch.Tensor] = {}
    for index, (picture, rows) in enumerate(pictures):
        ids = picture.token_ids
        if len(ids) != len(rows) or ids[-1] - ids[0] + 1 != len(ids):
            raise UsageError(
                f"embedding {index} has {len(ids)} token ids for {len(rows)} rows; TokenSpace.assign gives each row one, in "
                "a row"
            )
        if ids[0] < base:
            raise UsageError(f"embedding {index} has token ids from {ids[0]} on, below {base}: pass base=space.base")
        if rows.shape[-1] != width:
            raise UsageError(f"embedding {index} has rows of {rows.shape[-1]} numbers, and the text rows of {width}")
        if ranges.setdefault(ids[0], rows).shape != rows.shape:
            raise UsageError(f"embedding {index} has the token ids of another one; assign both in one space")
    ordered = sorted(ranges.items())
    for (first, rows), (following, _) in pairwise(ordered):
        if first + len(rows) > following:
            raise UsageError(f"two embeddings have token id {following}; assign both in one space")
    return ordered
