"""Whether a checkpoint holds a vision tower, and the configuration file that says so."""

from pathlib import Path

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.hub import CONFIG_NAME, locate
from tritontower.errors import CheckpointNotFoundError

from .registry import MISTRAL_FORMAT, has_tower

__all__ = ["configuration_in", "has_vision"]


def configuration_in(folder: Path) -> ConfigReader:
    """The checkpoint's ``config.json``, or Mistral's own file where there is none.

    Raises:
        CheckpointNotFoundError: the folder has neither.
        ConfigError: the file cannot be read.
    """
    for name in (CONFIG_NAME, MISTRAL_FORMAT):
        if (folder / name).is_file():
            return ConfigReader.from_file(folder / name)
    raise CheckpointNotFoundError(
        f"{folder} holds neither {CONFIG_NAME} nor {MISTRAL_FORMAT}; pass the folder that a checkpoint's configuration and "
        "weight files lie in"
    )


def has_vision(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """Whether a checkpoint holds a vision tower that can be loaded; only its configuration is read.

    Args:
        model: a local folder or a hub id.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointError, ConfigError: there is no such checkpoint, or its ``config.json`` cannot be read.
    """
    folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return has_tower(configuration_in(folder))
