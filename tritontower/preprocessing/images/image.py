"""Accepted image inputs, their limits, and the canonical image: uint8 RGB, ``[height, width, 3]``, contiguous."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from tritontower.errors import AspectRatioError, EmptyImageError, ImageError, ImageTooLargeError, Limits

ImageInput = Image.Image | NDArray[Any] | torch.Tensor | bytes | bytearray | memoryview | Path
ChannelOrder = Literal["channels_first", "channels_last"]

MOST_BYTES_PER_PIXEL = 8
"""Memory for each pixel while an image of ``Limits.max_image_pixels`` is decoded; formats that need more have fewer pixels."""

WORTH_A_THREAD = 2**17
"""Pixels of an image above which a thread of its own does more than wait for Python's lock."""


@dataclass(frozen=True, eq=False)
class CanonicalImage:
    """An image in canonical form: uint8 ``[height, width, 3]``, C-contiguous and read-only.

    It shares no memory with the input, because its digest may be computed at any time.  ``source`` describes the input
    in messages: a path, ``"PIL image RGBA"``, ``"numpy array uint8 [3, 8, 8]"``.
    """

    array: NDArray[np.uint8]
    source: str

    def __post_init__(self) -> None:
        self.array.flags.writeable = False

    @property
    def width(self) -> int:
        """Pixels per row."""
        return int(self.array.shape[1])

    @property
    def height(self) -> int:
        """Number of rows."""
        return int(self.array.shape[0])

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 over height, width and pixels, in hexadecimal; about a millisecond per megabyte."""
        state = hashlib.blake2b(digest_size=32, person=b"tritontower-rgb8")
        state.update(self.height.to_bytes(8, "little") + self.width.to_bytes(8, "little"))
        state.update(self.array.data)
        return state.hexdigest()


@dataclass(frozen=True)
class ImageContext:
    """Index and description of the image being read, for messages, and its limits."""

    limits: Limits
    index: int | None = None
    source: str | None = None

    def error(self, kind: type[ImageError], reason: str) -> ImageError:
        """Makes an error that names the image."""
        return kind(reason, index=self.index, source=self.source)

    def check_size(self, width: int, height: int, bytes_per_pixel: int = 0) -> None:
        """Raises unless the size of an image, in pixels, is within the limits.

        ``bytes_per_pixel`` is what decoding takes; more than :data:`MOST_BYTES_PER_PIXEL` lower the limit of pixels.
        """
        limits = self.limits
        if width < 1 or height < 1:
            raise self.error(EmptyImageError, f"both sides must be at least 1 pixel, got {width} × {height} pixels")
        allowed = limits.max_image_pixels * MOST_BYTES_PER_PIXEL // max(bytes_per_pixel, MOST_BYTES_PER_PIXEL)
        if width * height > allowed:
            reason = f" if decoding takes {bytes_per_pixel} bytes for each" if allowed < limits.max_image_pixels else ""
            raise self.error(
                ImageTooLargeError,
                f"an image must have at most {allowed} pixels{reason}, got {width} × {height} = {width * height} pixels; "
                "scale it down, or pass Limits(max_image_pixels=...)",
            )
        ratio = max(width, height) / min(width, height)
        if ratio > limits.max_aspect_ratio:
            raise self.error(
                AspectRatioError,
                f"the aspect ratio must be at most {limits.max_aspect_ratio:g}, got {ratio:.4g} for {width} × {height} "
                "pixels; crop it, or pass Limits(max_aspect_ratio=...)",
            )


def is_large(image: ImageInput | CanonicalImage) -> bool:
    """Returns whether an image deserves a thread: it has to be decoded, or it has many pixels."""
    if isinstance(image, (CanonicalImage, Image.Image)):
        return isinstance(image, ImageFile) or image.width * image.height >= WORTH_A_THREAD
    return not isinstance(image, (np.ndarray, torch.Tensor)) or count_array_pixels(image) >= WORTH_A_THREAD


def count_array_pixels(array: NDArray[Any] | torch.Tensor) -> int:
    """Counts pixels: the two longest axes are height and width, whatever their order; a nested tensor has no shape."""
    if isinstance(array, torch.Tensor) and array.is_nested:
        return 0
    height, width = sorted(array.shape)[-2:] if len(array.shape) > 1 else (0, 0)
    return int(height) * int(width)
