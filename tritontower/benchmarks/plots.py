"""Draws documents as bar charts (PNG) with matplotlib, an optional dependency."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritontower.errors import UsageError

from .documents import describe_machine, median_seconds
from .towers import order_candidates

COLORS = ("#1b6ca8", "#e08e36", "#7a9e4b", "#9b5fa5", "#8c8c8c", "#b5473c")
"""This project's color first; distinguishable with common color blindness."""

UNITS = {
    "towers": (1e3, "milliseconds"),
    "preprocessing": (1e3, "milliseconds"),
    "loading": (1.0, "seconds"),
    "kernels": (1e6, "microseconds"),
}
"""Benchmark → factor from seconds, and unit."""


def import_figure() -> Any:
    """Returns ``matplotlib.figure.Figure``; raises :class:`UsageError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            'plots need matplotlib, which is not installed; run pip install "tritontower[plot]" or drop --plot'
        ) from error
    return Figure


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draws a document into ``path``: a group of bars per row, a bar per candidate, shorter is better."""
    groups = group_times(found)
    if not groups:
        raise UsageError(f"plot must be of a report with times, got {found['bench']!r} without any")
    names = order_candidates(name for _, times in groups for name in times)
    figure = import_figure()(figsize=(10, 1.9 + 0.25 * len(groups) * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [row + number * height for row, (_, times) in enumerate(groups) if name in times]
        lengths = [times[name] for _, times in groups if name in times]
        bars = axes.barh(places, lengths, height=0.92 * height, color=COLORS[number % len(COLORS)], label=name)
        axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], [label for label, _ in groups], fontsize=9)
    axes.invert_yaxis()
    longest = [length for _, times in groups for length in times.values()]
    if max(longest) > 20 * min(longest):
        axes.set_xscale("log")
    axes.margins(x=0.12)
    dtype = f"{found['dtype']}, " if "dtype" in found else ""
    axes.set_title(f"{str(found['bench']).capitalize()}: {dtype}{describe_machine(found)}", fontsize=11, loc="left")
    axes.set_xlabel(f"{UNITS[found['bench']][1]} (median, shorter is better)")
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.5 / figure.get_figheight()), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def group_times(found: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Label of a row → candidate → time in the benchmark's unit."""
    bench = found["bench"]
    groups: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        if row.get("status", "ok") != "ok" or bench not in UNITS:
            continue
        if bench == "towers":
            images = f"{row['images']} images, " if row["images"] > 1 else ""
            label, seconds = f"{row['family']}: {images}{row['patches']:,} patches", median_seconds(row)
        elif bench == "preprocessing":
            label, seconds = row["label"], median_seconds(row)
        elif bench == "kernels":
            label, seconds = f"{row['kernel']}: {row['case']}", row["seconds"]
        else:
            label, seconds = f"files {row['files']}", {row["by"]: row["seconds"]}
        times = {name: UNITS[bench][0] * value for name, value in seconds.items() if value > 0}
        groups.setdefault(label, {}).update(times)
    return list(groups.items())
