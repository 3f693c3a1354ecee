"""Journal of a tuning run: one line for each measurement, so that an interrupted run can be resumed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritontower.engine.tuned_tables import source_digest

from .candidate import Candidate
from .tasks import Task

ATTEMPTS = 2
"""Attempts at a configuration that ends the process, or hangs until the process is killed, before it is dropped."""


class Journal:
    """Measurements that were begun and their results.

    A configuration that was begun :data:`ATTEMPTS` times without a result is dropped by the tuner, so a run never restarts
    with the same fatal configuration forever.  Without a ``path`` everything stays in memory.  Results of another
    ``identity`` (GPU and compiler versions) are ignored.
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
            except (ValueError, TypeError, KeyError):  # a line that was cut off when the process was killed
                continue

    def key(self, task: Task, candidate: Candidate) -> str:
        """Returns everything that decides a time."""
        return json.dumps(
            [self.identity, source_digest(task.kernel), *task.key, task.sizes, task.details, candidate.identity]
        )

    def write(self, key: str, **result: Any) -> None:
        """Adds a result: ``microseconds``, ``error`` and ``dropped``."""
        self.known[key] = result
        self._append({"key": key, **result})

    def begin(self, key: str, attempts: int) -> None:
        """Records the number of attempts; 0 if the user interrupted the measurement."""
        self.begun[key] = attempts
        self._append({"key": key, "begun": attempts})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # Without a newline, a line that was cut off would swallow this one.
            is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(entry).encode() + b"\n")
