"""How a call of ``encode`` becomes passes over the tower, and what comes back for each image.

Images are decoded in threads, a bounded number ahead; equal ones are recognized by their pixels, and known ones taken
from the cache; the others are put together, in order, into passes of so many patches, and preprocessed while the device
works on the pass before.  What an image becomes depends on none of this: a row of a pass does not depend on the others.

When a pass does not fit into memory, or an image in it turns out to be unusable, it is halved and tried again, down to
single images, so that one image can fail only for itself.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import cast

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.cache import EmbeddingCache
from tritontower.embedding import ImageEmbedding
from tritontower.errors import (
    ImageError,
    Limits,
    NonFiniteOutputError,
    ProcessorError,
    TowerError,
    TowerOutOfMemoryError,
    is_out_of_memory,
)
from tritontower.graph.memory_plan import MemoryPlan
from tritontower.preprocessing import Bounds, Preprocessor
from tritontower.preprocessing.base import Each
from tritontower.preprocessing.images.image import (
    CanonicalImage,
    ChannelOrder,
    ImageInput,
    canonical_rgb,
    decoded_bytes,
)

from .prefetch import ahead, progress_bar, workers

__all__ = ["Call", "ItemError", "encode_images", "patches_per_pass"]

PORTION = 256
"""Images whose sizes are looked at together before the first of them is decoded."""

PASS_BYTES = 2**30
"""What a pass may take by default, beside the weights.  A pass this large keeps any device busy; what is larger only makes
the first result late, and leaves preprocessing nothing to overlap with."""

ITEM_ERRORS = (ImageError, ProcessorError, NonFiniteOutputError, TowerOutOfMemoryError)
"""What can be wrong with one image while the next is fine; everything else is wrong with the call."""


@dataclass(frozen=True)
class ItemError:
    """Stands in the place of an image that could not be encoded, where ``on_error="return"`` asked for it.

    Attributes:
        index: position of the image in the caller's list.
        error: what was wrong with it.
    """

    index: int
    error: TowerError


@dataclass(kw_only=True)
class Call:
    """What one call of ``encode`` works with.

    Attributes:
        preprocessor: canonical images → packed batch.
        bounds: how large an image may become.
        run: packed batch → its embeddings: one pass.
        release: gives back what the tower holds on the device beside its weights.
        device: where the tower runs.
        output_device: where the embeddings go.
        raw: whether pixels stay bytes; ``None``: where they can.
        input_data_format: the order of an array's axes; ``None``: as its shape says.
        max_patches: patches of one pass; an image with more is a pass of its own.  Lowered when memory runs out.
        raises: whether the first image that cannot be encoded ends the call.
        check_output: whether embeddings are looked through for NaN and infinity.
        cache: embeddings from before, if the tower has a cache.
        key: digest of an image's pixels → its key in the cache.
    """

    preprocessor: Preprocessor
    bounds: Bounds
    run: Callable[[PackedBatch], list[ImageEmbedding]]
    release: Callable[[], None]
    device: torch.device
    output_device: torch.device
    raw: bool | None = False
    input_data_format: ChannelOrder | None = None
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
        """The embedding of an image that the cache knows, checked: the call that put it there may not have asked for it."""
        try:
            found = None if self.cache is None else self.cache.get(self.key(digest), device=self.output_device)
            return None if found is None else self._unusable(found) or (_pinned(found) if self.pinned else found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # A pass that does not fit can be made smaller, and says whose fault it is; a copy cannot.
            return None

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
            f"the embedding of an image of {embedding.original_size[0]} × {embedding.original_size[1]} pixels holds "
            f"NaN or infinity in {embedding.embeddings.dtype}; if that is float16, use bfloat16 or float32"
        )

    def kept(self, error: TowerError) -> TowerError:
        """An error that waits for the end of the call: without the functions that it came through, which hold pixels."""
        link: BaseException | None = None if self.raises else error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return error

    def does_not_fit(self, what: str, patches: int) -> TowerOutOfMemoryError:
        """The error for what does not fit into memory in a pass of its own."""
        return TowerOutOfMemoryError(
            f"{what} does not fit into the memory of {self.device}: {patches} patches in a pass of their own; lower "
            "max_pixels or longest_edge, free memory, or ask memory_plan what a pass takes"
        )

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
    """One image of a call, and what has become of it so far."""

    index: int
    image: ImageInput
    decoded: CanonicalImage | None = None
    """Its pixels, from when it is decoded until it is packed."""
    digest: str = ""
    """Of its pixels, where it has to be told from others."""
    patches: int = 0
    """What it adds to a pass."""
    first: "_Item | None" = None
    """The same image earlier in the call."""
    result: ImageEmbedding | TowerError | None = None

    @property
    def outcome(self) -> ImageEmbedding | TowerError | None:
        """Its result, or that of the same image earlier in the call."""
        return self.result if self.first is None else self.first.result

    def settle(self, result: ImageEmbedding | TowerError) -> None:
        self.result, self.decoded, self.patches = result, None, 0
        if isinstance(result, TowerError):
            result.index = self.index


@dataclass
class _Pass:
    """Images in a row; those that are neither known nor unusable are in the batch."""

    items: list[_Item] = field(default_factory=list)
    patches: int = 0
    batch: PackedBatch | None = None

    @property
    def fresh(self) -> list[_Item]:
        """The images that the tower has to encode."""
        return [item for item in self.items if item.first is None and item.result is None]

    def add(self, item: _Item) -> None:
        self.items.append(item)
        self.patches += item.patches


def encode_images(
    call: Call, images: Sequence[ImageInput], *, progress: bool | None = None
) -> list[ImageEmbedding | ItemError]:
    """Encodes still images in as many passes as they take.

    Args:
        call: what to work with.
        images: the images.
        progress: whether a bar is shown; ``None``: for long lists, on a terminal.

    Returns:
        As many as there are images, in their order.

    Raises:
        TowerError: the call is wrong, or, where ``call.raises``, an image cannot be encoded.  Whatever ends the call,
            ``completed`` of the exception holds the embeddings of the images before the first that has none.
    """
    items = [_Item(index, image) for index, image in enumerate(images)]
    try:
        with (
            progress_bar(len(items), progress) as advance,
            workers(len(items)) as each,
            closing(ahead(_passes(call, items, each), call.stream, alone=len(items) < 2)) as passes,
        ):
            for part in passes:
                _encode(call, part.fresh, part)
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


def _results(call: Call, items: Iterable[_Item]) -> list[ImageEmbedding | ItemError]:
    """What the caller gets: no two embeddings in the same memory."""
    results: list[ImageEmbedding | ItemError] = []
    for item in items:
        outcome = item.outcome
        if not isinstance(outcome, ImageEmbedding):
            error = cast("TowerError", outcome)
            if item.first is not None:
                error = copy(error)
                error.index = item.index
            results.append(ItemError(item.index, error))
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


# -- images → passes ------------------------------------------------------------------------------------------------


def _passes(call: Call, items: Sequence[_Item], each: Each) -> Generator[_Pass, None, None]:
    """The images in order, cut where the next would be too much for one pass; packed."""
    seen: dict[str, _Item] = {}
    # The digest of a lone image that no cache may know can wait until the device has work.
    compares = len(items) > 1 or call.cache is not None
    for portion in _portions(items, call.preprocessor.limits):
        coming = _Pass()
        for item in each(partial(_decode, call, compares), portion):
            _recognize(call, item, seen)
            if coming.patches and coming.patches + item.patches > call.max_patches:
                yield _packed(call, coming, each)
                coming = _Pass()
            coming.add(item)
            if call.raises and isinstance(item.outcome, TowerError):
                yield _packed(call, coming, each)
                return
        yield _packed(call, coming, each)


def _portions(items: Sequence[_Item], limits: Limits) -> Iterator[list[_Item]]:
    """The images in order, as many at a time as may be decoded at once."""
    portion: list[_Item] = []
    held = 0
    for item in items:
        size = decoded_bytes(item.image, limits) if len(items) > 1 else 0
        if portion and (held + size > limits.max_decoded_bytes or len(portion) == PORTION):
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += size
    if portion:
        yield portion


def _decode(call: Call, compares: bool, item: _Item) -> _Item:
    """Decodes an image and works out how large it is to the tower, or why it cannot be encoded.

    Args:
        call: what to work with.
        compares: whether its digest is needed here.
        item: the image.
    """
    try:
        image = _decoded(call, item)
        layout = call.preprocessor.layout(image.width, image.height, **call.bounds)
        item.decoded, item.patches = image, layout.patches
        item.digest = image.digest if compares else ""
    except ImageError as error:
        named = error.index is not None
        item.settle(call.kept(error if named else type(error)(error.reason, index=item.index, source=image.source)))
    except ProcessorError as error:
        item.settle(call.kept(error))
    return item


def _decoded(call: Call, item: _Item) -> CanonicalImage:
    limits, order = call.preprocessor.limits, call.input_data_format
    return canonical_rgb(item.image, index=item.index, limits=limits, input_data_format=order)


def _recognize(call: Call, item: _Item, seen: dict[str, _Item]) -> None:
    """Settles an image that came before, in this call or in an earlier one."""
    if item.decoded is None or not item.digest:
        return
    first = seen.setdefault(item.digest, item)
    if first is not item:
        item.first, item.decoded, item.patches = first, None, 0
    elif (known := call.recall(item.digest)) is not None:
        item.settle(known)


def _packed(call: Call, coming: _Pass, each: Each) -> _Pass:
    fresh = coming.fresh
    if fresh:
        try:
            coming.batch = _pack(call, fresh, each)
        except (*ITEM_ERRORS, RuntimeError, MemoryError) as error:
            if not isinstance(error, ITEM_ERRORS) and not is_out_of_memory(error):
                raise
            # Which image it was shows when they are packed by halves.
            coming.batch = None
    for item in fresh:
        item.decoded = None
    return coming


def _pack(call: Call, items: Sequence[_Item], each: Each) -> PackedBatch:
    """The batch of ``items``, which are decoded again where a pass with them has failed before."""
    images = [item.decoded or _decoded(call, item) for item in items]
    batch = call.preprocessor.images(images, each=each, raw=call.raw, **call.bounds)
    # Here, while the device works on the pass before: whoever starts a pass should not have to copy its pixels first.
    return batch.pinned() if call.device.type == "cuda" else batch


# -- passes → embeddings ----------------------------------------------------------------------------------------------


def _encode(call: Call, items: Sequence[_Item], part: _Pass) -> None:
    """Settles ``items``, in one pass if that is possible.

    Args:
        call: what to work with.
        items: images that the tower has to encode.
        part: holds their batch, and does not any more when they are done; without one, packing them together did not
            work, or was not tried.
    """
    if not items:
        return
    outcome = _attempt(call, items, part)
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
    # The error may hold functions, and with them tensors.
    del outcome
    half = len(items) // 2
    _encode(call, items[:half], _Pass())
    _encode(call, items[half:], _Pass())


def _attempt(
    call: Call, items: Sequence[_Item], part: _Pass
) -> list[ImageEmbedding | NonFiniteOutputError] | TowerError:
    """One pass: what becomes of each image, or why none could be encoded.  Nobody has its batch when it ends."""
    batch, part.batch = part.batch, None
    try:
        batch = batch or _pack(call, items, map)
        return [call.finish(embedding) for embedding in call.run(batch)]
    except ITEM_ERRORS as error:
        return call.kept(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not before: as its context, the error would keep the tensors of every function that it came through.
    return call.does_not_fit(f"image {items[0].index}", sum(item.patches for item in items))


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
    return max(1, budget * plan.workload.patches // (plan.peak_bytes - plan.workspace_bytes))
