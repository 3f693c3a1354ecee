"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_python(*words: object, environment: dict[str, str | None] | None = None, **options: Any) -> Any:
    """Runs Python in the root of the checkout; returns the completed process, with its output as text.

    Args:
        *words: of the command line.
        environment: changed variables, ``None`` removes one; without it the command runs without Triton's interpreter.
        **options: of ``subprocess.run``.
    """
    changed = {**os.environ, **({"TRITON_INTERPRET": None} if environment is None else environment)}
    given = {name: value for name, value in changed.items() if value is not None}
    defaults = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run([sys.executable, *map(str, words)], env=given, **{**defaults, **options})
