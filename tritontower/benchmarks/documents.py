"""Benchmark reports: rows with the machine, the versions and the command that they were measured with."""

import hashlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tritontower
from tritontower.engine import tuned_tables as tables

from .measuring import provenance

SCHEMA = 2
"""Counts up whenever the fields of a document change their meaning."""

Document = dict[str, Any]
"""``bench``, ``schema``, ``complete``, ``rows``, the fields of :func:`.measuring.provenance`, and on a GPU ``tuned``."""


class Report:
    """Collects rows and saves them to ``path`` after each one: a benchmark that is killed keeps what it measured."""

    def __init__(
        self,
        bench: str,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        path: Path | None = None,
        **fields: Any,
    ) -> None:
        self.path = path
        self.rows: list[Mapping[str, Any]] = []
        self._document: Document = {"bench": bench, "schema": SCHEMA, "complete": False, **fields}
        if dtype is not None:
            self._document["dtype"] = str(dtype).removeprefix("torch.")
        if device.type == "cuda":
            self._document["tuned"] = list_tuned_tables(tables.identify(device).gpu)
        self._document |= provenance(device)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row."""
        self.rows.append(row)
        self._save()

    def finish(self) -> Document:
        """Marks the report as complete and returns the document."""
        self._document["complete"] = True
        return self._save()

    def _save(self) -> Document:
        found = {**self._document, "rows": list(self.rows)}
        if self.path is not None:
            replace_file(self.path, json.dumps(found, indent=2) + "\n")
        return found


def list_tuned_tables(gpu: str) -> dict[str, str]:
    """Lists the tables of tuned configurations that apply to a GPU, highest priority first.

    A name is ``shipped:``, ``user:`` (the cache folder) or ``chosen:`` (the environment's) and the file's, so that it holds
    no path of one machine.  A value is the first 12 hexadecimal digits of the file's SHA-256.
    """
    places = {tables.packaged_folder(): "shipped", tables.user_folder(): "user"}
    found: dict[str, str] = {}
    for path in tables.table_paths(gpu):
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        except OSError:  # most of the places are empty
            continue
        found.setdefault(f"{places.get(path.parent, 'chosen')}:{path.name}", digest)
    return found


def describe_error(error: BaseException, limit: int = 300) -> str:
    """Type and message of an error, in one line."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


def describe_machine(found: Mapping[str, Any]) -> str:
    """The GPU of a document, or its CPU and threads."""
    if found.get("gpu"):
        return str(found["gpu"])
    return f"{found['threads']} thread{'' if found['threads'] == 1 else 's'} of {found['cpu']}"


def machine_slug(found: Mapping[str, Any]) -> str:
    """The machine of a document as a folder name."""
    name = found.get("gpu") or f"cpu {found['cpu']} {found['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def median_seconds(row: Mapping[str, Any], key: str = "seconds") -> dict[str, float]:
    """Candidate → median seconds of a row."""
    return {name: statistics.median(seconds) for name, seconds in row[key].items()}


def milliseconds(seconds: float | None, digits: int = 2) -> str | None:
    """A cell of a table."""
    return None if seconds is None else f"{1e3 * seconds:,.{digits}f}"


def megabytes(size: int | None, digits: int = 0) -> str | None:
    """A cell of a table."""
    return None if size is None else f"{size / 1e6:,.{digits}f}"


def list_failures(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """One line for each row without a result; ``names`` are the fields that name it."""
    failed = [row for row in found["rows"] if row.get("status", "ok") != "ok"]
    return [f"{row['status']}: {', '.join(str(row[name]) for name in names)}: {row['reason']}" for row in failed]


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step, so that no reader and no interruption sees half of it; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes a file that only its owner can read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports this checkout and does not interpret Triton."""
    root = str(Path(tritontower.__file__).resolve().parent.parent)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))}
