"""Everything this package raises on purpose, and the limits that make it raise.

Every error is a :class:`TowerError`, and also the builtin that a caller most likely catches already (``ValueError``,
``OSError``, ``RuntimeError``, ``TypeError``).  A message says what is wrong, where, what the limit is and how to change
it.  It never holds an object's address or raw bytes: a server hands these texts to strangers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AspectRatioError",
    "BackendUnavailableError",
    "CheckpointAmbiguousError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointIncompleteError",
    "CheckpointNotFoundError",
    "ConfigError",
    "EmbeddingFileError",
    "EmptyImageError",
    "HostRefusalError",
    "ImageDecodeError",
    "ImageError",
    "ImageFormatError",
    "ImageTooLargeError",
    "ImageTypeError",
    "ImageValueError",
    "Limits",
    "NoVisionTowerError",
    "NonFiniteOutputError",
    "NonFiniteWeightsError",
    "ProcessorError",
    "PromptError",
    "ShapeMismatchError",
    "TokenSpaceExhaustedError",
    "TowerError",
    "TowerNotLoadedError",
    "TowerOutOfMemoryError",
    "UnexpectedTensorError",
    "UnsafeFormatError",
    "UnsafePathError",
    "UnsupportedArchitectureError",
    "UnsupportedDtypeError",
    "UsageError",
    "is_out_of_memory",
    "list_names",
    "shorten",
]


@dataclass(frozen=True)
class Limits:
    """What an image may cost before it is refused; checked on the header, before anything is decoded.

    Attributes:
        max_image_pixels: width × height of one image.  The default is where Pillow itself gives up.
        max_aspect_ratio: longer side ÷ shorter side.
        max_planned_pixels: width × height that a processor may resize one image to.  An image of 1 × 10000 pixels
            weighs nothing, but scaled to a shortest edge of 224 it has 500 million.
        max_video_pixels: frames × width × height that a processor may resize one video to.  The default takes 3 GiB as fp32,
            and has room for 445 frames of the largest size that Qwen2-VL's processor gives one.
        image_formats: the encoded formats that are opened, by Pillow's names.  Pillow registers more than forty
            openers, and nearly all of its advisories concern the ones left out here.
        max_decoded_bytes: what the decoded images of one call may take at once.  ``encode`` works off more of them in
            portions; ``encode_video`` and ``preprocess`` need all of theirs, and refuse more.  An image that takes more
            than this is taken alone.
    """

    max_image_pixels: int = 178_956_970
    max_aspect_ratio: float = 200.0
    max_planned_pixels: int = 64 * 2**20
    max_video_pixels: int = 256 * 2**20
    image_formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    max_decoded_bytes: int = 715_827_880


def shorten(value: object, limit: int = 80) -> str:
    """``repr(value)`` fit for a message: one line, at most ``limit`` characters, numbers and texts only in full."""
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
    """``a, b, c (and 12 more)``: the first ``limit`` names and how many are left out."""
    shown = ", ".join(shorten(name, 120).strip("'\"") for name in names[:limit])
    hidden = len(names) - limit
    return f"{shown} (and {hidden} more)" if hidden > 0 else shown


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has run out of memory.

    For the CPU's, and for memory that cannot be page-locked, torch has no class of its own, but a plain ``RuntimeError``.
    """
    import torch

    texts = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _rebuild(kind: type["TowerError"], arguments: tuple[Any, ...], facts: Mapping[str, Any]) -> "TowerError":
    # Attribute lookup would find ValueError.__new__ first, which refuses the larger layout of an OSError.
    error: TowerError = OSError.__new__(kind) if issubclass(kind, OSError) else kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(facts)
    return error


class TowerError(Exception):
    """The root of every error that this package raises on purpose.

    Attributes:
        index: of an error about one of several images, its position in the caller's list.
        completed: of an error that stopped ``encode``, the embeddings of the images before the one that was next.
    """

    index: int | None = None
    completed: Sequence[Any] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes hand errors back by pickling them, and the default would call __init__ with the message only.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class UsageError(TowerError, ValueError):
    """The call itself makes no sense: contradictory or missing arguments."""


# -- configuration ----------------------------------------------------------------------------------------------------


class ConfigError(TowerError, ValueError):
    """A value in ``config.json`` (or another JSON file of the checkpoint) cannot be used.

    Attributes:
        key: dotted path of the value, such as ``"vision_config.hidden_size"``; ``""`` for the file as a whole.
        value: what stands there.
        allowed: what may stand there, in words.
    """

    def __init__(self, key: str, value: object, allowed: str, *, source: str = "config.json") -> None:
        self.key, self.value, self.allowed, self.source = key, value, allowed, source
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where} is {shorten(value)}; allowed: {allowed}")


class UnsupportedArchitectureError(TowerError, ValueError):
    """The checkpoint is of a model family that this package does not read."""


class NoVisionTowerError(TowerError, ValueError):
    """The checkpoint is of a text-only model."""


# -- checkpoint files -------------------------------------------------------------------------------------------------


class CheckpointError(TowerError):
    """The root of what can be wrong with a checkpoint's files."""


class CheckpointNotFoundError(CheckpointError, OSError):
    """There is no such folder, hub repository, revision or file."""


class CheckpointCorruptError(CheckpointError, ValueError):
    """A file is not what its name says: truncated, replaced, not a safetensors file, not JSON."""


class CheckpointIncompleteError(CheckpointError, ValueError):
    """Tensors or shards are missing.  Nothing is ever initialized in their place."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        super().__init__(message)


class CheckpointAmbiguousError(CheckpointError, ValueError):
    """One tensor is stored more than once, and nothing says which is meant."""


class ShapeMismatchError(CheckpointError, ValueError):
    """A tensor does not have the shape that ``config.json`` implies."""

    def __init__(self, name: str, expected: Sequence[int], found: Sequence[int], *, source: str = "") -> None:
        self.name, self.expected, self.found = name, tuple(expected), tuple(found)
        where = f" in {source}" if source else ""
        super().__init__(
            f"tensor {name}{where} has shape {list(self.found)}, but config.json implies {list(self.expected)}; "
            "the configuration and the weights belong to different models"
        )


class UnexpectedTensorError(CheckpointError, ValueError):
    """The checkpoint holds vision tensors that the tower would not use."""

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        super().__init__(message)


class UnsupportedDtypeError(CheckpointError, ValueError):
    """A vision tensor is stored in a type (quantized, integer) that cannot be used as it is."""


class UnsafePathError(CheckpointError, ValueError):
    """A shard's name or symbolic link points outside the checkpoint."""


class UnsafeFormatError(CheckpointError, ValueError):
    """The weights exist only as pickles, which can run code when they are read."""


class NonFiniteWeightsError(CheckpointError, ValueError):
    """A tensor holds NaN or infinity, or would after the conversion to the wanted type."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(f"tensor {name} {reason}")


# -- images ---------------------------------------------------------------------------------------------------------


class ImageError(TowerError, ValueError):
    """The root of what can be wrong with an image.

    Attributes:
        index: position of the image in the caller's list, where there is one.
        source: what kind of input it was, or the path it was read from.
    """

    def __init__(self, reason: str, *, index: int | None = None, source: str | None = None) -> None:
        self.reason, self.index, self.source = reason, index, source
        name = "image" if index is None else f"image {index}"
        super().__init__(f"{name} ({source}): {reason}" if source else f"{name}: {reason}")


class ImageDecodeError(ImageError, OSError):
    """The bytes are not an image, or a damaged one, or the file cannot be read."""


class ImageFormatError(ImageError):
    """An image in an encoded format that is not opened."""


class ImageTooLargeError(ImageError):
    """More pixels than :class:`Limits` allow."""


class EmptyImageError(ImageError):
    """A side of zero pixels."""


class AspectRatioError(ImageError):
    """Longer than :class:`Limits` allow for its height, or the other way round."""


class ImageValueError(ImageError):
    """Pixel values, a shape or a channel order that cannot be read as an image without guessing."""


class ImageTypeError(ImageError, TypeError):
    """An object that is not an image; a plain ``str`` above all."""


class ProcessorError(TowerError, ValueError):
    """The checkpoint's image processor cannot be used, or it refused the images."""


class ReferenceModelError(TowerError, ValueError):
    """transformers has no implementation of the tower to hold it against, or cannot load its checkpoint."""


# -- running ----------------------------------------------------------------------------------------------------------


class BackendUnavailableError(TowerError, RuntimeError):
    """The device or the kernel backend that was asked for does not exist here."""


class TowerNotLoadedError(TowerError, RuntimeError):
    """The tower was opened without its weights (``delay_load=True``) and ``load()`` was not called."""


class TowerOutOfMemoryError(TowerError, RuntimeError):
    """A single image or video does not fit into the device's memory; smaller passes were tried before.

    Attributes:
        remaining: positions in the caller's list of the images that were not encoded.
    """

    remaining: Sequence[int] = ()


class NonFiniteOutputError(TowerError, ValueError):
    """An embedding holds NaN or infinity; looked for only where ``check_output`` asks for it."""


# -- prompts ----------------------------------------------------------------------------------------------------------


class PromptError(TowerError, ValueError):
    """A text and its images do not fit together: aliases, markers, token ids, or a tokenizer of another model."""


class TokenSpaceExhaustedError(TowerError, RuntimeError):
    """A token space has no ids left for another image."""


# -- embeddings in files ----------------------------------------------------------------------------------------------


class EmbeddingFileError(TowerError, ValueError, OSError):
    """A file of embeddings cannot be read or written, or does not hold what it says."""


# -- other engines ----------------------------------------------------------------------------------------------------


class HostRefusalError(TowerError, ValueError):
    """An engine cannot take ready embeddings of this model, or not these.

    Attributes:
        host: the engine and the release that was read, such as ``"vLLM 0.33.0"``.
        model_type: the checkpoint's model type, as in :func:`tritontower.models.common.registry.model_types`.
        reason: what the engine does with such embeddings.
        instead: what works.
    """

    def __init__(self, host: str, model_type: str, reason: str, instead: str) -> None:
        self.host, self.model_type, self.reason, self.instead = host, model_type, reason, instead
        super().__init__(f"{host} cannot take these embeddings of a {shorten(model_type)} model: {reason}; {instead}")
