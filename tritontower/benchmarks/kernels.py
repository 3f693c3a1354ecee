"""Every kernel at the towers' shapes, beside what torch offers for the same work and beside the roofline.

The cases are those of the tests, and each is checked against the formula before it is timed: one whose numbers are wrong is
reported as failed and has no time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from tritontower.engine.tuned_tables import fill_registry
from tritontower.text_table import text_table

from .cases import Case, Grid, Prepared, cases, check
from .documents import Document, document, machine, reason_of
from .measuring import Timing, time_on_device
from .roofline import Roofline, measured_roofline, published_roofline

__all__ = ["OURS", "benchmark_kernels", "kernel_table", "measure", "rival_seconds", "timings"]

OURS = "tritontower"
"""The name of this project's candidate in every document."""

COLUMNS = ("kernel", "case", "µs", "TFLOP/s", "GB/s", "% of roofline", "best of torch, µs", "ratio", "distance")


def benchmark_kernels(
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Sequence[str] | None = None,
    grid: Grid | None = None,
    rivals: bool = True,
    budget_seconds: float = 0.2,
    report: Callable[[Mapping[str, Any]], None] | None = None,
) -> Document:
    """Times a grid of cases.

    Args:
        device: where.
        dtype: of weights and activations.
        kernels: only these; see :data:`tritontower.benchmarks.cases.KERNELS`.
        grid: ``gpu`` or ``cpu`` by default, after the device.
        rivals: whether to time torch's own beside them.
        budget_seconds: for one candidate of one case.
        report: called with every row as soon as it is there.
    """
    fill_registry(device)
    measured = measured_roofline(device, dtype)
    published = published_roofline(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    roofline = published if published is not None and dtype != torch.float32 else measured
    rows = []
    for case in cases(grid or ("gpu" if device.type == "cuda" else "cpu"), dtype, kernels):
        rows.append(measure(case, device, roofline, rivals=rivals, budget_seconds=budget_seconds))
        if report is not None:
            report(rows[-1])
    facts = {"roofline": _facts(roofline), "measured_roofline": _facts(measured)}
    return document("kernels", rows, device=device, dtype=dtype, **facts)


def measure(
    case: Case, device: torch.device, roofline: Roofline, *, rivals: bool = True, budget_seconds: float = 0.2
) -> dict[str, Any]:
    """The row of one case: checked, then timed."""
    facts: dict[str, Any] = {"kernel": case.kernel, "case": case.label, "sizes": dict(case.sizes)}
    if case.config is not None:
        facts["config"] = str(case.config)
    try:
        prepared = case.prepare(device)
        outcome = check(case, prepared, device)
    except Exception as error:  # Triton's own (a compilation, a lack of shared memory) have no base but this one
        return {**facts, "status": "failed", "reason": reason_of(error)}
    facts |= {"distance": outcome.distance, "limit": outcome.limit}
    if not outcome.passed:
        return {**facts, "status": "failed", "reason": "the numbers are wrong"}
    try:
        timed, notes = timings(prepared, device, rivals=rivals, budget_seconds=budget_seconds)
    except RuntimeError as error:  # too short to be timed
        return {**facts, "status": "failed", "reason": reason_of(error)}
    ours = timed[OURS]
    return {
        **facts,
        "status": "ok",
        "seconds": {name: timing.median for name, timing in timed.items()},
        "best": {name: timing.best for name, timing in timed.items()},
        "spread": {name: timing.spread for name, timing in timed.items()},
        "method": ours.method,
        "rivals": [name for name in prepared.rivals if name in timed],
        "notes": notes,
        "flops": prepared.flops,
        "bytes": prepared.bytes,
        "tflops": prepared.flops / ours.median / 1e12,
        "gigabytes_per_second": prepared.bytes / ours.median / 1e9,
        "share": roofline.share(prepared.flops, prepared.bytes, ours.median) if device.type == "cuda" else None,
    }


def rival_seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """What torch took for the same work, by name: neither a part of it nor this project's own kernels in another order."""
    return {name: row["seconds"][name] for name in row["rivals"]}


def timings(
    prepared: Prepared, device: torch.device, *, rivals: bool = True, budget_seconds: float = 0.2
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The times of a case and of what it is held against, and why those that are missing could not be timed.

    All by one clock: where one of them cannot be captured in a CUDA graph, none is timed in one.
    """
    others = {**prepared.rivals, **prepared.parts, **prepared.own} if rivals else {}

    def timed(*, graph: bool) -> tuple[dict[str, Timing], dict[str, str]]:
        found = {OURS: time_on_device(prepared.call, device=device, budget_seconds=budget_seconds, graph=graph)}
        notes = {}
        for name, call in others.items():
            try:
                found[name] = time_on_device(call, device=device, budget_seconds=budget_seconds, graph=graph)
            except (RuntimeError, ValueError, TypeError) as error:  # not for this dtype or head size
                notes[name] = reason_of(error)
        return found, notes

    found, notes = timed(graph=True)
    if len({timing.method for timing in found.values()}) > 1:
        found, notes = timed(graph=False)
    return found, notes


def kernel_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    title = (
        f"Kernels, {found['dtype']}, {machine(found)}\n"
        f"roofline: {_words(found['roofline'])}; today: {_words(found['measured_roofline'])}"
    )
    table = text_table(title, COLUMNS, [_cells(row) for row in found["rows"]])
    failed = [f"FAILED {row['kernel']}, {row['case']}: {row['reason']}" for row in _failed(found["rows"])]
    return "\n".join([table, *failed])


def _failed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] != "ok"]


def _cells(row: Mapping[str, Any]) -> Sequence[object]:
    if row["status"] != "ok":
        return (row["kernel"], row["case"], None, None, None, None, None, None, "FAILED")
    ours = row["seconds"][OURS]
    best = min(rival_seconds(row).values(), default=None)
    return (
        row["kernel"],
        row["case"],
        f"{ours * 1e6:,.1f}",
        f"{row['tflops']:,.2f}" if row["flops"] else None,
        f"{row['gigabytes_per_second']:,.0f}",
        None if row["share"] is None else f"{row['share']:.0%}".replace("%", " %"),
        None if best is None else f"{best * 1e6:,.1f}",
        None if best is None else f"{best / ours:.2f}",
        f"{row['distance']:.1e}",
    )


def _facts(roofline: Roofline) -> dict[str, Any]:
    return {"flops": roofline.flops, "bytes": roofline.bytes, "source": roofline.source}


def _words(roofline: Mapping[str, Any]) -> str:
    return f"{roofline['flops'] / 1e12:,.1f} TFLOP/s, {roofline['bytes'] / 1e9:,.0f} GB/s ({roofline['source']})"
