"""Writes what campaigns have measured into the README, between the markers ``<!-- bench:... -->``.

    python -m bench.report             # rewrite the README's tables
    python -m bench.report --plots     # and draw the pictures beside the results (needs matplotlib)
    python -m bench.report --check     # exit code 1 if the README says anything else than the results

Of every stage the latest complete result counts.  Dry runs are refused.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritontower.benchmarks.documents import machine, seconds_of
from tritontower.benchmarks.plots import plot
from tritontower.benchmarks.preprocessing import BYTES, PIXELS, THEIRS
from tritontower.benchmarks.towers import EAGER, OURS, PRODUCTS, RIVALS

from .runner import ROOT

__all__ = ["RESULTS", "generated", "latest", "rewritten"]

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
Found = Mapping[str, Any]
DRAWN: Mapping[str, Sequence[str]] = {"cpu": ("families", "packs"), "gpu": ("towers",)}
"""Campaign → stages whose rows are those of the towers' benchmark, and make a picture."""

NOT_RUN = (
    "The GPU campaign (`make gpu`) has not been run on any GPU yet: there is no GPU figure here, and none is claimed "
    "anywhere."
)


def latest(results: Path, campaign: str) -> dict[str, tuple[Path, Found]]:
    """Stage → file and content of its latest complete result.

    Raises:
        ValueError: there are results of a dry run among them.
    """
    found: dict[str, tuple[Path, Found]] = {}
    for path in sorted(results.glob("*/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("campaign") != campaign:
            continue
        if content.get("dry_run"):
            raise ValueError(f"{path} is of a dry run, which measures nothing; take it away")
        name = str(content["bench"])
        if content["complete"] and (name not in found or content["date"] >= found[name][1]["date"]):
            found[name] = (path, content)
    return found


def generated(results: Path = RESULTS) -> dict[str, str]:
    """Section of the README → what belongs there."""
    return {"cpu": _cpu(latest(results, "cpu")), "gpu": _gpu(latest(results, "gpu"))}


def rewritten(readme: str, sections: Mapping[str, str]) -> str:
    """``readme`` with its sections replaced.

    Raises:
        ValueError: it lacks the markers of one.
    """
    for name, text in sections.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(f"the README has to have {begin} and {end} once each")
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return readme


# -- sections ---------------------------------------------------------------------------------------------------------


def _cpu(found: Mapping[str, tuple[Path, Found]]) -> str:
    if not found:
        return "The CPU campaign (`python -m bench.campaign --cpu`) has not been run yet."
    parts = [_preamble([content for _, content in found.values()])]
    for name, describe in _CPU_SECTIONS.items():
        if name in found:
            path, content = found[name]
            parts.append(describe(content))
            picture = path.with_suffix(".png")
            if name in DRAWN["cpu"] and picture.is_file():
                parts.append(f"![{content['summary']}]({_relative(picture)})")
    return "\n\n".join(parts)


def _preamble(contents: Sequence[Found]) -> str:
    machines = sorted({machine(content) for content in contents})
    versions = sorted({f"torch {content['torch']}, transformers {content['transformers']}" for content in contents})
    dates = sorted({str(content["date"])[:10] for content in contents})
    return (
        f"Measured on {' and '.join(machines)}, {'; '.join(versions)}, on {' and '.join(dates)}; random weights. Medians of "
        "runs that take turns with transformers' (SDPA), which gets the same preprocessed pixels; the ratio is "
        "transformers ÷ tritontower. *products* are the tower's products of rows by weights alone, by the same library and "
        "with nothing around them: no candidate can be faster. Raw results with provenance are in [`bench/results/`](bench/results)."
    )


def _tower_rows(content: Found) -> Iterable[Sequence[str]]:
    for row in content["rows"]:
        if row["status"] != "ok":
            yield (row.get("family", row["key"]), row.get("pack", ""), "–", "–", "–", "–", "–", row["status"])
            continue
        seconds = seconds_of(row)
        theirs = seconds.get(RIVALS["sdpa"])
        yield (
            row["family"],
            _pack(row),
            f"{row['patches']:,}",
            f"{row['tokens']:,}",
            _milliseconds(seconds[OURS]),
            _milliseconds(theirs),
            _milliseconds(seconds.get(PRODUCTS)),
            f"{row['ratio']:.2f}" if row["ratio"] else "–",
        )


TOWER_COLUMNS = (
    "family",
    "pictures",
    "patches",
    "tokens",
    "tritontower, ms",
    "transformers, ms",
    "products, ms",
    "ratio",
)


def _towers(content: Found) -> str:
    return f"**The tower of Qwen2-VL-2B**, {content['dtype_of_rows']}, one square still picture:\n\n" + _markdown(
        TOWER_COLUMNS, _tower_rows(content)
    )


def _families(content: Found) -> str:
    return (
        "**Every family** (ShieldGemma 2 has the tower of Gemma 3) at its published width, depth cut to 8 blocks "
        "(LLaVA: 7 of 8), bfloat16, one picture of 448 × 448:\n\n"
    ) + _markdown(TOWER_COLUMNS, _tower_rows(content))


def _packs(content: Found) -> str:
    return "**Large pictures, many small ones, and mixed sizes in one pass**, 8 blocks, bfloat16:\n\n" + _markdown(
        TOWER_COLUMNS, _tower_rows(content)
    )


def _preprocessing(content: Found) -> str:
    ways = (OURS, PIXELS, BYTES, THEIRS)
    columns = ("pictures", "fp32, ms", "pixels alone, ms", "bytes, ms", "transformers, ms", "ratios")
    rows = []
    for row in content["rows"]:
        seconds = seconds_of(row)
        # A processor that nothing is known of makes no bytes.
        milliseconds = (_milliseconds(seconds[way]) if way in seconds else "–" for way in ways)
        ratios = (f"{seconds[THEIRS] / seconds[way]:.1f}" for way in ways[:-1] if way in seconds)
        rows.append((row["label"], *milliseconds, " / ".join(ratios)))
    return (
        "**Preprocessing**, pictures to patches, against transformers' own image processor; the pixels are the same, bit for "
        "bit. *fp32* and *bytes* (what goes to a GPU) copy the picture and take a digest of it first, which transformers "
        "does not; *pixels alone* is fp32 without that:\n\n"
    ) + _markdown(columns, rows)


def _memory(content: Found) -> str:
    words = [
        f"{row['beyond_bytes'] / 1e6:,.0f} MB at {row['patches']:,} patches{_of_plan(row)}"
        for row in content["rows"]
        if row["status"] == "ok"
    ]
    return (
        f"**Memory** beyond weights and memory plan, peak of the process, bfloat16 (`tests/test_full_size.py` holds it under "
        f"300 MB): {', '.join(words)}."
    )


def _of_plan(row: Mapping[str, Any]) -> str:
    """What the pass itself allocates, where that was measured."""
    if "allocated_bytes" not in row:
        return ""
    return f" (the pass allocates {row['allocated_bytes'] / row['planned_bytes']:.3f} of its plan)"


def _loading(content: Found) -> str:
    columns = ("loaded by", "files", "seconds", "peak growth, MB", "weights, MB")
    rows = [
        (
            load["by"],
            load["files"],
            f"{load['seconds']:.2f}",
            f"{load['growth_bytes'] / 1e6:,.0f}",
            f"{load['weights_bytes'] / 1e6:,.0f}",
        )
        for row in content["rows"]
        if row["status"] == "ok"
        for load in row["loads"]
    ]
    return (
        "**Loading** the tower of Qwen2-VL-2B in bfloat16 (transformers: the model without the layers of its language "
        "model). Here the weights are read, checked and packed for the CPU's products; transformers maps the file, and "
        "reads most of it when it is first used, which is in neither of its figures:\n\n"
    ) + _markdown(columns, rows)


_CPU_SECTIONS: Mapping[str, Callable[[Found], str]] = {
    "towers": lambda content: _towers({**content, "dtype_of_rows": "bfloat16"}),
    "towers-float32": lambda content: _towers({**content, "dtype_of_rows": "float32"}),
    "families": _families,
    "packs": _packs,
    "preprocessing": _preprocessing,
    "memory": _memory,
    "loading": _loading,
}


def _gpu(found: Mapping[str, tuple[Path, Found]]) -> str:
    if not found:
        return NOT_RUN
    _, some = next(iter(found.values()))
    dates = sorted({str(content["date"])[:10] for _, content in found.values()})
    parts = [
        f"Measured on {machine(some)} (driver {some.get('driver', 'unknown')}), torch {some['torch']}, Triton "
        f"{some['triton']}, transformers {some['transformers']}, on {' and '.join(dates)}; random weights, bfloat16, medians. "
        "The whole campaign is in [`bench/results/`](bench/results)."
    ]
    peak = _peak_of(found)
    if "towers" in found:
        parts.append(_gpu_towers(found["towers"][1], peak))
        picture = found["towers"][0].with_suffix(".png")
        if picture.is_file():
            parts.append(f"![Whole towers against transformers]({_relative(picture)})")
    if "attention" in found:
        parts.append(_gpu_attention(found["attention"][1]))
    if "gemm" in found:
        parts.append(_gpu_products(found["gemm"][1]))
    if "stress" in found:
        parts.append(_gpu_stress(found["stress"][1]))
    return "\n\n".join(parts)


def _peak_of(found: Mapping[str, tuple[Path, Found]]) -> float | None:
    """What the vendor's product of 8192³ reached on that day, operations a second."""
    if "peak" not in found:
        return None
    rows = [row for row in found["peak"][1]["rows"] if row["key"].startswith("product of 8192³, bfloat16")]
    return rows[0]["tflops"] * 1e12 if rows and rows[0]["status"] == "ok" else None


def _gpu_towers(content: Found, peak: float | None) -> str:
    compiled = RIVALS["compile"]
    columns = (
        "tower",
        "pictures",
        "patches",
        "ms",
        "without graphs, ms",
        "transformers sdpa, ms",
        "compiled, ms",
        "products alone, ms",
        "ratio",
        "% of a large product",
    )
    by_pass: dict[tuple[str, str], dict[str, Any]] = {}
    for row in content["rows"]:
        if row["status"] != "ok":
            continue
        kept = by_pass.setdefault((row["family"], row["pack"]), dict(row))
        kept["seconds"] = {**row["seconds"], **kept["seconds"]}
    rows = []
    for row in by_pass.values():
        seconds = seconds_of(row)
        theirs = [seconds[name] for name in RIVALS.values() if name in seconds]
        share = None if peak is None else row["flops"] / seconds[OURS] / peak
        rows.append(
            (
                row["family"],
                _pack(row),
                f"{row['patches']:,}",
                _milliseconds(seconds[OURS]),
                _milliseconds(seconds.get(EAGER)),
                _milliseconds(seconds.get(RIVALS["sdpa"])),
                _milliseconds(seconds.get(compiled)),
                _milliseconds(seconds.get(PRODUCTS)),
                f"{min(theirs) / seconds[OURS]:.2f}" if theirs else "–",
                "–" if share is None else f"{100 * share:.0f}",
            )
        )
    of_what = "" if peak is None else f" ({peak / 1e12:,.0f} TFLOP/s, 8192³ by the vendor's library on the same day)"
    return (
        "**Whole towers**; *products alone* are those of rows by weights, by the vendor's library; the ratio is to "
        f"transformers' fastest, the last column to a large product{of_what}:\n\n" + (_markdown(columns, rows))
    )


def _gpu_attention(content: Found) -> str:
    columns = ("case", "TFLOP/s", "best of torch, TFLOP/s", "best variant, TFLOP/s", "variant")
    chosen = {row["case"]: row for row in content["rows"] if row["status"] == "ok" and "config" not in row}
    rows = []
    for case, row in chosen.items():
        others = [seconds for name, seconds in row["seconds"].items() if name != OURS]
        variants = [
            other
            for other in content["rows"]
            if other["status"] == "ok" and "config" in other and other["case"].startswith(f"{case}, ")
        ]
        best = max(variants, key=lambda other: other["tflops"], default=None)
        rows.append(
            (
                case,
                f"{row['tflops']:,.0f}",
                f"{row['flops'] / min(others) / 1e12:,.0f}" if others else "–",
                f"{best['tflops']:,.0f}" if best else "–",
                best["case"].removeprefix(f"{case}, ") if best else "–",
            )
        )
    return "**Attention**, as chosen by default or by the tuned table, and the best variant tried:\n\n" + _markdown(
        columns, rows
    )


def _gpu_products(content: Found) -> str:
    columns = ("product", "TFLOP/s", "torch, TFLOP/s", "ratio")
    rows = []
    for row in content["rows"]:
        if row["status"] != "ok" or "config" in row:
            continue
        others = [seconds for name, seconds in row["seconds"].items() if name != OURS and "alone" not in name]
        best = min(others)
        rows.append(
            (
                f"{row['kernel']}: {row['case']}",
                f"{row['tflops']:,.0f}",
                f"{row['flops'] / best / 1e12:,.0f}",
                f"{best / row['seconds'][OURS]:.2f}",
            )
        )
    return "**Products** with their epilogues, against torch's operations for the same result:\n\n" + _markdown(
        columns, rows
    )


def _gpu_stress(content: Found) -> str:
    launches = sum(row.get("launches", 0) for row in content["rows"])
    wrong = sum(row.get("wrong_draws", row["status"] not in ("ok", "skipped")) for row in content["rows"])
    return f"**Stress**: {launches:,} attention launches with random lengths in every variant, {wrong:,} draws of them wrong."


# -- cells ------------------------------------------------------------------------------------------------------------

_NAMED = {
    "448": "448²",
    "1024": "1024²",
    "small": "16 × 224²",
    "64small": "64 × 112²",
    "mixed": "6 mixed, 112 to 900",
}


def _pack(row: Mapping[str, Any]) -> str:
    return _NAMED.get(row["pack"], "one square" if row["pictures"] == 1 else f"{row['pictures']} of one size")


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--plots", action="store_true", help="draw the towers' results as PNG")
    arguments = parser.parse_args(words)
    if arguments.plots:
        for campaign, drawn in DRAWN.items():
            for name, (path, content) in latest(RESULTS, campaign).items():
                if name in drawn:
                    plot({**content, "bench": "towers", "dtype": "bfloat16"}, path.with_suffix(".png"))
    before = README.read_text(encoding="utf-8")
    after = rewritten(before, generated())
    if arguments.check:
        differs = before != after
        print(
            "the README and the results differ; run `python -m bench.report`" if differs else "the README is up to date"
        )
        return int(differs)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
