"""How a call of ``encode`` becomes passes over the tower, and what comes back for each picture.

Pictures are decoded in threads, a bounded number ahead; equal ones are recognised by their pixels, and known ones taken
from the cache; the others are put together, in order, into passes of so many patches, and preprocessed while the device
works on the pass before.  What a picture becomes depends on none of this: a row of a pass does not depend on the others.

When a pass does not fit into memory, or a picture in it turns out to be unusable, it is halved and tried again, down to
single pictures, so that one picture can fail only for itself.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise, takewhile
from numbers import Integral, Real
from typing import Any, cast

import torch

from .batch import PackedBatch
from .cache import EmbeddingCache
from .config import TowerConfig
from .embedding import FOREVER, ImageEmbedding, checked_alias
from .errors import (
    ImageError,
    Limits,
    NonFiniteOutputError,
    ProcessorError,
    TowerError,
    TowerOutOfMemoryError,
    UsageError,
    shorten,
)
from .images import CanonicalImage, Picture, canonical_rgb, decoded_bytes
from .memory import MemoryPlan
from .preprocessing import Bounds, Preprocessor
from .preprocessing.base import Each

__all__ = [
    "Call",
    "ClipTimes",
    "ItemError",
    "aliases_of",
    "canonical_pictures",
    "embeddings_of",
    "encode_clip",
    "encode_pictures",
    "patches_per_pass",
    "workers",
]

WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode and preprocess for one call.  More would wait for Python's lock, not for pixels."""

PORTION = 256
"""Pictures whose sizes are looked at together before the first of them is decoded."""

PASS_BYTES = 2**30
"""What a pass may take by default, beside the weights.  A pass this large keeps any device busy; what is larger only makes
the first result late, and leaves preprocessing nothing to overlap with."""

LONG_LIST = 64
"""Pictures from which on a progress bar is shown on a terminal, unless the caller says otherwise."""

SLOWEST, FASTEST = 1e-9, 1e9
"""Frames per second.  Beyond them the times of a clip's frames would not be numbers that a file of embeddings may hold."""

ITEM_ERRORS = (ImageError, ProcessorError, NonFiniteOutputError, TowerOutOfMemoryError)
"""What can be wrong with one picture while the next is fine; everything else is wrong with the call."""


@dataclass(frozen=True)
class ItemError:
    """Stands in the place of a picture that could not be encoded, where ``on_error="return"`` asked for it.

    Attributes:
        index: position of the picture in the caller's list.
        error: what was wrong with it.
    """

    index: int
    error: TowerError


@dataclass(kw_only=True)
class Call:
    """What one call of ``encode`` works with.

    Attributes:
        preprocessor: canonical pictures → packed batch.
        bounds: how large a picture may become.
        run: packed batch → its embeddings: one pass.
        release: gives back what the tower holds on the device beside its weights.
        device: where the tower runs.
        output_device: where the embeddings go.
        raw: whether pixels stay bytes; ``None``: where they can.
        max_patches: patches of one pass; a picture with more is a pass of its own.  Lowered when memory runs out.
        raises: whether the first picture that cannot be encoded ends the call.
        check_output: whether embeddings are looked through for NaN and infinity.
        cache: embeddings from before, if the tower has a cache.
        key: digest of a picture's pixels → its key in the cache.
    """

    preprocessor: Preprocessor
    bounds: Bounds
    run: Callable[[PackedBatch], list[ImageEmbedding]]
    release: Callable[[], None]
    device: torch.device
    output_device: torch.device
    raw: bool | None = False
    max_patches: int = 1
    raises: bool = True
    check_output: bool = False
    cache: EmbeddingCache | None = None
    key: Callable[[str], str] = str

    @property
    def pinned(self) -> bool:
        """Whether embeddings come to the CPU from a GPU: into page-locked memory, without waiting for each."""
        return self.device.type == "cuda" and self.output_device.type == "cpu"

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """What the caller's thread queues its work on, where the tower is on a GPU."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def recall(self, digest: str) -> ImageEmbedding | NonFiniteOutputError | None:
        """The embedding of a picture that the cache knows, checked: the call that put it there may not have asked for it."""
        try:
            found = None if self.cache is None else self.cache.get(self.key(digest), device=self.output_device)
        except torch.OutOfMemoryError:
            # A pass that does not fit can be made smaller, and says whose fault it is; a copy cannot.
            return None
        return None if found is None else self._unusable(found) or (_pinned(found) if self.pinned else found)

    def finish(self, embedding: ImageEmbedding) -> ImageEmbedding | NonFiniteOutputError:
        """An embedding as it left the tower: checked, kept in the cache, and taken where the caller wants it."""
        if error := self._unusable(embedding):
            return error
        if self.cache is not None:
            self.cache.put(self.key(embedding.content_hash), embedding)
        return _pinned(embedding) if self.pinned else embedding.to(self.output_device)

    def _unusable(self, embedding: ImageEmbedding) -> NonFiniteOutputError | None:
        """What is wrong with an embedding, if the caller wants to know."""
        if not self.check_output or all(bool(rows.isfinite().all()) for rows in embedding.tensors.values()):
            return None
        return NonFiniteOutputError(
            f"the embedding of a picture of {embedding.original_size[0]} × {embedding.original_size[1]} pixels holds "
            f"NaN or infinity in {embedding.embeddings.dtype}; if that is float16, use bfloat16 or float32"
        )

    def kept(self, error: TowerError) -> TowerError:
        """An error that waits for the end of the call: without the functions that it came through, which hold pixels."""
        link: BaseException | None = None if self.raises else error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return error

    def settle(self) -> None:
        """Waits for the copies to page-locked memory."""
        if self.pinned:
            torch.cuda.current_stream(self.device).synchronize()


def _pinned(embedding: ImageEmbedding) -> ImageEmbedding:
    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    return embedding.with_tensors({name: pinned(tensor) for name, tensor in embedding.tensors.items()})


# -- one call ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Item:
    """One picture of a call, and what has become of it so far."""

    index: int
    picture: Picture
    image: CanonicalImage | None = None
    """Its pixels, from when it is decoded until it is packed."""
    digest: str = ""
    patches: int = 0
    """What it adds to a pass."""
    first: "_Item | None" = None
    """The same picture earlier in the call."""
    result: ImageEmbedding | TowerError | None = None

    @property
    def outcome(self) -> ImageEmbedding | TowerError | None:
        """Its result, or that of the same picture earlier in the call."""
        return self.result if self.first is None else self.first.result

    def settle(self, result: ImageEmbedding | TowerError) -> None:
        self.result, self.image, self.patches = result, None, 0
        if isinstance(result, TowerError):
            result.index = self.index


@dataclass
class _Pass:
    """Pictures in a row; those that are neither known nor unusable are in the batch."""

    items: list[_Item] = field(default_factory=list)
    patches: int = 0
    batch: PackedBatch | None = None

    @property
    def fresh(self) -> list[_Item]:
        """The pictures that the tower has to encode."""
        return [item for item in self.items if item.first is None and item.result is None]

    def add(self, item: _Item) -> None:
        self.items.append(item)
        self.patches += item.patches


Passes = Generator[_Pass, None, None]


def encode_pictures(
    call: Call, pictures: Sequence[Picture], *, progress: bool | None = None
) -> list[ImageEmbedding | ItemError]:
    """Encodes still pictures in as many passes as they take.

    Args:
        call: what to work with.
        pictures: the pictures.
        progress: whether a bar is shown; ``None``: for long lists, on a terminal.

    Returns:
        As many as there are pictures, in their order.

    Raises:
        TowerError: the call is wrong, or, where ``call.raises``, a picture cannot be encoded.  Whatever ends the call,
            ``completed`` of the exception holds the embeddings of the pictures before the first that has none.
    """
    items = [_Item(index, picture) for index, picture in enumerate(pictures)]
    try:
        with (
            _progress_bar(len(items), progress) as advance,
            workers(len(items)) as each,
            closing(_ahead(_passes(call, items, each), call.stream, alone=len(items) < 2)) as passes,
        ):
            for part in passes:
                batch, part.batch = part.batch, None
                _encode(call, part.fresh, batch)
                _raise_failure(call, part.items)
                advance(len(part.items))
    except BaseException as error:
        call.settle()
        done = list(takewhile(lambda item: isinstance(item.outcome, ImageEmbedding), items))
        # An interruption by the keyboard is none of this package's errors, and keeps what is done all the same.
        vars(error)["completed"] = _results(call, done)
        if isinstance(error, TowerOutOfMemoryError):
            error.remaining = [item.index for item in items if not isinstance(item.outcome, ImageEmbedding)]
        raise
    call.settle()
    return _results(call, items)


def encode_clip(call: Call, batch: PackedBatch) -> ImageEmbedding:
    """Encodes one clip that is packed already, unless the cache knows it.

    Raises:
        TowerOutOfMemoryError: it does not fit into the device's memory.
        NonFiniteOutputError: ``call.check_output``, and it holds NaN or infinity.
    """
    result: ImageEmbedding | TowerError | None = call.recall(batch.content_hashes[0])
    if result is None:
        try:
            (embedding,) = call.run(batch)
            result = call.finish(embedding)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            result = _out_of_memory(call, "the clip", batch.segments.total)
        if isinstance(result, TowerOutOfMemoryError):
            call.release()
    call.settle()
    if isinstance(result, TowerError):
        raise result
    return replace(result, is_clip=True)


def _results(call: Call, items: Iterable[_Item]) -> list[ImageEmbedding | ItemError]:
    """What the caller gets: no two embeddings in the same memory."""
    results: list[ImageEmbedding | ItemError] = []
    for item in items:
        outcome = item.outcome
        if not isinstance(outcome, ImageEmbedding):
            results.append(ItemError(item.index, cast("TowerError", outcome)))
        elif item.first is None:
            results.append(outcome)
        else:
            results.append(_pinned(outcome) if call.pinned else outcome.to(call.output_device, copy=True))
    return results


def _raise_failure(call: Call, items: Iterable[_Item]) -> None:
    """Raises what is wrong with the first of ``items`` that cannot be encoded, where that ends the call."""
    for item in items:
        if call.raises and isinstance(item.outcome, TowerError):
            raise item.outcome


# -- pictures → passes ------------------------------------------------------------------------------------------------


def _passes(call: Call, items: Sequence[_Item], each: Each) -> Passes:
    """The pictures in order, cut where the next would be too much for one pass; packed."""
    seen: dict[str, _Item] = {}
    for portion in _portions(items, call.preprocessor.limits):
        coming = _Pass()
        for item in each(partial(_decode, call), portion):
            _recognise(call, item, seen)
            if coming.patches and coming.patches + item.patches > call.max_patches:
                yield _packed(call, coming, each)
                coming = _Pass()
            coming.add(item)
            if call.raises and isinstance(item.outcome, TowerError):
                yield _packed(call, coming, each)
                return
        yield _packed(call, coming, each)


def _portions(items: Sequence[_Item], limits: Limits) -> Iterator[list[_Item]]:
    """The pictures in order, as many at a time as may be decoded at once."""
    portion: list[_Item] = []
    held = 0
    for item in items:
        size = decoded_bytes(item.picture, limits) if len(items) > 1 else 0
        if portion and (held + size > limits.max_decoded_bytes or len(portion) == PORTION):
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += size
    if portion:
        yield portion


def _decode(call: Call, item: _Item) -> _Item:
    """Decodes a picture and works out how large it is to the tower, or why it cannot be encoded."""
    try:
        image = canonical_rgb(item.picture, index=item.index, limits=call.preprocessor.limits)
        layout = call.preprocessor.layout(image.width, image.height, **call.bounds)
        item.image, item.digest, item.patches = image, image.digest, layout.patches
    except ImageError as error:
        named = error.index is not None
        item.settle(call.kept(error if named else type(error)(error.reason, index=item.index, source=image.source)))
    except ProcessorError as error:
        item.settle(call.kept(error))
    return item


def _recognise(call: Call, item: _Item, seen: dict[str, _Item]) -> None:
    """Settles a picture that came before, in this call or in an earlier one."""
    if item.image is None:
        return
    first = seen.setdefault(item.digest, item)
    if first is not item:
        item.first, item.image, item.patches = first, None, 0
    elif (known := call.recall(item.digest)) is not None:
        item.settle(known)


def _packed(call: Call, coming: _Pass, each: Each) -> _Pass:
    fresh = coming.fresh
    if fresh:
        try:
            coming.batch = _pack(call, fresh, each)
        except (*ITEM_ERRORS, RuntimeError, MemoryError) as error:
            if not isinstance(error, ITEM_ERRORS) and not _is_out_of_memory(error):
                raise
            # Which picture it was shows when they are packed by halves.
            coming.batch = None
    for item in fresh:
        item.image = None
    return coming


def _pack(call: Call, items: Sequence[_Item], each: Each) -> PackedBatch:
    """The batch of ``items``, which are decoded again where a pass with them has failed before."""
    limits = call.preprocessor.limits
    images = [item.image or canonical_rgb(item.picture, index=item.index, limits=limits) for item in items]
    batch = call.preprocessor.pictures(images, each=each, raw=call.raw, **call.bounds)
    # Here, while the device works on the pass before: whoever starts a pass should not have to copy its pixels first.
    return batch.pinned() if call.device.type == "cuda" else batch


# -- passes → embeddings ----------------------------------------------------------------------------------------------


def _encode(call: Call, items: Sequence[_Item], batch: PackedBatch | None) -> None:
    """Settles ``items``, in one pass if that is possible.

    Args:
        call: what to work with.
        items: pictures that the tower has to encode.
        batch: they, packed; ``None``: packing them together did not work, or was not tried.
    """
    if not items:
        return
    outcome = _attempt(call, items, batch)
    if not isinstance(outcome, TowerError):
        for item, result in zip(items, outcome, strict=True):
            item.settle(result)
        return
    if isinstance(outcome, TowerOutOfMemoryError):
        call.release()
        call.max_patches = max(1, sum(item.patches for item in items) // 2)
    if len(items) == 1:
        items[0].settle(outcome)
        return
    half = len(items) // 2
    _encode(call, items[:half], None)
    _encode(call, items[half:], None)


def _attempt(
    call: Call, items: Sequence[_Item], batch: PackedBatch | None
) -> list[ImageEmbedding | NonFiniteOutputError] | TowerError:
    """One pass: what becomes of each picture, or why none could be encoded."""
    try:
        batch = batch or _pack(call, items, map)
        return [call.finish(embedding) for embedding in call.run(batch)]
    except ITEM_ERRORS as error:
        return call.kept(error)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # Not before: as its context, the error would keep the tensors of every function that it came through.
    return _out_of_memory(call, f"picture {items[0].index}", sum(item.patches for item in items))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has run out of memory; for the CPU's, torch has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(call: Call, what: str, patches: int) -> TowerOutOfMemoryError:
    return TowerOutOfMemoryError(
        f"{what} does not fit into the memory of {call.device}: {patches} patches in a pass of their own; lower max_pixels or "
        "longest_edge, free memory, or ask memory_plan what a pass takes"
    )


# -- how much at once -------------------------------------------------------------------------------------------------


def patches_per_pass(plan: MemoryPlan, device: torch.device) -> int:
    """How many patches a pass has by default: what takes 1 GiB, or half of what is free on a GPU if that is less.

    Args:
        plan: what a pass of some patches takes; the rest follows in proportion, but for what torch's operations take for
            themselves on a CPU, which does not grow with a pass and does not count.
        device: where the tower runs.
    """
    budget = PASS_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself is free for it, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(budget, (free + unused) // 2)
    return max(1, budget * plan.workload.patches // (plan.peak_bytes - plan.temporary_bytes))


@contextmanager
def workers(tasks: int) -> Iterator[Each]:
    """What works like ``map`` in threads, a bounded number of calls ahead; ``map`` itself for a single task."""
    if tasks < 2:
        yield map
        return
    with ThreadPoolExecutor(min(WORKERS, tasks), thread_name_prefix="tritontower-pictures") as pool:
        yield partial(_buffered_map, pool)


def _buffered_map(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    coming: deque[Future[Any]] = deque()
    try:
        for values in zip(*arguments, strict=False):
            coming.append(pool.submit(function, *values))
            if len(coming) > 2 * WORKERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def _ahead(passes: Passes, stream: torch.cuda.Stream | None, *, alone: bool) -> Passes:
    """The same passes, each made in another thread while the caller has the one before; not if there is but one."""
    if alone:
        yield from passes
        return
    context = copy_context()

    def advance() -> _Pass | None:
        with torch.cuda.stream(stream):
            return context.run(next, passes, None)

    with closing(passes), ThreadPoolExecutor(1, thread_name_prefix="tritontower-next-pass") as thread:
        coming = thread.submit(advance)
        while (part := coming.result()) is not None:
            coming = thread.submit(advance)
            yield part


@contextmanager
def _progress_bar(total: int, progress: bool | None) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    hidden = not progress if progress is not None else (None if total >= LONG_LIST else True)  # None: off a terminal
    with tqdm(total=total, unit="picture", disable=hidden) as bar:
        yield bar.update


def canonical_pictures(pictures: Sequence[Picture], limits: Limits, each: Each = map) -> list[CanonicalImage]:
    """Decodes pictures, by ``each``.

    Raises:
        ImageError: one of them cannot be used; the first, if there are several.
    """

    def decode(index: int, picture: Picture) -> CanonicalImage:
        return canonical_rgb(picture, index=index, limits=limits)

    return list(each(decode, range(len(pictures)), pictures))


# -- a pass's rows → embeddings ---------------------------------------------------------------------------------------


def embeddings_of(
    config: TowerConfig, outputs: Mapping[str, torch.Tensor], batch: PackedBatch, *, bidirectional: bool = False
) -> list[ImageEmbedding]:
    """The rows of a pass, picture by picture.

    Args:
        config: the tower.
        outputs: what it made of the batch, by name.
        batch: the batch.
        bidirectional: whether a language model lets the rows of a view attend to each other in both directions.
    """

    def parts(rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        # A view would keep, and take along when it is pickled, the rows of the whole pack.
        return [part.clone() for part in rows.split(list(counts))] if len(batch) > 1 else [rows][: len(batch)]

    tokens = {name: parts(rows, batch.token_counts) for name, rows in outputs.items() if name != "pooled"}
    pooled = parts(outputs["pooled"], batch.view_counts) if "pooled" in outputs else None
    levels = [tokens[f"deepstack.{level}"] for level in range(len(config.deepstack))]
    views = _view_tokens(config, batch)
    return [
        ImageEmbedding(
            embeddings=rows,
            grid_thw=batch.grids[index],
            original_size=batch.original_sizes[index],
            processed_size=batch.processed_sizes[index],
            content_hash=batch.content_hashes[index],
            deepstack=tuple(level[index] for level in levels),
            pooled=None if pooled is None else pooled[index],
            view_tokens=views[index],
            bidirectional_spans=tuple(pairwise(accumulate(views[index], initial=0))) if bidirectional else (),
        )
        for index, rows in enumerate(tokens["embeddings"])
    ]


def _view_tokens(config: TowerConfig, batch: PackedBatch) -> list[tuple[int, ...]]:
    """Per picture the tokens of its views; of one that is put together of tiles, all of its tokens."""
    if batch.assembly_index is not None:
        return [(tokens,) for tokens in batch.token_counts]
    extra = 1 if config.keep_class_token else 0
    counts = [t * h * w // config.rows_per_token + extra for t, h, w in batch.view_grids]
    ends = list(accumulate(batch.view_counts, initial=0))
    return [tuple(counts[first:last]) for first, last in pairwise(ends)]


def aliases_of(text_alias: str | Sequence[str | None] | None, pictures: int) -> Sequence[str | None]:
    """An alias, or ``None``, for every picture.

    Raises:
        UsageError: no alias and no list of them, another number of aliases than pictures, or one that cannot be.
    """
    aliases = [text_alias] if isinstance(text_alias, str) else text_alias
    if aliases is None:
        return [None] * pictures
    if not isinstance(aliases, Sequence):
        raise UsageError(
            f"text_alias is {shorten(aliases)}; allowed: a text for one picture, a list with one for each, or None"
        )
    if len(aliases) != pictures:
        raise UsageError(
            f"text_alias has {len(aliases)} aliases for {pictures} pictures; allowed: one for each, or None"
        )
    return [checked_alias(alias) for alias in aliases]


# -- clips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipTimes:
    """When the frames of a clip are shown, as far as it is known.

    Attributes:
        seconds: of each frame; empty: not known.
        interval: seconds from one frame to the next.
    """

    seconds: tuple[float, ...] = ()
    interval: float | None = None

    @classmethod
    def of(cls, frames: int, fps: float | None, timestamps: Sequence[float] | None) -> "ClipTimes":
        """The times of ``frames`` frames, so many per second or at these times.

        Raises:
            UsageError: both are given, or one that cannot be right.
        """
        if fps is not None and timestamps is not None:
            raise UsageError("fps and timestamps both say when the frames are shown; pass one of them")
        if fps is not None:
            if not _is_number(fps) or not SLOWEST <= fps <= FASTEST:
                raise UsageError(f"fps is {shorten(fps)}; allowed: {SLOWEST:g} to {FASTEST:g} frames per second")
            return cls(tuple(frame / float(fps) for frame in range(frames)), 1.0 / float(fps))
        if timestamps is None:
            return cls()
        times = list(timestamps)
        if len(times) != frames or not all(_is_number(time) and 0 <= time < FOREVER for time in times):
            raise UsageError(
                f"{len(times)} timestamps for {frames} frames; allowed: a number of seconds from 0 to below {FOREVER} for each"
            )
        if any(later < earlier for earlier, later in pairwise(times)):
            raise UsageError("the timestamps of a clip's frames must not decrease")
        spread = float(times[-1] - times[0]) / (frames - 1) if frames > 1 else None
        return cls(tuple(float(time) for time in times), spread or None)

    def put_on(self, embedding: ImageEmbedding, temporal: int) -> ImageEmbedding:
        """``embedding`` with these times, where one patch spans ``temporal`` frames.

        A temporal patch is shown in the middle between its first frame and its last, where the last frame of the clip is
        repeated until the patches come out even: the times that Qwen3-VL's processor writes into a prompt.
        """
        if not self.seconds:
            return embedding
        padded = [*self.seconds, *[self.seconds[-1]] * (-len(self.seconds) % temporal)]
        middles = [(padded[first] + padded[first + temporal - 1]) / 2 for first in range(0, len(padded), temporal)]
        grid = None if self.interval is None else self.interval * temporal
        return replace(embedding, timestamps=tuple(middles), seconds_per_grid=grid)


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Integral)) and not isinstance(value, bool)
