"""Any image → canonical RGB: uint8, ``[height, width, 3]``, contiguous.

The rules, which are this package's own and do not change with the libraries below it:

* EXIF orientation is applied to encoded images (``bytes``, ``Path``), not to ``PIL`` images, whose owner may have
  done so.  Malformed EXIF is ignored.
* The first frame only; the rest of an animation is never decoded.
* Any transparency (alpha, palette alpha, a PNG's transparent color) is composited on white.
* 16-bit and float values are scaled by their range (65535 and 1.0), never clipped.  What would need clipping is
  refused.
* The order of an array's axes is never guessed: where both orders are possible, ``input_data_format`` has to say.
* Sizes are checked on the header, before anything is decoded, and whatever ``PIL.Image.MAX_IMAGE_PIXELS`` says.
* Nothing is fetched: a ``str``, which could be anybody's path or URL, is refused.
"""

import hashlib
import io
import re
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from tritontower.batch.normalization import fresh
from tritontower.errors import (
    AspectRatioError,
    EmptyImageError,
    ImageDecodeError,
    ImageError,
    ImageFormatError,
    ImageTooLargeError,
    ImageTypeError,
    ImageValueError,
    Limits,
)

__all__ = [
    "CanonicalImage",
    "ChannelOrder",
    "Image",
    "canonical_rgb",
    "check_size",
    "decoded_bytes",
    "is_large",
]

ImageInput = Image.Image | NDArray[Any] | torch.Tensor | bytes | bytearray | memoryview | Path
ChannelOrder = Literal["channels_first", "channels_last"]

WORTH_A_THREAD = 2**17
"""Pixels of an image from which on a thread of its own does more than wait for Python's lock."""
STRIP_BYTES = 2**16
"""What Pillow hands out at once."""

_CHANNEL_COUNTS = (1, 3, 4)
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
# How formats that are commonly met and deliberately not opened begin; only for a better message.
_REFUSED_SIGNATURES = (
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "EPS"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"SIMPLE  ="), "FITS"),
    (re.compile(rb"GRIB"), "GRIB"),
    (re.compile(rb"\x89HDF"), "HDF5"),
    (re.compile(rb"\xd7\xcd\xc6\x9a"), "WMF"),
    (re.compile(rb"\x00\x00\x01\x00"), "ICO"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG2000"),
    (re.compile(rb"....ftyp(?:hei|hev|mif1)", re.DOTALL), "HEIF"),
    (re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<svg"), "SVG"),
)
_PLAIN_SENTENCE = re.compile(r"[A-Za-z0-9 ,.;:()_/-]{1,120}")
# Reading the pixels of a lazily opened PIL image moves its file position, so two threads that do it at once silently
# get wrong pixels.  An image always falls to the same lock; images that share one merely wait for each other.
_LOCKS = tuple(threading.Lock() for _ in range(64))


@dataclass(frozen=True, eq=False)
class CanonicalImage:
    """An image in canonical form.

    Attributes:
        array: uint8 ``[height, width, 3]``, C-contiguous, shared with nobody, and read-only: its digest may be taken at
            any time.
        source: what it was made from, for messages: a path, ``"PIL image RGBA"``, ``"numpy array uint8 [3, 8, 8]"`` …
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
        """BLAKE2b-256 over height, width and pixels, in hexadecimal; equal exactly for equal canonical images.

        The sizes are part of it: 30 × 100 and 100 × 30 pixels of the same bytes are different images.  It is taken when
        it is first asked for, which costs about a millisecond per megabyte.
        """
        state = hashlib.blake2b(digest_size=32, person=b"tritontower-rgb8")
        state.update(self.height.to_bytes(8, "little") + self.width.to_bytes(8, "little"))
        state.update(self.array.data)
        return state.hexdigest()


def canonical_rgb(
    image: ImageInput,
    *,
    index: int | None = None,
    limits: Limits | None = None,
    input_data_format: ChannelOrder | None = None,
) -> CanonicalImage:
    """``image`` in canonical form; the rules are in the module's docstring.

    Args:
        image: a ``PIL`` image; a numpy or torch array of uint8, bool, uint16 (0 … 65535) or float (0 … 1), shaped
            ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with C = 1, 3 (RGB) or 4 (RGBA); an encoded file as ``bytes`` or
            ``Path``.  It is left as it was; a lazily opened ``PIL`` image is loaded.
        index: position in the caller's list, for messages.
        limits: what an image may cost; the defaults of :class:`~tritontower.errors.Limits` if ``None``.
        input_data_format: the order of a three-dimensional array's axes.  Needed where both are possible.

    Raises:
        ImageTypeError: not an image; a ``str`` above all.
        ImageDecodeError: bytes or a file that cannot be read as an image.
        ImageFormatError: an encoded format that is not in ``limits.image_formats``.
        ImageTooLargeError, AspectRatioError, EmptyImageError: the size, before anything is decoded.
        ImageValueError: values, a shape or an order of axes that allow more than one reading, or none.
    """
    limits = limits or Limits()
    if isinstance(image, Image.Image):
        source = f"PIL image {image.mode}"
        return CanonicalImage(_from_pil(image, _Place(index, source, limits)), source)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        kind = "numpy array" if isinstance(image, np.ndarray) else "torch tensor"
        dtype = str(image.dtype).removeprefix("torch.")
        source = f"{kind} {dtype} {list(image.shape)}"
        place = _Place(index, source, limits)
        array = image if isinstance(image, np.ndarray) else _from_torch(image, place)
        return CanonicalImage(_from_array(array, place, input_data_format), source)
    if isinstance(image, (bytes, bytearray, memoryview)):
        source = "encoded bytes"
        return CanonicalImage(_from_file(io.BytesIO(image), _Place(index, source, limits)), source)
    if isinstance(image, Path):
        source = str(image)
        place = _Place(index, source, limits)
        if not image.is_file():
            raise place.error(ImageDecodeError, "there is no such file, or it is not an ordinary file")
        try:
            file = image.open("rb")
        except OSError as error:
            raise place.error(ImageDecodeError, f"cannot be opened: {error.strerror}") from error
        with file:
            return CanonicalImage(_from_file(file, place), source)
    hint = "; a text may be anybody's path or URL: pass pathlib.Path(...) for a local file, or the bytes of the file"
    raise ImageTypeError(
        f"{type(image).__name__} is not an image; pass a PIL image, a numpy or torch array, bytes or a pathlib.Path"
        + (hint if isinstance(image, str) else ""),
        index=index,
    )


def check_size(
    width: int, height: int, *, limits: Limits | None = None, index: int | None = None, source: str | None = None
) -> None:
    """Raises unless an image of ``width`` × ``height`` pixels is within ``limits``.

    Raises:
        EmptyImageError, AspectRatioError, ImageTooLargeError: it is not.
    """
    limits = limits or Limits()
    if width < 1 or height < 1:
        raise EmptyImageError(f"{width} × {height} pixels; both sides need at least 1", index=index, source=source)
    if width * height > limits.max_image_pixels:
        raise ImageTooLargeError(
            f"{width} × {height} = {width * height} pixels, the limit is {limits.max_image_pixels}; "
            "scale it down, or pass Limits(max_image_pixels=...)",
            index=index,
            source=source,
        )
    ratio = max(width, height) / min(width, height)
    if ratio > limits.max_aspect_ratio:
        raise AspectRatioError(
            f"{width} × {height} pixels is an aspect ratio of {ratio:.4g}, the limit is {limits.max_aspect_ratio:g}; "
            "crop it, or pass Limits(max_aspect_ratio=...)",
            index=index,
            source=source,
        )


def is_large(image: ImageInput | CanonicalImage) -> bool:
    """Whether there is enough to do for ``image`` that it is worth a thread: it has to be decoded, or is large."""
    if isinstance(image, CanonicalImage):
        return image.width * image.height >= WORTH_A_THREAD
    if isinstance(image, Image.Image):
        return isinstance(image, ImageFile) or image.width * image.height >= WORTH_A_THREAD
    return not isinstance(image, (np.ndarray, torch.Tensor)) or decoded_bytes(image) >= 3 * WORTH_A_THREAD


def decoded_bytes(image: ImageInput, limits: Limits | None = None) -> int:
    """Bytes that ``image`` takes in canonical form, as far as its header or shape tells; nothing is decoded.

    An estimate for planning: 0 for what cannot be read, and what :func:`canonical_rgb` would refuse is not refused here.
    """
    if isinstance(image, Image.Image):
        return 3 * image.width * image.height
    if isinstance(image, (np.ndarray, torch.Tensor)):
        # The two longest axes are height and width, whatever the order.
        height, width = sorted(image.shape)[-2:] if len(image.shape) > 1 else (0, 0)
        return 3 * int(height) * int(width)
    if isinstance(image, Path) and not image.is_file():
        return 0
    place = _Place(None, "", limits or Limits())
    try:
        with (
            image.open("rb") if isinstance(image, Path) else io.BytesIO(image) as file,
            _open(file, place) as opened,
        ):
            return 3 * opened.width * opened.height
    except (ImageError, OSError, TypeError):
        return 0


@dataclass(frozen=True)
class _Place:
    """Which image is being read, for messages, and what it may cost."""

    index: int | None
    source: str
    limits: Limits

    def error(self, kind: type[ImageError], reason: str) -> ImageError:
        return kind(reason, index=self.index, source=self.source)

    def check_size(self, width: int, height: int) -> None:
        check_size(width, height, limits=self.limits, index=self.index, source=self.source)


# -- encoded files ----------------------------------------------------------------------------------------------------


def _from_file(file: BinaryIO, place: _Place) -> NDArray[np.uint8]:
    with _open(file, place) as image:
        place.check_size(*image.size)
        _load(image, place)
        return _pixels(_upright(image), place)


def _open(file: BinaryIO, place: _Place) -> Image.Image:
    """The image in ``file`` with its header read, if it is in an allowed format."""
    allowed = place.limits.image_formats
    start = file.read(64)
    file.seek(0)
    if not start:
        raise place.error(ImageDecodeError, "0 bytes: the file is empty")
    try:
        # A format that this Pillow was built without makes Image.open raise KeyError.
        if not all(name in Image.OPEN for name in allowed):
            Image.init()
        return Image.open(file, formats=[name for name in allowed if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise place.error(
            ImageTooLargeError,
            f"more than twice the PIL.Image.MAX_IMAGE_PIXELS of this process ({Image.MAX_IMAGE_PIXELS} pixels); "
            "scale it down",
        ) from error
    except UnidentifiedImageError as error:
        name = next((name for signature, name in _REFUSED_SIGNATURES if signature.match(start)), None)
        if name is not None and name not in allowed:
            raise place.error(
                ImageFormatError,
                f"the format {name} is not opened, only {', '.join(allowed)}; convert it, "
                "or pass Limits(image_formats=...) if you trust where it comes from",
            ) from error
        reason = f"not an image in a format that is opened ({', '.join(allowed)}), or damaged at its start"
        raise place.error(ImageDecodeError, reason) from error
    except (
        Exception
    ) as error:  # Pillow's parsers raise SyntaxError, ValueError, RuntimeError, TypeError, struct.error …
        raise place.error(ImageDecodeError, _decode_failure(error)) from error


def _load(image: Image.Image, place: _Place) -> None:
    try:
        image.load()
    except Exception as error:  # as above: anything, down to MemoryError for a header that lies
        raise place.error(ImageDecodeError, _decode_failure(error)) from error


def _decode_failure(error: Exception) -> str:
    """Why decoding failed, in Pillow's words only where they are words: some of its texts hold addresses or bytes."""
    text = str(error)
    harmless = _PLAIN_SENTENCE.fullmatch(text) and "0x" not in text
    return f"cannot be decoded: {text}" if harmless else f"cannot be decoded ({type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF orientation asks; as it is when there is none, or none that can be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
        transposition = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # malformed EXIF raises anything, SyntaxError included, and says nothing about the pixels
        return image
    return image if transposition is None else image.transpose(transposition)


# -- PIL images -------------------------------------------------------------------------------------------------------


def _from_pil(image: Image.Image, place: _Place) -> NDArray[np.uint8]:
    place.check_size(*image.size)
    with _LOCKS[(id(image) >> 4) % len(_LOCKS)]:
        frame = image.tell()
        if frame == 0:
            _load(image, place)
            return _pixels(image, place)
        try:
            _seek(image, 0, place)
            place.check_size(*image.size)
            _load(image, place)
            return _pixels(image, place)
        finally:
            _seek(image, frame, place)


def _seek(image: Image.Image, frame: int, place: _Place) -> None:
    try:
        image.seek(frame)
    except Exception as error:  # the same parsers as in _load
        raise place.error(ImageDecodeError, f"frame {frame}: {_decode_failure(error)}") from error


def _pixels(image: Image.Image, place: _Place) -> NDArray[np.uint8]:
    """The loaded ``image`` as canonical pixels in memory of their own."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_gray_pixels(image, place)
    try:
        if image.has_transparency_data:
            return _on_white(image.convert("RGBA"))
        return _rgb_pixels(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:
        reason = f"mode {image.mode} cannot be converted to RGB; convert it first"
        raise place.error(ImageValueError, reason) from error


def _rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an RGB image.  Pillow hands out a copy, and a strip at a time it needs no new memory for it."""
    pixels: NDArray[np.uint8] = fresh((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_BYTES // (3 * image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom)).tobytes()
        pixels[top:bottom] = np.frombuffer(strip, np.uint8).reshape(bottom - top, image.width, 3)
    return pixels


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return _rgb_pixels(Image.alpha_composite(white, image).convert("RGB"))


def _deep_gray_pixels(image: Image.Image, place: _Place) -> NDArray[np.uint8]:
    """Pixels of a greyscale image of more than 8 bits: 0 … 65535 in the integer modes, 0 … 1 in mode F."""
    values = np.asarray(image)
    if image.mode == "F":
        return _from_array(values, place, None)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise place.error(
            ImageValueError,
            f"mode {image.mode} holds values from {lowest} to {highest}, allowed are 0 to 65535; scale them first",
        )
    if image.mode == "I" and 0 < highest <= 255 and image.format not in ("PNG", "PPM"):
        # Pillow reads 16-bit files into this mode, and `convert("I")` makes it out of 8-bit ones: nothing tells.
        raise place.error(
            ImageValueError,
            f"mode I holds no value above {highest}, which may be 8-bit or very dark 16-bit pixels; "
            'convert it to mode "L" or "I;16" first',
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)
    return _from_array(values.astype(np.uint16), place, None)


# -- arrays -----------------------------------------------------------------------------------------------------------


def _from_torch(tensor: torch.Tensor, place: _Place) -> NDArray[Any]:
    try:
        tensor = tensor.detach().cpu()
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    except (TypeError, RuntimeError) as error:  # meta, sparse, quantized
        raise place.error(ImageTypeError, "this kind of tensor has no plain values; pass a dense one") from error


def _from_array(array: NDArray[Any], place: _Place, input_data_format: ChannelOrder | None) -> NDArray[np.uint8]:
    array = _channels_last(array, place, input_data_format)
    height, width, channels = array.shape
    place.check_size(width, height)
    pixels = _to_uint8(array, place)
    if channels == 4:
        return _on_white(Image.fromarray(np.ascontiguousarray(pixels)))
    if channels == 1:
        pixels = np.broadcast_to(pixels, (height, width, 3))
    return np.array(pixels, dtype=np.uint8, order="C")


def _channels_last(array: NDArray[Any], place: _Place, order: ChannelOrder | None) -> NDArray[Any]:
    """A view of ``array`` as ``[height, width, channels]``."""
    if order not in (None, "channels_first", "channels_last"):
        reason = 'input_data_format has to be "channels_first", "channels_last" or None'
        raise place.error(ImageValueError, reason)
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        hint = "; pass the images of a batch one by one" if array.ndim == 4 else ""
        reason = f"{array.ndim} dimensions; an image is [H, W], [H, W, C] or [C, H, W]{hint}"
        raise place.error(ImageValueError, reason)
    first, last = array.shape[0] in _CHANNEL_COUNTS, array.shape[2] in _CHANNEL_COUNTS
    if first and last and order is None:
        raise place.error(
            ImageValueError,
            f"shape {list(array.shape)} may be [C, H, W] or [H, W, C]; "
            'say which with input_data_format="channels_first" or "channels_last"',
        )
    channels_first = first if order is None else order == "channels_first"
    if not (first if channels_first else last):
        raise place.error(
            ImageValueError,
            f"shape {list(array.shape)} has no axis of 1, 3 or 4 channels"
            + (f" where input_data_format={order!r} puts it" if order else " at its start or end"),
        )
    return np.moveaxis(array, 0, 2) if channels_first else array


def _to_uint8(array: NDArray[Any], place: _Place) -> NDArray[np.uint8]:
    """``array`` with its range scaled to 0 … 255; a uint8 array is returned as it is."""
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
            found = "NaN" if np.isnan(lowest) or np.isnan(highest) else f"values from {lowest:g} to {highest:g}"
            raise place.error(
                ImageValueError,
                f"{found}, but float pixels have to lie in 0 … 1; divide by their range, "
                "or pass .astype(uint8) if they are 0 … 255",
            )
        scaled: NDArray[np.uint8] = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
        return scaled
    if dtype.kind in "iu":
        raise place.error(
            ImageValueError, f"{dtype.name} has no range of its own as pixels; convert to uint8, uint16 or float"
        )
    raise place.error(ImageTypeError, f"an array of {dtype.name} holds no pixels")
