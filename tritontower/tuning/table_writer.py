"""Tables on disk: what was chosen becomes entries, merged with what a file holds already.

A table is replaced in one step (a file beside it, then a rename) and under a lock, so that a reader never sees half of one
and two writers do not lose each other's entries.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from tritontower.engine import tuned_tables as tables
from tritontower.engine.tuned_tables import Identity
from tritontower.errors import UsageError, shorten
from tritontower.kernels.runtime.registry import bucket

from .predict import CHIPS
from .search_space import uniform
from .tuner import Candidate, Choice

__all__ = [
    "Merged",
    "entries_of",
    "merge",
    "read_checked",
    "replace_table",
    "static_identity",
    "table_key",
    "table_text",
]

_LOCK_SECONDS = 60.0


def static_identity(architecture: str) -> Identity:
    """The identity of a table that belongs to an architecture and to no GPU."""
    chip = architecture.removeprefix("sm_")
    capability = f"{chip[:-1]}.{chip[-1]}" if architecture.startswith("sm_") else architecture
    return Identity(
        gpu="", architecture=architecture, capability=capability, multiprocessors=CHIPS[architecture].multiprocessors
    )


def table_key(identity: Identity, ptxas: str | None = None) -> dict[str, Any]:
    """What a table says of where its entries come from."""
    import triton

    return {
        "gpu": identity.gpu,
        "architecture": identity.architecture,
        "capability": identity.capability,
        "multiprocessors": identity.multiprocessors,
        "triton": triton.__version__,
        "ptxas": ptxas,
    }


def entries_of(choices: Sequence[Choice], date: str | None = None) -> list[dict[str, Any]]:
    """The choices as a table holds them."""
    import triton

    day = date or datetime.now(UTC).date().isoformat()
    entries = []
    for choice in choices:
        task, best = choice.task, choice.best
        source = tables.source_digest(task.kernel)
        if source is None:
            raise ValueError(f"there is no kernel file {task.kernel!r}")
        entries.append(
            {
                "kernel": task.kernel,
                "source": source,
                "triton": triton.__version__,
                "dtype": task.dtype,
                "constants": dict(task.constants),
                "sizes": dict(task.sizes),
                "config": dict(best.config),
                "microseconds": _rounded(best.microseconds),
                "runner_up": _runner_up(choice.runner_up),
                "verified": best.error,
                "date": day,
            }
        )
    return entries


def _positive(facts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in facts.items() if value}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)


def _static(candidate: Candidate) -> dict[str, int] | None:
    if candidate.compile_result is None or not candidate.compile_result.launches:
        return None
    main = candidate.compile_result.main
    return {"registers": main.registers, "spills": main.spills, "shared_memory": main.shared_memory}


def _runner_up(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {"config": dict(candidate.config), "microseconds": _rounded(candidate.microseconds)}


def table_text(key: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """The table as a file holds it: an entry a line, in an order of its own, so that versions can be compared."""
    lines = sorted(json.dumps(entry, sort_keys=True, ensure_ascii=False) for entry in entries)
    head = json.dumps({"schema": tables.SCHEMA, "key": key}, ensure_ascii=False)[:-1]
    return head + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def read_checked(path: Path) -> tables.Table:
    """The table in ``path``.

    Raises:
        UsageError: there is none, with the reason.
    """
    try:
        return tables.read_table(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{shorten(str(path), 200)} is no table of tuned configurations: {reason}") from error


class Merged(NamedTuple):
    """What became of a table and of the entries that were put into it."""

    held: int
    """Entries that the table holds now."""
    added: int
    """Those of them that are new."""
    given_up: int
    """Entries for other sizes that the table held before and that do not agree with the new ones."""


def merge(path: Path, key: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Merged:
    """Puts ``entries`` into the table in ``path``.

    An entry takes the place of one of the same kernel, dtype, constants and buckets of sizes, unless that one is worth
    more: what counts here (source, Triton) more than what does not, and a measured one more than a predicted one.

    Entries of one launch for several sizes have fields in common (:func:`~tritontower.tuning.search_space.uniform`), and a table
    never holds two values of them.  Of two that do not agree, the one that is worth more stays; of two that are worth the
    same, the new one, and of two new ones that for the larger sizes.

    A file that is no table is kept beside the new one, as ``….broken``.

    Raises:
        ValueError: the entries could not be read back.
        OSError: the folder cannot be written, or another process holds the table for a minute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
        known: Sequence[Mapping[str, Any]] = ()
        try:
            known = tables.read_table(path).entries
        except FileNotFoundError:
            pass
        except ValueError:
            os.replace(path, path.with_name(f"{path.name}.broken"))
        # What is worth the most comes last, of that the new, of those the largest sizes; and what comes last counts.
        ranked = sorted([*sorted(known, key=_sizes), *sorted(entries, key=_sizes)], key=_worth)
        merged = {_place(entry): entry for entry in ranked}
        kept = _agreeing(list(merged.values()), ranked, key["architecture"])
        replace_table(path, key, kept)
    old, held = {id(entry) for entry in known}, {id(entry) for entry in kept}
    given_up = sum(id(entry) in old and id(entry) not in held for entry in merged.values())
    return Merged(len(kept), len(held - old), given_up)


def _agreeing(
    entries: Sequence[Mapping[str, Any]], ranked: Sequence[Mapping[str, Any]], architecture: str
) -> list[Mapping[str, Any]]:
    """Those of ``entries`` whose common fields are those of the last in ``ranked`` that belongs to the same launch."""

    def launch(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return _place(entry)[:3]

    def common(entry: Mapping[str, Any]) -> list[Any]:
        return [entry["config"].get(name) for name in uniform(entry["kernel"], architecture)]

    wanted = {launch(entry): common(entry) for entry in ranked}
    return [entry for entry in entries if common(entry) == wanted[launch(entry)]]


def _worth(entry: Mapping[str, Any]) -> tuple[bool, bool]:
    return tables.is_current(entry), entry["microseconds"] is not None


def _sizes(entry: Mapping[str, Any]) -> list[int]:
    return [size for _, size in sorted(entry["sizes"].items())]


def replace_table(path: Path, key: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table in one step, whatever stood there before.

    Raises:
        ValueError: the entries could not be read back.
        OSError: the folder cannot be written.
    """
    text = table_text(key, entries)
    tables.check_table(json.loads(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, text)
    tables.reload_tables()


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    sizes = tuple(sorted((name, bucket(size)) for name, size in entry["sizes"].items()))
    return entry["kernel"], entry["dtype"], tuple(sorted(entry["constants"].items())), sizes


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # What mkstemp makes is for its owner alone; a table is for whoever may read the folder.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
