"""The memory plan against what a pass really allocates, each in a process of its own.

What torch's allocator gives out during a pass is held against the whole plan.  On a CPU there is also how far the process
grew from before loading to after the pass, less weights and plan: what the libraries take for themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower.text_table import text_table

from .children import ask
from .documents import Document, document, machine

__all__ = ["benchmark_memory", "memory_table"]

COLUMNS = (
    "patches",
    "allocated, MB",
    "planned, MB",
    "allocated ÷ planned",
    "process grew, MB",
    "weights, MB",
    "beyond, MB",
)


def benchmark_memory(folder: Path, *, device: torch.device, dtype: torch.dtype, patches: Sequence[int]) -> Document:
    """One row for each number of patches."""
    name = str(dtype).removeprefix("torch.")
    rows = [ask("memory", folder=str(folder), dtype=name, device=str(device), patches=count) for count in patches]
    for row in rows:
        grown = row["growth_bytes"]
        row["beyond_bytes"] = None if grown is None else grown - row["weights_bytes"] - row["plan_bytes"]
    return document("memory", rows, device=device, dtype=dtype)


def memory_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    rows = [
        (
            f"{row['patches']:,}",
            _megabytes(row["allocated_bytes"]),
            _megabytes(row["planned_bytes"]),
            f"{row['allocated_bytes'] / row['planned_bytes']:.3f}",
            _megabytes(row["growth_bytes"]),
            _megabytes(row["weights_bytes"]),
            _megabytes(row["beyond_bytes"]),
        )
        for row in found["rows"]
    ]
    return text_table(f"Peak memory, {found['dtype']}, {machine(found)}", COLUMNS, rows)


def _megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:,.1f}"
