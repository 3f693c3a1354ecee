"""Checks and normalizes the arguments of a tower's methods."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from tritontower.embedding import check_alias
from tritontower.errors import UsageError, shorten
from tritontower.preprocessing.images.image import ImageInput


def check_instance(name: str, value: object, kinds: tuple[type, ...], allowed: str) -> None:
    """Raises :class:`~tritontower.errors.UsageError` unless the argument ``name`` is an instance of ``kinds``."""
    if not isinstance(value, kinds):
        raise UsageError(f"{name} must be {allowed}, got {shorten(value)}")


def is_one_image(images: object) -> bool:
    """Returns whether ``images`` is a single image; an object that is neither counts as one, for its error message."""
    single = (Image.Image, np.ndarray, torch.Tensor, bytes, bytearray, memoryview, Path, str)
    return isinstance(images, single) or not isinstance(images, Iterable)


def list_images(images: Iterable[ImageInput] | ImageInput) -> list[ImageInput]:
    """Returns one image or several as a list."""
    return [cast("ImageInput", images)] if is_one_image(images) else list(cast("Iterable[ImageInput]", images))


def list_frames(frames: Iterable[ImageInput]) -> list[ImageInput]:
    """Returns the frames of a video as a list; rejects a single image, whose rows would be taken for gray frames."""
    if is_one_image(frames) and getattr(frames, "ndim", 0) != 4:
        raise UsageError(f"frames must be a list of the video's frames, in order, got one {type(frames).__name__}")
    return list(frames)


def parse_sizes(sizes: tuple[int, int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the width and height of each image of a batch."""
    is_one = isinstance(sizes, tuple) and not any(isinstance(side, Iterable) for side in sizes)
    several = [sizes] if is_one else sizes
    if not isinstance(several, Iterable) or not all(
        isinstance(size, Iterable) and len([*size]) == 2 for size in several
    ):
        raise UsageError(f"sizes must be (width, height) or a list of them, in pixels, got {shorten(sizes)}")
    return [cast("tuple[int, int]", tuple(cast("Sequence[int]", size))) for size in several]


def parse_aliases(text_alias: str | Sequence[str | None] | None, images: int) -> Sequence[str | None]:
    """Returns an alias or ``None`` for each image."""
    aliases = [text_alias] if isinstance(text_alias, str) else text_alias
    if aliases is None:
        return [None] * images
    if not isinstance(aliases, Sequence):
        raise UsageError(
            f"text_alias must be a text for one image, a list with one for each, or None, got {shorten(aliases)}"
        )
    if len(aliases) != images:
        raise UsageError(
            f"text_alias must have one alias for each image, got {len(aliases)} aliases for {images} images"
        )
    return [check_alias(alias) for alias in aliases]
