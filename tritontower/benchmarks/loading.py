"""Seconds and memory to load a tower from a checkpoint, against transformers' model of it.

Every load happens in a process of its own that has imported everything already.  transformers is given the model without
the layers of its language model, which is the least that it can be made to load.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tritontower.text_table import text_table

from .children import ask
from .documents import Document, document, machine

__all__ = ["benchmark_loading", "loading_table"]

COLUMNS = (
    "loaded by",
    "files",
    "seconds",
    "peak growth, MB",
    "weights, MB",
    "read, MB",
    "of files, MB",
    "from disk, MB",
    "on the GPU, MB",
)


def benchmark_loading(
    folder: Path, *, device: torch.device, dtype: torch.dtype, repeats: int = 3, transformers: bool = True
) -> Document:
    """Loads with the files in the system's cache, and once from the disk.

    Args:
        folder: the checkpoint.
        device: where the weights go.
        dtype: of the weights.
        repeats: loads of each kind with the files cached; the median counts.
        transformers: whether to load transformers' model as well.
    """
    name = str(dtype).removeprefix("torch.")
    rows = []
    for by in ("tritontower", "transformers") if transformers else ("tritontower",):
        facts = {"folder": str(folder), "dtype": name, "device": str(device), "by": by}
        cold = ask("load", **facts, cold=True)
        warm = [ask("load", **facts, cold=False) for _ in range(repeats)]
        rows += [{**cold, "files": "on disk"}, {**_middle(warm), "files": "cached"}]
    return document("loading", rows, device=device, dtype=dtype)


def _middle(answers: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [answer["seconds"] for answer in answers]
    return {
        **answers[0],
        "seconds": median(seconds),
        "all_seconds": seconds,
        "growth_bytes": int(median(answer["growth_bytes"] for answer in answers)),
    }


def loading_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    rows = [
        (
            row["by"],
            row["files"],
            f"{row['seconds']:,.2f}",
            f"{row['growth_bytes'] / 1e6:,.0f}",
            f"{row['weights_bytes'] / 1e6:,.0f}",
            # Which bytes of its memory-mapped files transformers reads, nobody counts.
            f"{row['read_bytes'] / 1e6:,.0f}" if row["read_bytes"] else None,
            f"{row['files_bytes'] / 1e6:,.0f}",
            # What is read from a file system in memory, or in spite of the request from the cache, does not count here.
            f"{row['disk_bytes'] / 1e6:,.0f}" if row["files"] == "on disk" and row["disk_bytes"] else None,
            f"{row['device_bytes'] / 1e6:,.0f}" if row["device_bytes"] else None,
        )
        for row in found["rows"]
    ]
    return text_table(f"Loading, {found['dtype']}, {machine(found)}", COLUMNS, rows)
