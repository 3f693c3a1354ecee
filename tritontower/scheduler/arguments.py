"""What callers may pass to a tower in more than one form, in the one that it works with."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
import torch
from PIL import Image

from tritontower.batch.packed_batch import expected_workload
from tritontower.config import TowerConfig
from tritontower.errors import UsageError, shorten
from tritontower.graph.ir import Workload
from tritontower.preprocessing.images.image import ImageInput

__all__ = [
    "check_instance",
    "frames_of",
    "images_of",
    "is_one_image",
    "is_whole_number",
    "pack_of",
    "tiles_of",
    "workload_of",
]


def check_instance(name: str, value: object, kinds: tuple[type, ...], allowed: str) -> None:
    """Raises :class:`~tritontower.errors.UsageError` unless the argument ``name`` is one of ``kinds``."""
    if not isinstance(value, kinds):
        raise UsageError(f"{name} is {shorten(value)}; allowed: {allowed}")


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether this is a whole number and not a truth value, which Python counts among them."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_one_image(images: object) -> bool:
    """Whether this is an image and not several; what is neither counts as one, for its error message."""
    alone = (Image.Image, np.ndarray, torch.Tensor, bytes, bytearray, memoryview, Path, str)
    return isinstance(images, alone) or not isinstance(images, Iterable)


def images_of(images: Iterable[ImageInput] | ImageInput) -> list[ImageInput]:
    """One image or several, in a list."""
    return [cast("ImageInput", images)] if is_one_image(images) else list(cast("Iterable[ImageInput]", images))


def frames_of(frames: Iterable[ImageInput]) -> list[ImageInput]:
    """The frames of a video, in a list.

    Raises:
        UsageError: a single image, whose rows would pass for gray frames.
    """
    if is_one_image(frames) and getattr(frames, "ndim", 0) != 4:
        raise UsageError(f"frames is one {type(frames).__name__}; pass a list of the video's frames, in order")
    return list(frames)


def tiles_of(tiles: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pixels that are preprocessed already, tile by tile.

    Raises:
        UsageError: neither a tensor of several tiles nor a list of tensors.
    """
    alone = isinstance(tiles, torch.Tensor) and tiles.ndim == 0
    if alone or isinstance(tiles, str) or not isinstance(tiles, Iterable):
        raise UsageError(
            f"batch is {shorten(tiles)}; allowed: what preprocess() returned, pixels [B, C, H, W], or a list of [C, H, W]"
        )
    return list(tiles)


def pack_of(sizes: tuple[int, int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Width and height of each image of a pass, of which there may be one.

    Raises:
        UsageError: neither a size nor a list of sizes.
    """
    alone = isinstance(sizes, tuple) and not any(isinstance(side, Iterable) for side in sizes)
    several = [sizes] if alone else sizes
    if not isinstance(several, Iterable) or not all(
        isinstance(size, Iterable) and len([*size]) == 2 for size in several
    ):
        raise UsageError(f"{shorten(sizes)} is no pack; allowed: (width, height), or a list of these, in pixels")
    return [cast("tuple[int, int]", tuple(cast("Sequence[int]", size))) for size in several]


def workload_of(config: TowerConfig, patches: int | Sequence[int] | Workload) -> Workload:
    """The workload of a pass over still images of so many patches each, of which there may be one.

    Raises:
        UsageError: a count of patches that no image of the tower has.
    """
    if isinstance(patches, Workload):
        return patches
    counts = list(patches) if isinstance(patches, Iterable) and not isinstance(patches, str) else [patches]
    if not all(map(is_whole_number, counts)):
        raise UsageError(f"patches is {shorten(patches)}; allowed: a whole number, or a list of them")
    counts = [int(count) for count in counts]
    unit = config.num_patches or config.rows_per_token
    if any(count < 0 or count % unit for count in counts):
        reason = "the patches of one token" if config.num_patches is None else "the patches of one tile"
        raise UsageError(f"patches {counts} must be multiples of {unit}, {reason}")
    return expected_workload(config, counts)
