"""Times loading a tower from a checkpoint, against transformers' model of it.

Each load runs in its own process, after all imports.  transformers loads the model without the layers of its language
model, which is the least that it can load.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tritontower.text_table import text_table

from .documents import Document, Report, describe_machine
from .subprocesses import measure_apart

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
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
    transformers: bool = True,
    path: Path | None = None,
) -> Document:
    """Loads with the files in the system's cache, and once from the disk.

    Args:
        folder: the checkpoint.
        device: where the weights go.
        dtype: of the weights.
        repeats: loads with cached files; the median counts.
        transformers: whether to load transformers' model as well.
        path: a file that gets the document after every row.
    """
    report = Report("loading", device=device, dtype=dtype, path=path)
    for by in ("tritontower", "transformers") if transformers else ("tritontower",):
        options = {
            "folder": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "by": by,
        }
        report.add({**measure_apart("load", **options, cold=True), "files": "on disk"})
        warm = [measure_apart("load", **options, cold=False) for _ in range(repeats)]
        seconds = [answer["seconds"] for answer in warm]
        growth = int(median(answer["growth_bytes"] for answer in warm))
        row = {**warm[0], "seconds": median(seconds), "all_seconds": seconds, "growth_bytes": growth}
        report.add({**row, "files": "cached"})
    return report.finish()


def loading_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    rows = [
        (
            row["by"],
            row["files"],
            f"{row['seconds']:,.2f}",
            f"{row['growth_bytes'] / 1e6:,.0f}",
            f"{row['weights_bytes'] / 1e6:,.0f}",
            # transformers maps its files into memory; the bytes that it reads of them are not counted.
            f"{row['read_bytes'] / 1e6:,.0f}" if row["read_bytes"] else None,
            f"{row['files_bytes'] / 1e6:,.0f}",
            # Excludes file systems in memory, and files that the system kept cached despite the request.
            f"{row['disk_bytes'] / 1e6:,.0f}" if row["files"] == "on disk" and row["disk_bytes"] else None,
            f"{row['device_bytes'] / 1e6:,.0f}" if row["device_bytes"] else None,
        )
        for row in found["rows"]
    ]
    return text_table(f"Loading, {found['dtype']}, {describe_machine(found)}", COLUMNS, rows)
