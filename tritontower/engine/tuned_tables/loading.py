"""Reading the tables of a GPU, and handing their current entries to the kernels' registry.

An entry is ignored if the source that decides how its kernel runs has changed (:mod:`.source_digest`), or if it was measured
with another minor version of Triton.  A file that breaks a rule of :mod:`.schema` is ignored as a whole, with one warning
that names the file and the reason.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime._triton import HAS_TRITON, triton

from .folders import FOLDER_VARIABLE, Identity, identify, table_paths
from .schema import read_table, triton_minor
from .source_digest import source_digest

logger = logging.getLogger("tritontower")


@dataclass(frozen=True)
class LoadedTable:
    """The current entries of a file."""

    path: Path
    table: registry.TunedTable
    current: int
    stale: int


def is_current(entry: Mapping[str, Any]) -> bool:
    """Returns whether an entry was measured with these kernels and this minor version of Triton."""
    same_triton = HAS_TRITON and triton_minor(entry["triton"]) == triton_minor(str(triton.__version__))
    return same_triton and entry["source"] == source_digest(entry["kernel"])


def load_tables(identity: Identity) -> list[LoadedTable]:
    """Reads the tables of a GPU, the preferred one first; files that cannot be used are logged and skipped."""
    loaded = []
    for path in dict.fromkeys(table_paths(identity.gpu)):
        try:
            entries = read_table(path).entries
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning("the table of tuned configurations %s is ignored: %s", path, error)
            continue
        current = [entry for entry in entries if is_current(entry)]
        loaded.append(LoadedTable(path, registry.TunedTable(current), len(current), len(entries) - len(current)))
    return loaded


def fill_registry(device: torch.device) -> None:
    """Hands the tables of ``device`` to the kernels' registry, once per process; does nothing on the CPU."""
    if device.type != "cuda":
        return
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in registry.filled_devices():
        _fill(device)


def reload_tables() -> None:
    """Reads the tables of all filled devices again; call it after a table was written."""
    for device in registry.filled_devices():
        _fill(device)


def _fill(device: torch.device) -> None:
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen and not Path(chosen).is_dir():
        logger.warning("%s must be a folder, got %r; no tables are read from there", FOLDER_VARIABLE, chosen)
    identity = identify(device)
    loaded = load_tables(identity)
    registry.fill(device, [each.table for each in loaded])
    if any(each.current for each in loaded):
        return
    stale = sum(each.stale for each in loaded)
    reason = f"{stale} are from another release of the kernels or of Triton" if stale else "none was measured"
    logger.warning(
        "no measured launch configurations for %s (%s): kernels use their defaults; `tritontower tune MODEL` measures them",
        identity.gpu,
        reason,
    )
