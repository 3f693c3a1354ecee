"""M-RoPE: where the tokens of images and videos stand in a language model's rotary embedding.

A text token has one position; a token of an image has three, in time, height and width (Wang et al. 2024, arXiv
2409.12191, section 2.1).  The text behind an image goes on at the larger of its sides, not at the number of its tokens.
What differs between models is data, :class:`MropeRule`.  The numbers are those of ``get_rope_index`` of
``transformers.models.qwen2_vl``, ``qwen2_5_vl`` and ``qwen3_vl`` (from 5.18 on; 5.17 rounds the seconds between two
temporal patches down to whole ones); for engines that run a prompt in chunks they can be had in chunks as well, cut
anywhere.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple, Protocol

import torch

from tritontower.errors import UsageError, shorten

__all__ = [
    "IMAGE",
    "TEXT",
    "VIDEO",
    "MropePositions",
    "MropeRule",
    "MropeState",
    "mrope_positions",
    "prompt_positions",
]

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kinds of tokens, as ``mm_token_type_ids`` of transformers' processors numbers them."""

NAMES = {IMAGE: ("image", "image_grids"), VIDEO: ("video", "video_grids")}

LARGEST_POSITION = 2**31
"""Language models hold positions in 32 bits, here or there."""

Grids = torch.Tensor | Sequence[Sequence[int]]
Seconds = torch.Tensor | Sequence[float | None]


@dataclass(frozen=True)
class MropeRule:
    """How a language model numbers what it sees.

    Attributes:
        merge: side of the square of patches that one token stands for.
        positions_per_second: positions that a second of a video takes (``tokens_per_second`` of Qwen2.5-VL); ``None``
            where a video's temporal patches are numbered one by one, whatever time lies between them.
        split_videos: whether every temporal patch of a video stands in the prompt by itself, with text (its time stamp)
            before it, and counts as an image (Qwen3-VL).
    """

    merge: int
    positions_per_second: float | None = None
    split_videos: bool = False


@dataclass(frozen=True)
class Block:
    """Neighboring tokens that stand for one box of space and time.

    Attributes:
        times: position in time of each temporal patch, from the start of the block.
        rows, columns: the tokens of one temporal patch.
    """

    times: tuple[int, ...]
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """How many tokens the block has."""
        return len(self.times) * self.rows * self.columns


@dataclass(frozen=True)
class MropeState:
    """How far one sequence has been numbered.

    It never changes: an engine may keep it at any boundary between two chunks, as long as it keeps the keys and values of
    the tokens before it, and go on from there more than once and in any batch.

    Attributes:
        tokens: tokens so far, padding not counted.
        next_position: where the next block or text token starts; where an unfinished block started.
        highest: the largest position so far, −1 before the first.
        block: the kind of the unfinished block, and itself; ``None`` between two.
        done: tokens of the unfinished block that have their positions.
        video: blocks of a split video that are still to come.
    """

    tokens: int = 0
    next_position: int = 0
    highest: int = -1
    block: tuple[int, Block] | None = None
    done: int = 0
    video: tuple[Block, ...] = ()

    @property
    def delta(self) -> int:
        """What has to be added to the number of a generated token (counted from 0, padding not counted)."""
        return self.highest + 1 - self.tokens


class MropePositions(NamedTuple):
    """What :func:`mrope_positions` returns.

    Attributes:
        positions: ``[3, batch, length]`` int64: time, height and width of every token; 0 for padding.
        deltas: ``[batch, 1]`` int64: token number ``n`` of a sequence (from 0, padding not counted), generated behind
            its prompt, has the position ``n + delta`` on all three axes.
        states: per sequence, what the next chunk starts from.
    """

    positions: torch.Tensor
    deltas: torch.Tensor
    states: tuple[MropeState, ...]


class Placed(Protocol):
    """An image or a video in a prompt."""

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Temporal patches, rows and columns of patches."""
        ...

    @property
    def seconds_per_grid(self) -> float | None:
        """Of a video, the seconds between two temporal patches, where they are known."""
        ...


class PlacedPrompt(Protocol):
    """A prompt in tokens, such as :func:`tritontower.prompt.encode_prompt` makes it."""

    @property
    def token_types(self) -> torch.Tensor:
        """``[T]``: 0 text, 1 image, 2 video."""
        ...

    @property
    def embeddings(self) -> Sequence[Placed]:
        """The images and videos."""
        ...

    @property
    def spans(self) -> Sequence[tuple[int, int]]:
        """Of each of them, the place of its first token and the place behind its last one."""
        ...


def prompt_positions(
    rule: MropeRule,
    prompt: PlacedPrompt,
    *,
    tokens: int | None = None,
    state: MropeState | None = None,
) -> MropePositions:
    """The positions of one prompt, or of the piece of it that an engine runs next.

    Args:
        rule: ``tower.mrope``.
        prompt: what :func:`~tritontower.prompt.encode_prompt` returned.
        tokens: how many tokens the piece has; by default all that are left.
        state: what the piece before it returned; ``None`` at the start.

    Returns:
        As :func:`mrope_positions`, for a batch of one.

    Raises:
        UsageError: the prompt has not so many tokens left.
    """
    state = state or MropeState()
    length, start = len(prompt.token_types), state.tokens
    stop = length if tokens is None else start + tokens
    if not start <= stop <= length:
        raise UsageError(f"a piece of {stop - start} tokens behind the first {start} of a prompt of {length}")
    types = prompt.token_types[start:stop].tolist()
    begun = sorted((first - start, index) for index, (first, _) in enumerate(prompt.spans) if start <= first < stop)
    images = [prompt.embeddings[index] for first, index in begun if types[first] == IMAGE]
    videos = [prompt.embeddings[index] for first, index in begun if types[first] == VIDEO]
    return mrope_positions(
        rule,
        prompt.token_types[None, start:stop],
        image_grids=[image.grid_thw for image in images],
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
    """The positions of a batch of prompts, or of the next chunk of each of them.

    Args:
        rule: ``tower.mrope``.
        token_types: ``[batch, length]``: 0 for text, 1 for the tokens of images, 2 for those of videos
            (``mm_token_type_ids``).  Text that wraps an image is text.
        image_grids: ``[images, 3]``: temporal patches, rows and columns of *patches* (``grid_thw``) of the images
            that begin in ``token_types``, in their order, one sequence behind the other.
        video_grids: the same of videos, each of them once, also where the model splits it.
        seconds_per_grid: per video, the seconds between two temporal patches; 1 where nothing is given.  Read by models
            with ``positions_per_second`` alone.
        attention_mask: ``[batch, length]``: 0 or ``False`` for padding, on whichever side.
        states: per sequence, what the chunk before returned; ``None`` at the start.
        partial: whether the sequences go on: their last image or video may then be cut off.

    Returns:
        Positions and deltas on the device of ``token_types``, and the states.  They are worked out on the CPU.

    Raises:
        UsageError: tokens and grids do not match: too many or too few of either, an image that is interrupted, a grid
            that does not divide into tokens; or shapes that do not fit each other.
    """
    types, kept = _checked(token_types, attention_mask)
    batch, length = types.shape
    before = tuple(states) if states is not None else (MropeState(),) * batch
    if len(before) != batch:
        raise UsageError(f"states has {len(before)} entries for {batch} sequences; pass one for each")
    sources = {IMAGE: _images(rule, image_grids), VIDEO: _videos(rule, video_grids, seconds_per_grid)}
    numbered = [_Numbering(state, sources, row) for row, state in enumerate(before)]
    for row, kind, tokens in _runs(types, kept):
        numbered[row].add(kind, tokens)
    for kind, blocks in sources.items():
        if left := sum(1 for _ in blocks):
            name, argument = NAMES[kind]
            raise UsageError(f"{argument} has {left} more grids than {name}s begin in token_types")
    positions = torch.zeros(3, batch, length, dtype=torch.int64, device="cpu")
    positions[:, kept] = _positions([piece for sequence in numbered for piece in sequence.pieces])
    highest = positions.masked_fill(~kept, -1).amax((0, 2)) if length else positions.new_full((batch,), -1)
    after = tuple(
        sequence.finish(most, partial=partial) for sequence, most in zip(numbered, highest.tolist(), strict=True)
    )
    deltas = torch.tensor([state.delta for state in after], dtype=torch.int64, device="cpu").view(batch, 1)
    device = token_types.device
    return MropePositions(positions.to(device), deltas.to(device), after)


def _checked(token_types: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Types and which of them are no padding, on the CPU."""
    if token_types.ndim != 2:
        raise UsageError(f"token_types has the shape {list(token_types.shape)}; allowed: [batch, length]")
    if attention_mask is not None and attention_mask.shape != token_types.shape:
        raise UsageError(
            f"attention_mask has the shape {list(attention_mask.shape)}, token_types {list(token_types.shape)}; "
            "they must be the same (the chunk's part of the mask)"
        )
    types = token_types.cpu()
    kept = torch.ones_like(types, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    unknown = kept & ((types < TEXT) | (types > VIDEO))
    if unknown.any():
        raise UsageError(f"token_types holds {int(types[unknown][0])}; allowed: 0 (text), 1 (image), 2 (video)")
    return types, kept


def _runs(types: torch.Tensor, kept: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Sequence, kind and number of neighboring tokens of one kind, padding left out."""
    flat = types[kept]
    if not len(flat):
        return
    rows = torch.arange(len(types), device="cpu").repeat_interleave(kept.sum(1))
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = (flat[1:] != flat[:-1]) | (rows[1:] != rows[:-1])
    starts = begins.nonzero().flatten()
    tokens = starts.diff(append=torch.tensor([len(flat)], device="cpu"))
    yield from zip(rows[starts].tolist(), flat[starts].tolist(), tokens.tolist(), strict=True)


def _grids(rule: MropeRule, grids: Grids | None, argument: str) -> list[tuple[int, int, int]]:
    """Temporal patches, and rows and columns of tokens."""
    found = []
    for index, grid in enumerate([] if grids is None else grids.tolist() if torch.is_tensor(grids) else grids):
        times, rows, columns = (int(side) for side in grid) if len(grid) == 3 else (0, 0, 0)
        if min(times, rows, columns) < 1 or rows % rule.merge or columns % rule.merge:
            raise UsageError(
                f"{argument}[{index}] is {shorten(str(list(grid)))}; allowed: temporal patches, rows and columns of "
                f"patches, rows and columns multiples of {rule.merge}"
            )
        found.append((times, rows // rule.merge, columns // rule.merge))
    return found


def _images(rule: MropeRule, grids: Grids | None) -> Iterator[list[Block]]:
    found = _grids(rule, grids, "image_grids")
    return iter([[Block(tuple(range(times)), rows, columns)] for times, rows, columns in found])


def _videos(rule: MropeRule, grids: Grids | None, seconds: Seconds | None) -> Iterator[list[Block]]:
    found = _grids(rule, grids, "video_grids")
    steps: Sequence[float | torch.Tensor | None] = [None] * len(found) if seconds is None else list(seconds)
    if len(steps) != len(found):
        raise UsageError(f"seconds_per_grid has {len(steps)} entries for {len(found)} videos; pass one for each")
    videos = []
    for (times, rows, columns), step in zip(found, steps, strict=True):
        if rule.split_videos:
            videos.append([Block((0,), rows, columns)] * times)
        else:
            videos.append([Block(_times(rule, times, step), rows, columns)])
    return iter(videos)


def _times(rule: MropeRule, count: int, seconds: float | torch.Tensor | None) -> tuple[int, ...]:
    """Position of each temporal patch of a video."""
    if rule.positions_per_second is None:
        return tuple(range(count))
    # A tensor's element stays one: the product is then rounded in its dtype, as it is in transformers.
    step = 1 if seconds is None else seconds.cpu() if torch.is_tensor(seconds) else seconds
    interval = rule.positions_per_second * step
    if not (isfinite(interval) and 0 <= interval * count < LARGEST_POSITION):
        raise UsageError(
            f"seconds_per_grid holds {float(step)}; allowed: at least 0, and so few that the {count} temporal patches of "
            f"the video end before position {LARGEST_POSITION}"
        )
    # A plain number is rounded to fp32, as transformers has it unless torch's default dtype is another.
    factor = interval if torch.is_tensor(interval) else torch.tensor(interval, dtype=torch.float32, device="cpu")
    return tuple((torch.arange(count, device="cpu") * factor).long().tolist())


# Longer than any text.
TEXT_LINE = Block((0,), 1, 2**40)


class _Piece(NamedTuple):
    """Neighboring tokens of a chunk that belong to one block, or are text.

    Attributes:
        tokens: how many.
        base: position at which the block, or the text, starts.
        block: ``None`` for text.
        offset: tokens of the block before these.
    """

    tokens: int
    base: int
    block: Block | None
    offset: int


class _Numbering:
    """Goes along one sequence, run by run, from the state behind its last chunk to the next."""

    def __init__(self, state: MropeState, sources: dict[int, Iterator[list[Block]]], row: int) -> None:
        self.pieces: list[_Piece] = []
        self._before, self._sources, self._row = state, sources, row
        self._tokens, self._next = state.tokens, state.next_position
        self._open, self._done = state.block, state.done
        self._video = deque(state.video)

    def add(self, kind: int, tokens: int) -> None:
        """Numbers a run of tokens of one kind."""
        if self._open is not None and self._open[0] != kind:
            raise UsageError(f"{self._where()} interrupts {self._progress(*self._open)}")
        if kind == TEXT:
            self._append(None, tokens)
            self._next += tokens
            return
        while tokens:
            if self._open is None:
                self._open = kind, self._following(kind)
            block = self._open[1]
            taken = min(tokens, block.tokens - self._done)
            self._append(block, taken)
            self._done += taken
            tokens -= taken
            if self._done == block.tokens:
                self._open, self._done = None, 0
                self._next += max(block.rows, block.columns)

    def finish(self, highest: int, *, partial: bool) -> MropeState:
        """The state behind the chunk, in which ``highest`` is the largest position."""
        if not partial and (self._open is not None or self._video):
            unfinished = self._progress(*self._open) if self._open else f"a video of {len(self._video)} more parts"
            raise UsageError(f"sequence {self._row} ends within {unfinished}; a chunk of it needs partial=True")
        return MropeState(
            tokens=self._tokens,
            next_position=self._next,
            highest=max(highest, self._before.highest),
            block=self._open,
            done=self._done,
            video=tuple(self._video),
        )

    def _append(self, block: Block | None, tokens: int) -> None:
        self.pieces.append(_Piece(tokens, self._next, block, self._done))
        self._tokens += tokens

    def _following(self, kind: int) -> Block:
        if kind == VIDEO and self._video:
            return self._video.popleft()
        blocks = next(self._sources[kind], None)
        if blocks is None:
            name, argument = NAMES[kind]
            raise UsageError(f"{self._where()} belongs to a {name} that {argument} has no grid for")
        first, *rest = blocks
        self._video.extend(rest)
        return first

    def _where(self) -> str:
        return f"token {self._tokens} of sequence {self._row}"

    def _progress(self, kind: int, block: Block) -> str:
        return f"a {NAMES[kind][0]} of which there are {self._done} of {block.tokens} tokens"


def _positions(pieces: Iterable[_Piece]) -> torch.Tensor:
    """``[3, tokens]`` int64 of all pieces, one behind the other.

    A line is a run of tokens along which the width alone counts up, or all three in text; there are many fewer of them.
    """
    facts, times = [], [0]
    for piece in pieces:
        block = piece.block or TEXT_LINE
        facts.append((piece.tokens, piece.base, piece.offset, block.rows, block.columns, len(times), not piece.block))
        times += block.times
    table = torch.tensor(facts, dtype=torch.int64, device="cpu").view(-1, 7)
    tokens, offset, columns = table[:, 0], table[:, 2], table[:, 4]
    first_line = offset // columns
    lines = (offset + tokens - 1) // columns + 1 - first_line
    before_lines = lines.cumsum(0) - lines
    tokens, base, offset, rows, columns, time, text = table.repeat_interleave(lines, 0).unbind(1)
    line = torch.arange(len(base), device="cpu") + (first_line - before_lines).repeat_interleave(lines)
    # The first and the last line of a block that is cut are cut as well.
    start = torch.maximum(line * columns, offset)
    tokens = torch.minimum((line + 1) * columns, offset + tokens) - start
    width = start - line * columns - (tokens.cumsum(0) - tokens)
    moment = torch.tensor(times, device="cpu")[time + line // rows]
    positions = (torch.stack([moment, line % rows, width]) + base).repeat_interleave(tokens, 1)
    positions[2] += torch.arange(positions.shape[1], device="cpu")
    return torch.where(text.bool().repeat_interleave(tokens), positions[2], positions)
