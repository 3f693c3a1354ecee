"""Puts image rows where a prompt has their token ids: into text embeddings, and into hidden states (deepstack)."""

from collections.abc import Iterable, Sequence

import torch

from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, UsageError
from tritontower.kernels.rowwise.splice import splice_rows
from tritontower.kernels.runtime.checks import FLOAT_DTYPES

from .token_ids import DEFAULT_BASE, Ids, order_by_ids


def merge_embeddings(
    text_embeddings: torch.Tensor,
    input_ids: Ids,
    embeddings: Iterable[ImageEmbedding],
    *,
    base: int = DEFAULT_BASE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts image rows where a prompt has their ids.

    Works on any chunk of a prompt, since each id identifies one row. Inference only: it returns no gradients.

    Args:
        text_embeddings: ``[..., T, D]``, the embeddings of :func:`sanitize_ids`' ids; values at image ids are ignored.
        input_ids: ``[..., T]``, ids from :func:`encode_prompt`. Ids on a GPU cause a synchronization, ids on the CPU do not.
        embeddings: all embeddings that the ids refer to; others are allowed. Rows are moved and rounded to the device and
            dtype of ``text_embeddings``.
        base: first id beyond the vocabulary; the space's ``base`` if it is not the default.
        out: destination with the shape and dtype of ``text_embeddings``, contiguous; may be ``text_embeddings``.

    Returns:
        ``out`` or a new tensor; ``text_embeddings`` itself if ``input_ids`` has no image and ``out`` is not given.

    Raises:
        PromptError: an id that no embedding has.
        UsageError: ids of embeddings that are missing, shared or below ``base``; tensors that do not fit.
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
    """Adds a deepstack level to the image rows of hidden states (Qwen3-VL).

    Args:
        hidden: ``[..., T, D]``, the output of the language model's block ``level``.
        input_ids, embeddings, base, out: as in :func:`merge_embeddings`.
        level: deepstack level, from 0.

    Raises:
        PromptError, UsageError: as in :func:`merge_embeddings`; an embedding does not have the level.
    """
    rows = []
    for index, image in enumerate(embeddings):
        if not 0 <= level < len(image.deepstack):
            raise UsageError(
                f"level must be below {len(image.deepstack)}, the deepstack levels of embedding {index}, got {level}"
            )
        rows.append((image, image.deepstack[level]))
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
    for number, (image, _) in enumerate(images):
        if image.token_ids and image.token_ids[0] < base:
            raise UsageError(
                f"token ids of embedding {number} must be at least {base}, got {image.token_ids[0]}; pass base=space.base"
            )
    ids = ids.cpu().long().reshape(-1)
    places = ((ids < 0) | (ids >= base)).nonzero().view(-1)
    if not len(places):
        return text if out is None or out is text else out.copy_(text)
    width = text.shape[-1]
    numbers, rows = _select_rows(ids[places], _list_ranges(images, width), base, text.device)
    index = torch.full(ids.shape, -1, dtype=torch.int32, device="cpu")
    index[places] = numbers
    index = index.to(text.device, non_blocking=True)
    flat = _make_rows_contiguous(text.reshape(-1, width))
    spliced = splice_rows(flat, rows, index, add=add, out=None if out is None else out.view(-1, width))
    return spliced.view(text.shape) if out is None else out


def _check_tensors(text: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None) -> None:
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise UsageError(f"input_ids must be integers, got {ids.dtype}")
    if text.dtype not in FLOAT_DTYPES:
        raise UsageError(f"text must be float32, float16 or bfloat16, got {text.dtype}")
    if text.dim() < 2 or text.shape[:-1] != ids.shape:
        shapes = f"{list(text.shape)} and {list(ids.shape)}"
        raise UsageError(f"text and input_ids must be [..., T, D] and [..., T], got {shapes}")
    if out is not None and (
        out.shape != text.shape or out.dtype != text.dtype or out.device != text.device or not out.is_contiguous()
    ):
        raise UsageError(
            f"out must be {text.dtype} {list(text.shape)} on {text.device}, and contiguous, got {out.dtype} "
            f"{list(out.shape)} on {out.device} with strides {list(out.stride())}"
        )


def _make_rows_contiguous(rows: torch.Tensor) -> torch.Tensor:
    """Copies only transposed matrices: the kernel reads rows of contiguous elements, at any distance."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _select_rows(
    wanted: torch.Tensor, ranges: Sequence[tuple[int, torch.Tensor]], base: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the row of each id, ``[ids]`` int32, and the rows, ``[rows, D]`` on ``device``.

    Moves only the rows between the first and the last that each image needs, which are few in a chunk of a prompt.
    """
    firsts = torch.tensor([first for first, _ in ranges], dtype=torch.int64, device="cpu")
    lengths = torch.tensor([len(rows) for _, rows in ranges], dtype=torch.int64, device="cpu")
    image = torch.searchsorted(firsts, wanted, right=True) - 1
    nearest = image.clamp(min=0)
    # Compared as differences, since the id after the last one may exceed int64.
    known = (image >= 0) & (wanted - firsts[nearest] < lengths[nearest]) if ranges else torch.zeros_like(wanted).bool()
    if not bool(known.all()):
        unknown = wanted[~known].unique()
        raise PromptError(
            f"input_ids has {len(unknown)} ids that no embedding has, such as {int(unknown[0])}; pass the embeddings of all "
            f"images in this chunk of the prompt (ids below {base} belong to the vocabulary)"
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
    return numbers, _make_rows_contiguous(taken[0]) if len(taken) == 1 else torch.cat(taken)


def _list_ranges(images: Sequence[tuple[ImageEmbedding, torch.Tensor]], width: int) -> list[tuple[int, torch.Tensor]]:
    """Lists the first id and the rows of every image, each image once."""
    ranges = []
    for index in order_by_ids([image for image, _ in images]):
        image, rows = images[index]
        if tuple(rows.shape) != (image.num_tokens, width):
            expected = f"[{image.num_tokens}, {width}], as its tokens and the text"
            raise UsageError(f"rows of embedding {index} must be {expected}, got {list(rows.shape)}")
        ranges.append((image.token_ids[0], rows))
    return ranges
