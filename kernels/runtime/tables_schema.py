"""What may stand in a table of tuned configurations: its schema, the limits of every value, and how it is read.

Tables may come from anywhere.  They are data and stay data: read as JSON up to a limit, every value checked against a type
and a range, and a file that breaks a rule is refused as a whole, with the reason.  Configurations that no chip of the
table's architecture could launch are refused too, and those that only a measurement on the very GPU can vouch for
(``vendor``, the variant ``"specialized"``) where there is none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from .config import SHARED_MEMORY_LIMIT

__all__ = [
    "KERNEL_NAME",
    "LARGEST_TILE",
    "SCHEMA",
    "Table",
    "check_config",
    "check_table",
    "configuration",
    "dtype_name",
    "file_stem",
    "read_table",
    "triton_minor",
    "unproven",
]

SCHEMA = 1

LARGEST_FILE = 8 * 2**20
LARGEST_TABLE = 20_000
LARGEST_TEXT = 200
LARGEST_NUMBER = 2**31 - 1
LARGEST_TILE = 128 * 512
"""Values that one program may hold at a time: the 32-bit registers, or the tensor memory, of a multiprocessor."""

KERNEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LIMITS = {
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "split": (1, 64),
    "group_rows": (1, 64),
    "rows": (1, 1024),
}
"""Field of a configuration → its least and largest value; blocks have a rule of their own."""

Config = TypeVar("Config")


def file_stem(name: str) -> str:
    """What the table of a GPU or an architecture is called, without ``.json``; empty if nothing is left of ``name``."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("._")[:100]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def triton_minor(version: str) -> str:
    """``"3.7.1"`` → ``"3.7"``."""
    return ".".join(version.split(".")[:2])


@dataclass(frozen=True)
class Table:
    """A table that was read and checked."""

    path: Path
    key: Mapping[str, Any]
    entries: list[dict[str, Any]]


def read_table(path: Path) -> Table:
    """The table in ``path``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a table, with what is wrong and where.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes, the limit of a table")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({type(error).__name__})") from None
    check_table(content)
    return Table(path, content["key"], content["entries"])


def check_table(content: object) -> None:
    """Raises :class:`ValueError` where ``content`` is not a table of this schema: what is wrong, and where."""
    table = _mapping(content, "the table", {"schema", "key", "entries"})
    if table["schema"] != SCHEMA or isinstance(table["schema"], bool):
        raise ValueError(f"schema is {str(table['schema'])[:20]!r}; this release reads schema {SCHEMA}")
    key = _mapping(table["key"], "key", {"gpu", "architecture", "capability", "multiprocessors", "triton", "ptxas"})
    for name in ("gpu", "architecture", "capability", "triton", "ptxas"):
        _text(key[name], f"key.{name}", optional=name in ("gpu", "ptxas"))
    if key["gpu"] and not file_stem(key["gpu"]):
        raise ValueError("key.gpu has no letter or digit (a-z, 0-9) to name a table by")
    if key["architecture"] not in SHARED_MEMORY_LIMIT:
        raise ValueError(f"key.architecture is none of {', '.join(SHARED_MEMORY_LIMIT)}")
    _whole(key["multiprocessors"], "key.multiprocessors", 0, 100_000)
    entries = table["entries"]
    if not isinstance(entries, list) or len(entries) > LARGEST_TABLE:
        raise ValueError(f"entries is not a list of at most {LARGEST_TABLE}")
    for number, entry in enumerate(entries):
        _check_entry(entry, f"entries[{number}]", key["architecture"], gpu=bool(key["gpu"]))


_ENTRY = {
    "kernel", "source", "triton", "dtype", "constants", "sizes", "config", "microseconds", "tflops", "predicted",
    "static", "runner_up", "verified", "date",
}  # fmt: skip


def _check_entry(entry: object, where: str, architecture: str, *, gpu: bool) -> None:
    checked = _mapping(entry, where, _ENTRY)
    _matches(checked["kernel"], f"{where}.kernel", KERNEL_NAME)
    _matches(checked["source"], f"{where}.source", _DIGEST)
    _matches(checked["date"], f"{where}.date", _DATE)
    _text(checked["triton"], f"{where}.triton")
    if not isinstance(checked["dtype"], str) or checked["dtype"] not in _ITEMSIZES:
        raise ValueError(f"{where}.dtype is none of {', '.join(sorted(_ITEMSIZES))}")
    _facts(checked["constants"], f"{where}.constants")
    for name, value in _facts(checked["sizes"], f"{where}.sizes").items():
        _whole(value, f"{where}.sizes.{name}", 1, LARGEST_NUMBER)
    check_config(checked["config"], f"{where}.config")
    _check_launch(checked, checked["config"], f"{where}.config", architecture)
    measured = checked["microseconds"] is not None and checked["verified"] is not None
    for name in ("microseconds", "tflops", "verified"):
        _number(checked[name], f"{where}.{name}", optional=True)
    for name in ("predicted", "static"):
        if checked[name] is not None:
            for inner, value in _facts(checked[name], f"{where}.{name}").items():
                _number(value, f"{where}.{name}.{inner}")
    if checked["runner_up"] is not None:
        runner_up = _mapping(checked["runner_up"], f"{where}.runner_up", {"config", "microseconds"})
        check_config(runner_up["config"], f"{where}.runner_up.config")
        _check_launch(checked, runner_up["config"], f"{where}.runner_up.config", architecture)
        _number(runner_up["microseconds"], f"{where}.runner_up.microseconds", optional=True)
    if checked["microseconds"] is not None and not gpu:
        raise ValueError(f"{where} has a measured time, but key.gpu names no GPU that it was measured on")
    if not measured and unproven(checked["config"]):
        raise ValueError(
            f"{where}.config is {unproven(checked['config'])}, which only a time and a check of the numbers on the GPU "
            "itself can vouch for; both are missing"
        )


def unproven(config: Mapping[str, Any]) -> str:
    """Which choice in ``config`` needs proof from the GPU itself, in words; empty if none does."""
    if config.get("vendor"):
        return "the vendor's own product"
    return "the variant 'specialized'" if config.get("variant") == "specialized" else ""


def check_config(config: object, where: str) -> None:
    """Raises :class:`ValueError` where ``config`` cannot be the fields of any configuration."""
    for name, value in _facts(config, where).items():
        block = name.startswith("block_")
        if block:
            _whole(value, f"{where}.{name}", 16, 4096)
        elif name in _LIMITS:
            _whole(value, f"{where}.{name}", *_LIMITS[name])
        if (block or name in ("num_warps", "rows")) and value & (value - 1):
            raise ValueError(f"{where}.{name} is {value}; it has to be a power of two")


def _check_launch(entry: Mapping[str, Any], config: Mapping[str, Any], where: str, architecture: str) -> None:
    """Raises :class:`ValueError` where no chip of ``architecture`` could launch ``config`` for such an entry.

    Fields that are missing count as the least that they can be: what is incomplete is no configuration of any kernel.
    """
    constants = entry["constants"]
    if "block_inner" in config:
        # Each column of a gated product is two of its weight.
        columns = config.get("block_columns", 16) * (2 if "gated" in str(constants.get("activation")) else 1)
        rows = config.get("block_rows", 16)
        values, buffered = rows * columns, config.get("num_stages", 1) * (rows + columns) * config["block_inner"]
    elif "block_queries" in config:
        rows, keys = config["block_queries"], config.get("block_keys", 16)
        width = _least(constants.get("head_dim"))
        values, buffered = rows * max(keys, width), (rows + 2 * config.get("num_stages", 1) * keys) * width
    else:
        values, buffered = config.get("rows", 1) * _least(constants.get("width")), 0
    if values > LARGEST_TILE:
        raise ValueError(f"{where} has tiles of {values} values; the limit is {LARGEST_TILE}")
    shared_memory, limit = buffered * _ITEMSIZES[entry["dtype"]], SHARED_MEMORY_LIMIT[architecture]
    if shared_memory > limit:
        raise ValueError(
            f"{where} takes {shared_memory} bytes of shared memory; the limit of {architecture} is {limit}"
        )


def _least(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1


def _mapping(value: object, where: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"{where} is not an object with exactly {', '.join(sorted(names))}")
    return value


def _facts(value: object, where: str) -> dict[str, Any]:
    """An object of a few names with numbers, switches, texts or nothing."""
    if not isinstance(value, dict) or len(value) > 32:
        raise ValueError(f"{where} is not an object of at most 32 names")
    for name, fact in value.items():
        _matches(name, f"a name in {where}", KERNEL_NAME)
        if isinstance(fact, str):
            _text(fact, f"{where}.{name}")
        elif fact is not None and not isinstance(fact, bool):
            _number(fact, f"{where}.{name}")
    return value


def _matches(value: object, where: str, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"{where} does not have the form {pattern.pattern}")


def _text(value: object, where: str, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or len(value) > LARGEST_TEXT or not value.isprintable():
        raise ValueError(f"{where} is not a line of at most {LARGEST_TEXT} characters")


def _number(value: object, where: str, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1e15
    if not fits:
        raise ValueError(f"{where} is not a number from 0 to 1e15")


def _whole(value: object, where: str, least: int, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
        raise ValueError(f"{where} is not a whole number from {least} to {largest}")


def configuration(kind: type[Config], found: Mapping[str, Any] | None) -> Config | None:
    """``kind(**found)`` for one of the kernels' configuration classes; ``None`` where ``found`` does not fit it.

    A field of ``kind`` that has a default may be missing; a name that is no field, or a value of another type than the
    field's, makes the whole of ``found`` unusable: it was written for another release.
    """
    if found is None:
        return None
    types = get_type_hints(kind)
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if not set(found) <= known or any(not _is_of(value, types[name]) for name, value in found.items()):
        return None
    try:
        return kind(**found)
    except (TypeError, ValueError):
        return None


def _is_of(value: object, wanted: Any) -> bool:
    if wanted in (int, bool):
        return type(value) is wanted
    # Choices are annotated as literals of texts.
    return isinstance(value, str)
