"""Splits the images of a call into batches, runs them, and returns one embedding per image, in order.

Images are decoded in threads, a bounded number ahead.  Images with equal pixels are encoded once, and cached ones not at
all.  The others are packed in order into batches of limited size; the next batch is preprocessed while the device runs
the current one.  None of this changes an embedding, because a row does not depend on the other images of its batch.

A batch that does not fit into memory, or contains an image that turns out to be unusable, is halved and tried again,
down to single images.  So an image fails only because of itself.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import cast

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.embedding import ImageEmbedding
from tritontower.engine.runner import ModelRunner
from tritontower.errors import (
    EncodeInterrupted,
    ImageError,
    NonFiniteOutputError,
    ProcessorError,
    TowerError,
    TowerOutOfMemoryError,
    is_out_of_memory,
)
from tritontower.preprocessing import Bounds, Preprocessor
from tritontower.preprocessing.images.decode import decode_image
from tritontower.preprocessing.images.image import CanonicalImage, ChannelOrder, ImageInput
from tritontower.preprocessing.preprocessor import Each

from .outputs import ItemError, OutputHandler, are_finite, split_embeddings
from .prefetch import decode, prefetch, progress_bar, split_portions, thread_map

PORTION_IMAGES = 256
"""Images whose sizes are read together before the first of them is decoded."""

ITEM_ERRORS = (ImageError, ProcessorError, NonFiniteOutputError, TowerOutOfMemoryError)
"""Errors that concern one image; every other error ends the call."""


class EncodeOptions(Bounds, total=False):
    """Options of ``VisionTower.encode`` that do not change the type of its result."""

    max_patches: int | None
    output_device: str | torch.device | None
    text_alias: str | Sequence[str | None] | None
    check_output: bool | None
    progress: bool | None
    input_data_format: ChannelOrder | None


@dataclass(eq=False)
class _Item:
    """One image of a call and its state."""

    index: int
    image: ImageInput
    decoded: CanonicalImage | None = None
    """From decoding until packing."""
    patches: int = 0
    """Patches that it adds to a batch."""
    first: "_Item | None" = None
    """An earlier image of the call with the same pixels."""
    own_result: ImageEmbedding | TowerError | None = None

    @property
    def result(self) -> ImageEmbedding | TowerError | None:
        """The result, or that of the earlier image with the same pixels."""
        return self.own_result if self.first is None else self.first.own_result

    def settle(self, result: ImageEmbedding | TowerError) -> None:
        self.own_result, self.decoded, self.patches = result, None, 0
        if isinstance(result, TowerError):
            result.index = self.index


@dataclass
class _Batch:
    """Consecutive images; those that need a forward pass are in ``packed``."""

    items: list[_Item] = field(default_factory=list)
    patches: int = 0
    packed: PackedBatch | None = None
    """``None`` if packing failed or was not tried yet."""

    @property
    def pending(self) -> list[_Item]:
        """Images that are not known, not duplicates, and not failed."""
        return [item for item in self.items if item.first is None and item.own_result is None]


@dataclass(kw_only=True)
class Scheduler:
    """Encodes the images or the video of one call."""

    config: TowerConfig
    runner: ModelRunner
    preprocessor: Preprocessor
    outputs: OutputHandler
    bounds: Bounds
    raw: bool | None = False
    """Pixels stay uint8; ``None``: if the preprocessor can."""
    input_data_format: ChannelOrder | None = None
    max_patches: int = 1
    """Patches of one batch; a larger image gets a batch of its own.  Lowered when memory runs out."""
    raise_errors: bool = True
    """The first image that cannot be encoded ends the call."""
    bidirectional: bool = False

    def encode_images(
        self, images: Sequence[ImageInput], *, progress: bool | None = None
    ) -> list[ImageEmbedding | ItemError]:
        """Encodes still images in as many batches as they need; returns one result per image, in order."""
        items = [_Item(index, image) for index, image in enumerate(images)]
        device = self.outputs.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            with (
                progress_bar(len(items), progress) as advance,
                thread_map(len(items)) as each,
                closing(prefetch(self._make_batches(items, each), stream, enabled=len(items) > 1)) as batches,
            ):
                for batch in batches:
                    self._run_batch(batch)
                    for item in batch.items:
                        if self.raise_errors and isinstance(item.result, TowerError):
                            raise item.result
                    advance(len(batch.items))
        except (TowerError, KeyboardInterrupt) as error:
            done = takewhile(lambda item: isinstance(item.result, ImageEmbedding), items)
            completed = cast("list[ImageEmbedding]", self._collect_results(done))
            if isinstance(error, KeyboardInterrupt):
                interrupted = EncodeInterrupted()
                interrupted.completed = completed
                raise interrupted from error
            error.completed = completed
            if isinstance(error, TowerOutOfMemoryError):
                error.remaining = [item.index for item in items if not isinstance(item.result, ImageEmbedding)]
            raise
        return self._collect_results(items)

    def encode_video(self, batch: PackedBatch) -> ImageEmbedding:
        """Encodes one packed video, unless the cache has it."""
        result: ImageEmbedding | TowerError | None = self.outputs.look_up(batch.images.content_hashes[0])
        if result is None:
            try:
                (result,) = self._finish(batch, self.runner.run(batch))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if result is None:
                self.runner.release()
                raise self._make_memory_error("the video", batch.attention.segments.total)
        self.outputs.synchronize()
        if isinstance(result, TowerError):
            raise result
        return replace(result, is_video=True)

    def _make_batches(self, items: Sequence[_Item], each: Each) -> Generator[_Batch, None, None]:
        """Decodes and packs the images in order; a batch ends where the next image would exceed ``max_patches``."""
        seen: dict[str, _Item] = {}
        images = [item.image for item in items]
        limits = self.preprocessor.limits
        # The digest of a single image that no cache may have can wait until the device is busy.
        take_digests = len(items) > 1 or self.outputs.cache is not None
        for portion in split_portions(images, limits, PORTION_IMAGES):
            batch = _Batch()
            decoded = decode(
                images[portion], limits, each, self.input_data_format, first=portion.start, take_digests=take_digests
            )
            for item, image in zip(items[portion], decoded, strict=True):
                self._plan_item(item, image)
                del image
                if take_digests:
                    self._find_known(item, seen)
                if batch.patches and batch.patches + item.patches > self.max_patches:
                    yield self._pack_batch(batch, each)
                    batch = _Batch()
                batch.items.append(item)
                batch.patches += item.patches
                if self.raise_errors and isinstance(item.result, TowerError):
                    yield self._pack_batch(batch, each)
                    return
            yield self._pack_batch(batch, each)

    def _plan_item(self, item: _Item, image: CanonicalImage | ImageError) -> None:
        """Computes the patches of a decoded image, or settles it with its error."""
        if isinstance(image, ImageError):
            item.settle(self._detach(image))
            return
        try:
            item.patches = self.preprocessor.layout(image.width, image.height, **self.bounds).patches
            item.decoded = image
        except (ImageError, ProcessorError) as error:
            if isinstance(error, ImageError) and error.index is None:
                error = type(error)(error.reason, index=item.index, source=image.source)
            item.settle(self._detach(error))

    def _find_known(self, item: _Item, seen: dict[str, _Item]) -> None:
        """Links an image to an earlier one with the same pixels, or settles it from the cache."""
        if item.decoded is None:
            return
        digest = item.decoded.digest
        first = seen.setdefault(digest, item)
        if first is not item:
            item.first, item.decoded, item.patches = first, None, 0
        elif (known := self.outputs.look_up(digest)) is not None:
            item.settle(known)

    def _pack_batch(self, batch: _Batch, each: Each) -> _Batch:
        pending = batch.pending
        if pending:
            try:
                batch.packed = self._pack(pending, each)
            except (*ITEM_ERRORS, RuntimeError, MemoryError) as error:
                # Packing the halves will show which image it was.
                if not isinstance(error, ITEM_ERRORS) and not is_out_of_memory(error):
                    raise
        for item in pending:
            item.decoded = None
        return batch

    def _pack(self, items: Sequence[_Item], each: Each) -> PackedBatch:
        """Packs images; decodes them again if a batch with them failed before."""
        limits, order = self.preprocessor.limits, self.input_data_format
        images = [
            item.decoded or decode_image(item.image, index=item.index, limits=limits, input_data_format=order)
            for item in items
        ]
        batch = self.preprocessor.preprocess_images(images, each=each, raw=self.raw, **self.bounds)
        # Here, while the device runs the batch before: the thread that starts a forward pass need not copy the pixels.
        return batch.pinned() if self.outputs.device.type == "cuda" else batch

    def _run_batch(self, batch: _Batch) -> None:
        """Settles all pending images of a batch; halves it as long as it fails."""
        stack = [batch]
        while stack:
            part = stack.pop()
            items = part.pending
            if not items:
                continue
            packed, part.packed = part.packed, None
            error: TowerError | None = None
            results: list[ImageEmbedding | NonFiniteOutputError] | None = None
            try:
                packed = packed or self._pack(items, map)
                results = self._finish(packed, self.runner.run(packed))
            except ITEM_ERRORS as failure:
                error = self._detach(failure)
            except (RuntimeError, MemoryError) as failure:
                if not is_out_of_memory(failure):
                    raise
            packed = None
            if results is not None:
                for item, result in zip(items, results, strict=True):
                    item.settle(result)
                continue
            patches = sum(item.patches for item in items)
            if error is None:
                # Made outside the except block: as its context, torch's error would keep the tensors of its frames alive.
                error = self._make_memory_error(f"image {items[0].index}", patches)
            if isinstance(error, TowerOutOfMemoryError):
                self.runner.release()
                self.max_patches = max(1, patches // 2)
            if len(items) == 1:
                items[0].settle(error)
            else:
                half = len(items) // 2
                stack += [_Batch(items[half:]), _Batch(items[:half])]

    def _finish(
        self, packed: PackedBatch, outputs: Mapping[str, torch.Tensor]
    ) -> list[ImageEmbedding | NonFiniteOutputError]:
        embeddings = split_embeddings(self.config, outputs, packed, bidirectional=self.bidirectional)
        # One reduction for the whole batch; which image it was matters only if there is one.
        is_suspect = self.outputs.check_output and not are_finite(outputs.values())
        return [self.outputs.finish(embedding, is_suspect) for embedding in embeddings]

    def _collect_results(self, items: Iterable[_Item]) -> list[ImageEmbedding | ItemError]:
        """Returns the results of finished images, each embedding in memory of its own."""
        results: list[ImageEmbedding | ItemError] = []
        for item in items:
            result = item.result
            if isinstance(result, ImageEmbedding):
                results.append(result if item.first is None else self.outputs.duplicate(result))
                continue
            error = cast("TowerError", result)
            if item.first is not None:
                error = copy(error)
                error.index = item.index
            results.append(ItemError(item.index, error))
        self.outputs.synchronize()
        return results

    def _detach(self, error: TowerError) -> TowerError:
        """Drops the tracebacks of an error that is returned, whose frames keep decoded images alive."""
        link: BaseException | None = None if self.raise_errors else error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
        return error

    def _make_memory_error(self, what: str, patches: int) -> TowerOutOfMemoryError:
        return TowerOutOfMemoryError(
            f"{what} does not fit into the memory of {self.outputs.device}: {patches} patches in a batch of its own; lower "
            "max_pixels or longest_edge, or free memory; memory_plan tells what a forward pass takes"
        )
