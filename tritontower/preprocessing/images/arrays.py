"""Converts numpy and torch arrays of any accepted dtype, shape and order of axes to canonical pixels."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tritontower.errors import ImageTypeError, ImageValueError

from .buffers import allocate_array
from .image import ChannelOrder, ImageContext

STRIP_BYTES = 2**16
"""Bytes that Pillow hands out at once."""
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
    pixels = _scale_to_bytes(array, context)
    if channels == 4:
        return composite_on_white(Image.fromarray(np.ascontiguousarray(pixels)))
    if channels == 1:
        pixels = np.broadcast_to(pixels, (height, width, 3))
    return np.array(pixels, dtype=np.uint8, order="C")


def composite_on_white(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels of an RGBA image on a white background."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return copy_rgb_pixels(Image.alpha_composite(white, image).convert("RGB"))


def copy_rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Copies the pixels of an RGB image strip by strip, because Pillow would copy a whole image into new memory."""
    pixels: NDArray[np.uint8] = allocate_array((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_BYTES // (3 * image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom)).tobytes()
        pixels[top:bottom] = np.frombuffer(strip, np.uint8).reshape(bottom - top, image.width, 3)
    return pixels


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


def _scale_to_bytes(array: NDArray[Any], context: ImageContext) -> NDArray[np.uint8]:
    """Scales the dtype's range to 0 … 255; a uint8 array is returned as it is."""
    dtype = array.dtype
    if dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if dtype.kind == "u" and dtype.itemsize == 2:
        # round(value / 257), exactly, since 65535 = 255 · 257.
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if dtype.kind == "f":
        lowest, highest = float(array.min()), float(array.max())
        if not (lowest >= 0.0 and highest <= 1.0):  # false for NaN too
            raise context.error(
                ImageValueError,
                f"float pixels must lie in 0 … 1, got values from {lowest:g} to {highest:g}; divide by their range, "
                "or pass .astype(uint8) if they are 0 … 255",
            )
        scaled: NDArray[np.uint8] = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
        return scaled
    kind = ImageValueError if dtype.kind in "iu" else ImageTypeError
    raise context.error(kind, f"pixels must be uint8, uint16, bool or float, got {dtype.name}; convert them")
