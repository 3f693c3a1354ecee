"""Measurements that need a process of their own: peak memory, and loading as the first action of a process.

    python -m tritontower.benchmarks.subprocesses load '{"folder": "…", "dtype": "bfloat16", "device": "cpu"}'

The last line of output is the result, as JSON.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.devices import synchronize
from tritontower.parity.parity import Reference

from .documents import child_environment
from .images import square_batch


def measure_apart(measurement: str, **options: Any) -> dict[str, Any]:
    """Runs one of this module's measurements in a fresh process and returns its result."""
    options = {"threads": torch.get_num_threads(), **options}
    command = [sys.executable, "-m", f"{__package__}.subprocesses", measurement, json.dumps(options)]
    child = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(
            f"the process that measures {measurement!r} exited with {child.returncode}: {child.stderr[-600:]}"
        )
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def peak_bytes() -> int:
    """Peak resident set of this process; 0 if the system does not report it.

    ``getrusage`` is unsuitable: its figure survives ``exec`` and starts at the parent's.
    """
    return 1024 * _read_proc("status", "VmHWM:")


def forget_files(folder: Path) -> None:
    """Asks the system to drop a checkpoint's files from its cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read_proc(name: str, field: str) -> int:
    """Returns a number of this process from Linux; 0 elsewhere."""
    try:
        lines = Path(f"/proc/self/{name}").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def load(folder: str, dtype: str, device: str, by: str, cold: bool) -> dict[str, Any]:
    """Measures loading the tower, or transformers' model without its language model."""
    where = torch.device(device)
    # Excludes imports on first use and the device's context.
    tower = VisionTower.from_pretrained(folder, device=where, dtype=dtype, delay_load=True)
    implementation = tower.family.reference
    if by != "tritontower":
        import transformers

        assert implementation is not None
        _ = (transformers.AutoModel, getattr(transformers, implementation.auto_class))
    if where.type == "cuda":
        torch.zeros(1, device=where)
        torch.cuda.reset_peak_memory_stats(where)
    if cold:
        forget_files(Path(folder))
    memory, disk, start = peak_bytes(), _read_proc("io", "read_bytes:"), time.perf_counter()
    read: list[int] = []
    kept = (
        tower.load(progress=lambda done, total: read.append(done))
        if by == "tritontower"
        else Reference(tower, tower.dtype)
    )
    synchronize(where)
    seconds = time.perf_counter() - start
    return {
        "by": by,
        "kind": type(kept).__name__,
        "seconds": seconds,
        "growth_bytes": peak_bytes() - memory,
        "read_bytes": max(read, default=None),
        "disk_bytes": _read_proc("io", "read_bytes:") - disk,
        "files_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
        "device_bytes": torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
        # transformers holds the published weights; the tower pads, folds and prepacks them.
        "weights_bytes": tower.weights_bytes if by == "tritontower" else tower.graph.parameters * tower.dtype.itemsize,
    }


def _memory(folder: str, dtype: str, device: str, patches: int) -> dict[str, Any]:
    """Measures what a forward pass allocates and, on a CPU, the growth of the process."""
    where = torch.device(device)
    from .memory import forward_peak  # that module starts this one

    # A captured graph would hold its memory from then on.
    tower = VisionTower.from_pretrained(folder, device=where, dtype=dtype, delay_load=True, cuda_graphs=False)
    batch = square_batch(tower, patches)
    before = peak_bytes()
    tower.load().forward(batch)
    growth = peak_bytes() - before
    plan = tower.memory_plan(batch.workload)
    return {
        "patches": batch.workload.patches,
        "growth_bytes": growth if where.type == "cpu" else None,
        "weights_bytes": tower.weights_bytes,
        "plan_bytes": plan.arena_bytes + plan.output_bytes,
        "allocated_bytes": forward_peak(tower.executor_for(batch), batch.to(where)),
        "planned_bytes": plan.peak_bytes,
    }


_MEASUREMENTS: Mapping[str, Callable[..., dict[str, Any]]] = {"load": load, "memory": _memory}


def main(measurement: str, options: str) -> None:
    """Prints the result of one measurement."""
    given = json.loads(options)
    torch.set_num_threads(given.pop("threads"))
    print(json.dumps(_MEASUREMENTS[measurement](**given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
