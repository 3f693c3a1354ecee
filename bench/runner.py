"""A campaign's frame: stages of items, each stage a process of its own with a time limit, every result kept at once.

A stage appends a line to ``NAME.jsonl`` before and after every item.  What it leaves can therefore be gone on with, whatever
ended it: items that were finished are not done again, and one that was begun twice and never finished has killed the process
and is kept as such.  ``NAME.json`` has all the rows of a stage; ``complete`` in it says whether there are more to come.

Rows stand under one provenance, so a stage is gone on with only under the conditions that it was begun under
(:data:`CONDITIONS`), and only under those does a complete one count as done.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.documents import document, reason_of, write_json

__all__ = [
    "CONDITIONS",
    "Item",
    "OtherConditionsError",
    "Row",
    "Setting",
    "Stage",
    "check_conditions",
    "collect",
    "facts_of",
    "is_complete",
    "run_items",
    "run_stage",
]

ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 2
"""How often an item may end the process that it runs in, or be stopped with it."""
SPARE_SECONDS = 20
"""No item is begun this short before the limit."""
CONDITIONS = ("campaign", "dry_run", "commit", "torch", "triton", "transformers", "threads", "cpu", "gpu")
"""The facts of a document that all of its rows have in common."""


class OtherConditionsError(ValueError):
    """A folder holds what a stage has found under other conditions."""


@dataclass(frozen=True)
class Setting:
    """Where a stage runs.

    Attributes:
        device: of everything that is measured.
        folder: where the results go.
        dry: tiny shapes on a CPU, so that the code is known to run; nothing that it measures means anything.
        seconds: how long a stage may take.
    """

    device: torch.device
    folder: Path
    dry: bool = False
    seconds: float = 540.0


Row = dict[str, Any]
"""``status`` (``"ok"``, ``"failed"``, ``"skipped"`` or ``"died"``), and what was found."""
Item = tuple[str, Callable[[], Mapping[str, Any]]]
"""A name that is the stage's own, and what makes the row."""


@dataclass(frozen=True)
class Stage:
    """A part of a campaign.

    Attributes:
        name: also that of its files.
        summary: what it answers.
        items: what it is made of, in the order of their value.
        interpreted: whether a dry run takes Triton's interpreter for the kernels, or torch's own operations.
    """

    name: str
    summary: str
    items: Callable[[Setting], Iterator[Item]]
    interpreted: bool = False


def run_items(stage: Stage, setting: Setting, facts: Mapping[str, Any]) -> None:
    """Does what is left of a stage, in this process, until its time is over.

    Raises:
        OtherConditionsError: what is there was found under others.
    """
    current = facts_of(stage, setting, facts)
    check_conditions(stage, setting.folder, current)
    until = time.monotonic() + setting.seconds - (0 if setting.dry else SPARE_SECONDS)
    path = _lines_path(setting.folder, stage.name)
    done = {line["key"] for line in _lines(path) if "row" in line}
    begun = Counter(line["begun"] for line in _lines(path) if "begun" in line)
    died = {key for key, times in begun.items() if times >= ATTEMPTS} - done
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        if torn:
            file.write("\n")  # or the first line of this process would be lost with it

        def keep(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

        keep({"facts": current})
        for key in died:
            keep({"key": key, "row": {"status": "died", "reason": "the process ended while it ran"}})
        for key, make in stage.items(setting):
            if key in done or key in died:
                continue
            if time.monotonic() > until:
                print(f"out of time before {key!r}; run the stage again to go on", flush=True)
                return
            print(f"{time.strftime('%H:%M:%S')} {key}", flush=True)
            keep({"begun": key})
            start = time.monotonic()
            try:
                row = dict(make())
            except Exception as error:
                row = {"status": "failed", "reason": reason_of(error, 600)}
                print(f"  {row['reason']}", flush=True)
            keep({"key": key, "seconds": round(time.monotonic() - start, 3), "row": row})
            if setting.device.type == "cuda" and _device_is_lost():
                # Nothing works after an illegal access; a new process starts with a new context.
                raise SystemExit(3)
        keep({"finished": True})


def facts_of(stage: Stage, setting: Setting, facts: Mapping[str, Any]) -> Row:
    """The document of a stage as it would be begun now, without rows."""
    return document(stage.name, [], device=setting.device, dry_run=setting.dry, **facts)


def check_conditions(stage: Stage, folder: Path, current: Mapping[str, Any]) -> None:
    """Holds what a stage has left in ``folder`` against the conditions of today.

    Raises:
        OtherConditionsError: they are others; with the first that differs, and what to do.
    """
    found = [line["facts"] for line in _lines(_lines_path(folder, stage.name)) if "facts" in line]
    if (path := folder / f"{stage.name}.json").is_file():
        found.append(json.loads(path.read_text(encoding="utf-8")))
    for facts in found:
        for name in CONDITIONS:
            before, now = facts.get(name), current.get(name)
            if before != now:
                raise OtherConditionsError(
                    f"{stage.name}: the results in {folder} were measured with {name} {before!s}, and now it is {now!s}; "
                    "--again starts the stage over, and another --output keeps them"
                )


def collect(stage: Stage, folder: Path) -> dict[str, Any] | None:
    """Makes ``NAME.json`` of what a stage has left; ``None`` if that is nothing.

    Tuned tables may change while a stage is stopped; rows that were measured with others than the document names
    (``tuned``) name their own.
    """
    path = _lines_path(folder, stage.name)
    lines = _lines(path)
    facts = next((line["facts"] for line in reversed(lines) if "facts" in line), None)
    if facts is None:
        return None
    rows = []
    tuned = None
    for line in lines:
        if "facts" in line:
            tuned = line["facts"].get("tuned")
        elif "row" in line:
            own = {} if tuned == facts.get("tuned") else {"tuned": tuned}
            rows.append({"key": line["key"], "took": line.get("seconds"), **own, **line["row"]})
    begun = {line["begun"] for line in lines if "begun" in line} - {row["key"] for row in rows}
    rows += [{"key": key, "status": "died", "reason": "stopped while it ran"} for key in sorted(begun)]
    complete = any("finished" in line for line in lines)
    found = {**facts, "summary": stage.summary, "complete": complete, "rows": rows}
    write_json(folder / f"{stage.name}.json", found)
    if complete:
        path.unlink()
    return found


def is_complete(stage: Stage, folder: Path, current: Mapping[str, Any]) -> bool:
    """Whether a stage has nothing left to do under the conditions in ``current`` (:func:`facts_of`).

    Raises:
        OtherConditionsError: what is there was found under others.
    """
    check_conditions(stage, folder, current)
    path = folder / f"{stage.name}.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("complete"))


def run_stage(stage: Stage, setting: Setting, command: Sequence[str]) -> dict[str, Any] | None:
    """Runs ``command``, which has to do :func:`run_items`, in a process of its own; again if that dies, until time is up."""
    until = time.monotonic() + setting.seconds
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if setting.dry and stage.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    log_path = setting.folder / "logs" / f"{stage.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    while (left := until - time.monotonic()) > 0:
        before = len(_lines(_lines_path(setting.folder, stage.name)))
        with open(log_path, "a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, *command, "--seconds", str(left)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(timeout=left)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # its own children too
                    child.wait()
        # A process that has died is started again only if it came further than its start.
        if code in (None, 0) or len(_lines(_lines_path(setting.folder, stage.name))) <= before + 1:
            break
    return collect(stage, setting.folder)


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _lines_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one of a killed process may be torn."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
