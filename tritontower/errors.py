"""Errors of this package, and the limits whose violation raises them.

Every error is a :class:`TowerError` and exactly one builtin exception (``ValueError``, ``OSError``, ``RuntimeError`` or
``TypeError``).  A message gives the value, its place, the limit, and the remedy.  It never contains an object's address
or raw bytes, because servers pass these messages on to strangers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Limits:
    """Limits on the size of an image, checked on its header before anything is decoded.

    Attributes:
        max_image_pixels: width × height of one image.  The default is Pillow's own limit.  Decoding takes up to 8 bytes for
            each; where a format needs more (WebP 16), an image may have accordingly fewer pixels.
        max_aspect_ratio: longer side ÷ shorter side.
        max_planned_pixels: width × height to which a processor may resize one image.  An image of 1 × 10000 pixels is
            small, but scaled to a shortest edge of 224 it has 500 million pixels.
        max_video_pixels: frames × width × height to which a processor may resize one video.  The default takes 3 GiB as
            fp32, enough for 445 frames of the largest size that Qwen2-VL's processor produces.
        image_formats: encoded formats that are opened, by Pillow's names.  Pillow registers more than forty openers;
            nearly all of its advisories concern the ones left out here.  TIFF is one of them, because its library writes to
            standard error; PPM and PGM only if they are binary.
        max_decoded_bytes: memory that decoding the images of one call takes.  ``encode`` processes longer lists in portions.
            ``encode_video`` and ``preprocess`` need all images at once and raise.  A larger image is decoded alone.
    """

    max_image_pixels: int = 178_956_970
    max_aspect_ratio: float = 200.0
    max_planned_pixels: int = 64 * 2**20
    max_video_pixels: int = 256 * 2**20
    image_formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "AVIF")
    max_decoded_bytes: int = 715_827_880


def is_integer(value: object) -> TypeGuard[int]:
    """Returns whether ``value`` is an integer, numpy's included; ``True`` and ``False`` are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def shorten(value: object, limit: int = 80) -> str:
    """Formats ``value`` for a message: one line of at most ``limit`` characters, containers by their length only."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if value is None or isinstance(value, (bool, float, str)):
        text = repr(value)
    elif isinstance(value, int):
        text = repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple, dict, set, frozenset)):
        text = f"a {type(value).__name__} of {len(value)}"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def list_names(names: Sequence[str], limit: int = 10) -> str:
    """Formats the first ``limit`` names and the number of the others: ``a, b, c (and 12 more)``."""
    shown = ", ".join(shorten(name, 120).strip("'\"") for name in names[:limit])
    hidden = len(names) - limit
    return f"{shown} (and {hidden} more)" if hidden > 0 else shown


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device ran out of memory."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # For CPU memory and for page-locked memory torch raises a plain RuntimeError.
    texts = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _rebuild(kind: type["TowerError"], arguments: tuple[Any, ...], attributes: Mapping[str, Any]) -> "TowerError":
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class TowerError(Exception):
    """Base class of every error that this package raises on purpose.

    Attributes:
        index: of an error about one of several images, its position in the caller's list.
        completed: of an error that ended ``encode``, the embeddings of the images before the first one without a result.
    """

    index: int | None = None
    completed: Sequence[Any] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes return errors by pickling them, and the default would call __init__ with the message only.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class EncodeInterrupted(KeyboardInterrupt):
    """Ctrl-C during ``encode``; not a :class:`TowerError`, so that ``except Exception`` does not catch it."""

    completed: Sequence[Any] = ()
    """The embeddings of the images before the first one without a result."""


class UsageError(TowerError, ValueError):
    """An argument of a call is invalid, missing, or contradicts another one."""


class ConfigError(TowerError, ValueError):
    """A value in ``config.json`` (or another JSON file of the checkpoint) cannot be used.

    ``key`` is its dotted path, such as ``"vision_config.hidden_size"``; ``""`` for the file as a whole.
    """

    def __init__(self, key: str, value: object, allowed: str, *, source: str = "config.json") -> None:
        self.key, self.value, self.allowed, self.source = key, value, allowed, source
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where} must be {allowed}, got {shorten(value)}")


class UnsupportedArchitectureError(TowerError, ValueError):
    """The checkpoint belongs to a model family that this package does not read."""


class NoVisionTowerError(TowerError, ValueError):
    """The checkpoint belongs to a text-only model."""


class CheckpointError(TowerError):
    """Base class of the errors about a checkpoint's files; ``names`` are those of missing or unused tensors or shards."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        super().__init__(message)


class CheckpointNotFoundError(CheckpointError, OSError):
    """The folder, hub repository, revision or file does not exist."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """A file is truncated, replaced, or not of the format that its name says."""


class CheckpointIncompleteError(CheckpointError, ValueError):
    """Tensors or shards are missing.  Nothing is ever initialized in their place."""


class CheckpointAmbiguousError(CheckpointError, ValueError):
    """One tensor is stored more than once, and the checkpoint does not say which one to use."""


class ShapeMismatchError(CheckpointError, ValueError):
    """A tensor does not have the shape that ``config.json`` implies."""

    def __init__(self, name: str, expected: Sequence[int], found: Sequence[int], *, source: str = "") -> None:
        self.name, self.expected, self.found = name, tuple(expected), tuple(found)
        where = f" in {source}" if source else ""
        super().__init__(
            f"tensor {name}{where} must have the shape {list(self.expected)} that config.json implies, got "
            f"{list(self.found)}; the configuration and the weights belong to different models"
        )


class UnexpectedTensorError(CheckpointError, ValueError):
    """The checkpoint contains vision tensors that the tower would not use."""


class UnsupportedDtypeError(CheckpointError, ValueError):
    """A vision tensor is stored in a type (quantized, integer) that cannot be used as it is."""


class UnsafePathError(CheckpointError, ValueError):
    """A shard's name or symbolic link points outside the checkpoint."""


class UnsafeFormatError(CheckpointError, ValueError):
    """The weights exist only as pickles, which can run code when they are read."""


class NonFiniteWeightsError(CheckpointError, ValueError):
    """A tensor contains NaN or infinity, or would after the conversion to the requested dtype."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(f"tensor {name} {reason}")


class ImageError(TowerError):
    """Base class of the errors about an image.

    Attributes:
        index: position of the image in the caller's list, if there is one.
        source: the kind of input, or the path it was read from.
    """

    def __init__(self, reason: str, *, index: int | None = None, source: str | None = None) -> None:
        self.reason, self.index, self.source = reason, index, source
        name = "image" if index is None else f"image {index}"
        super().__init__(f"{name} ({source}): {reason}" if source else f"{name}: {reason}")


class ImageDecodeError(ImageError, ValueError):
    """The bytes are not an image or a damaged one, or the file cannot be read."""


class ImageFormatError(ImageError, ValueError):
    """The image has an encoded format that is not opened."""


class ImageTooLargeError(ImageError, ValueError):
    """The image has more pixels than :class:`Limits` allow."""


class EmptyImageError(ImageError, ValueError):
    """The image has a side of zero pixels."""


class AspectRatioError(ImageError, ValueError):
    """The image has a greater aspect ratio than :class:`Limits` allow."""


class ImageValueError(ImageError, ValueError):
    """Pixel values, shape or channel order cannot be read as an image without guessing."""


class ImageTypeError(ImageError, TypeError):
    """The object is not an image, for instance a plain ``str``."""


class ProcessorError(TowerError, ValueError):
    """The checkpoint's image processor cannot be used, or it rejected the images."""


class ReferenceModelError(TowerError, ValueError):
    """transformers does not implement the tower, or cannot load its checkpoint."""


class BackendUnavailableError(TowerError, RuntimeError):
    """The requested device or kernel backend does not exist on this machine."""


class TowerNotLoadedError(TowerError, RuntimeError):
    """The tower was opened without its weights (``delay_load=True``) and ``load()`` was not called."""


class TowerOutOfMemoryError(TowerError, RuntimeError):
    """A single image or video does not fit into the device's memory, not even in a batch of its own."""

    remaining: Sequence[int] = ()
    """Positions in the caller's list of the images that were not encoded."""


class NonFiniteOutputError(TowerError, ValueError):
    """An embedding contains NaN or infinity; checked with ``check_output``, and by default in float16."""


class PromptError(TowerError, ValueError):
    """A text and its images do not match: aliases, markers, token ids, or the tokenizer of another model."""


class TokenSpaceExhaustedError(TowerError, RuntimeError):
    """A token space has no ids left for another image."""


class EmbeddingFileError(TowerError, OSError):
    """A file of embeddings cannot be read or written, or its content is invalid."""


class HostRefusalError(TowerError, ValueError):
    """An engine (``host``, with its release) cannot take ready embeddings of this model, or not these.

    ``reason`` is the engine's behavior with such embeddings, ``instead`` an alternative that works.
    """

    def __init__(self, host: str, model_type: str, reason: str, instead: str) -> None:
        self.host, self.model_type, self.reason, self.instead = host, model_type, reason, instead
        super().__init__(f"{host} cannot take these embeddings of a {shorten(model_type)} model: {reason}; {instead}")
