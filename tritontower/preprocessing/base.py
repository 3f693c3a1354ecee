"""What every resizing rule has in common: settings, limits, the processor's call or the fast_path past it, the cut."""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import repeat
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypedDict, Unpack, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.digests import Digests
from tritontower.batch.layout import ImageLayout
from tritontower.batch.normalization import PixelNormalization
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import ImageError, ImageTooLargeError, Limits, ProcessorError, UsageError, list_names, shorten

from .fast_path import (
    FastPath,
    Spread,
    alone,
    cut_bytes,
    cut_values,
    fast_path_of,
    pixel_matrix,
    probe_image,
    resized,
    spread_over_threads,
)
from .images.image import CanonicalImage, check_size, is_large
from .processor_config import IMAGE_FILES, Settings

__all__ = ["Bounds", "Preprocessor", "cut_into_patches"]

Each = Callable[..., Iterable[Any]]
"""``map``, or what works like it."""

Resize = Callable[[NDArray[np.uint8], tuple[int, int]], NDArray[np.uint8]]
"""Resizes bytes ``[height, width, 3]`` to a width and height, as the processor does."""

KEPT_BYTES = 2
"""Bytes of an image, for each byte of its patches, up to which it is kept for a digest that may never be asked for."""

PIXEL_OPTIONS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Settings that change pixels and no size; every rule hands them to the processor as they are."""


class Bounds(TypedDict, total=False):
    """How large an image may become, where the caller says so; ``None`` leaves it to the checkpoint.

    A rule knows some of the three, and refuses the others.
    """

    min_pixels: int | None
    """Least area of a resized image, pixels."""
    max_pixels: int | None
    """Greatest area of a resized image, pixels."""
    longest_edge: int | None
    """Greatest side of a resized image, pixels."""


def cut_into_patches(image: torch.Tensor, patch: int, merge: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Tiles → rows of patches: tile by tile, block by block, the patches of a block in raster order.

    Args:
        image: ``[tiles, channels, height, width]``.  What is left of a side that is no multiple of ``patch``, right
            and bottom, is left out, as by a convolution without padding.
        patch: side of a patch, pixels.
        merge: side of a block, patches; 1 is plain raster order.
        out: where to write.

    Returns:
        ``[patches, channels · patch²]``, of ``out``'s dtype if that is given, else of the image's.

    Raises:
        ValueError: rows or columns of patches that ``merge`` does not divide, or an ``out`` of another shape.
    """
    tiles, channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    if rows % merge or columns % merge:
        raise ValueError(f"{rows} × {columns} patches cannot be cut into blocks of {merge} × {merge}")
    shape = (tiles * rows * columns, channels * patch * patch)
    if out is None:
        out = image.new_empty(shape)
    elif out.shape != shape:
        raise ValueError(f"out has shape {list(out.shape)}; the image makes {list(shape)}")
    blocks = image[:, :, : rows * patch, : columns * patch].reshape(
        tiles, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    out.view(blocks.shape).copy_(blocks)
    return out


@dataclass(frozen=True)
class Preprocessor(ABC):
    """Turns canonical images into packed batches for one tower; safe to share between threads.

    Attributes:
        config: the tower.
        folder: the checkpoint.
        limits: what an image may cost.
        given: an image processor of transformers to use instead of the checkpoint's.
        options: settings to use instead of those in the checkpoint's file.

    Raises:
        UsageError: an option that the rule does not have.
    """

    BOUNDS: ClassVar[tuple[str, ...]] = ()
    """Which of :class:`Bounds` the rule has."""
    WITHOUT_BOUNDS: ClassVar[str] = "its images all have one size"
    """Why it has no others; ends a message."""
    OPTIONS: ClassVar[tuple[str, ...]] = PIXEL_OPTIONS
    """Names that ``options`` may have."""
    PROCESSORS: ClassVar[Collection[str]] = ()
    """Classes of transformers, by their full names, whose pixels the rule can make itself."""

    config: TowerConfig
    folder: Path
    limits: Limits
    given: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self._known_options
        if unknown := sorted(set(self.options) - set(known)):
            raise UsageError(
                f"the image processor of {self.folder} has no option {list_names(unknown)}; "
                f"known are {', '.join(known) or 'none'}"
            )

    @property
    def factor(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.config.patch.size * self.config.merge

    # -- what an engine asks --------------------------------------------------------------------------------------

    def layout(self, width: int, height: int, **bounds: Unpack[Bounds]) -> ImageLayout:
        """What an image of ``width`` × ``height`` pixels becomes: arithmetic on the settings, nothing is decoded.

        Raises:
            EmptyImageError, AspectRatioError, ImageTooLargeError: no image of this size can be encoded.
            UsageError: a side that is not a whole number, or a bound that the rule does not have.
            ProcessorError, ConfigError: settings or bounds that allow nothing, or that do not fit the tower.
        """
        self.check_bounds(bounds)
        if not (isinstance(width, Integral) and isinstance(height, Integral)):
            raise UsageError(f"width {shorten(width)} and height {shorten(height)} must be whole numbers of pixels")
        check_size(int(width), int(height), limits=self.limits)
        return self._plan(int(width), int(height), bounds)

    def images(
        self,
        images: Sequence[CanonicalImage],
        *,
        each: Each = map,
        raw: bool | None = False,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """Packs still images, in order; see :meth:`layout` for the errors, which name the image.

        The batch keeps an image until its digest is asked for, unless it is much larger than its patches: then the
        digest is taken here.

        Args:
            images: the images.
            each: applies a function to every image, as ``map`` does; the ``map`` of a thread pool to work on several
                at once.
            raw: leave the pixels bytes, for weights that take them: a quarter of what fp32 takes.  ``None``: where
                :attr:`rescaling` is known.
            **bounds: how large an image may become.

        Raises:
            UsageError: ``raw``, and :attr:`rescaling` is not known.
        """
        self.check_bounds(bounds)
        raw = self._stay_bytes(raw)
        layouts = [self._layout_of(image, index, bounds) for index, image in enumerate(images)]
        return PackedBatch.pack(
            self.config,
            self._patches(images, layouts, bounds, each, raw),
            layouts,
            original_sizes=[(image.width, image.height) for image in images],
            content_hashes=Digests(images),
        )

    def video(
        self,
        frames: Sequence[CanonicalImage],
        *,
        each: Each = map,
        raw: bool | None = False,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """Packs one video, where the tower takes videos; the arguments are those of :meth:`images`.

        Raises:
            UsageError: it does not.
        """
        raise self._no_videos()

    def normalized(self, batch: PackedBatch) -> PackedBatch:
        """``batch`` with the pixels that a tower was trained on, fp32, in place of bytes; itself if it has no bytes.

        Raises:
            UsageError: bytes, and :attr:`rescaling` is not known.
        """
        if batch.pixels.dtype != torch.uint8:
            return batch
        self._stay_bytes(raw=True)
        pixels = pixel_matrix(*batch.pixels.shape)
        cast("PixelNormalization", self.rescaling).normalize(batch.pixels.cpu().numpy(), pixels.numpy())
        if self.config.class_token:
            pixels[batch.tokens.class_rows.flatten().long().cpu()] = 0
        return replace(batch, pixels=pixels.to(batch.pixels.device))

    def check_takes_videos(self) -> None:
        """Raises what :meth:`clip` would raise for a tower that takes no videos; looks at no frame."""
        if type(self).video is Preprocessor.video:
            raise self._no_videos()

    def _no_videos(self) -> UsageError:
        return UsageError(
            f"this tower takes no video: the {self.config.family} family encodes still images only; "
            "encode the frames one by one"
        )

    # -- what a rule says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _plan(self, width: int, height: int, bounds: Bounds) -> ImageLayout:
        """The layout of an image whose size is within the limits."""

    @abstractmethod
    def _arguments(self, bounds: Bounds) -> Mapping[str, Any]:
        """The settings in the spelling that transformers takes, for the processor and for every call of it."""

    def _tiles(self, image: CanonicalImage, bounds: Bounds) -> torch.Tensor:
        """``[tiles, channels, height, width]``: the image's tiles, resized and normalized."""
        pixels: torch.Tensor = self._processed(image.array, **self._arguments(bounds))["pixel_values"]
        return pixels

    @property
    def _known_options(self) -> Sequence[str]:
        return self.OPTIONS

    def _expected(self) -> Mapping[str, Any]:
        """Attributes that the processor has to have, and their values."""
        return {"do_resize": True}

    # -- what all rules share -------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Settings:
        """What the processor's file, or the given processor, says; ``options`` in place of it."""
        if self.given is not None:
            settings = Settings.of_processor(self.given)
        else:
            settings = Settings.of_files(self.folder, IMAGE_FILES, "image_processor")
        return settings.changed(self.options)

    @cached_property
    def fast_path(self) -> FastPath | None:
        """How the processor's pixels are made without it; ``None``: it has to make them.

        It has to where its class or its settings are none that the rule knows, and where what the rule makes of a small
        image is not what the processor makes of it, bit for bit.

        Raises:
            ProcessorError: the processor cannot be loaded.
        """
        if not self.PROCESSORS:
            return None
        fast_path = fast_path_of(self.processor, self.PROCESSORS, self.options, self.config.patch.channels)
        return fast_path if fast_path is not None and self._is_usual() and self._proves(fast_path) else None

    @property
    def rescaling(self) -> PixelNormalization | None:
        """What becomes of an image's bytes, where that can be left to a tower's weights; ``None``: it cannot."""
        return None if self.fast_path is None else self.fast_path.rescaling

    @cached_property
    def processor(self) -> Any:
        """The image processor of transformers, on its PIL backend.

        Raises:
            ProcessorError: it cannot be loaded, or it belongs to another tower.
        """
        processor = self.given if self.given is not None else self._load()
        for name, value in self._expected().items():
            if (found := getattr(processor, name, None)) != value:
                raise ProcessorError(
                    f"the image processor of {self.folder} has {name} = {found!r}, but the tower needs {value!r}; "
                    "the processor's file and config.json belong to different models"
                )
        return processor

    def _load(self) -> Any:
        # From its own module: the name at the top of transformers 5.17 asks for torchvision, whatever the backend.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        # Some published files spell a size in a way that transformers refuses; this one it takes.
        arguments = self._arguments(Bounds())
        try:
            return AutoImageProcessor.from_pretrained(
                str(self.folder), backend="pil", local_files_only=True, trust_remote_code=False, **arguments
            )
        except Exception as error:  # whatever the libraries below it raise about a file
            raise ProcessorError(
                f"transformers cannot load the image processor of {self.folder}: {_reason(error)}"
            ) from error

    def _processed(self, array: NDArray[np.uint8], **arguments: Any) -> Any:
        """What the processor makes of ``array``, ``[height, width, 3]`` uint8 RGB."""
        processor = self.processor
        pixel_options = {name: value for name, value in self.options.items() if name in PIXEL_OPTIONS}
        try:
            return processor(
                images=[array],
                input_data_format="channels_last",
                do_convert_rgb=False,  # it is RGB; some files leave this open
                return_tensors="pt",
                **pixel_options,
                **arguments,
            )
        except MemoryError:
            raise
        except Exception as error:  # other libraries check the arguments, and raise errors of their own
            height, width = array.shape[:2]
            raise ProcessorError(
                f"the image processor of {self.folder} refused an image of {width} × {height} pixels: {_reason(error)}"
            ) from error

    def _patches(
        self,
        images: Sequence[CanonicalImage],
        layouts: Sequence[ImageLayout],
        bounds: Bounds,
        each: Each = map,
        raw: bool = False,
    ) -> torch.Tensor:
        """``[patches, channels · patch²]``: all tiles of all images, cut into patches in merge-block order."""
        counts = [layout.patches for layout in layouts]
        pixels = pixel_matrix(sum(counts), self.config.patch.still_inner, raw)
        if not images:
            return pixels
        # Found here, not by every thread for itself.
        fast_path = self.fast_path
        if len(images) > 1:
            # They are several threads' already, where there are any.  Small ones would only wait for Python's lock there.
            if fast_path is not None and not any(map(is_large, images)):
                each = map
            alike = map(repeat, (bounds, fast_path, alone))
            for _ in each(self._fill_and_digest, pixels.split(counts), images, layouts, *alike):
                pass
            return pixels
        (image,), (layout,) = images, layouts
        largest = max(image.width * image.height, layout.patches * self.config.patch.size**2)
        beside = (lambda: image.digest) if _outweighs(image, pixels) else None
        with spread_over_threads(largest, beside) as spread:
            self._fill(pixels, image, layout, bounds, fast_path, spread)
        return pixels

    def _fill_and_digest(self, out: torch.Tensor, image: CanonicalImage, *arguments: Any) -> None:
        """As :meth:`_fill`, and takes the digest of an image that should not be kept for it."""
        self._fill(out, image, *arguments)
        if _outweighs(image, out):
            _ = image.digest

    def _fill(
        self,
        out: torch.Tensor,
        image: CanonicalImage,
        layout: ImageLayout,
        bounds: Bounds,
        fast_path: FastPath | None,
        spread: Spread,
    ) -> None:
        """Writes the patches of one image, fp32 or, where there is a fast_path, bytes."""
        if fast_path is None:
            self._fill_by_processor(out, image, layout, bounds)
        else:
            self._fill_directly(out, image, layout, fast_path, spread)

    def _fill_directly(
        self, out: torch.Tensor, image: CanonicalImage, layout: ImageLayout, fast_path: FastPath, spread: Spread
    ) -> None:
        patch, merge = self.config.patch.size, self.config.merge
        counts = [t * h * w for t, h, w in layout.tiles]
        resize = partial(resized, resample=fast_path.resample, spread=spread)
        tiles = self._resized_tiles(image.array, layout, resize)
        for tile, rows in zip(tiles, out.split(counts), strict=True):
            if rows.dtype == torch.uint8:
                cut_bytes(tile, patch, merge, rows.numpy())
            else:
                cut_values(tile, patch, merge, fast_path.rescaling, rows.numpy(), spread)

    def _resized_tiles(
        self, array: NDArray[np.uint8], layout: ImageLayout, resize: Resize
    ) -> Iterable[NDArray[np.uint8]]:
        """``[height, width, 3]`` of every tile, as the processor has it before it rescales."""
        return (resize(array, layout.processed_size),)

    def _is_usual(self) -> bool:
        """Whether the processor's settings are ones for which :meth:`_resized_tiles` makes the processor's tiles."""
        return True

    def _proves(self, fast_path: FastPath) -> bool:
        """Whether both ways lead to the same pixels."""
        probe = CanonicalImage(probe_image(), "probe")
        try:
            layout = self._plan(probe.width, probe.height, Bounds())
            ours, theirs = (pixel_matrix(layout.patches, self.config.patch.still_inner) for _ in range(2))
            self._fill_by_processor(theirs, probe, layout, Bounds())
        except (ImageError, ProcessorError):
            # Whatever is wrong, the images themselves will show it.
            return False
        self._fill_directly(ours, probe, layout, fast_path, alone)
        return torch.equal(ours, theirs)

    def _stay_bytes(self, raw: bool | None) -> bool:
        """Whether pixels stay bytes."""
        if raw is False:
            return False
        if self.rescaling is not None:
            return True
        if raw:
            raise UsageError(
                f"the images of {self.folder} cannot be packed as bytes: their image processor is none whose "
                "arithmetic is known, or has settings that are not; leave `raw` out"
            )
        return False

    def _fill_by_processor(self, out: torch.Tensor, image: CanonicalImage, layout: ImageLayout, bounds: Bounds) -> None:
        """Writes the patches of one image, as the processor makes them."""
        tiles = self._tiles(image, bounds)
        patch = self.config.patch
        made = [(1, tiles.shape[2] // patch.size, tiles.shape[3] // patch.size)] * len(tiles)
        self._check_made(made, layout)
        self._check_channels(tiles.shape[1])
        cut_into_patches(tiles, patch.size, self.config.merge, out)

    def _check_made(self, made: Sequence[Sequence[int]], layout: ImageLayout) -> None:
        if [tuple(grid) for grid in made] != list(layout.tiles):
            raise ProcessorError(
                f"the image processor of {self.folder} made grids {list(made)} where {list(layout.tiles)} were "
                "planned; its resizing rule is not the tower's"
            )

    def _check_channels(self, channels: int) -> None:
        if channels != self.config.patch.channels:
            raise ProcessorError(
                f"the image processor of {self.folder} makes images of {channels} channels, "
                f"but the tower takes {self.config.patch.channels}"
            )

    def _check_planned(self, original: tuple[int, int], planned: tuple[int, int], tiles: int, advice: str) -> None:
        """Raises unless ``tiles`` images of the ``planned`` width and height are within the limits."""
        if planned[0] * planned[1] * tiles > self.limits.max_planned_pixels:
            times = "" if tiles == 1 else f"{tiles} times "
            raise ImageTooLargeError(
                f"{original[0]} × {original[1]} pixels would be resized to {times}{planned[0]} × {planned[1]}, the "
                f"limit is {self.limits.max_planned_pixels} pixels; {advice}, or pass Limits(max_planned_pixels=...)"
            )

    def _check_grid(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        """Raises unless a tower whose tiles all have one grid has this one."""
        patches, merge = self.config.num_patches, self.config.merge
        if (patches is not None and (grid[0] != grid[1] or grid[0] * grid[1] != patches)) or any(
            side < 1 or side % merge for side in grid
        ):
            wanted = f"{patches} patches in a square" if patches is not None else f"multiples of {merge}"
            raise ProcessorError(
                f"the image processor of {self.folder} makes images of {size[0]} × {size[1]} pixels, {grid[0]} × "
                f"{grid[1]} patches, but the tower needs {wanted}; the processor's file and config.json belong to "
                "different models"
            )

    def _layout_of(self, image: CanonicalImage, index: int, bounds: Bounds) -> ImageLayout:
        try:
            return self.layout(image.width, image.height, **bounds)
        except ImageError as error:
            raise type(error)(error.reason, index=index, source=image.source) from error

    def check_bounds(self, bounds: Bounds) -> None:
        """Raises :class:`~tritontower.errors.UsageError` for a bound that the resizing rule does not have."""
        foreign = [name for name, value in bounds.items() if value is not None and name not in self.BOUNDS]
        if foreign:
            has = f"it has {' and '.join(self.BOUNDS)}, because" if self.BOUNDS else "it has none, because"
            raise UsageError(
                f"the resizing rule of the {self.config.family} family has no bound {list_names(foreign)}; "
                f"{has} {self.WITHOUT_BOUNDS}"
            )

    def _whole(self, bounds: Bounds, name: str, default: int) -> int:
        """The bound ``name`` as a number of pixels."""
        value = cast("Mapping[str, object]", bounds).get(name)
        if value is None:
            return default
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ProcessorError(f"{name} = {shorten(value)} must be a whole number of pixels")
        return int(value)


def _outweighs(image: CanonicalImage, patches: torch.Tensor) -> bool:
    """Whether an image is so much larger than its patches that it should not be kept as long as they are."""
    return image.array.nbytes > KEPT_BYTES * patches.nbytes


def _reason(error: Exception) -> str:
    # On one line: transformers says on the first which setting it refuses, and on the next why.
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
