"""Times every kernel at the towers' shapes, next to torch's equivalent and the roofline.

The cases are those of the tests.  Each is checked against fp64 first; one with a wrong result is reported and not timed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tritontower.engine.tuned_tables import fill_registry
from tritontower.text_table import text_table

from .cases import Case, Prepared, cases, check
from .documents import Document, Report, describe_error, describe_machine, list_failures
from .measuring import Timing, time_on_device
from .roofline import Roofline, measured_roofline, published_roofline

OURS = "tritontower"
"""Name of this project's candidate in every document."""


def benchmark_kernels(
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Sequence[str] | None = None,
    baselines: bool = True,
    path: Path | None = None,
) -> Document:
    """Times a grid of cases, by default ``gpu`` or ``cpu``, and torch's equivalents."""
    fill_registry(device)
    report, roofline = start_report(device, dtype, path)
    for case in cases("gpu" if device.type == "cuda" else "cpu", dtype, kernels):
        report.add(measure(case, device, roofline, baselines=baselines))
    return report.finish()


def start_report(device: torch.device, dtype: torch.dtype, path: Path | None) -> tuple[Report, Roofline]:
    """Starts a report with the rooflines of ``device``; returns it, and the roofline to compare with."""
    measured = measured_roofline(device, dtype)
    published = published_roofline(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    roofline = published if published is not None and dtype != torch.float32 else measured
    fields = {"roofline": asdict(roofline), "measured_roofline": asdict(measured)}
    return Report("kernels", device=device, dtype=dtype, path=path, **fields), roofline


def measure(
    case: Case, device: torch.device, roofline: Roofline, *, baselines: bool = True, budget_seconds: float = 0.2
) -> dict[str, Any]:
    """Checks and times one case; returns its row."""
    row: dict[str, Any] = {"kernel": case.kernel, "case": case.label, "sizes": dict(case.sizes)}
    if case.config is not None:
        row["config"] = str(case.config)
    try:
        prepared = case.prepare(device)
        outcome = check(case, prepared, device)
        row |= {"distance": outcome.distance, "limit": outcome.limit}
        if not outcome.passed:
            return {**row, "status": "failed", "reason": "the result is wrong"}
        times, notes = time_candidates(prepared, device, baselines=baselines, budget_seconds=budget_seconds)
    except Exception as error:  # Triton's errors share no narrower base; the call may also be too short to time
        return {**row, "status": "failed", "reason": describe_error(error)}
    ours = times[OURS]
    return {
        **row,
        "status": "ok",
        "seconds": {name: timing.median for name, timing in times.items()},
        "best": {name: timing.best for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "method": ours.method,
        "baselines": [name for name in prepared.baselines if name in times],
        "notes": notes,
        "flops": prepared.flops,
        "bytes": prepared.bytes,
        "tflops": prepared.flops / ours.median / 1e12,
        "gigabytes_per_second": prepared.bytes / ours.median / 1e9,
        "share": roofline.share(prepared.flops, prepared.bytes, ours.median) if device.type == "cuda" else None,
    }


def baseline_seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of torch's equivalents, by name; parts of the work and other orders of our kernels do not count."""
    return {name: row["seconds"][name] for name in row["baselines"]}


def time_candidates(
    prepared: Prepared, device: torch.device, *, baselines: bool = True, budget_seconds: float = 0.2
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times a case and its baselines; returns the times, and a reason for each baseline that could not be timed.

    All use one clock: if one candidate cannot be captured in a CUDA graph, none is.
    """
    others = {**prepared.baselines, **prepared.others} if baselines else {}

    def timed(*, graph: bool) -> tuple[dict[str, Timing], dict[str, str]]:
        found = {OURS: time_on_device(prepared.call, device=device, budget_seconds=budget_seconds, graph=graph)}
        notes = {}
        for name, call in others.items():
            try:
                found[name] = time_on_device(call, device=device, budget_seconds=budget_seconds, graph=graph)
            except (RuntimeError, ValueError, TypeError) as error:  # not for this dtype or head size
                notes[name] = describe_error(error)
        return found, notes

    found, notes = timed(graph=True)
    if len({timing.method for timing in found.values()}) > 1:
        found, notes = timed(graph=False)
    return found, notes


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table."""
    title = (
        f"Kernels, {found['dtype']}, {describe_machine(found)}\n"
        f"roofline: {_describe(found['roofline'])}; today: {_describe(found['measured_roofline'])}"
    )
    columns = ("kernel", "case", "µs", "TFLOP/s", "GB/s", "% of roofline", "best of torch, µs", "ratio", "distance")
    table = text_table(title, columns, [_cells(row) for row in found["rows"]])
    return "\n".join([table, *list_failures(found, ("kernel", "case"))])


def _cells(row: Mapping[str, Any]) -> Sequence[object]:
    if row["status"] != "ok":
        return (row["kernel"], row["case"], None, None, None, None, None, None, row["status"].upper())
    ours = row["seconds"][OURS]
    best = min(baseline_seconds(row).values(), default=None)
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


def _describe(roofline: Mapping[str, Any]) -> str:
    return f"{roofline['flops'] / 1e12:,.1f} TFLOP/s, {roofline['bytes'] / 1e9:,.0f} GB/s ({roofline['source']})"
