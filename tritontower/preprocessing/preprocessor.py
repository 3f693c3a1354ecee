"""Preprocessor: canonical images → packed batch, by a resizing rule and either the fast path or transformers' processor."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import repeat
from typing import Any, Unpack

import torch

from tritontower.batch.digests import Digests
from tritontower.batch.layout import ImageLayout
from tritontower.batch.normalization import PixelNormalization
from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import ImageError, ProcessorError, UsageError, is_integer, shorten

from .bounds import Bounds
from .fast_path import FastPath, allocate_pixels
from .hf_processor import HFProcessor
from .images.image import CanonicalImage, ImageContext, is_large
from .patchify import cut_into_patches
from .processor_config import ProcessorSource
from .resize.rule import ResizeRule
from .threads import Spread, run_serially, spread_over_threads
from .video import fill_video, hash_frames

Each = Callable[..., Iterable[Any]]
"""``map``, or a function with its signature."""
MakeRule = Callable[[ProcessorSource], ResizeRule]

KEPT_BYTES = 2
"""Bytes of an image per byte of its patches up to which it is kept for a digest that may never be needed."""


class Preprocessor:
    """Turns canonical images into packed batches for one tower; threads may share it.

    Raises :class:`~tritontower.errors.UsageError` for an option that the resizing rule does not have.
    """

    def __init__(self, source: ProcessorSource, make_rule: MakeRule, *, use_fast_path: bool = True) -> None:
        self.source, self.rule, self._use_fast_path = source, make_rule(source), use_fast_path
        self.config, self.limits = source.config, source.limits
        self.check_bounds = self.rule.check_bounds
        self._hf_processor = HFProcessor(self.rule)

    @property
    def processor(self) -> Any:
        """The image processor of transformers; raises if it cannot be loaded or belongs to another tower."""
        if not self.rule.HAS_PROCESSOR:
            raise UsageError("this preprocessing has no image processor of transformers; use the pixels of the batch")
        return self._hf_processor.processor

    @cached_property
    def fast_path(self) -> FastPath | None:
        """The fast path, if it supports the processor and reproduces its pixels of a small image, bit for bit."""
        if not (self._use_fast_path and self.rule.PROCESSORS):
            return None
        fast_path = FastPath.from_processor(self.rule, self.processor)
        return fast_path if fast_path is not None and fast_path.passes_self_check(self._hf_processor) else None

    @property
    def normalization(self) -> PixelNormalization | None:
        """Normalization of uint8 pixels that a tower's weights can absorb; ``None``: unknown."""
        return None if self.fast_path is None else self.fast_path.normalization

    def layout(self, width: int, height: int, **bounds: Unpack[Bounds]) -> ImageLayout:
        """Computes the layout of an image of ``width`` × ``height`` pixels; nothing is decoded.

        Raises:
            EmptyImageError, AspectRatioError, ImageTooLargeError: no image of this size can be encoded.
            UsageError: a side that is not an integer, or a bound that the rule does not have.
            ProcessorError, ConfigError: settings or bounds that allow nothing, or that do not fit the tower.
        """
        self.check_bounds(bounds)
        self._check_numbers(width=width, height=height)
        return self.rule.plan(int(width), int(height), bounds)

    def video_layout(self, frames: int, width: int, height: int, **bounds: Unpack[Bounds]) -> ImageLayout:
        """Computes the layout of a video of ``frames`` frames; raises as :meth:`layout`, and where videos are unknown."""
        self.check_bounds(bounds)
        self._check_numbers(frames=frames, width=width, height=height)
        return self.rule.plan_video(int(frames), int(width), int(height), bounds)

    def preprocess_images(
        self, images: Sequence[CanonicalImage], *, each: Each = map, raw: bool | None = False, **bounds: Unpack[Bounds]
    ) -> PackedBatch:
        """Packs still images, in order; raises the errors of :meth:`layout`, which name the image.

        The batch keeps an image until its digest is needed, unless it is much larger than its patches.  Then the digest
        is computed here.  Several images are processed by ``each``, such as the ``map`` of a thread pool.  With ``raw``,
        pixels stay uint8, for weights that absorb the normalization; ``None``: where :attr:`normalization` is known.
        """
        self.check_bounds(bounds)
        raw = self._resolve_raw(raw)
        layouts = []
        for index, image in enumerate(images):
            try:
                layouts.append(self.layout(image.width, image.height, **bounds))
            except ImageError as error:
                raise type(error)(error.reason, index=index, source=image.source) from error
        return PackedBatch.pack(
            self.config,
            self._make_patches(images, layouts, bounds, each, raw),
            layouts,
            original_sizes=[(image.width, image.height) for image in images],
            content_hashes=Digests(images),
        )

    def preprocess_video(
        self, frames: Sequence[CanonicalImage], *, each: Each = map, raw: bool | None = False, **bounds: Unpack[Bounds]
    ) -> PackedBatch:
        """Packs one video, whose frames all have one size; the arguments are those of :meth:`preprocess_images`."""
        self.check_takes_videos()
        raw = self._resolve_raw(raw)
        sizes = {(frame.width, frame.height) for frame in frames}
        if len(sizes) != 1:
            found = "no frame" if not sizes else f"sizes {sorted(sizes)}"
            raise ProcessorError(f"a video must have at least one frame, and all frames one size, got {found}")
        (size,) = sizes
        layout = self.video_layout(len(frames), *size, **bounds)
        pixels = fill_video(frames, layout, self.fast_path, self._hf_processor, each, raw)
        digests = [hash_frames(frames)]
        return PackedBatch.pack(self.config, pixels, [layout], original_sizes=[size], content_hashes=digests)

    def normalize(self, batch: PackedBatch) -> PackedBatch:
        """Returns ``batch`` with fp32 pixels in place of uint8 pixels; itself if it has no uint8 pixels."""
        if batch.pixels.dtype != torch.uint8:
            return batch
        self._resolve_raw(raw=True)
        pixels = allocate_pixels(*batch.pixels.shape)
        if self.normalization is not None:
            self.normalization.normalize(batch.pixels.cpu().numpy(), pixels.numpy())
        if self.config.class_token:
            pixels[batch.tokens.class_rows.flatten().long().cpu()] = 0
        return replace(batch, pixels=pixels.to(batch.pixels.device))

    def check_takes_videos(self) -> None:
        """Raises :class:`~tritontower.errors.UsageError` for a tower that takes no videos."""
        if type(self.rule).plan_video is ResizeRule.plan_video:
            self.rule.plan_video(0, 0, 0, {})

    def without_fast_path(self) -> "Preprocessor":
        """Returns a preprocessor that leaves every pixel to transformers."""
        return Preprocessor(self.source, lambda _: self.rule, use_fast_path=False)

    def _check_numbers(self, *, width: int, height: int, **others: int) -> None:
        numbers = {**others, "width": width, "height": height}
        if not all(map(is_integer, numbers.values())):
            found = ", ".join(f"{name} {shorten(number)}" for name, number in numbers.items())
            raise UsageError(f"sizes must be whole numbers, got {found}")
        ImageContext(self.limits).check_size(int(width), int(height))

    def _make_patches(
        self, images: Sequence[CanonicalImage], layouts: Sequence[ImageLayout], bounds: Bounds, each: Each, raw: bool
    ) -> torch.Tensor:
        """Returns ``[patches, channels · patch²]`` of all tiles of all images, in merge-block order."""
        counts = [layout.patches for layout in layouts]
        pixels = allocate_pixels(sum(counts), self.config.patch.still_inner, raw=raw)
        if len(images) == 1:
            (image,), (layout,) = images, layouts
            largest = max(image.width * image.height, layout.patches * self.config.patch.size**2)
            hash_image = (lambda: image.digest) if _outweighs(image, pixels) else None
            with spread_over_threads(largest, hash_image) as spread:
                self._fill(pixels, image, layout, bounds, spread)
        elif images:
            # The fast path is checked once here, not by every thread.  Small images would only wait for Python's lock.
            if self.fast_path is not None and not any(map(is_large, images)):
                each = map
            for _ in each(self._fill_and_hash, pixels.split(counts), images, layouts, repeat(bounds)):
                pass
        return pixels

    def _fill_and_hash(self, out: torch.Tensor, image: CanonicalImage, layout: ImageLayout, bounds: Bounds) -> None:
        self._fill(out, image, layout, bounds, run_serially)
        if _outweighs(image, out):
            _ = image.digest

    def _fill(
        self, out: torch.Tensor, image: CanonicalImage, layout: ImageLayout, bounds: Bounds, spread: Spread
    ) -> None:
        """Writes the patches of one image: fp32, or with the fast path the dtype of ``out``."""
        if self.fast_path is not None:
            self.fast_path.fill(out, image.array, layout, spread)
        elif self.rule.HAS_PROCESSOR:
            self._hf_processor.fill(out, image.array, layout, self.rule.list_arguments(bounds))
        else:
            tiles = self.rule.make_tiles(image.array, layout)
            cut_into_patches(tiles, self.config.patch.size, self.config.merge, out)

    def _resolve_raw(self, raw: bool | None) -> bool:
        """Returns whether pixels stay uint8."""
        known = raw is not False and self.normalization is not None
        if raw and not known:
            raise UsageError(
                f"raw must be False or None for {self.source.folder}, got True; its image processor or the settings "
                "are not known, so its pixels cannot be packed as bytes"
            )
        return known


def _outweighs(image: CanonicalImage, patches: torch.Tensor) -> bool:
    """Returns whether an image is too large, compared with its patches, to be kept as long as they are."""
    return image.array.nbytes > KEPT_BYTES * patches.nbytes
