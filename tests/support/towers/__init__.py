"""One file per family: how to make its small random checkpoints, and how transformers alone encodes images with them.

Every file here lists its :class:`TowerCase` s in ``CASES``; ``tests/models/test_every_model.py`` holds each of them to the same
promises.  A new family's test entry is one new file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import torch

__all__ = ["TowerCase", "all_cases"]

SaveCheckpoint = Callable[..., Path]
"""``save(folder, *, dtype, seed, depth, **changes)``: writes a whole small checkpoint with its processor; returns it."""
EncodeByTransformers = Callable[[Path, Sequence[np.ndarray], torch.dtype], list[torch.Tensor]]
"""``reference(folder, images, dtype)``: embeddings per image by transformers' processor and model, nothing of ours."""


@dataclass(frozen=True)
class TowerCase:
    """A kind of checkpoint, small.

    Attributes:
        name: for test ids.
        save: makes a checkpoint; ``depth`` is the number of vision blocks.
        reference: encodes with transformers alone.
        others: name → changes that make a checkpoint of a configuration nobody has published.
        prefixes: generations of tensor names: each a sequence of (what a name begins with, what instead), of which the
            first that fits a name is applied.
        sizes: width and height of images of very different shapes, the first of them the smallest.
        video: whether it takes videos.
        video_frames: how many frames the videos have that it is shown.
        random_size: the largest side of the images that tokens are counted for.
    """

    name: str
    save: SaveCheckpoint
    reference: EncodeByTransformers
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prefixes: Sequence[Sequence[tuple[str, str]]] = ()
    sizes: Sequence[tuple[int, int]] = ((28, 28), (157, 243), (300, 64), (14, 700), (90, 90))
    video: bool = False
    video_frames: Sequence[int] = (1, 2, 5)
    random_size: int = 400


def all_cases() -> list[TowerCase]:
    """The cases of every file, in the order of their names."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    return [case for module in modules for case in module.CASES]
