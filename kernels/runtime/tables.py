"""Tuned launch configurations: which table files there are, and what they say of a launch.

A table is a JSON file of one GPU (``NVIDIA_H200.json``: measured there) or of one architecture (``sm_90.json``: predicted
from what the configurations compile to).  It is looked for in these places, first found first:

1. ``$TRITONTOWER_TUNED_CONFIG_FOLDER``: the GPU's table, then the architecture's;
2. the user's cache folder (:func:`user_folder`): the GPU's table;
3. the folder ``tuned`` beside this file: the GPU's table;
4. the user's cache folder, then ``tuned``: the architecture's table.

An entry belongs to a kernel, a dtype, the constants of a tower (widths, activation …) and *sizes* (rows, longest
segment).  Sizes fall into buckets of half a power of two.  Where no entry has the wanted bucket, the nearest one of the
same kernel, dtype and constants counts, up to :data:`FARTHEST` buckets away; beyond that the next table answers.  For the
kernels of :data:`SAME_FOR_ALL_SIZES` the nearest counts however far it is.  An entry that cuts K into parts says nothing of
more rows than :data:`SPLIT_ROWS`.

An entry is ignored when the code that decides how the kernel runs is not the one that it was found for (``source``, see
:mod:`.source_digest`), and a measured one also when Triton's minor version is another.  A file that breaks a rule of
:mod:`.tables_schema` is ignored as a whole, with one warning that names the file and the reason.  Nothing is read from
disk after the first question of a process.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import config
from ._triton import HAS_TRITON, triton
from .source_digest import source_digest
from .tables_schema import (
    SCHEMA,
    Table,
    check_config,
    check_table,
    configuration,
    dtype_name,
    file_stem,
    read_table,
    triton_minor,
    unproven,
)

__all__ = [
    "FARTHEST",
    "FOLDER_VARIABLE",
    "SAME_FOR_ALL_SIZES",
    "SCHEMA",
    "SPLIT_ROWS",
    "Identity",
    "Table",
    "bucket",
    "cache_folder",
    "check_config",
    "check_table",
    "configuration",
    "dtype_name",
    "find",
    "forget",
    "identity",
    "is_current",
    "packaged_folder",
    "read_table",
    "source_digest",
    "table_name",
    "table_paths",
    "triton_minor",
    "tuned",
    "unproven",
    "user_folder",
]

logger = logging.getLogger("tritontower")

FOLDER_VARIABLE = "TRITONTOWER_TUNED_CONFIG_FOLDER"

FARTHEST = 4
"""How many buckets an entry may be away from the sizes that it answers for: a factor of four."""

SAME_FOR_ALL_SIZES = ("attention", "norm", "patch_projection")
"""Kernels whose configurations have fields in common for all sizes, because they decide the order of a row's sums.

The first table that knows such a launch at all answers for every size: two tables would not agree in those fields.
"""

SPLIT_ROWS = 1024
"""Rows up to whose bucket K may be cut: every part has fp32 sums of all rows and columns in a workspace."""

Key = tuple[str, str, tuple[tuple[str, Any], ...], tuple[str, ...]]


# -- where tables are -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What decides which tables belong to a device."""

    gpu: str
    """Its name as the driver gives it; empty for an architecture without a device."""
    architecture: str
    """Among ``configs.ARCHITECTURES``."""
    capability: str = ""
    """``"9.0"``, or AMD's own name of the chip."""
    multiprocessors: int = 0


@lru_cache
def _identity(index: int) -> Identity:
    properties = torch.cuda.get_device_properties(index)
    chip = str(properties.gcnArchName).split(":")[0] if torch.version.hip else f"{properties.major}.{properties.minor}"
    return Identity(
        gpu=properties.name,
        architecture=config.architecture(torch.device("cuda", index)),
        capability=chip,
        multiprocessors=properties.multi_processor_count,
    )


def identity(device: torch.device) -> Identity:
    """The identity of a CUDA or ROCm device."""
    return _identity(torch.cuda.current_device() if device.index is None else device.index)


def table_name(gpu: str) -> str:
    """The file name of a GPU's (or an architecture's) table: ``"NVIDIA H200"`` → ``"NVIDIA_H200.json"``.

    Raises:
        ValueError: nothing of the name can stand in that of a file.
    """
    stem = file_stem(gpu)
    if not stem:
        raise ValueError(f"{gpu!r} has no letter or digit (a-z, 0-9) to name a table by")
    return f"{stem}.json"


def packaged_folder() -> Path:
    """The folder of the tables that come with the package."""
    return Path(__file__).parent.parent / "tuned"


def cache_folder() -> Path | None:
    """Where things are kept between runs: ``$TRITONTOWER_CACHE``, else ``tritontower`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME`` or ``~/.cache``; ``None`` where the user has no home folder either.
    """
    if own := os.environ.get("TRITONTOWER_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritontower"
    except RuntimeError:
        return None


def user_folder() -> Path | None:
    """Where this user's tables are: ``tuned`` in the cache folder, if there is one."""
    cache = cache_folder()
    return None if cache is None else cache / "tuned"


def table_paths(gpu: str, architecture: str) -> list[Path]:
    """The files that may hold a device's configurations, the one that counts most first; they need not exist.

    ``gpu`` is empty where there is no device: then only the architecture's tables count.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    user, packaged = user_folder(), packaged_folder()
    places: list[tuple[Path | None, str]] = [
        (user, gpu),
        (packaged, gpu),
        (user, architecture),
        (packaged, architecture),
    ]
    if chosen:
        places = [(Path(chosen), gpu), (Path(chosen), architecture), *places]
    return [folder / table_name(name) for folder, name in places if folder is not None and file_stem(name)]


# -- questions --------------------------------------------------------------------------------------------------------


def bucket(size: int) -> int:
    """Which half power of two ``size`` is nearest to: 4096 → 24, 5793 → 25, 8192 → 26."""
    return round(2 * math.log2(max(1, size)))


class _Entries:
    """One file's entries that count here, by what they belong to."""

    def __init__(self, table: Table) -> None:
        self.path = table.path
        self.measured = bool(table.key["gpu"])
        self.by_key: dict[Key, list[dict[str, Any]]] = {}
        self.stale: dict[str, int] = {}
        for entry in table.entries:
            if is_current(entry):
                key = _key(entry["kernel"], entry["dtype"], entry["constants"], entry["sizes"])
                self.by_key.setdefault(key, []).append(entry)
            else:
                self.stale[entry["kernel"]] = self.stale.get(entry["kernel"], 0) + 1

    @property
    def kernels(self) -> set[str]:
        return {key[0] for key in self.by_key}

    def nearest(self, key: Key, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """The entry in the bucket of ``sizes`` or the one that is the fewest buckets away; of two the larger.

        ``None`` where all are too far away, or say nothing of so many rows.
        """

        def away(entry: dict[str, Any]) -> tuple[int, int]:
            steps = [bucket(entry["sizes"][name]) - bucket(size) for name, size in sizes.items()]
            return sum(map(abs, steps)), -sum(steps)

        known = self.by_key.get(key, ())
        if bucket(sizes.get("rows", 1)) > bucket(SPLIT_ROWS):
            known = [entry for entry in known if entry["config"].get("split", 1) == 1]
        best = min(known, key=away, default=None)
        if best is None or key[0] in SAME_FOR_ALL_SIZES or away(best)[0] <= FARTHEST:
            return best
        return None


def is_current(entry: Mapping[str, Any]) -> bool:
    """Whether an entry was found for the kernels, and if it was measured for the Triton, that are here."""
    if entry["source"] != source_digest(entry["kernel"]):
        return False
    same = HAS_TRITON and triton_minor(entry["triton"]) == triton_minor(str(triton.__version__))
    return entry["microseconds"] is None or same


def _key(kernel: str, dtype: str, constants: Mapping[str, Any], sizes: Mapping[str, int]) -> Key:
    return kernel, dtype, tuple(sorted(constants.items())), tuple(sorted(sizes))


_files: dict[Path, _Entries | None] = {}
_tables: dict[Identity, list[_Entries]] = {}
_answers: dict[tuple[Any, ...], dict[str, Any] | None] = {}
_warned: set[tuple[str, str]] = set()


def forget() -> None:
    """Drops everything that was read, so that files written since then count."""
    for memory in (_files, _tables, _answers):
        memory.clear()


def _read(path: Path) -> _Entries | None:
    if path not in _files:
        try:
            _files[path] = _Entries(read_table(path))
        except FileNotFoundError:
            _files[path] = None
        except (OSError, ValueError) as error:
            logger.warning("the table of tuned configurations %s is ignored: %s", path, error)
            _files[path] = None
    return _files[path]


def _tables_of(who: Identity) -> list[_Entries]:
    if who not in _tables:
        chosen = os.environ.get(FOLDER_VARIABLE)
        if chosen and (FOLDER_VARIABLE, chosen) not in _warned and not Path(chosen).is_dir():
            _warned.add((FOLDER_VARIABLE, chosen))
            logger.warning("%s names %r, which is no folder: no tables are read from there", FOLDER_VARIABLE, chosen)
        found = [_read(path) for path in dict.fromkeys(table_paths(who.gpu, who.architecture))]
        _tables[who] = [entries for entries in found if entries is not None]
    return _tables[who]


def find(
    kernel: str, who: Identity, dtype: str, constants: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[dict[str, Any], Path] | None:
    """The entry that counts for a launch on ``who``, and the file that it comes from; ``None`` where none does."""
    key = _key(kernel, dtype, constants, sizes)
    for entries in _tables_of(who):
        entry = entries.nearest(key, sizes)
        if entry is not None:
            return entry, entries.path
    return None


def tuned(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    constants: Mapping[str, object],
    sizes: Mapping[str, int],
) -> dict[str, Any] | None:
    """The fields of the configuration that the tables hold for a launch, or ``None``: then the default is the best known.

    Args:
        kernel: the kernel's file, such as ``"linear"``.
        device: where it is launched; anywhere but on a GPU the answer is ``None``.
        dtype: of the activations.
        constants: what the launch has in common with every other of its place in the tower, such as widths.
        sizes: what varies from pass to pass, at least 1; the answer depends on their buckets only.

    The first answer of a process reads the tables; from then on it is a look-up in memory.
    """
    if device.type != "cuda":
        return None
    who = identity(device)
    question = (
        kernel, who, dtype, tuple(sorted(constants.items())), tuple((n, bucket(s)) for n, s in sizes.items())
    )  # fmt: skip
    try:
        answer = _answers[question]
    except KeyError:
        _warn_unmeasured(kernel, who)
        found = find(kernel, who, dtype_name(dtype), constants, sizes)
        answer = _answers[question] = None if found is None else found[0]["config"]
    return None if answer is None else dict(answer)


def _warn_unmeasured(kernel: str, who: Identity) -> None:
    if (kernel, who.gpu) in _warned:
        return
    _warned.add((kernel, who.gpu))
    tables = [entries for entries in _tables_of(who) if entries.measured]
    if any(kernel in entries.kernels for entries in tables):
        return
    stale = sum(entries.stale.get(kernel, 0) for entries in tables)
    reason = f"{stale} were found for another release of it or of Triton" if stale else "none was measured"
    logger.warning(
        "no measured configurations of the kernel %s for %s (%s): it runs with predicted or default ones; "
        "`tritontower tune MODEL` measures them here",
        kernel,
        who.gpu,
        reason,
    )
