"""Converts numpy and torch arrays of any accepted dtype, shape and order of axes to canonical pixels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tritontower.errors import ImageTypeError, ImageValueError

from .buffers import allocate_array
from .image import ChannelOrder, ImageContext

STRIP_BYTES, CONVERTED_STRIP_BYTES = 2**16, 2**20
"""Bytes that Pillow hands out at once, and that are converted at once: each conversion has an overhead."""
CHANNEL_COUNTS = (1, 3, 4)


def convert_array(
    array: NDArray[Any] | torch.Tensor, context: ImageContext, order: ChannelOrder | None
) -> NDArray[np.uint8]:
    """Returns canonical pixels in memory of their own."""
    if isinstance(array, torch.Tensor):
        try:
            array = array.detach().cpu()
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        except (TypeError, RuntimeError) as error:  # meta, sparse, quantized
            raise context.error(ImageTypeError, "a tensor must be dense and hold plain values") from error
    array = _move_channels_last(array, context, order)
    height, width, channels = array.shape
    context.check_size(width, height)
    _check_values(array, context)
    pixels: NDArray[np.uint8] = allocate_array((height, width, 3), np.uint8)
    for rows in split_rows(height, width, CONVERTED_STRIP_BYTES):
        strip = _scale_to_bytes(array[rows])
        pixels[rows] = copy_rgb_pixels(Image.fromarray(np.ascontiguousarray(strip))) if channels == 4 else strip
    return pixels


def copy_rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Copies the pixels of an image as RGB, transparent ones composited on white.

    It goes strip by strip, because Pillow would hold the whole image again for each step.
    """
    pixels: NDArray[np.uint8] = allocate_array((image.height, image.width, 3), np.uint8)
    is_plain, is_transparent = image.mode == "RGB", image.has_transparency_data
    strip_bytes = STRIP_BYTES if is_plain and not is_transparent else CONVERTED_STRIP_BYTES
    for rows in split_rows(image.height, image.width, strip_bytes):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if is_transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        if strip.mode != "RGB":
            strip = strip.convert("RGB")
        pixels[rows] = np.frombuffer(strip.tobytes(), np.uint8).reshape(-1, image.width, 3)
    return pixels


def split_rows(height: int, width: int, strip_bytes: int) -> Iterator[slice]:
    """Splits the rows of an image so that as many RGB pixels fit into ``strip_bytes``."""
    rows = max(1, strip_bytes // (3 * width))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _move_channels_last(array: NDArray[Any], context: ImageContext, order: ChannelOrder | None) -> NDArray[Any]:
    """Returns a view of ``array`` as ``[height, width, channels]``."""
    if order not in (None, "channels_first", "channels_last"):
        reason = 'input_data_format must be "channels_first", "channels_last" or None'
        raise context.error(ImageValueError, reason)
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        reason = f"an array must be [H, W], [H, W, C] or [C, H, W], got {array.ndim} dimensions"
        raise context.error(ImageValueError, f"{reason}; pass the images of a batch one by one")
    first, last = array.shape[0] in CHANNEL_COUNTS, array.shape[2] in CHANNEL_COUNTS
    if first and last and order is None:
        raise context.error(
            ImageValueError,
            f"shape {list(array.shape)} may be [C, H, W] or [H, W, C]; "
            'pass input_data_format="channels_first" or "channels_last"',
        )
    channels_first = first if order is None else order == "channels_first"
    if not (first if channels_first else last):
        place = f"where input_data_format={order!r} puts it" if order else "first or last"
        raise context.error(
            ImageValueError, f"an array must have an axis of 1, 3 or 4 channels {place}, got shape {list(array.shape)}"
        )
    return np.moveaxis(array, 0, 2) if channels_first else array


def _check_values(array: NDArray[Any], context: ImageContext) -> None:
    """Raises unless the values can be scaled to bytes."""
    dtype = array.dtype
    if dtype.kind == "f":
        lowest, highest = float(array.min()), float(array.max())
        if not (lowest >= 0.0 and highest <= 1.0):  # false for NaN too
            raise context.error(
                ImageValueError,
                f"float pixels must lie in 0 … 1, got values from {lowest:g} to {highest:g}; divide by their range, "
                "or pass .astype(uint8) if they are 0 … 255",
            )
    elif dtype.kind != "b" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        kind = ImageValueError if dtype.kind in "iu" else ImageTypeError
        raise context.error(kind, f"pixels must be uint8, uint16, bool or float, got {dtype.name}; convert them")


def _scale_to_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Scales the dtype's range to 0 … 255; a uint8 array is returned as it is."""
    dtype = array.dtype
    if dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "u":
        # round(value / 257), exactly, since 65535 = 255 · 257.
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    scaled: NDArray[np.uint8] = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
    return scaled
