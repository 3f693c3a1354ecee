"""Decodes one input of any accepted kind into canonical RGB.

These rules belong to this package and do not change with the libraries below it:

* EXIF orientation is applied to encoded images (``bytes``, ``Path``), not to ``PIL`` images, because their owner may
  have applied it already.  Malformed EXIF is ignored.
* Only the first frame of an animation is decoded.
* Transparency (alpha, palette alpha, a PNG's transparent color) is composited on white.
* 16-bit and float values are scaled by their range (65535 and 1.0).  Values outside it are rejected, never clipped.
* The order of an array's axes is never guessed.  Where both orders are possible, ``input_data_format`` is required.
* Sizes are checked on the header before anything is decoded, whatever ``PIL.Image.MAX_IMAGE_PIXELS`` is.
* Nothing is fetched: a ``str`` could be anybody's path or URL, and is rejected.
"""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from tritontower.errors import (
    ImageDecodeError,
    ImageError,
    ImageFormatError,
    ImageTooLargeError,
    ImageTypeError,
    ImageValueError,
    Limits,
    is_out_of_memory,
    shorten,
)

from .arrays import convert_array, copy_rgb_pixels
from .image import CanonicalImage, ChannelOrder, ImageContext, ImageInput, count_array_pixels

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# First bytes of common formats that are deliberately not opened; they only improve the message.
_REFUSED_SIGNATURES = (
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "EPS"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+"), "TIFF"),
    (re.compile(rb"P[1-7Ffy]\s"), "PPM"),
    (re.compile(rb"\x00\x00\x01\x00"), "ICO"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG2000"),
    (re.compile(rb"....ftyp(?:hei|hev|mif1)", re.DOTALL), "HEIF"),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<svg"), "SVG"),
)
# Pillow reads the rest of this family, and long headers, in Python, partly in quadratic time.
_BINARY_PPM = re.compile(rb"P[56](?:(?:\s|#[^\r\n]*[\r\n])+[0-9]+){2}(?:\s|#[^\r\n]*[\r\n])+(?:255|65535)\s")
_HEADER_BYTES = 1024
# Bytes per pixel of Pillow's modes; all others have 4.
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 6}
# Further bytes per pixel that decoders of formats take, measured.
_DECODER_BYTES = {"WEBP": 9, "AVIF": 3}
_PROGRESSIVE_BYTES = 6
_MOST_SCANNED_PIXELS = 2**31
_START_OF_SCAN = b"\xff\xda"
_PLAIN_SENTENCE = re.compile(r"[A-Za-z0-9 ,.;:()_/-]{1,120}")
# Loading a lazily opened PIL image moves its file position, so two threads that load it at once silently get wrong
# pixels.  The same image always takes the same lock; images that share a lock only wait for each other.
_LOCKS = tuple(threading.Lock() for _ in range(64))


def decode_image(
    image: ImageInput,
    *,
    index: int | None = None,
    limits: Limits | None = None,
    input_data_format: ChannelOrder | None = None,
) -> CanonicalImage:
    """Decodes ``image`` into canonical form, by the rules in the module's docstring.

    An array is uint8, bool, uint16 (0 … 65535) or float (0 … 1), ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``, with C = 1,
    3 (RGB) or 4 (RGBA).  The image is not changed; a lazily opened ``PIL`` image is loaded.  ``index`` is its position in
    the caller's list, for messages.
    """
    context = ImageContext(limits or Limits(), index, _describe(image))
    # Whatever one image raises is that image's error: the others of its batch go on.
    with _wrap_errors(context):
        if isinstance(image, Image.Image):
            pixels = _decode_pil(image, context)
        elif isinstance(image, (np.ndarray, torch.Tensor)):
            pixels = convert_array(image, context, input_data_format)
        elif isinstance(image, (bytes, bytearray, memoryview)):
            pixels = _decode_file(io.BytesIO(image), context)
        elif isinstance(image, Path):
            if not image.is_file():
                raise context.error(ImageDecodeError, "there is no such file, or it is not an ordinary file")
            with image.open("rb") as file:
                pixels = _decode_file(file, context)
        else:
            hint = "; a text may be anybody's path or URL: pass pathlib.Path(...) for a local file, or the file's bytes"
            raise ImageTypeError(
                "an image must be a PIL image, a numpy or torch array, bytes or a pathlib.Path, "
                f"got {type(image).__name__}" + (hint if isinstance(image, str) else ""),
                index=index,
            )
    return CanonicalImage(pixels, context.source or "")


def _describe(image: ImageInput) -> str:
    if isinstance(image, Image.Image):
        return f"PIL image {image.mode}"
    if isinstance(image, np.ndarray):
        return f"numpy array {image.dtype} {list(image.shape)}"
    if isinstance(image, torch.Tensor):
        shape = "nested" if image.is_nested else list(image.shape)
        return f"torch tensor {str(image.dtype).removeprefix('torch.')} {shape}"
    return shorten(str(image), 200).strip("'\"") if isinstance(image, Path) else "encoded bytes"


def count_decoded_bytes(image: ImageInput, limits: Limits | None = None) -> int:
    """Estimates the memory that decoding ``image`` takes from its header or shape; 0 for unreadable inputs.

    That is its canonical form, and for files the decoder's own memory.
    """
    context = ImageContext(limits or Limits())
    try:
        if isinstance(image, Image.Image):
            return (_count_pixel_bytes(image) if isinstance(image, ImageFile) else 3) * image.width * image.height
        if isinstance(image, (np.ndarray, torch.Tensor)):
            return 3 * count_array_pixels(image)
        if isinstance(image, Path) and not image.is_file():
            return 0
        with (
            image.open("rb") if isinstance(image, Path) else io.BytesIO(image) as file,
            _open_image(file, context) as opened,
        ):
            return _count_pixel_bytes(opened) * opened.width * opened.height
    except Exception:  # decoding will raise it as this image's error
        return 0


def _count_pixel_bytes(image: Image.Image) -> int:
    """Bytes per pixel of decoding an opened file: Pillow's image, the decoder's memory, and the canonical form."""
    progressive = _PROGRESSIVE_BYTES if image.info.get("progressive") else 0
    return _MODE_BYTES.get(image.mode, 4) + _DECODER_BYTES.get(image.format or "", 0) + progressive + 3


def _decode_file(file: BinaryIO, context: ImageContext) -> NDArray[np.uint8]:
    with _open_image(file, context) as image:
        context.check_size(*image.size, _count_pixel_bytes(image))
        if image.format in ("JPEG", "MPO"):
            _check_scans(file, image, context)
        image.load()
        return _convert_pil(_apply_orientation(image), context)


def _check_scans(file: BinaryIO, image: Image.Image, context: ImageContext) -> None:
    """Raises if a JPEG goes over its pixels too often; a scan may have a few bytes and yet takes as long as any other."""
    place = file.tell()
    file.seek(0)
    # Within a scan this pair of bytes does not occur.
    scans = file.read().count(_START_OF_SCAN)
    file.seek(place)
    most = max(1, _MOST_SCANNED_PIXELS // (image.width * image.height))
    if scans > most:
        size = f"{image.width} × {image.height}"
        reason = f"a JPEG of {size} pixels must have at most {most} scans, got {scans}; save it again, not progressive"
        raise context.error(ImageTooLargeError, reason)


def _open_image(file: BinaryIO, context: ImageContext) -> Image.Image:
    """Reads the header of an image in an allowed format."""
    allowed = context.limits.image_formats
    start = file.read(_HEADER_BYTES)
    file.seek(0)
    if not start:
        raise context.error(ImageDecodeError, "0 bytes: the file is empty")
    # Image.open raises KeyError for a format that this Pillow was built without.
    if not all(name in Image.OPEN for name in allowed):
        Image.init()
    formats = [name for name in allowed if name in Image.OPEN and (name != "PPM" or _BINARY_PPM.match(start))]
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        limit = f"PIL.Image.MAX_IMAGE_PIXELS of this process ({Image.MAX_IMAGE_PIXELS} pixels)"
        raise context.error(ImageTooLargeError, f"more than twice the {limit}; scale it down") from error
    except UnidentifiedImageError as error:
        name = next((name for signature, name in _REFUSED_SIGNATURES if signature.match(start)), None)
        if name == "PPM" and name in allowed:
            reason = "a PPM or PGM file must be binary (P5 or P6) with 8 or 16 bits and a short header; convert it"
            raise context.error(ImageFormatError, reason) from error
        if name is None or name in allowed:
            reason = f"not an image in an allowed format ({', '.join(allowed)}), or damaged at its start"
            raise context.error(ImageDecodeError, reason) from error
        raise context.error(
            ImageFormatError,
            f"the format must be one of {', '.join(allowed)}, got {name}; convert it, "
            "or pass Limits(image_formats=...) if you trust its origin",
        ) from error


@contextmanager
def _wrap_errors(context: ImageContext) -> Iterator[None]:
    """Raises :class:`ImageDecodeError` in place of any error but a lack of memory; those of parsers are of any class."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Some of Pillow's messages contain addresses or raw bytes; only plain text is quoted.
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        is_plain = _PLAIN_SENTENCE.fullmatch(text) and "0x" not in text
        reason = f"cannot be decoded: {text}" if is_plain else f"cannot be decoded ({type(error).__name__})"
        raise context.error(ImageDecodeError, reason) from error


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
        transposition = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # malformed EXIF raises anything, SyntaxError included, and does not affect the pixels
        return image
    if transposition is None:
        return image
    turned = image.transpose(transposition)
    image.close()  # frees the pixels before they are copied once more
    return turned


def _decode_pil(image: Image.Image, context: ImageContext) -> NDArray[np.uint8]:
    context.check_size(*image.size)
    with _LOCKS[(id(image) >> 4) % len(_LOCKS)]:
        frame = image.tell()
        try:
            if frame:
                image.seek(0)
                context.check_size(*image.size)
            image.load()
            return _convert_pil(image, context)
        finally:
            if frame:
                image.seek(frame)


def _convert_pil(image: Image.Image, context: ImageContext) -> NDArray[np.uint8]:
    """Returns the pixels of a loaded image in memory of their own."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _convert_deep_gray(image, context)
    try:
        return copy_rgb_pixels(image)
    except Exception as error:
        reason = f"mode {image.mode} cannot be converted to RGB; convert it first"
        raise context.error(ImageValueError, reason) from error


def _convert_deep_gray(image: Image.Image, context: ImageContext) -> NDArray[np.uint8]:
    """Converts a gray image of more than 8 bits: 0 … 65535 in the integer modes, 0 … 1 in mode F."""
    values = np.asarray(image)
    if image.mode == "F":
        return convert_array(values, context, None)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise context.error(
            ImageValueError,
            f"mode {image.mode} must hold values from 0 to 65535, got {lowest} to {highest}; scale them first",
        )
    if image.mode == "I" and 0 < highest <= 255 and image.format not in ("PNG", "PPM"):
        # Pillow reads 16-bit files into this mode, and `convert("I")` makes it from 8-bit ones.
        raise context.error(
            ImageValueError,
            f"mode I has no value above {highest}, which may be 8-bit or very dark 16-bit pixels; "
            'convert it to mode "L" or "I;16" first',
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)
    return convert_array(values.astype(np.uint16), context, None)
