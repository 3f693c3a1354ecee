"""Rows of images put where a prompt has their token ids: in the embeddings of its text, and in hidden states."""

from collections.abc import Iterable, Sequence

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, UsageError
from tritontower.kernels.rowwise.splice import DTYPES, splice_rows

from .token_ids import DEFAULT_BASE, Ids, ordered_by_ids

__all__ = ["add_deepstack", "merge_embeddings"]


def merge_embeddings(
    text_embeddings: torch.Tensor,
    input_ids: Ids,
    embeddings: Iterable[ImageEmbedding],
    *,
    base: int = DEFAULT_BASE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts the rows of images where a prompt has their ids.

    Any piece of a prompt will do, cut anywhere: an id says by itself which row it stands for.  It is for inference: no
    gradient comes back through it, neither to the rows of images nor to those of the text.

    Args:
        text_embeddings: ``[..., T, D]``: of :func:`sanitize_ids`' ids; what it holds at the places of images is not
            looked at.
        input_ids: ``[..., T]``, ids as :func:`encode_prompt` makes them.  Ids on a GPU are waited for; on the CPU nothing
            is.
        embeddings: those that the ids stand for; others may be among them.  Rows elsewhere are moved, those of another
            dtype are rounded to ``text_embeddings``'.
        base: the first id that is not the vocabulary's: the space's, where it has another than usual.
        out: where to write, of ``text_embeddings``' shape and dtype, rows contiguous; may be ``text_embeddings``.

    Returns:
        ``out``; or a new tensor; or, where ``input_ids`` has no image, ``text_embeddings`` itself.

    Raises:
        PromptError: an id that no embedding has.
        UsageError: embeddings without ids, with ids below ``base`` or with each other's; shapes, dtypes or devices that
            do not fit.
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
    """Adds a deepstack level to the rows of images, behind the language model's block of that number (Qwen3-VL).

    Args:
        hidden: ``[..., T, D]``, the hidden states behind block ``level``.
        input_ids, embeddings, base, out: as for :func:`merge_embeddings`.
        level: from 0.

    Raises:
        PromptError, UsageError: as :func:`merge_embeddings`; an embedding does not have the level.
    """
    images = list(embeddings)
    for index, image in enumerate(images):
        if not 0 <= level < len(image.deepstack):
            raise UsageError(f"level is {level}; embedding {index} has {len(image.deepstack)} deepstack levels, from 0")
    rows = [(image, image.deepstack[level]) for image in images]
    return _splice(hidden, input_ids, rows, base, add=True, out=out)


@torch.no_grad()
def _splice(
    text: torch.Tensor,
    input_ids: Ids,
    images: Sequence[tuple[ImageEmbedding, torch.Tensor]],
    base: int,
    *,
    add: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    ids = input_ids if torch.is_tensor(input_ids) else torch.as_tensor(input_ids, device="cpu")
    _check_tensors(text, ids, out)
    _check_base(images, base)
    ids = ids.cpu().long().reshape(-1)
    places = ((ids < 0) | (ids >= base)).nonzero().view(-1)
    if not len(places):
        return text if out is None or out is text else out.copy_(text)
    width = text.shape[-1]
    numbers, rows = _rows_wanted(ids[places], _ranges(images, width), base, text.device)
    index = torch.full(ids.shape, -1, dtype=torch.int32, device="cpu")
    index[places] = numbers
    index = index.to(text.device, non_blocking=True)
    flat = _with_adjacent_elements(text.reshape(-1, width))
    if out is not None:
        splice_rows(flat, rows, index, add=add, out=out.view(-1, width))
        return out
    return splice_rows(flat, rows, index, add=add).view(text.shape)


def _check_tensors(text: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None) -> None:
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise UsageError(f"input_ids are {ids.dtype}; they have to be integers")
    if text.dtype not in DTYPES:
        raise UsageError(f"text is {text.dtype}; allowed: float32, float16, bfloat16")
    if text.dim() < 2 or text.shape[:-1] != ids.shape:
        raise UsageError(
            f"text has shape {list(text.shape)} and input_ids {list(ids.shape)}; they have to be [..., T, D] and [..., T]"
        )
    if out is not None and (
        out.shape != text.shape or out.dtype != text.dtype or out.device != text.device or not out.is_contiguous()
    ):
        raise UsageError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; it has to be {text.dtype} {list(text.shape)} on "
            f"{text.device}, and contiguous"
        )


def _with_adjacent_elements(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as the kernel reads them; only a transposed matrix has to be copied for that."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _rows_wanted(
    wanted: torch.Tensor, ranges: Sequence[tuple[int, torch.Tensor]], base: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which row each of these ids stands for, ``[ids]`` int32, and the rows, ``[rows, D]`` on ``device``.

    Of each image only the rows from the first to the last that is asked for, which are few in a piece of a prompt.
    """
    firsts = torch.tensor([first for first, _ in ranges], dtype=torch.int64, device="cpu")
    lengths = torch.tensor([len(rows) for _, rows in ranges], dtype=torch.int64, device="cpu")
    image = torch.searchsorted(firsts, wanted, right=True) - 1
    nearest = image.clamp(min=0)
    # Without any image there is nothing to look up in; the id behind the last one need not be a number of 64 bits.
    known = (image >= 0) & (wanted - firsts[nearest] < lengths[nearest]) if ranges else torch.zeros_like(wanted).bool()
    if not bool(known.all()):
        unknown = wanted[~known].unique()
        raise PromptError(
            f"input_ids hold {len(unknown)} ids that no embedding has, such as {int(unknown[0])}; pass the embeddings of "
            f"all images in this piece of the prompt (ids below {base} are the vocabulary's)"
        )
    row = wanted - firsts[image]
    low = lengths.scatter_reduce(0, image, row, "amin")
    high = torch.full_like(lengths, -1).scatter_reduce(0, image, row, "amax")
    taken = [
        rows[start : end + 1].to(device, non_blocking=True)
        for (_, rows), start, end in zip(ranges, low.tolist(), high.tolist(), strict=True)
        if end >= 0
    ]
    counts = (high - low + 1).clamp(min=0)
    numbers = (row - low[image] + (counts.cumsum(0) - counts)[image]).int()
    return numbers, _with_adjacent_elements(taken[0]) if len(taken) == 1 else torch.cat(taken)


def _check_base(images: Sequence[tuple[ImageEmbedding, torch.Tensor]], base: int) -> None:
    """Raises if an image's ids would pass for the vocabulary's, and its rows be left out."""
    for index, (image, _) in enumerate(images):
        if image.token_ids and image.token_ids[0] < base:
            raise UsageError(
                f"embedding {index} has token ids from {image.token_ids[0]} on, below {base}: pass base=space.base"
            )


def _ranges(images: Sequence[tuple[ImageEmbedding, torch.Tensor]], width: int) -> list[tuple[int, torch.Tensor]]:
    """First id and rows of every image, each image once."""
    ranges = []
    for index in ordered_by_ids([image for image, _ in images]):
        image, rows = images[index]
        if rows.shape[-1] != width:
            raise UsageError(f"embedding {index} has rows of {rows.shape[-1]} numbers, and the text rows of {width}")
        if len(rows) != image.num_tokens:
            raise UsageError(f"embedding {index} has {image.num_tokens} rows, and {len(rows)} of this deepstack level")
        ranges.append((image.token_ids[0], rows))
    return ranges
