"""Writing of tables: choices become entries, which are merged into the entries of a file.

A table is replaced in one step (a temporary file, then a rename) and under a lock, so that a reader never sees half of one
and two writers do not lose each other's entries.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from tritontower.benchmarks.documents import replace_file
from tritontower.engine import tuned_tables
from tritontower.engine.tuned_tables import Identity
from tritontower.errors import UsageError, shorten
from tritontower.kernels.runtime.registry import bucket

from .candidate import Candidate, Choice
from .search_space import shared_fields


def table_key(identity: Identity, ptxas: str | None = None) -> dict[str, Any]:
    """Returns the key of a table: the GPU and the compiler versions."""
    import triton

    return {**asdict(identity), "triton": triton.__version__, "ptxas": ptxas}


def make_entries(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Converts choices to the entries of a table."""
    import triton

    def timed(candidate: Candidate) -> dict[str, Any]:
        return {"config": dict(candidate.config), "microseconds": round(candidate.cost, 2)}

    return [
        {
            "kernel": choice.task.kernel,
            "source": tuned_tables.source_digest(choice.task.kernel),
            "triton": triton.__version__,
            "dtype": choice.task.dtype,
            "constants": dict(choice.task.constants),
            "sizes": dict(choice.task.sizes),
            **timed(choice.best),
            "runner_up": choice.runner_up and timed(choice.runner_up),
            "verified": choice.best.error,
            "date": datetime.now(UTC).date().isoformat(),
        }
        for choice in choices
    ]


def table_text(key: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Formats a table with one sorted entry per line, so that versions can be compared."""
    lines = sorted(json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in entries)
    head = json.dumps({"schema": tuned_tables.SCHEMA, "key": key}, ensure_ascii=False)[:-1]
    return head + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def read_checked(path: Path) -> tuned_tables.Table:
    """Reads the table in ``path``; raises :class:`UsageError` with the reason if the file is not one."""
    try:
        return tuned_tables.read_table(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{shorten(str(path), 200)} is no table of tuned configurations: {reason}") from error


class Merged(NamedTuple):
    """Numbers of entries after a merge."""

    held: int
    """Entries in the table."""
    added: int
    """New entries among them."""
    given_up: int
    """Previous entries for other sizes that disagreed with the new ones and were removed."""


def merge(path: Path, key: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Merged:
    """Merges ``entries`` into the table in ``path``.

    An entry replaces the entry of the same kernel, dtype, constants and buckets of sizes, unless it is stale (another source
    or Triton) and that one is current.

    Entries of one launch for several sizes have fields in common (:func:`~tritontower.tuning.search_space.shared_fields`),
    and a table never has two values of them.  Of two entries that disagree, a current one stays rather than a stale one,
    then the new one, then the one for the larger sizes.

    A file that is not a table is renamed to ``….broken``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=60.0):
        known: Sequence[Mapping[str, Any]] = ()
        try:
            known = tuned_tables.read_table(path).entries
        except FileNotFoundError:
            pass
        except ValueError:
            os.replace(path, path.with_name(f"{path.name}.broken"))
        # Current entries come last, of these the new ones, of these the largest sizes; the last one wins.
        ranked = sorted([*sorted(known, key=_sizes), *sorted(entries, key=_sizes)], key=tuned_tables.is_current)
        merged = {_place(entry): entry for entry in ranked}

        def common(entry: Mapping[str, Any]) -> list[Any]:
            return [entry["config"].get(name) for name in shared_fields(entry["kernel"], key["architecture"])]

        wanted = {_place(entry)[:3]: common(entry) for entry in ranked}
        kept = [entry for entry in merged.values() if common(entry) == wanted[_place(entry)[:3]]]
        text = table_text(key, kept)
        tuned_tables.check_table(json.loads(text))
        replace_file(path, text)
        tuned_tables.reload_tables()
    old, held = {id(entry) for entry in known}, {id(entry) for entry in kept}
    given_up = sum(id(entry) in old and id(entry) not in held for entry in merged.values())
    return Merged(len(kept), len(held - old), given_up)


def _sizes(entry: Mapping[str, Any]) -> list[int]:
    return [size for _, size in sorted(entry["sizes"].items())]


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    sizes = tuple(sorted((name, bucket(size)) for name, size in entry["sizes"].items()))
    return entry["kernel"], entry["dtype"], tuple(sorted(entry["constants"].items())), sizes
