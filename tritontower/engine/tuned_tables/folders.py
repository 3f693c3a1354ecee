"""Identity of a GPU, and the files that may hold its table."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tritontower.kernels.runtime.config import architecture

from .schema import file_stem
from .source_digest import kernels_folder

FOLDER_VARIABLE = "TRITONTOWER_TUNED_CONFIG_FOLDER"


@dataclass(frozen=True)
class Identity:
    """Properties of a GPU that its table names; ``capability`` is ``"9.0"``, or AMD's name of the chip."""

    gpu: str
    architecture: str
    capability: str
    multiprocessors: int


@lru_cache
def _identify(index: int) -> Identity:
    properties = torch.cuda.get_device_properties(index)
    chip = str(properties.gcnArchName).split(":")[0] if torch.version.hip else f"{properties.major}.{properties.minor}"
    name = architecture(torch.device("cuda", index))
    return Identity(properties.name, name, chip, properties.multi_processor_count)


def identify(device: torch.device) -> Identity:
    """Returns the identity of a CUDA or ROCm device."""
    return _identify(torch.cuda.current_device() if device.index is None else device.index)


def table_name(gpu: str) -> str:
    """Returns the file name of a GPU's table: ``"NVIDIA H200"`` → ``"NVIDIA_H200.json"``."""
    stem = file_stem(gpu)
    if not stem:
        raise ValueError(f"the name of a GPU must have a letter or digit (a-z, 0-9) to name a table by, got {gpu!r}")
    return f"{stem}.json"


def packaged_folder() -> Path:
    """Returns the folder of the tables that come with the package; it may be empty."""
    return kernels_folder() / "tuned"


def cache_folder() -> Path | None:
    """Returns ``$TRITONTOWER_CACHE``, else ``tritontower`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``None`` without a home."""
    if own := os.environ.get("TRITONTOWER_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritontower"
    except RuntimeError:
        return None


def user_folder() -> Path | None:
    """Returns the folder of this user's tables: ``tuned`` in the cache folder."""
    cache = cache_folder()
    return None if cache is None else cache / "tuned"


def table_paths(gpu: str) -> list[Path]:
    """Lists the files that may hold a GPU's table, the preferred one first; they need not exist."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(chosen) if chosen else None, user_folder(), packaged_folder()]
    return [folder / table_name(gpu) for folder in folders if folder is not None and file_stem(gpu)]
