"""The journal of a tuning run: what was begun and what came of it, so that the next run goes on from there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.engine import tuned_tables as tables

from .tasks import Task

if TYPE_CHECKING:
    from .tuner import Candidate

__all__ = ["ATTEMPTS", "Journal"]

ATTEMPTS = 2
"""How often a check may end the process, or hang until somebody ends it, before its configuration is dropped."""


class Journal:
    """What was begun and the times that were taken, a line each, so that a run that is killed goes on where it was.

    A run that a configuration ends does not begin with the same one for ever: what was begun :data:`ATTEMPTS` times and
    came to no result is dropped.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.known: dict[str, dict[str, Any]] = {}
        self.begun: dict[str, int] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                key = str(entry["key"])
                if "begun" in entry:
                    self.begun[key] = int(entry["begun"])
                    continue
                self.known[key] = {
                    "microseconds": None if entry["microseconds"] is None else float(entry["microseconds"]),
                    "error": float(entry["error"]),
                    "dropped": str(entry["dropped"]),
                }
            except (ValueError, TypeError, KeyError):  # the line that was being written when the run was killed
                continue

    def key(self, task: Task, candidate: "Candidate") -> str:
        """Everything that decides a time."""
        return json.dumps(
            [self.identity, tables.source_digest(task.kernel), *task.key, task.sizes, task.facts, candidate.identity]
        )

    def write(self, key: str, **facts: Any) -> None:
        """Adds a result."""
        self.known[key] = facts
        self._append({"key": key, **facts})

    def begin(self, key: str, attempts: int) -> None:
        """Notes how often a configuration has been begun; 0 where that was interrupted for no fault of its own."""
        self.begun[key] = attempts
        self._append({"key": key, "begun": attempts})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # A line that was cut off is ended first: it would swallow the next one otherwise.
            torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
