"""Compares the memory plan with what a forward pass allocates, in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine.executor import Executor
from tritontower.text_table import text_table

from .documents import Document, Report, describe_machine, megabytes
from .subprocesses import measure_apart


def benchmark_memory(
    folder: Path, *, device: torch.device, dtype: torch.dtype, patches: Sequence[int], path: Path | None = None
) -> Document:
    """Measures one row for each number of patches.

    On a CPU ``beyond_bytes`` is the growth of the process from before loading to after the forward pass, minus weights and
    plan: memory of the libraries.
    """
    report = Report("memory", device=device, dtype=dtype, path=path)
    options = {"folder": str(folder), "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    for count in patches:
        row = measure_apart("memory", **options, patches=count)
        grown = row["growth_bytes"]
        row["beyond_bytes"] = None if grown is None else grown - row["weights_bytes"] - row["plan_bytes"]
        report.add(row)
    return report.finish()


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    columns = (
        "patches", "allocated, MB", "planned, MB", "allocated ÷ planned", "process grew, MB", "weights, MB", "beyond, MB"
    )  # fmt: skip
    rows = [
        (
            f"{row['patches']:,}",
            megabytes(row["allocated_bytes"], 1),
            megabytes(row["planned_bytes"], 1),
            f"{row['allocated_bytes'] / row['planned_bytes']:.3f}",
            *(megabytes(row[name], 1) for name in ("growth_bytes", "weights_bytes", "beyond_bytes")),
        )
        for row in found["rows"]
    ]
    return text_table(f"Peak memory, {found['dtype']}, {describe_machine(found)}", columns, rows)


def allocated_peak(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch's allocator holds during ``call``, beyond what it held before.

    On a CPU torch's profiler reports every allocation of all threads, so nothing else may run.  Memory that libraries take
    from the system themselves does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profiler = profile.profiler
    assert profiler is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += int(event.nbytes())
        most = max(most, held)
    return most


def forward_peak(executor: Executor, batch: PackedBatch) -> int:
    """Measures :attr:`MemoryPlan.peak_bytes`: bytes that a forward pass holds at once, besides the weights.

    The forward pass runs twice, so that what is allocated once is excluded.  The executor's arena is released; the inputs of
    the batch are added to the measured bytes.
    """
    executor.run(batch)
    executor.release()
    taken = allocated_peak(lambda: executor.run(batch), executor.device)
    executor.release()
    inputs = (batch.tensors[name] for name in executor.graph.inputs)
    return taken + sum(int(tensor.nbytes) for tensor in inputs)
