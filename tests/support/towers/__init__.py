"""Small random checkpoints of every model, one file per model, with their encoding by transformers alone.

Every file here lists its :class:`TowerCase` s in ``CASES``; ``tests/models/test_every_model.py`` tests all of them.  A new
model's test entry is one new file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
import torch

__all__ = ["TowerCase", "all_cases", "in_section"]

SaveCheckpoint = Callable[..., Path]
"""``save(folder, *, dtype, seed, depth, **changes)``: writes a whole small checkpoint with its processor; returns it."""
EncodeByTransformers = Callable[[Path, Sequence[np.ndarray], torch.dtype], list[torch.Tensor]]
"""``reference(folder, images, dtype)``: embeddings per image by transformers' processor and model alone."""


@dataclass(frozen=True)
class TowerCase:
    """A kind of small checkpoint.

    Attributes:
        name: for test ids.
        save: makes a checkpoint; ``depth`` is the number of vision blocks.
        reference: encodes with transformers alone.
        others: name → changes that make an unpublished configuration.
        prefixes: generations of tensor names: each a sequence of (prefix, replacement), of which the first match applies.
        sizes: width and height of images of very different shapes, the smallest first.
        video: it takes videos.
        video_frames: numbers of frames of the videos in the tests.
        random_size: largest side of the images for which tokens are counted.
        wrong: dotted key of ``config.json`` → values that must be rejected; ``None`` removes the key.
        repeats: the tower is that of another case; slow tests skip it.
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
    wrong: Mapping[str, Sequence[object]] = field(default_factory=dict)
    repeats: bool = False


def all_cases() -> list[TowerCase]:
    """Returns the cases of every file, in the order of their names."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    return [case for module in modules for case in module.CASES]


def in_section(wrong: Mapping[str, Sequence[object]], section: str = "vision_config") -> dict[str, Sequence[object]]:
    """Puts ``section.`` before the keys of :attr:`TowerCase.wrong`."""
    return {f"{section}.{key}": values for key, values in wrong.items()}
