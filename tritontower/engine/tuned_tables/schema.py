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
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_LIMITS = {"num_warps": (1, 32), "num_stages": (1, 8), "split": (1, 64), "group_rows": (1, 64), "rows": (1, 1024)}
"""Field of a configuration → its smallest and largest value; blocks have a rule of their own."""
_TABLE = {"schema": "any", "key": "any", "entries": "any"}
_KEY = {
    "gpu": "text",
    "architecture": SHARED_MEMORY_LIMIT,
    "capability": "text",
    "multiprocessors": (0, 100_000),
    "triton": "text",
    "ptxas": "text or null",
}
_ENTRY = {
    "kernel": KERNEL_NAME,
    "source": re.compile(r"[0-9a-f]{12}"),
    "triton": "text",
    "dtype": _ITEMSIZES,
    "constants": "values",
    "sizes": "values",
    "config": "values",
    "microseconds": "number",
    "runner_up": "any",
    "verified": "number",
    "date": re.compile(r"\d{4}-\d{2}-\d{2}"),
}
_RUNNER_UP = {"config": "values", "microseconds": "number"}


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
    """Reads and checks a table; raises :class:`OSError`, or :class:`ValueError` that names the field and the rule."""
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
    table = _check_fields(content, "the table", _TABLE)
    if table["schema"] != SCHEMA or isinstance(table["schema"], bool):
        raise ValueError(f"schema must be {SCHEMA}, got {str(table['schema'])[:20]!r}")
    key = _check_fields(table["key"], "key", _KEY)
    if not file_stem(key["gpu"]):
        raise ValueError("key.gpu must have a letter or digit (a-z, 0-9) to name a table by")
    entries = table["entries"]
    if not isinstance(entries, list) or len(entries) > LARGEST_TABLE:
        raise ValueError(f"entries must be a list of at most {LARGEST_TABLE}")
    for number, entry in enumerate(entries):
        where = f"entries[{number}]"
        _check_fields(entry, where, _ENTRY)
        for name, value in entry["sizes"].items():
            _check(value, f"{where}.sizes.{name}", (1, LARGEST_NUMBER))
        _check_config(entry, entry["config"], f"{where}.config", key["architecture"])
        if entry["runner_up"] is not None:
            runner_up = _check_fields(entry["runner_up"], f"{where}.runner_up", _RUNNER_UP)
            _check_config(entry, runner_up["config"], f"{where}.runner_up.config", key["architecture"])


def _check_config(entry: Mapping[str, Any], fields: Mapping[str, Any], where: str, architecture: str) -> None:
    """Checks that a chip of ``architecture`` could launch a configuration.

    Missing fields count as the smallest value that they can have.
    """
    for name, value in fields.items():
        is_block = name.startswith("block_")
        if is_block or name in _LIMITS:
            _check(value, f"{where}.{name}", (16, 4096) if is_block else _LIMITS[name])
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


def _check_fields(value: object, where: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that ``value`` is an object with exactly the fields of ``rules``, and each field by its rule."""
    if not isinstance(value, dict) or value.keys() != rules.keys():
        raise ValueError(f"{where} must be an object with exactly {', '.join(sorted(rules))}")
    for name, rule in rules.items():
        _check(value[name], f"{where}.{name}", rule)
    return value


def _check(value: Any, where: str, rule: Any) -> None:
    """Checks a value by its rule: a pattern, the smallest and largest integer, the allowed texts, or a kind."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if rule == "any" or (rule == "text or null" and value is None):
        return
    if isinstance(rule, re.Pattern):
        valid, form = isinstance(value, str) and bool(rule.fullmatch(value)), f"have the form {rule.pattern}"
    elif isinstance(rule, tuple):
        valid = is_number and isinstance(value, int) and rule[0] <= value <= rule[1]
        form = f"be an integer from {rule[0]} to {rule[1]}"
    elif isinstance(rule, Mapping):
        valid, form = isinstance(value, str) and value in rule, f"be one of {', '.join(sorted(rule))}"
    elif rule == "number":
        valid, form = is_number and 0 <= value <= 1e15, "be a number from 0 to 1e15"
    elif rule == "values":
        valid, form = isinstance(value, dict) and len(value) <= 32, "be an object of at most 32 names"
    else:
        valid = isinstance(value, str) and len(value) <= LARGEST_TEXT and value.isprintable()
        form = f"be a line of at most {LARGEST_TEXT} characters"
    if not valid:
        raise ValueError(f"{where} must {form}")
    for name, each in value.items() if rule == "values" else ():
        _check(name, f"a name in {where}", _NAME)
        if each is not None and not isinstance(each, bool):
            _check(each, f"{where}.{name}", "text" if isinstance(each, str) else "number")
