"""Every kind of image becomes the same canonical RGB, or a named error; never silently other pixels."""

import io
import os
import pickle
import re
import struct
import threading
import tracemalloc
import warnings
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.processes import run_python

from tritontower.batch.digests import Digests
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
    TowerError,
)
from tritontower.preprocessing.images.decode import decode_image
from tritontower.preprocessing.images.image import CanonicalImage

WITH_TIFF = Limits(image_formats=(*Limits().image_formats, "TIFF"))
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def png(width: int, height: int, color_type: int, depth: int, rows: bytes, *, transparent: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow cannot write; ``rows`` without the filter bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(rows) // height if height and rows else 0
    filtered = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height if rows else 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(filtered))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 6, width: int = 7, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixel(image: Any, **options: Any) -> list[int]:
    """The upper left canonical pixel."""
    return decode_image(image, **options).array[0, 0].tolist()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def disguise(array: np.ndarray, folder: Path) -> dict[str, Any]:
    """One image in every accepted form."""
    image, floats, deep = Image.fromarray(array), array.astype(np.float32) / 255, array.astype(np.uint16) * 257
    files = {kind: encoded(image, kind) for kind in ("PNG", "BMP", "TIFF", "PPM")}
    return {
        "PIL": image,
        "numpy": array,
        "channels first": np.ascontiguousarray(array.transpose(2, 0, 1)),
        "a reversed view": np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
        "uint16": deep,
        "big-endian": deep.astype(">u2"),
        "float32": floats,
        "float16": floats.astype(np.float16),
        "float64": array / 255.0,
        "torch": torch.from_numpy(array).permute(2, 0, 1),
        "torch, with a gradient": torch.from_numpy(floats).requires_grad_(),
        "torch uint16": torch.from_numpy(deep),
        "memoryview": memoryview(files["PNG"]),
        "lossless WebP": encoded(image, "WEBP", lossless=True),
        "path": write(folder / "image.png", files["PNG"]),
        "opaque RGBA": image.convert("RGBA"),
        "numpy, opaque RGBA": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        **files,
    }


def test_every_form_of_an_image_has_the_same_pixels(tmp_path: Path) -> None:
    array = noise()
    for name, image in disguise(array, tmp_path).items():
        decoded = decode_image(image, limits=WITH_TIFF)
        assert np.array_equal(decoded.array, array), name
        assert decoded.array.dtype == np.uint8
        assert decoded.array.flags.c_contiguous, name
        assert (decoded.width, decoded.height) == (7, 6)
        assert decoded.digest == decode_image(array).digest
        with pytest.raises(ImageTooLargeError, match=r"at most (41|20) pixels.*, got 7 × 6 = 42"):
            decode_image(image, limits=replace(WITH_TIFF, max_image_pixels=41))
    rounded = decode_image((torch.from_numpy(array).float() / 255).bfloat16())
    assert np.abs(rounded.array.astype(int) - array).max() <= 1


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("P", 0, [0, 0, 0]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("YCbCr", (255, 128, 128), [255, 255, 255]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
        ("LA", (10, 0), [255, 255, 255]),
        ("LA", (10, 255), [10, 10, 10]),
        ("PA", (0, 0), [255, 255, 255]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 300, [1, 1, 1]),
        ("I;16B", 65535, [255, 255, 255]),
        ("I", 32768, [128, 128, 128]),
        ("F", 1.0, [255, 255, 255]),
        ("F", 0.5, [128, 128, 128]),
    ],
)
def test_modes_are_converted_and_the_image_is_unchanged(mode: str, color: Any, expected: list[int]) -> None:
    image = Image.new(mode, (2, 2), color)
    before = (image.mode, image.size, dict(image.info), image.tobytes())
    assert pixel(image) == expected
    assert (image.mode, image.size, dict(image.info), image.tobytes()) == before


def transparent_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    return image


# First pixel transparent, second not.
TRANSPARENT_COLORS = {
    "RGB": (png(2, 1, 2, 8, bytes([255, 0, 0, 0, 255, 0]), transparent=struct.pack(">3H", 255, 0, 0)), [0, 255, 0]),
    "gray": (png(2, 1, 0, 8, bytes([5, 9]), transparent=struct.pack(">H", 5)), [9, 9, 9]),
    "1 bit": (png(2, 1, 0, 1, b"\x80", transparent=struct.pack(">H", 1)), [0, 0, 0]),
    "16-bit gray": (png(2, 1, 0, 16, struct.pack(">2H", 1000, 514), transparent=struct.pack(">H", 1000)), [2, 2, 2]),
    "palette": (encoded(transparent_palette()), [0, 255, 0]),
    "palette, PIL": (transparent_palette(), [0, 255, 0]),
}


@pytest.mark.parametrize(("image", "opaque"), TRANSPARENT_COLORS.values(), ids=TRANSPARENT_COLORS)
def test_transparent_color_becomes_white(image: Any, opaque: list[int]) -> None:
    assert decode_image(image).array.tolist() == [[[255, 255, 255], opaque]]


def test_arrays_are_converted_as_pil_images_are() -> None:
    alpha, gray = noise(channels=4), noise(channels=1)
    composited = decode_image(Image.fromarray(alpha)).array
    assert not np.array_equal(composited, alpha[..., :3])
    for array in (alpha, alpha.transpose(2, 0, 1)):
        assert np.array_equal(decode_image(array).array, composited)
    for array in (gray[..., 0], gray, gray.transpose(2, 0, 1)):
        assert np.array_equal(decode_image(array).array, np.repeat(gray, 3, axis=2))
    assert pixel(np.ones((2, 2), dtype=bool)) == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(ramp / 257).astype(np.uint8)
    file = png(256, 256, 0, 16, ramp.astype(">u2").tobytes())
    for image in (ramp, Image.fromarray(ramp), file, torch.from_numpy(ramp)):
        assert np.array_equal(decode_image(image).array, np.dstack([expected] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_files_and_not_pil_images(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((32, 16, 3), dtype=np.uint8)
    upright[:16, :8] = 255  # one bright quarter: each of the eight ways to hold the camera shows it elsewhere
    upright[16:, 8:] = 90
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif)
        for image in (data, write(tmp_path / "image", data)):
            array = decode_image(image, limits=WITH_TIFF).array
            assert array.shape == upright.shape
            assert np.abs(array.astype(int) - upright).mean() < 3
        if kind != "TIFF":  # Pillow itself turns a TIFF when it loads it
            assert decode_image(Image.open(io.BytesIO(data))).array.shape == as_stored.shape


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_malformed_exif_is_ignored() -> None:
    image = Image.fromarray(noise(16, 16))
    for tail in (b"garbage", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff"):
        data = encoded(image, "JPEG", exif=b"Exif\0\0" + tail, quality=100)
        assert decode_image(data).array.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_only_and_the_position_is_restored(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    options = {} if kind == "TIFF" else {"duration": 10}
    if kind == "WEBP":
        options["lossless"] = True
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(data, limits=WITH_TIFF) == [255, 0, 0]
    image = Image.open(io.BytesIO(data))
    for frame in (0, 2):
        image.seek(frame)
        assert pixel(image) == [255, 0, 0]
        assert image.tell() == frame
    assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def in_threads(work: Callable[[], Any]) -> list[Any]:
    """Results of eight threads that start at once."""
    with ThreadPoolExecutor(8, initializer=threading.Barrier(8).wait) as pool:
        return list(pool.map(lambda _: work(), range(8)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_one_lazy_image_in_many_threads(kind: str) -> None:
    data = encoded(Image.fromarray(noise(300, 300)), kind)
    expected = decode_image(data).digest
    for _ in range(5):
        image = Image.open(io.BytesIO(data))
        assert in_threads(lambda image=image: decode_image(image).digest) == [expected] * 8


def test_digest_depends_on_size_and_every_byte() -> None:
    flat = np.arange(3000, dtype=np.uint32).astype(np.uint8)
    changed = flat.copy()
    changed[-1] ^= 1
    arrays = [flat.reshape(shape) for shape in ((10, 100, 3), (100, 10, 3), (20, 50, 3))]
    digests = {decode_image(array).digest for array in (*arrays, changed.reshape(10, 100, 3))}
    assert [len(bytes.fromhex(digest)) for digest in digests] == [32] * 4


def test_pixels_cannot_change_under_their_digest() -> None:
    array = noise(40, 30)
    image = Image.fromarray(array)
    images = [decode_image(array), decode_image(image), decode_image(torch.from_numpy(array))]
    expected = decode_image(array.copy()).digest
    array[:] = 0
    image.paste((1, 2, 3), (0, 0, 30, 40))
    for decoded in images:
        assert decoded.digest == expected
        with pytest.raises(ValueError, match="read-only"):
            decoded.array[0, 0] = 0


def test_digests_are_computed_on_access_and_release_the_image() -> None:
    known, waiting = decode_image(noise(5, 5)), decode_image(noise(6, 5))
    expected = (known.digest, decode_image(noise(6, 5)).digest)
    alive, digests = weakref.ref(waiting), Digests([known, waiting])
    assert digests[0] == expected[0]
    assert "digest" not in vars(waiting)
    del waiting
    assert alive() is not None
    assert digests[-1] == expected[1]
    assert alive() is None


def test_digests_are_like_a_tuple_in_every_thread() -> None:
    def images() -> list[CanonicalImage]:
        return [decode_image(noise(height)) for height in range(5, 25)]

    texts = tuple(image.digest for image in images())
    digests = Digests(images())
    assert in_threads(lambda: list(digests)) == [list(texts)] * 8
    assert Digests(images()) == texts
    assert Digests(images()) == Digests(images()) != Digests(images()[:2])
    assert hash(Digests(images())) == hash(texts)
    assert Digests(images())[1:] == texts[1:]
    assert pickle.loads(pickle.dumps(Digests(images()))) == texts


@pytest.mark.parametrize("size", [(1, 1), (700, 1), (1, 700), (211, 331), (30000, 4), (3, 30000), (1000, 900)])
def test_pixels_come_out_of_pillow_strip_by_strip(size: tuple[int, int]) -> None:
    array = noise(size[1], size[0])
    for image in (Image.fromarray(array), Image.fromarray(array).convert("RGBA")):
        decoded = decode_image(image, limits=Limits(max_aspect_ratio=1e5))
        assert np.array_equal(decoded.array, array)
        assert decoded.array.flags.c_contiguous


def test_sizes_without_pixels_or_too_long_are_refused() -> None:
    for width, height in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(EmptyImageError, match=f"{width} × {height} pixels"):
            decode_image(Image.new("RGB", (width, height)))
        with pytest.raises(EmptyImageError):
            decode_image(np.zeros((height, width, 3), dtype=np.float32))
    for size in ((1, 10_000), (10_000, 1), (201, 1)):
        with pytest.raises(AspectRatioError, match=r"must be at most 200, got .* crop it, or pass Limits"):
            decode_image(png(*size, 2, 8, b""))  # the pixels are not even there
    assert decode_image(Image.new("RGB", (1, 200))).height == 200


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (14_000, 14_000)])
@pytest.mark.parametrize("pillow_limit", [None, 89_478_485])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch, size: Any, pillow_limit: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    data = png(*size, 2, 8, b"")
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLargeError, match="scale it down"):
            decode_image(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 4 million pixels whose last scan is repeated ``count`` times."""
    data = encoded(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + count * data[start:end] + data[end:]


MEASURE = """
import sys
from pathlib import Path
from tritontower.preprocessing.images.decode import count_decoded_bytes, decode_image

def status(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

for path in map(Path, sys.argv[1:]):
    for is_first in (True, False):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = status("VmRSS:")
        decode_image(path)
        if not is_first:
            print(path.name, status("VmHWM:") - before, count_decoded_bytes(path))
"""


def test_decoding_takes_no_more_memory_than_estimated(tmp_path: Path) -> None:
    side = 2500
    plain, exif = Image.new("RGB", (side, side)), Image.Exif()
    exif[0x0112] = 6
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        **{f"{mode}.png": (Image.new(mode, plain.size), {}) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")},
        "clear.png": (Image.new("P", plain.size), {"transparency": 0}),
        "clear.gif": (Image.new("P", plain.size), {"transparency": 0}),
        "palette.bmp": (Image.new("P", plain.size), {}),
        "turned.jpg": (plain, {"exif": exif}),
        "progressive.jpg": (plain, {"progressive": True, "subsampling": 0}),
        "cmyk.jpg": (Image.new("CMYK", plain.size), {}),
        **{f"{mode}.webp": (Image.new(mode, plain.size), {"method": 0}) for mode in ("RGB", "RGBA")},
        "rgb.avif": (plain, {"speed": 10}),
        "gray.ppm": (Image.new("L", plain.size), {}),
    }
    for name, (image, options) in saved.items():
        image.save(tmp_path / name, **options)
    # Every large block is returned to the system at once, and shows.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = run_python("-c", MEASURE, *(tmp_path / name for name in saved), environment=environment, check=True)
    for name, taken, estimate in map(str.split, done.stdout.splitlines()):
        assert 0.5 * int(estimate) < int(taken) < int(estimate) + 6 * 2**20, name
    assert len(done.stdout.splitlines()) == len(saved)


FLOAT = np.float32
NOISE = Image.fromarray(noise(64, 64))
WRONG_IMAGES: dict[str, tuple[Any, type[ImageError], str]] = {
    "empty": (b"", ImageDecodeError, "encoded bytes"),
    "garbage": (b"\x13\x37" * 50, ImageDecodeError, "encoded bytes"),
    "PNG signature alone": (b"\x89PNG\r\n\x1a\n", ImageDecodeError, "encoded bytes"),
    "bad checksum": (encoded(NOISE).replace(b"IDATx", b"IDATy"), ImageDecodeError, "encoded bytes"),
    "truncated PNG": (encoded(NOISE)[:-3000], ImageDecodeError, "encoded bytes"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-800], ImageDecodeError, "encoded bytes"),
    "truncated WebP": (encoded(NOISE, "WEBP")[:-300], ImageDecodeError, "encoded bytes"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", ImageFormatError, "got EPS"),
    "PDF": (b"%PDF-1.7\n", ImageFormatError, "got PDF"),
    "PSD": (b"8BPS" + b"\0" * 40, ImageFormatError, "got PSD"),
    "ICO": (encoded(Image.new("RGB", (16, 16)), "ICO"), ImageFormatError, "must be one of PNG, JPEG.* got ICO"),
    "HEIF": (b"\0\0\0\x18ftypheic" + b"\0" * 20, ImageFormatError, "got HEIF"),
    "read error": (Path("/proc/self/mem"), ImageDecodeError, "cannot be decoded: Input/output error"),
    "path of 5000 characters": (Path("x" * 5000), ImageDecodeError, "cannot be decoded: File name too long"),
    "memory with gaps": (memoryview(b"abcdef")[::2], ImageDecodeError, "cannot be decoded"),
    "nested tensor": (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]), ImageTypeError, "dense"),
    "TIFF": (encoded(NOISE, "TIFF"), ImageFormatError, r"got TIFF; convert it, or pass Limits\(image_formats"),
    "plain PPM": (b"P3 1 1 255 0 0 0 ", ImageFormatError, "must be binary"),
    "PPM with a long header": (b"P6 #" + b"x" * 2000 + b"\n1 1 255 abc", ImageFormatError, "must be binary"),
    "PPM of 7 bits": (b"P5 1 1 127 a", ImageFormatError, "must be binary"),
    "bitmap": (encoded(Image.new("1", (9, 9)), "PPM"), ImageFormatError, "must be binary"),
    "JPEG of 606 scans": (many_scans(600), ImageTooLargeError, r"at most 536 scans, got 606; save it again"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', ImageFormatError, "got SVG"),
    "name": ("photo.jpg", ImageTypeError, r"got str; .*pathlib\.Path"),
    "URL": ("https://example.org/a.png", ImageTypeError, r"got str; .*pathlib\.Path"),
    "None": (None, ImageTypeError, "an image must be .* got NoneType$"),
    "list": ([np.zeros((2, 2, 3))], ImageTypeError, "got list$"),
    "object": (object(), ImageTypeError, "got object$"),
    "float 0..255": (np.full((8, 8, 3), 200.0), ImageValueError, r"divide by their range.*astype\(uint8\)"),
    "float above 1": (np.full((8, 8), 1.01, FLOAT), ImageValueError, "must lie in 0 … 1, got values from 1.01"),
    "negative float": (np.full((8, 8, 3), -0.1, FLOAT), ImageValueError, "-0.1"),
    "one NaN": (np.array([[0.5, np.nan]], FLOAT), ImageValueError, "nan"),
    "infinity": (np.full((8, 8), np.inf, FLOAT), ImageValueError, "inf"),
    "int64": (np.zeros((8, 8, 3), np.int64), ImageValueError, "got int64; convert"),
    "int8": (np.zeros((8, 8, 3), np.int8), ImageValueError, "must be uint8, uint16, bool or float, got int8"),
    "objects": (np.full((8, 8, 3), None), ImageTypeError, "got object"),
    "texts": (np.full((8, 8, 3), "a"), ImageTypeError, "got str"),
    "(3, 8, 3)": (np.zeros((3, 8, 3), np.uint8), ImageValueError, "input_data_format"),
    "(1, 1, 3)": (np.zeros((1, 1, 3), np.uint8), ImageValueError, "input_data_format"),
    "(4, 5, 4)": (np.zeros((4, 5, 4), np.uint8), ImageValueError, "input_data_format"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), ImageValueError, "1, 3 or 4 channels first or last"),
    "channels in the middle": (np.zeros((8, 3, 8), np.uint8), ImageValueError, "1, 3 or 4 channels first or last"),
    "batch": (np.zeros((1, 3, 8, 8), np.uint8), ImageValueError, "one by one"),
    "no dimension": (np.zeros((), np.uint8), ImageValueError, "0 dimensions"),
    "meta tensor": (torch.zeros(3, 8, 8, device="meta"), ImageTypeError, "dense"),
    "sparse tensor": (torch.zeros(8, 8).to_sparse(), ImageTypeError, "dense"),
    "mode F out of range": (Image.new("F", (2, 2), 200.0), ImageValueError, "200"),
    "mode I above 16 bits": (Image.new("I", (2, 2), 65536), ImageValueError, "0 to 65535"),
    "mode I negative": (Image.new("I", (2, 2), -1), ImageValueError, "-1"),
    "mode I of 8 bits": (Image.new("L", (2, 2), 200).convert("I"), ImageValueError, '"L" or "I;16"'),
}


@pytest.mark.parametrize(("image", "error", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_unreadable_images_raise_a_named_error(image: Any, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        decode_image(image, index=2)
    text = str(caught.value)
    assert text.startswith("image 2")
    assert caught.value.index == 2
    assert isinstance(caught.value, TypeError if error is ImageTypeError else ValueError)
    assert not ADDRESS.search(text)
    assert not isinstance(image, str) or image not in text


def test_formats_can_be_allowed_and_forbidden() -> None:
    ico, bmp = encoded(Image.new("RGB", (16, 16), "red"), "ICO"), encoded(Image.new("RGB", (2, 2)), "BMP")
    assert pixel(ico, limits=Limits(image_formats=("PNG", "ICO"))) == [255, 0, 0]
    with pytest.raises(ImageError):
        decode_image(bmp, limits=Limits(image_formats=("PNG", "no such format")))


def test_path_that_is_missing_a_folder_or_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nothing.png", tmp_path, tmp_path / "pipe"):
        with pytest.raises(ImageDecodeError, match="no such file, or it is not an ordinary file") as caught:
            decode_image(path)
        assert caught.value.source == str(path)


def test_named_order_of_axes_is_followed() -> None:
    array = noise(3, 8, 3)
    assert np.array_equal(decode_image(array, input_data_format="channels_last").array, array)
    first = decode_image(array, input_data_format="channels_first").array
    assert np.array_equal(first, array.transpose(1, 2, 0))
    with pytest.raises(ImageValueError, match="where input_data_format='channels_first' puts it"):
        decode_image(noise(8, 8), input_data_format="channels_first")
    with pytest.raises(ImageValueError, match='must be "channels_first"'):
        decode_image(array, input_data_format="HWC")  # type: ignore[arg-type]


SEEDS = [encoded(Image.fromarray(noise(12, 12)), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")]
SEEDS += [encoded(transparent_palette())]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_files_raise_nothing_but_tower_errors(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    text = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode_image(bytes(content), limits=replace(WITH_TIFF, max_image_pixels=10**6))
            assert image.array.shape == (image.height, image.width, 3)
        except TowerError as error:
            text = str(error)
    assert not ADDRESS.search(text)
    assert "\\x" not in text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(["u1", "u2", "i4", "f2", "f4", "f8", "?", "c8", "O"]),
    order=st.sampled_from([None, "channels_first", "channels_last"]),
)
def test_any_array_is_an_image_or_a_tower_error(shape: list[int], dtype: str, order: Any) -> None:
    try:
        image = decode_image(np.zeros(shape, dtype=dtype), input_data_format=order)
    except TowerError:
        return
    assert image.array.shape == (image.height, image.width, 3)
    assert image.width * image.height > 0
