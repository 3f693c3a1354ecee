"""Tuned launch configurations: which table files there are, what may stand in them, and what they say of a launch.

A table is a JSON file of one GPU (``NVIDIA_H200.json``: measured there) or of one architecture (``sm_90.json``: predicted
from what the configurations compile to).  It is looked for in these places, first found first:

1. ``$TRITONTOWER_TUNED_CONFIG_FOLDER``: the GPU's table, then the architecture's;
2. the user's cache folder (:func:`user_folder`): the GPU's table;
3. the folder ``tuned`` beside this file: the GPU's table;
4. the user's cache folder, then ``tuned``: the architecture's table.

An entry belongs to a kernel, a dtype, the constants of a tower (widths, activation …) and *sizes* (rows, longest
segment).  Sizes fall into buckets of half a power of two; where no entry has the wanted bucket, the nearest one of the
same kernel, dtype and constants counts.  An entry is ignored when the kernel's device code or launcher is not the one
that it was found for (``source``), and a measured one also when Triton's minor version is another.

Files may come from anywhere.  They are data and stay data: read as JSON up to a limit, every value checked against a type
and a range, and a file that breaks a rule is ignored as a whole, with one warning that names the file and the reason.
Configurations that only a measurement on the very GPU can vouch for (``vendor``, the variant ``"specialised"``) are
refused where there is none.  Nothing is read from disk after the first question of a process.
"""

import ast
import hashlib
import io
import json
import logging
import math
import os
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from . import configs
from ._triton import HAS_TRITON, triton

__all__ = [
    "FOLDER_VARIABLE",
    "SCHEMA",
    "Identity",
    "Table",
    "bucket",
    "check_table",
    "configuration",
    "dtype_name",
    "find",
    "forget",
    "identity",
    "packaged_folder",
    "read_table",
    "source_digest",
    "table_name",
    "table_paths",
    "triton_minor",
    "tuned",
    "user_folder",
]

logger = logging.getLogger("tritontower")

SCHEMA = 1
FOLDER_VARIABLE = "TRITONTOWER_TUNED_CONFIG_FOLDER"

LARGEST_FILE = 8 * 2**20
LARGEST_TABLE = 20_000
LARGEST_TEXT = 200
LARGEST_NUMBER = 2**31 - 1

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_DTYPES = {"float32", "float16", "bfloat16"}
_LIMITS = {
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "split": (1, 64),
    "group_rows": (1, 64),
    "rows": (1, 1024),
}
"""Field of a configuration → its least and largest value; blocks have a rule of their own."""

Config = TypeVar("Config")
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
        architecture=configs.architecture(torch.device("cuda", index)),
        capability=chip,
        multiprocessors=properties.multi_processor_count,
    )


def identity(device: torch.device) -> Identity:
    """The identity of a CUDA or ROCm device."""
    return _identity(torch.cuda.current_device() if device.index is None else device.index)


def table_name(gpu: str) -> str:
    """The file name of a GPU's (or an architecture's) table: ``"NVIDIA H200"`` → ``"NVIDIA_H200.json"``."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", gpu).strip("._")[:100] + ".json"


def packaged_folder() -> Path:
    """The folder of the tables that come with the package."""
    return Path(__file__).parent / "tuned"


def user_folder() -> Path | None:
    """Where this user's tables are: ``tuned`` in ``$TRITONTOWER_CACHE``, ``$XDG_CACHE_HOME/tritontower`` or ``~/.cache``.

    ``None`` where the user has no home folder either.
    """
    if own := os.environ.get("TRITONTOWER_CACHE"):
        return Path(own) / "tuned"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritontower" / "tuned"
    except RuntimeError:
        return None


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
    return [folder / table_name(name) for folder, name in places if folder is not None and name]


# -- what may stand in them -------------------------------------------------------------------------------------------


def bucket(size: int) -> int:
    """Which half power of two ``size`` is nearest to: 4096 → 24, 5793 → 25, 8192 → 26."""
    return round(2 * math.log2(max(1, size)))


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
    _whole(key["multiprocessors"], "key.multiprocessors", 0, 100_000)
    entries = table["entries"]
    if not isinstance(entries, list) or len(entries) > LARGEST_TABLE:
        raise ValueError(f"entries is not a list of at most {LARGEST_TABLE}")
    for number, entry in enumerate(entries):
        _check_entry(entry, f"entries[{number}]", gpu=bool(key["gpu"]))


_ENTRY = {
    "kernel", "source", "triton", "dtype", "constants", "sizes", "config", "microseconds", "tflops", "predicted",
    "static", "runner_up", "verified", "date",
}  # fmt: skip


def _check_entry(entry: object, where: str, *, gpu: bool) -> None:
    checked = _mapping(entry, where, _ENTRY)
    _matches(checked["kernel"], f"{where}.kernel", _NAME)
    _matches(checked["source"], f"{where}.source", _DIGEST)
    _matches(checked["date"], f"{where}.date", _DATE)
    _text(checked["triton"], f"{where}.triton")
    if not isinstance(checked["dtype"], str) or checked["dtype"] not in _DTYPES:
        raise ValueError(f"{where}.dtype is none of {', '.join(sorted(_DTYPES))}")
    _facts(checked["constants"], f"{where}.constants")
    for name, value in _facts(checked["sizes"], f"{where}.sizes").items():
        _whole(value, f"{where}.sizes.{name}", 1, LARGEST_NUMBER)
    check_config(checked["config"], f"{where}.config")
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
    return "the variant 'specialised'" if config.get("variant") == "specialised" else ""


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


def _mapping(value: object, where: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise ValueError(f"{where} is not an object with exactly {', '.join(sorted(names))}")
    return value


def _facts(value: object, where: str) -> dict[str, Any]:
    """An object of a few names with numbers, switches, texts or nothing."""
    if not isinstance(value, dict) or len(value) > 32:
        raise ValueError(f"{where} is not an object of at most 32 names")
    for name, fact in value.items():
        _matches(name, f"a name in {where}", _NAME)
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


# -- what an entry was found for --------------------------------------------------------------------------------------


@lru_cache
def source_digest(kernel: str) -> str | None:
    """12 hexadecimal digits of what decides how ``kernel`` runs; ``None`` where there is no such kernel file.

    They cover the functions under ``@triton.jit``, the launchers and the configuration classes of the kernel's file and
    of the siblings that it imports (and they import).  Comments, docstrings and layout have no say.
    """
    folder = Path(__file__).parent
    if _NAME.fullmatch(kernel) is None or not (folder / f"{kernel}.py").is_file():
        return None
    digest = hashlib.sha256()
    for name in sorted(_family(kernel, folder)):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if _counts(node):
                digest.update(f"{name}\n{' '.join(_words(text, node))}\n".encode())
    return digest.hexdigest()[:12]


def _family(kernel: str, folder: Path) -> set[str]:
    """The kernel file and all siblings that it imports, directly or not, by name."""
    found: set[str] = set()
    waiting = [kernel]
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if name in found or not path.is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def _counts(node: ast.stmt) -> bool:
    if isinstance(node, ast.ClassDef):
        return node.name.endswith("Config")
    if not isinstance(node, ast.FunctionDef):
        return False
    compiled = any(re.search(r"\bjit\b", ast.unparse(decorator)) for decorator in node.decorator_list)
    return compiled or re.match(r"_?launch", node.name) is not None


_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def _words(text: str, node: ast.stmt) -> Iterator[str]:
    """The tokens of a definition that mean something, the same under every Python version."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    lines = "\n".join(text.split("\n")[first - 1 : node.end_lineno])
    # Docstrings say nothing to the compiler, and formatted texts, which are tokens of another kind in every release, are
    # there for messages.
    depth, previous = 0, tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(lines).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":
            depth += 1
        elif name == "FSTRING_END":
            depth -= 1
        elif token.type == tokenize.STRING:
            formatted = "f" in re.match(r"\w*", token.string)[0].lower()  # type: ignore[index]
            starts = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
            if not depth and not formatted and not (starts and token.string.lstrip("rR").startswith('"""')):
                yield token.string
        elif not depth and token.type not in _LAYOUT:
            yield token.string
        if token.type != tokenize.COMMENT:
            previous = token.type


# -- questions --------------------------------------------------------------------------------------------------------


class _Entries:
    """One file's entries that count here, by what they belong to."""

    def __init__(self, table: Table) -> None:
        self.path = table.path
        self.measured = bool(table.key["gpu"])
        self.by_key: dict[Key, list[dict[str, Any]]] = {}
        self.stale: dict[str, int] = {}
        for entry in table.entries:
            if _is_current(entry):
                key = _key(entry["kernel"], entry["dtype"], entry["constants"], entry["sizes"])
                self.by_key.setdefault(key, []).append(entry)
            else:
                self.stale[entry["kernel"]] = self.stale.get(entry["kernel"], 0) + 1

    @property
    def kernels(self) -> set[str]:
        return {key[0] for key in self.by_key}

    def nearest(self, key: Key, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """The entry in the bucket of ``sizes`` or the one that is the fewest buckets away; of two the larger."""

        def away(entry: dict[str, Any]) -> tuple[int, int]:
            steps = [bucket(entry["sizes"][name]) - bucket(size) for name, size in sizes.items()]
            return sum(map(abs, steps)), -sum(steps)

        return min(self.by_key.get(key, ()), key=away, default=None)


def _is_current(entry: Mapping[str, Any]) -> bool:
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
