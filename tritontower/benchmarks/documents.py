"""A benchmark's result as plain data: made, kept, and named."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower.engine import tuned_tables as tables

from .measuring import Timing, provenance

__all__ = [
    "SCHEMA",
    "Document",
    "document",
    "list_tuned_tables",
    "machine",
    "machine_slug",
    "median",
    "reason_of",
    "seconds_of",
    "write_json",
]

SCHEMA = 1
"""Counts up whenever the fields of a document change their meaning."""

Document = dict[str, Any]
"""``bench``, ``schema``, ``rows``, the facts of :func:`tritontower.benchmarks.measuring.provenance`, and on a GPU ``tuned``."""


def document(
    bench: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    **facts: Any,
) -> Document:
    """The rows of one benchmark with all that they are worth nothing without; ``facts`` count before what is found out."""
    named: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        named["tuned"] = list_tuned_tables(tables.identify(device).gpu)
    return {"bench": bench, "schema": SCHEMA, **named, **provenance(device), **facts, "rows": list(rows)}


def list_tuned_tables(gpu: str) -> dict[str, str]:
    """Lists the tables of tuned configurations that apply to a GPU, the preferred one first.

    Returns:
        Name → the first 12 hexadecimal digits of the file's SHA-256.  A name is ``shipped:``, ``user:`` (the cache folder)
        or ``chosen:`` (the environment's) and the file's, so that it holds no path of one machine.
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


def reason_of(error: BaseException, limit: int = 300) -> str:
    """Kind and message of an error, in one line."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


def machine(facts: Mapping[str, Any]) -> str:
    """The machine of a document, in words."""
    if facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'} of {facts['cpu']}"


def machine_slug(facts: Mapping[str, Any]) -> str:
    """The machine of a document as a folder's name."""
    name = facts.get("gpu") or f"cpu {facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def median(seconds: Sequence[float]) -> float:
    """The median of the times in a row of a document."""
    return Timing(tuple(seconds)).median


def seconds_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Candidate → median seconds, of a row with ``seconds``."""
    return {name: median(seconds) for name, seconds in row["seconds"].items()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as a whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
