"""M-RoPE: positions of image and video tokens in a language model's rotary embedding.

A text token has one position; an image token has three, in time, height and width (Wang et al. 2024, arXiv 2409.12191,
section 2.1). Text after an image continues at the larger of its sides, not at the number of its tokens. Differences
between models are data, :class:`MropeRule`. The positions equal those of ``get_rope_index`` in
``transformers.models.qwen2_vl``, ``qwen2_5_vl`` and ``qwen3_vl`` (since 5.18; 5.17 rounds the seconds between two
temporal patches down to integers). For chunked prefill they can be computed chunk by chunk, with any chunk boundaries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple, cast

import torch

from tritontower.errors import UsageError, shorten

from .encode import EncodedPrompt

# Kinds of tokens, numbered as in transformers' ``mm_token_type_ids``.
TEXT, IMAGE, VIDEO = 0, 1, 2
NAMES = {IMAGE: ("an image", "image_grids"), VIDEO: ("a video", "video_grids")}
# Positions are stored in 32 bits in some part of every language model.
POSITION_LIMIT = 2**31

Grids = torch.Tensor | Sequence[Sequence[int]]
Seconds = torch.Tensor | Sequence[float | None]


@dataclass(frozen=True)
class MropeRule:
    """Position numbering of one language model.

    Attributes:
        merge: side of the square of patches that one token covers.
        positions_per_second: positions per second of video (``tokens_per_second`` of Qwen2.5-VL); ``None`` if temporal
            patches are numbered 0, 1, 2 …, independent of time.
        split_videos: each temporal patch of a video is a separate image after its timestamp (Qwen3-VL).
    """

    merge: int
    positions_per_second: float | None = None
    split_videos: bool = False


@dataclass(frozen=True)
class Block:
    """Consecutive tokens that cover one box in time and space: an image, a video, or a temporal patch of a split video."""

    times: tuple[int, ...]  # position of each temporal patch, relative to the start of the block
    rows: int  # tokens
    columns: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the block."""
        return len(self.times) * self.rows * self.columns


@dataclass(frozen=True)
class MropeState:
    """Immutable state of one sequence between two chunks.

    An engine may keep the state of any chunk boundary together with the keys and values before it, and continue from
    there several times and in any batch.
    """

    tokens: int = 0  # so far, without padding
    next_position: int = 0  # start of the next block or text token; start of an unfinished block
    highest: int = -1  # largest position so far
    block: tuple[int, Block] | None = None  # kind and box of an unfinished block
    done: int = 0  # tokens of the unfinished block that have positions
    video: tuple[Block, ...] = ()  # remaining blocks of a split video

    @property
    def delta(self) -> int:
        """Difference between the position and the index of a generated token (from 0, without padding)."""
        return self.highest + 1 - self.tokens


class MropePositions(NamedTuple):
    """Result of :func:`mrope_positions`.

    Attributes:
        positions: ``[3, batch, length]`` int64: time, height and width of every token; 0 for padding.
        deltas: ``[batch, 1]`` int64: the generated token with index ``n`` in its sequence (from 0, without padding) has
            position ``n + delta`` on all three axes.
        states: start of the next chunk, per sequence.
    """

    positions: torch.Tensor
    deltas: torch.Tensor
    states: tuple[MropeState, ...]


def prompt_positions(
    rule: MropeRule, prompt: EncodedPrompt, *, tokens: int | None = None, state: MropeState | None = None
) -> MropePositions:
    """Computes the positions of one encoded prompt, or of its next chunk, as a batch of one.

    Args:
        rule: ``tower.mrope``.
        prompt: result of :func:`~tritontower.prompt.encode_prompt`.
        tokens: length of the chunk; by default all remaining tokens, and at most these.
        state: state after the previous chunk; ``None`` at the start.
    """
    state = state or MropeState()
    length, start = len(prompt.token_types), state.tokens
    stop = length if tokens is None else start + tokens
    if not start <= stop <= length:
        raise UsageError(f"tokens must be 0 to {length - start}, the rest of the prompt, got {stop - start}")
    types = prompt.token_types[start:stop].tolist()
    begun = sorted((first - start, index) for index, (first, _) in enumerate(prompt.spans) if start <= first < stop)
    videos = [prompt.embeddings[index] for first, index in begun if types[first] == VIDEO]
    return mrope_positions(
        rule,
        prompt.token_types[None, start:stop],
        image_grids=[prompt.embeddings[index].grid_thw for first, index in begun if types[first] == IMAGE],
        video_grids=[video.grid_thw for video in videos],
        seconds_per_grid=[video.seconds_per_grid for video in videos],
        states=[state],
        partial=stop < length,
    )


def mrope_positions(
    rule: MropeRule,
    token_types: torch.Tensor,
    *,
    image_grids: Grids | None = None,
    video_grids: Grids | None = None,
    seconds_per_grid: Seconds | None = None,
    attention_mask: torch.Tensor | None = None,
    states: Sequence[MropeState] | None = None,
    partial: bool = False,
) -> MropePositions:
    """Computes the positions of a batch of prompts, or of the next chunk of each.

    Args:
        rule: ``tower.mrope``.
        token_types: ``[batch, length]``: 0 text, 1 image, 2 video (``mm_token_type_ids``). Text around an image is text.
        image_grids: ``[images, 3]``: temporal patches, rows and columns of *patches* (``grid_thw``) of the images that
            begin in ``token_types``, in order, sequence by sequence.
        video_grids: the same for videos; one grid per video, also if the model splits it.
        seconds_per_grid: seconds between two temporal patches of each video; 1 where it is missing. Used only with
            ``positions_per_second``.
        attention_mask: ``[batch, length]``: 0 or ``False`` for padding, on either side.
        states: states after the previous chunk, one per sequence; ``None`` at the start.
        partial: the sequences continue, so their last image or video may be incomplete.

    Returns:
        Positions and deltas on the device of ``token_types``, computed on the CPU, and the states.

    Raises:
        UsageError: tokens and grids, or the shapes, do not match each other.
    """
    types, kept = _check_types(token_types, attention_mask)
    batch, length = types.shape
    before = tuple(states) if states is not None else (MropeState(),) * batch
    if len(before) != batch:
        raise UsageError(f"states must have one entry for each of {batch} sequences, got {len(before)}")
    blocks = {IMAGE: _image_blocks(rule, image_grids), VIDEO: _video_blocks(rule, video_grids, seconds_per_grid)}
    sources = {kind: iter(found) for kind, found in blocks.items()}
    after = list(before)
    pieces: list[_Piece] = []
    for row, kind, tokens in _runs(types, kept):
        after[row] = _advance(after[row], kind, tokens, sources, row, pieces)
    for kind, rest in sources.items():
        if left := len(list(rest)):
            name, argument = NAMES[kind]
            raise UsageError(f"{argument} has {left} more grids than token_types has beginnings of {name}")
    positions = torch.zeros(3, batch, length, dtype=torch.int64, device="cpu")
    # Runs are in the order of the tokens that are kept, sequence by sequence.
    positions[:, kept] = _positions(pieces)
    highest = positions.masked_fill(~kept, -1).amax((0, 2)) if length else positions.new_full((batch,), -1)
    for row, (state, largest) in enumerate(zip(after, highest.tolist(), strict=True)):
        if not partial and (state.block is not None or state.video):
            unfinished = _describe(state) if state.block else f"a video of {len(state.video)} more parts"
            raise UsageError(f"sequence {row} must not end within {unfinished}; pass partial=True for a chunk")
        after[row] = replace(state, highest=max(largest, state.highest))
    deltas = torch.tensor([state.delta for state in after], dtype=torch.int64, device="cpu").view(batch, 1)
    device = token_types.device
    return MropePositions(positions.to(device), deltas.to(device), tuple(after))


def _check_types(token_types: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the types, and a mask of the tokens that are not padding, on the CPU."""
    if token_types.ndim != 2:
        raise UsageError(f"token_types must be [batch, length], got shape {list(token_types.shape)}")
    if attention_mask is not None and attention_mask.shape != token_types.shape:
        shapes = f"{list(token_types.shape)}, got {list(attention_mask.shape)}"
        raise UsageError(f"attention_mask must have the shape of token_types, {shapes}; pass the chunk's part of it")
    types = token_types.cpu()
    kept = torch.ones_like(types, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    unknown = kept & ((types < TEXT) | (types > VIDEO))
    if unknown.any():
        raise UsageError(f"token_types must be 0 (text), 1 (image) or 2 (video), got {int(types[unknown][0])}")
    return types, kept


def _runs(types: torch.Tensor, kept: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields sequence, kind and number of consecutive tokens of one kind, without padding."""
    flat = types[kept]
    if not len(flat):
        return
    rows = torch.arange(len(types), device="cpu").repeat_interleave(kept.sum(1))
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = (flat[1:] != flat[:-1]) | (rows[1:] != rows[:-1])
    starts = begins.nonzero().flatten()
    tokens = starts.diff(append=torch.tensor([len(flat)], device="cpu"))
    yield from zip(rows[starts].tolist(), flat[starts].tolist(), tokens.tolist(), strict=True)


def _token_grids(rule: MropeRule, grids: Grids | None, argument: str) -> Iterator[tuple[int, int, int]]:
    """Converts grids to temporal patches, and rows and columns of tokens."""
    for index, grid in enumerate([] if grids is None else grids.tolist() if torch.is_tensor(grids) else grids):
        times, rows, columns = (int(side) for side in grid) if len(grid) == 3 else (0, 0, 0)
        if min(times, rows, columns) < 1 or rows % rule.merge or columns % rule.merge:
            raise UsageError(
                f"{argument}[{index}] must be temporal patches, rows and columns of patches, with rows and columns "
                f"multiples of {rule.merge}, got {shorten(str(list(grid)))}"
            )
        yield times, rows // rule.merge, columns // rule.merge


def _image_blocks(rule: MropeRule, grids: Grids | None) -> list[list[Block]]:
    return [[Block(tuple(range(times)), *sides)] for times, *sides in _token_grids(rule, grids, "image_grids")]


def _video_blocks(rule: MropeRule, grids: Grids | None, seconds: Seconds | None) -> list[list[Block]]:
    found = list(_token_grids(rule, grids, "video_grids"))
    steps: Sequence[float | torch.Tensor | None] = [None] * len(found) if seconds is None else list(seconds)
    if len(steps) != len(found):
        raise UsageError(f"seconds_per_grid must have one entry for each of {len(found)} videos, got {len(steps)}")
    if rule.split_videos:
        return [[Block((0,), rows, columns)] * times for times, rows, columns in found]
    return [
        [Block(_video_times(rule, times, step), rows, columns)]
        for (times, rows, columns), step in zip(found, steps, strict=True)
    ]


def _video_times(rule: MropeRule, count: int, seconds: float | torch.Tensor | None) -> tuple[int, ...]:
    """Returns the position of each temporal patch of a video."""
    if rule.positions_per_second is None:
        return tuple(range(count))
    # A tensor element stays a tensor, so that the result is rounded in its dtype, as in transformers.
    step = 1 if seconds is None else seconds.cpu() if torch.is_tensor(seconds) else seconds
    interval = rule.positions_per_second * step
    if not (isfinite(interval) and 0 <= interval * count < POSITION_LIMIT):
        limits = f"at least 0 and keep {count} temporal patches below position {POSITION_LIMIT}"
        raise UsageError(f"seconds_per_grid must be {limits}, got {float(step)}")
    # A Python number is rounded to fp32, as in transformers under torch's usual default dtype.
    factor = interval if torch.is_tensor(interval) else torch.tensor(interval, dtype=torch.float32, device="cpu")
    return tuple((torch.arange(count, device="cpu") * factor).long().tolist())


# Consecutive tokens of a chunk that belong to one block (``None`` for text): their number, the start of the block, the
# block, and the number of its tokens before them.
_Piece = tuple[int, int, Block | None, int]


def _advance(
    state: MropeState,
    kind: int,
    count: int,
    sources: Mapping[int, Iterator[list[Block]]],
    row: int,
    pieces: list[_Piece],
) -> MropeState:
    """Appends the pieces of ``count`` tokens of one kind, and returns the state after them, without ``highest``."""
    if state.block is not None and state.block[0] != kind:
        raise UsageError(f"token {state.tokens} of sequence {row} interrupts {_describe(state)}")
    if kind == TEXT:
        pieces.append((count, state.next_position, None, 0))
        return replace(state, tokens=state.tokens + count, next_position=state.next_position + count)
    while count:
        if state.block is None:
            blocks: Sequence[Block] | None = (state.video if kind == VIDEO else ()) or next(sources[kind], None)
            if blocks is None:
                name, argument = NAMES[kind]
                raise UsageError(
                    f"token {state.tokens} of sequence {row} belongs to {name}, but {argument} has no grid for it"
                )
            state = replace(state, block=(kind, blocks[0]), video=tuple(blocks[1:]) if kind == VIDEO else state.video)
        block, start = cast("tuple[int, Block]", state.block)[1], state.done
        taken = min(count, block.tokens - start)
        pieces.append((taken, state.next_position, block, start))
        count -= taken
        state = replace(state, tokens=state.tokens + taken, done=start + taken)
        if state.done == block.tokens:
            step = max(block.rows, block.columns)
            state = replace(state, block=None, done=0, next_position=state.next_position + step)
    return state


def _describe(state: MropeState) -> str:
    kind, block = cast("tuple[int, Block]", state.block)
    return f"{NAMES[kind][0]} after {state.done} of its {block.tokens} tokens"


def _positions(pieces: Sequence[_Piece]) -> torch.Tensor:
    """Returns ``[3, tokens]`` int64, piece after piece."""
    table, times = [], [0]
    # Text is a block of one row, longer than any text; time and height repeat its width.
    line = Block((0,), 1, 2**40)
    for tokens, base, found, offset in pieces:
        block = found or line
        table.append((tokens, base, offset, block.rows, block.columns, len(times), found is None))
        times += block.times
    pieces_table = torch.tensor(table, dtype=torch.int64, device="cpu").view(-1, 7)
    counts = pieces_table[:, 0]
    first = counts.cumsum(0) - counts
    per_token = torch.cat((pieces_table[:, 1:], first[:, None]), 1).repeat_interleave(counts, 0)
    starts, offsets, rows, columns, time, is_text, first = per_token.unbind(1)
    index = torch.arange(len(per_token), device="cpu") - first + offsets
    row, width = index // columns, index % columns
    moment = torch.tensor(times, device="cpu")[time + row // rows]
    positions = torch.stack([moment, row % rows, width]) + starts
    return torch.where(is_text.bool(), positions[2], positions)
