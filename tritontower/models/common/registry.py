"""Lookup of the model file for a checkpoint, by the ``model_type`` in its ``config.json``.

Each model file declares its ``MODEL_TYPES``; adding a model is adding a file to ``tritontower/models/``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import cast

import torch

import tritontower.models
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.hub import CONFIG_NAME, locate
from tritontower.devices import DTYPES
from tritontower.errors import CheckpointNotFoundError, NoVisionTowerError, UnsupportedArchitectureError

from .family import MISTRAL_FORMAT, Family, FamilyFile, FamilySummary, read_summary

VISION_KEYS = (
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
"""A configuration with a vision tower, supported or not, has at least one of these keys."""


@lru_cache
def list_family_files() -> Mapping[str, FamilyFile]:
    """Model type → model file."""
    found: dict[str, FamilyFile] = {}
    for module_info in iter_modules(tritontower.models.__path__):
        if module_info.ispkg:
            continue
        module = cast("FamilyFile", import_module(f"tritontower.models.{module_info.name}"))
        found.update(dict.fromkeys(module.MODEL_TYPES, module))
    return found


def list_summaries() -> list[FamilySummary]:
    """Summaries of all model files, in the order of their names."""
    return [read_summary(name) for file in dict.fromkeys(list_family_files().values()) for name in file.PUBLISHED]


def model_types() -> Sequence[str]:
    """Every supported model type, as in :attr:`FamilyFile.MODEL_TYPES`."""
    return sorted(list_family_files())


def read_family(reader: ConfigReader) -> Family:
    """Reads the tower that a checkpoint's configuration describes.

    Raises:
        UnsupportedArchitectureError: the model type is not in :func:`model_types`.
        NoVisionTowerError: the model has no vision tower.
        ConfigError: a value is not supported.
    """
    return replace(_find_file(reader).read(reader), model_type=_read_model_type(reader))


def open_config(folder: Path) -> ConfigReader:
    """Opens the checkpoint's ``config.json``, or Mistral's own ``params.json`` if there is none."""
    for name in (CONFIG_NAME, MISTRAL_FORMAT):
        if (folder / name).is_file():
            return ConfigReader.from_file(folder / name)
    raise CheckpointNotFoundError(
        f"{folder} holds neither {CONFIG_NAME} nor {MISTRAL_FORMAT}; pass the folder with the checkpoint's configuration and "
        "weight files"
    )


def has_vision(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """Returns True if a checkpoint names a supported vision tower; only its configuration is read, and not checked.

    Args:
        model: a local folder or a hub id.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointError, ConfigError: there is no such checkpoint, or its ``config.json`` cannot be read.
    """
    folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        _find_file(open_config(folder))
    except (NoVisionTowerError, UnsupportedArchitectureError):
        return False
    return True


def declared_dtype(reader: ConfigReader) -> torch.dtype | None:
    """Returns the dtype that the configuration declares, if a tower can be computed in it."""
    for section in ("", "vision_config.", "text_config."):
        for key in (f"{section}dtype", f"{section}torch_dtype"):
            if reader.has(key):
                return DTYPES.get(reader.get(str, key).removeprefix("torch."))
    return None


def _find_file(reader: ConfigReader) -> FamilyFile:
    files, name = list_family_files(), _read_model_type(reader)
    if name in files:
        return files[name]
    known = f"supported are {', '.join(model_types())}"
    model_type, _, tower = name.partition("/")
    if not any(reader.has(key) for key in VISION_KEYS):
        missing = f"model_type {model_type!r} has no `vision_config` or the like"
        if reader.source == MISTRAL_FORMAT:
            missing = "there is no `vision_encoder`"
        raise NoVisionTowerError(f"{reader.source}: {missing}: this checkpoint holds no vision tower; {known}")
    what = f"model_type {model_type!r}" + (f" with a tower {tower!r}" if tower else "")
    raise UnsupportedArchitectureError(f"{reader.source}: {what} is not supported; {known}")


def _read_model_type(reader: ConfigReader) -> str:
    """Returns the name under which a model file would declare the configuration."""
    model_type = reader.get(str, "model_type", default="")
    if reader.source == MISTRAL_FORMAT and reader.has("vision_encoder"):
        return MISTRAL_FORMAT
    tower = reader.get(str, "vision_config.model_type", default="")
    # Some models come with several towers, and the tower decides; others only repeat their own name there.
    has_several_towers = any(declared.startswith(f"{model_type}/") for declared in list_family_files())
    return f"{model_type}/{tower}" if tower and has_several_towers else model_type
