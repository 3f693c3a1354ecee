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

from .documents import Document, Report, describe_machine, megabytes
from .subprocesses import measure_apart


def benchmark_loading(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
    transformers: bool = True,
    path: Path | None = None,
) -> Document:
    """Loads once from the disk, and ``repeats`` times with the files in the system's cache; the median counts."""
    report = Report("loading", device=device, dtype=dtype, path=path)
    for by in ("tritontower", "transformers") if transformers else ("tritontower",):
        options = {"folder": str(folder), "dtype": str(dtype).removeprefix("torch."), "device": str(device), "by": by}
        report.add({**measure_apart("load", **options, cold=True), "files": "on disk"})
        warm = [measure_apart("load", **options, cold=False) for _ in range(repeats)]
        seconds = [answer["seconds"] for answer in warm]
        growth = int(median(answer["growth_bytes"] for answer in warm))
        row = {**warm[0], "seconds": median(seconds), "all_seconds": seconds, "growth_bytes": growth}
        report.add({**row, "files": "cached"})
    return report.finish()


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    columns = (
        "loaded by", "files", "seconds", "peak growth, MB", "weights, MB", "read, MB", "of files, MB", "from disk, MB",
        "on the GPU, MB",
    )  # fmt: skip
    rows = [
        (
            row["by"],
            row["files"],
            f"{row['seconds']:,.2f}",
            megabytes(row["growth_bytes"]),
            megabytes(row["weights_bytes"]),
            # transformers maps its files into memory; the bytes that it reads of them are not counted.
            megabytes(row["read_bytes"] or None),
            megabytes(row["files_bytes"]),
            # Excludes file systems in memory, and files that the system kept cached despite the request.
            megabytes(row["disk_bytes"] or None) if row["files"] == "on disk" else None,
            megabytes(row["device_bytes"] or None),
        )
        for row in found["rows"]
    ]
    return text_table(f"Loading, {found['dtype']}, {describe_machine(found)}", columns, rows)
