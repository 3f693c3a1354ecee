"""Draws documents as bar charts (PNG) with matplotlib, an optional dependency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritontower.errors import UsageError

from .documents import describe_machine, median_seconds
from .kernels import OURS
from .towers import list_candidates

COLORS = ("#1b6ca8", "#e08e36", "#7a9e4b", "#9b5fa5", "#8c8c8c", "#b5473c")
"""This project's color first; distinguishable with common color blindness."""

UNITS = {"towers": "milliseconds", "preprocessing": "milliseconds", "loading": "seconds", "kernels": "microseconds"}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draws a document into ``path``: a group of bars for each row, a bar for each candidate, shorter is better.

    Raises:
        UsageError: matplotlib is not installed, or the document holds nothing that could be drawn.
    """
    groups = group_times(found)
    if not groups:
        raise UsageError(f"plot must be of a report with times, got {found['bench']!r} without any")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            'plots need matplotlib, which is not installed; run pip install "tritontower[plot]" or drop --plot'
        ) from error
    names = list_names(found, groups)
    most = max(len(times) for _, times in groups)
    height = 0.8 / most
    figure = Figure(figsize=(10, 1.9 + len(groups) * (0.22 * most + 0.18)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(names):
        drawn = []
        for row, (_, times) in enumerate(groups):
            present = [candidate for candidate in names if candidate in times]
            if name in times:
                drawn.append((row + (present.index(name) - (len(present) - 1) / 2) * height, times[name]))
        bars = axes.barh(
            [place for place, _ in drawn],
            [length for _, length in drawn],
            height=height * 0.92,
            color=COLORS[number % len(COLORS)],
            label=name,
        )
        axes.bar_label(bars, labels=[_number(length) for _, length in drawn], padding=3, fontsize=8, color="#333333")
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=9)
    axes.invert_yaxis()
    longest = [length for _, times in groups for length in times.values()]
    if max(longest) > 20 * min(longest):
        axes.set_xscale("log")
        axes.set_xlim(min(longest) / 2, max(longest) * 2.2)
        scale = ", logarithmic"
    else:
        axes.set_xlim(0, max(longest) * 1.12)
        scale = ""
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlabel(f"{UNITS[found['bench']]} (median, shorter is better{scale})")
    dtype = f"{found['dtype']}, " if "dtype" in found else ""
    axes.set_title(f"{str(found['bench']).capitalize()}: {dtype}{describe_machine(found)}", fontsize=11, loc="left")
    axes.legend(
        fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.5 / figure.get_figheight()), ncols=3, frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130, format="png")


def group_times(found: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Label of a row → candidate → time in the benchmark's unit."""
    rows = [row for row in found["rows"] if row.get("status", "ok") == "ok"]
    if found["bench"] == "towers":
        return [(_tower_label(row), _times(median_seconds(row), 1e3)) for row in rows]
    if found["bench"] == "kernels":
        return [(f"{row['kernel']}: {row['case']}", _times(row["seconds"], 1e6)) for row in rows]
    if found["bench"] == "loading":
        by_files: dict[str, dict[str, float]] = {}
        for row in rows:
            by_files.setdefault(f"files {row['files']}", {})[row["by"]] = row["seconds"]
        return list(by_files.items())
    if found["bench"] == "preprocessing":
        return [(row["label"], _times(median_seconds(row), 1e3)) for row in rows]
    return []


def _tower_label(row: Mapping[str, Any]) -> str:
    images = f"{row['images']} images, " if row["images"] > 1 else ""
    return f"{row.get('family') or 'tower'}: {images}{row['patches']:,} patches"


def _times(seconds: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in seconds.items() if value > 0}


def list_names(found: Mapping[str, Any], groups: Sequence[tuple[str, Mapping[str, float]]]) -> Sequence[str]:
    """The candidates of a document, this project's first."""
    if found["bench"] == "towers":
        return list_candidates(found)
    names = dict.fromkeys(name for _, times in groups for name in times)
    return sorted(names, key=lambda name: (name != OURS, not name.startswith(OURS)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
