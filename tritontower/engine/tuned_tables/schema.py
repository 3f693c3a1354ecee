"""Schema of a table of tuned configurations: its fields, and the limits of every value.

Tables may come from anywhere.  They are read as JSON up to a size limit, and every value is checked against a type and a
range.  A file that breaks a rule is rejected as a whole, with the reason.  Configurations that no chip of the table's
architecture could launch are rejected too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritontower.kernels.runtime.config import SHARED_MEMORY_LIMIT

SCHEMA = 1

LARGEST_FILE = 8 * 2**20
LARGEST_TABLE = 20_000
LARGEST_TEXT = 200
LARGEST_NUMBER = 2**31 - 1
LARGEST_TILE = 128 * 512
"""Values that one program may hold at a time: the 32-bit registers, or the tensor memory, of a multiprocessor."""

KERNEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}\.[a-z][a-z0-9_]{0,62}")
"""Module path of a kernel under ``kernels/``."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LIMITS = {"num_warps": (1, 32), "num_stages": (1, 8), "split": (1, 64), "group_rows": (1, 64), "rows": (1, 1024)}
"""Field of a configuration → its smallest and largest value; blocks have a rule of their own."""
_TABLE = {"schema", "key", "entries"}
_KEY = {"gpu", "architecture", "capability", "multiprocessors", "triton", "ptxas"}
_ENTRY = {
    "kernel", "source", "triton", "dtype", "constants", "sizes", "config", "microseconds", "runner_up", "verified", "date",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table that was read and checked."""

    path: Path
    key: Mapping[str, Any]
    entries: list[dict[str, Any]]


def file_stem(gpu: str) -> str:
    """Returns the file name of a GPU's table without ``.json``; empty if ``gpu`` has no usable character."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", gpu).strip("._")[:100]


def triton_minor(version: str) -> str:
    """``"3.7.1"`` → ``"3.7"``."""
    return ".".join(version.split(".")[:2])


def read_table(path: Path) -> Table:
    """Reads and checks the table in ``path``.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a table; the message names the field.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"a table must have at most {LARGEST_FILE} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a table must be JSON ({type(error).__name__})") from None
    check_table(content)
    return Table(path, content["key"], content["entries"])


def check_table(content: object) -> None:
    """Checks a table; raises :class:`ValueError` that names the field and the rule."""
    table = _mapping(content, "the table", _TABLE)
    if table["schema"] != SCHEMA or isinstance(table["schema"], bool):
        raise ValueError(f"schema must be {SCHEMA}, got {str(table['schema'])[:20]!r}")
    key = _mapping(table["key"], "key", _KEY)
    for name in ("gpu", "architecture", "capability", "triton"):
        _text(key[name], f"key.{name}")
    if key["ptxas"] is not None:
        _text(key["ptxas"], "key.ptxas")
    if not file_stem(key["gpu"]):
        raise ValueError("key.gpu must have a letter or digit (a-z, 0-9) to name a table by")
    if key["architecture"] not in SHARED_MEMORY_LIMIT:
        raise ValueError(f"key.architecture must be one of {', '.join(SHARED_MEMORY_LIMIT)}")
    _integer(key["multiprocessors"], "key.multiprocessors", 0, 100_000)
    entries = table["entries"]
    if not isinstance(entries, list) or len(entries) > LARGEST_TABLE:
        raise ValueError(f"entries must be a list of at most {LARGEST_TABLE}")
    for number, entry in enumerate(entries):
        _check_entry(_mapping(entry, f"entries[{number}]", _ENTRY), f"entries[{number}]", key["architecture"])


def _check_entry(entry: Mapping[str, Any], where: str, architecture: str) -> None:
    for name, pattern in (("kernel", KERNEL_NAME), ("source", _DIGEST), ("date", _DATE)):
        _matches(entry[name], f"{where}.{name}", pattern)
    _text(entry["triton"], f"{where}.triton")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _ITEMSIZES:
        raise ValueError(f"{where}.dtype must be one of {', '.join(sorted(_ITEMSIZES))}")
    _values(entry["constants"], f"{where}.constants")
    for name, value in _values(entry["sizes"], f"{where}.sizes").items():
        _integer(value, f"{where}.sizes.{name}", 1, LARGEST_NUMBER)
    for name in ("microseconds", "verified"):
        _number(entry[name], f"{where}.{name}")
    _check_config(entry, entry["config"], f"{where}.config", architecture)
    if entry["runner_up"] is not None:
        runner_up = _mapping(entry["runner_up"], f"{where}.runner_up", {"config", "microseconds"})
        _check_config(entry, runner_up["config"], f"{where}.runner_up.config", architecture)
        _number(runner_up["microseconds"], f"{where}.runner_up.microseconds")


def _check_config(entry: Mapping[str, Any], config: object, where: str, architecture: str) -> None:
    """Checks the fields of a configuration, and that a chip of ``architecture`` could launch it.

    Missing fields count as the smallest value that they can have.
    """
    fields = _values(config, where)
    for name, value in fields.items():
        is_block = name.startswith("block_")
        if is_block or name in _LIMITS:
            _integer(value, f"{where}.{name}", *((16, 4096) if is_block else _LIMITS[name]))
        if (is_block or name in ("num_warps", "rows")) and value & (value - 1):
            raise ValueError(f"{where}.{name} must be a power of two, got {value}")
    constants = entry["constants"]
    if "block_inner" in fields:
        # Each column of a gated matmul is two columns of its weight.
        columns = fields.get("block_columns", 16) * (2 if "gated" in str(constants.get("activation")) else 1)
        rows = fields.get("block_rows", 16)
        values, buffered = rows * columns, fields.get("num_stages", 1) * (rows + columns) * fields["block_inner"]
    elif "block_queries" in fields:
        rows, keys, width = fields["block_queries"], fields.get("block_keys", 16), _width(constants.get("head_dim"))
        values, buffered = rows * max(keys, width), (rows + 2 * fields.get("num_stages", 1) * keys) * width
    else:
        values, buffered = fields.get("rows", 1) * _width(constants.get("width")), 0
    if values > LARGEST_TILE:
        raise ValueError(f"{where} must have tiles of at most {LARGEST_TILE} values, got {values}")
    shared_memory, limit = buffered * _ITEMSIZES[entry["dtype"]], SHARED_MEMORY_LIMIT[architecture]
    if shared_memory > limit:
        raise ValueError(
            f"{where} must take at most {limit} bytes of shared memory on {architecture}, got {shared_memory}"
        )


def _width(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1


def _mapping(value: object, where: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"{where} must be an object with exactly {', '.join(sorted(names))}")
    return value


def _values(value: object, where: str) -> dict[str, Any]:
    """Checks an object of at most 32 names with numbers, booleans, texts or null."""
    if not isinstance(value, dict) or len(value) > 32:
        raise ValueError(f"{where} must be an object of at most 32 names")
    for name, each in value.items():
        _matches(name, f"a name in {where}", _NAME)
        if isinstance(each, str):
            _text(each, f"{where}.{name}")
        elif each is not None and not isinstance(each, bool):
            _number(each, f"{where}.{name}")
    return value


def _matches(value: object, where: str, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"{where} must have the form {pattern.pattern}")


def _text(value: object, where: str) -> None:
    if not isinstance(value, str) or len(value) > LARGEST_TEXT or not value.isprintable():
        raise ValueError(f"{where} must be a line of at most {LARGEST_TEXT} characters")


def _number(value: object, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1e15:
        raise ValueError(f"{where} must be a number from 0 to 1e15")


def _integer(value: object, where: str, smallest: int, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise ValueError(f"{where} must be an integer from {smallest} to {largest}")
