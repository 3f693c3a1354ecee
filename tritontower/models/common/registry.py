"""The families of towers: one file each, found by what a checkpoint's ``config.json`` says it is.

A family file reads a configuration into one :class:`Family`: what the tower is, how the checkpoint spells its weights,
how images are prepared for it, and which model of transformers it is held against.  It declares itself by its
``MODEL_TYPES``; adding a family is adding a file.  Files whose names begin with an underscore hold what several share.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, Protocol, cast

import torch

import tritontower.models
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import WeightMap
from tritontower.config import TowerConfig
from tritontower.devices import DTYPES
from tritontower.errors import Limits, NoVisionTowerError, UnsupportedArchitectureError
from tritontower.models.common.hf_reference import ReferenceModel
from tritontower.preprocessing import Preprocessor
from tritontower.prompt.layout import PromptLayout
from tritontower.prompt.mrope import MropeRule

__all__ = [
    "MISTRAL_FORMAT",
    "Family",
    "FamilyFile",
    "FamilySummary",
    "declared_dtype",
    "family_files",
    "has_tower",
    "model_types",
    "read_family",
]

MISTRAL_FORMAT = "params.json"
"""What stands for a ``model_type`` where a checkpoint has Mistral's own configuration file."""

SIGNS_OF_A_TOWER = (
    "vision_config",
    "vision_encoder",
    "vision_tower",
    "mm_vision_tower",
    "vlm_config",
    "thinker_config",
    "visual",
    "image_size",
    "patch_size",
)
"""Keys of which a configuration of a model with a tower, or of a tower alone, has at least one."""

MakePreprocessor = Callable[[TowerConfig, Path, Limits, Any, Mapping[str, Any]], Preprocessor]
"""Tower, checkpoint folder, limits, an explicit image processor or ``None``, options → preprocessor."""


@dataclass(frozen=True)
class Family:
    """One checkpoint's tower, as its family file reads it.

    Attributes:
        config: what the tower is.
        prefixes: beginnings of the stored names that belong to it → what they become
            (:func:`tritontower.checkpoint.files.strip_prefix`).
        tensors: name of a weight of the layer graph → how it is stored, under names stripped by ``prefixes``.  Weights that
            the graph turns out not to need (blocks behind the last one, pooling heads) are listed as well, and may be
            missing from the checkpoint.
        ignored: :mod:`fnmatch` patterns of stripped names that hold nothing the tower needs.
        preprocessors: how images may be prepared: ``"hf"`` as transformers does it, and other ways by name.
        reference: transformers' implementation; ``None`` where it reads no such checkpoint.
        layout: whose file names the weights have.
        mrope: how the language model numbers the tokens of images and videos; ``None`` where they have one position each,
            like text.
        prompt: how the language model's prompt has images; ``None`` for a tower that comes without one.
        bidirectional_tiles: whether the language model lets the rows of a tile attend to each other in both directions.
        settle: called with the stripped names that the checkpoint really holds, where they decide what the
            configuration leaves open.
        model_type: whose file it is, as in :func:`model_types`: what other engines go by; :func:`read_family` fills it in.
    """

    config: TowerConfig
    prefixes: Mapping[str, str]
    tensors: Mapping[str, WeightMap]
    preprocessors: Mapping[str, MakePreprocessor]
    reference: ReferenceModel | None
    ignored: Sequence[str] = ()
    layout: Literal["hf", "mistral"] = "hf"
    mrope: MropeRule | None = None
    prompt: PromptLayout | None = None
    bidirectional_tiles: bool = False
    settle: Callable[["Family", Collection[str]], "Family"] | None = field(default=None)
    model_type: str = ""


@dataclass(frozen=True)
class FamilySummary:
    """A family in one row of a table.

    Attributes:
        title: what people call it.
        checkpoints: models that it loads, by name.
        images: to which sizes it resizes images, in words.
        video: whether it takes videos.
        tokens: tokens per image, in words or as a formula.
        example: a published ``config.json`` (or ``params.json``), as far as it concerns the tower.
        processor: the processor file published with it; empty where there is none.
    """

    title: str
    checkpoints: str
    images: str
    video: bool
    tokens: str
    example: Mapping[str, Any]
    processor: Mapping[str, Any]


class FamilyFile(Protocol):
    """What a family file provides."""

    MODEL_TYPES: tuple[str, ...]
    """``model_type`` in ``config.json``, or, where the tower decides, ``model_type/vision_config.model_type``."""
    SUMMARIES: tuple[FamilySummary, ...]
    """What it loads, for the documentation."""

    def read(self, reader: ConfigReader) -> Family:
        """Reads a configuration; raises :class:`~tritontower.errors.ConfigError` on what it does not understand."""
        ...


@lru_cache
def family_files() -> Mapping[str, FamilyFile]:
    """Model type → the file that reads it."""
    found: dict[str, FamilyFile] = {}
    for module_info in iter_modules(tritontower.models.__path__):
        if module_info.ispkg:
            continue
        module = cast("FamilyFile", import_module(f"tritontower.models.{module_info.name}"))
        found.update(dict.fromkeys(module.MODEL_TYPES, module))
    return found


def model_types() -> Sequence[str]:
    """Every model type that can be loaded, as in :attr:`FamilyFile.MODEL_TYPES`."""
    return sorted(family_files())


def read_family(reader: ConfigReader) -> Family:
    """The tower that a checkpoint's configuration describes.

    Raises:
        UnsupportedArchitectureError: its model type is not among :func:`model_types`.
        NoVisionTowerError: it describes a model without a vision tower.
        ConfigError: a value cannot be right.
    """
    return replace(_file_for(reader).read(reader), model_type=_type_of(reader))


def has_tower(reader: ConfigReader) -> bool:
    """Whether the configuration names a tower that can be loaded; its values are not looked at."""
    try:
        _file_for(reader)
    except (NoVisionTowerError, UnsupportedArchitectureError):
        return False
    return True


def _file_for(reader: ConfigReader) -> FamilyFile:
    files, name = family_files(), _type_of(reader)
    if name in files:
        return files[name]
    known = f"supported are {', '.join(model_types())}"
    model_type, _, tower = name.partition("/")
    if not any(reader.has(key) for key in SIGNS_OF_A_TOWER):
        lacking = (
            "there is no `vision_encoder`"
            if reader.source == MISTRAL_FORMAT
            else f"model_type {model_type!r} has no `vision_config` or the like"
        )
        raise NoVisionTowerError(f"{reader.source}: {lacking}: this checkpoint holds no vision tower; {known}")
    what = f"model_type {model_type!r}" + (f" with a tower {tower!r}" if tower else "")
    raise UnsupportedArchitectureError(f"{reader.source}: {what} is not supported; {known}")


def _type_of(reader: ConfigReader) -> str:
    """The name under which a family file would claim the configuration."""
    model_type = reader.get(str, "model_type", default="")
    if reader.source == MISTRAL_FORMAT and reader.has("vision_encoder"):
        return MISTRAL_FORMAT
    tower = reader.get(str, "vision_config.model_type", default="")
    # Some models come with several towers, and the tower decides; others only repeat their own name there.
    several = any(claimed.startswith(f"{model_type}/") for claimed in family_files())
    return f"{model_type}/{tower}" if tower and several else model_type


def declared_dtype(reader: ConfigReader) -> torch.dtype | None:
    """What a configuration says the model is computed in, if a tower can be."""
    for section in ("", "vision_config.", "text_config."):
        for key in (f"{section}dtype", f"{section}torch_dtype"):
            if reader.has(key):
                return DTYPES.get(reader.get(str, key).removeprefix("torch."))
    return None
