"""The families of towers: one file each, found by the ``model_type`` of a checkpoint's ``config.json``.

A family file says how its checkpoints spell what a :class:`~tritontower.config.TowerConfig` holds, what its tensors are
called, and which grid of patches a picture of a given size becomes.  It declares itself by its ``MODEL_TYPES``; adding a
family is adding a file.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

import torch

from tritontower.config import TowerConfig
from tritontower.errors import NoVisionTowerError, UnsupportedArchitectureError
from tritontower.reader import ConfigReader

__all__ = ["Family", "family_of", "model_types"]


class Family(Protocol):
    """What a family file provides."""

    MODEL_TYPES: tuple[str, ...]
    """Values of ``model_type`` in ``config.json``."""
    PREFIXES: tuple[str, ...]
    """Prefixes under which published checkpoints keep the tower's tensors, longest first."""
    IGNORED: tuple[str, ...]
    """Patterns (:mod:`fnmatch`) of tensors under a prefix that hold nothing the tower needs."""
    SHRINKS_VIDEO_TO: tuple[int, int]
    """Default least and greatest area of one video frame, pixels."""

    def read_config(self, reader: ConfigReader) -> TowerConfig:
        """Reads ``config.json``; raises :class:`~tritontower.errors.ConfigError` on what it does not understand."""
        ...

    def tensor_names(self, config: TowerConfig) -> Mapping[str, str]:
        """Weight of the layer graph → tensor of the checkpoint, without its prefix."""
        ...

    def resized(self, width: int, height: int, factor: int, area: tuple[int, int]) -> tuple[int, int]:
        """Width and height, pixels, to which a picture is resized: multiples of ``factor``, its area within ``area``."""
        ...

    def reference_class(self) -> Any:
        """The class of transformers that is the tower's reference."""
        ...

    def reference_embeddings(self, output: Any) -> torch.Tensor:
        """The embeddings in what the reference returns."""
        ...

    def reference_values(self, config: TowerConfig) -> Mapping[str, tuple[str, str]]:
        """Value of the layer graph → module of the reference, and which side of it: ``"input"`` or ``"output"``."""
        ...


@lru_cache
def _families() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module_info in iter_modules(__path__):
        module = cast("Family", import_module(f"{__name__}.{module_info.name}"))
        found.update(dict.fromkeys(module.MODEL_TYPES, module))
    return found


def model_types() -> Sequence[str]:
    """Every ``model_type`` that can be loaded."""
    return sorted(_families())


def family_of(reader: ConfigReader) -> Family:
    """The family that a checkpoint's ``config.json`` belongs to.

    Raises:
        UnsupportedArchitectureError: its ``model_type`` is not among :func:`model_types`.
        NoVisionTowerError: it describes a model without a vision tower.
    """
    model_type = reader.get(str, "model_type", default="")
    family = _families().get(model_type)
    if family is not None:
        return family
    if not reader.has("vision_config"):
        raise NoVisionTowerError(
            f"{reader.source}: model_type {model_type!r} has no `vision_config`: this checkpoint holds no vision tower; "
            f"supported are {', '.join(model_types())}"
        )
    raise UnsupportedArchitectureError(
        f"{reader.source}: model_type {model_type!r} is not supported; supported are {', '.join(model_types())}"
    )
