"""Writes what campaigns have measured into the README, between the markers ``<!-- bench:... -->``.

    python -m bench.report             # rewrite the README's tables
    python -m bench.report --plots     # and draw the images beside the results (needs matplotlib)
    python -m bench.report --check     # exit code 1 if the README says anything else than the results

Of every stage the latest complete result of each machine counts; machines have sections of their own.  Dry runs are refused,
and so is what was measured in a tree that is not the commit's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritontower.benchmarks.documents import machine, machine_slug, seconds_of
from tritontower.benchmarks.kernels import rival_seconds
from tritontower.benchmarks.measuring import Timing
from tritontower.benchmarks.plots import plot
from tritontower.benchmarks.preprocessing import BYTES, DIGESTS, THEIRS
from tritontower.benchmarks.towers import EAGER, OURS, PRODUCTS, RIVALS, fastest_rival

from .runner import ROOT

__all__ = ["RESULTS", "generated", "latest", "rewritten"]

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
Found = Mapping[str, Any]
Stages = Mapping[str, tuple[Path, Found]]
"""Stage → file and content of what one machine has found."""
DRAWN: Mapping[str, Sequence[str]] = {"cpu": ("families", "packs"), "gpu": ("towers",)}
"""Campaign → stages whose rows are those of the towers' benchmark, and make an image."""

CPU_NOT_RUN = "The CPU campaign (`python -m bench.campaign --cpu`) has not been run yet."
NOT_RUN = (
    "The GPU campaign (`make gpu`) has not been run on any GPU yet: there is no GPU figure here, and none is claimed "
    "anywhere."
)


def latest(results: Path, campaign: str) -> dict[str, dict[str, tuple[Path, Found]]]:
    """Machine (:func:`machine_slug`) → stage → file and content of its latest complete result.

    Raises:
        ValueError: there are results of a dry run among them, or one that counts is of no commit.
    """
    found: dict[str, dict[str, tuple[Path, Found]]] = {}
    for path in sorted(results.glob("*/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("campaign") != campaign:
            continue
        if content.get("dry_run"):
            raise ValueError(f"{path} is of a dry run, which measures nothing; take it away")
        stages = found.setdefault(machine_slug(content), {})
        name = str(content["bench"])
        if content["complete"] and (name not in stages or content["date"] >= stages[name][1]["date"]):
            stages[name] = (path, content)
    for stages in found.values():
        for name, (path, content) in stages.items():
            if (commit := str(content.get("commit"))).endswith("+"):
                option = "--cpu " if campaign == "cpu" else ""
                raise ValueError(
                    f"{_relative(path)} was measured in a tree that differs from its commit ({commit}), so nobody can measure "
                    f"it again; commit, then run `python -m bench.campaign {option}--stage {name} --again`"
                )
    return {slug: stages for slug, stages in sorted(found.items()) if stages}


def generated(results: Path = RESULTS) -> dict[str, str]:
    """Section of the README → what belongs there."""
    return {
        "cpu": _machines(latest(results, "cpu"), _cpu) or CPU_NOT_RUN,
        "gpu": _machines(latest(results, "gpu"), _gpu) or NOT_RUN,
    }


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


def _machines(found: Mapping[str, Stages], describe: Callable[[Stages], str]) -> str:
    """What was found on each machine, with headings where there are several."""
    parts = []
    for stages in found.values():
        _, some = next(iter(stages.values()))
        parts += [f"#### {machine(some)}"] if len(found) > 1 else []
        parts.append(describe(stages))
    return "\n\n".join(parts)


def _cpu(found: Stages) -> str:
    parts = [_preamble([content for _, content in found.values()])]
    for name, describe in _CPU_SECTIONS.items():
        if name in found:
            path, content = found[name]
            parts.append(describe(content))
            image = path.with_suffix(".png")
            if name in DRAWN["cpu"] and image.is_file():
                parts.append(f"![{content['summary']}]({_relative(image)})")
    return "\n\n".join(parts)


def _preamble(contents: Sequence[Found]) -> str:
    versions = {f"torch {content['torch']}, transformers {content['transformers']}" for content in contents}
    return (
        f"Measured on {machine(contents[0])}, {_joined(versions, '; ')}, {_when(contents)}; random weights. Medians of "
        f"{_runs(contents)} that take turns with transformers' (SDPA), which gets the same preprocessed pixels; the ratio is "
        "transformers ÷ tritontower. *products* are the tower's products of rows by weights alone, by the same library and "
        "with nothing around them, timed behind the others: what a pass does not get below but for noise. ± says how far "
        "the farthest run lies from the median. Raw results with provenance are in [`bench/results/`](bench/results)."
    )


def _when(contents: Sequence[Found]) -> str:
    """Of which commit, and on which day."""
    commits = {f"`{content['commit']}`" if content.get("commit") else "unknown" for content in contents}
    dates = {str(content["date"])[:10] for content in contents}
    return f"commit {_joined(commits)}, on {_joined(dates)}"


def _joined(words: Iterable[str], between: str = " and ") -> str:
    return between.join(sorted(words))


def _runs(contents: Sequence[Found]) -> str:
    """How many runs the times of towers are of."""
    counts = {
        len(seconds)
        for content in contents
        for row in content["rows"]
        if row["status"] == "ok" and "pack" in row
        for seconds in row["seconds"].values()
    }
    return f"{' to '.join(str(count) for count in sorted({min(counts), max(counts)}))} runs" if counts else "runs"


def _tower_rows(content: Found) -> Iterable[Sequence[str]]:
    for row in content["rows"]:
        if row["status"] != "ok":
            yield (row.get("family", row["key"]), row.get("pack", ""), "–", "–", "–", "–", "–", row["status"])
            continue
        seconds = row["seconds"]
        yield (
            row["family"],
            _pack(row),
            f"{row['patches']:,}",
            f"{row['tokens']:,}",
            _with_farthest(seconds[OURS]),
            _with_farthest(seconds.get(RIVALS["sdpa"])),
            _with_farthest(seconds.get(PRODUCTS)),
            f"{row['ratio']:.2f}" if row["ratio"] else "unchecked",
        )


TOWER_COLUMNS = (
    "family",
    "images",
    "patches",
    "tokens",
    "tritontower, ms",
    "transformers, ms",
    "products, ms",
    "ratio",
)


def _towers(content: Found) -> str:
    return f"**The tower of Qwen2-VL-2B**, {content['dtype_of_rows']}, one square still image:\n\n" + _markdown(
        TOWER_COLUMNS, _tower_rows(content)
    )


def _families(content: Found) -> str:
    return (
        "**Every family** (ShieldGemma 2 has the tower of Gemma 3) at its published width, depth cut to 8 blocks "
        "(LLaVA: 7 of 8), bfloat16, one image of 448 × 448:\n\n"
    ) + _markdown(TOWER_COLUMNS, _tower_rows(content))


def _packs(content: Found) -> str:
    return "**Large images, many small ones, and mixed sizes in one pass**, 8 blocks, bfloat16:\n\n" + _markdown(
        TOWER_COLUMNS, _tower_rows(content)
    )


def _preprocessing(content: Found) -> str:
    ways = (OURS, DIGESTS, BYTES)
    columns = ("images", "fp32, ms", "with digests, ms", "bytes, ms", "transformers, ms", "ratios", "of first calls")
    rows = []
    for row in content["rows"]:
        if row["status"] != "ok":
            rows.append((row.get("label", row["key"]), "–", "–", "–", "–", "–", row["status"]))
            continue
        # A processor that nothing is known of makes no bytes.
        milliseconds = (_with_quartiles(row["seconds"].get(way)) for way in (*ways, THEIRS))
        rows.append((row["label"], *milliseconds, _ratios(row["seconds"], ways), _ratios(row["in_turn"], ways)))
    return (
        "**Preprocessing**, PIL images to patches, against transformers' own image processor; the pixels are the same, bit "
        "for bit. *fp32* is the like of what transformers returns (but for the frames of a still image, which are not "
        "repeated), *with digests* also names every image by its pixels, which a cache asks for, and *bytes* are what goes "
        "to a GPU; all check the images and copy them. Every candidate makes two calls in its turn and the second counts; "
        "the first, behind another candidate's, finds other caches and no memory of its own. ± is half the distance of the "
        "quartiles, ratios are those of *fp32 / with digests / bytes*:\n\n"
    ) + _markdown(columns, rows)


def _ratios(seconds: Mapping[str, Sequence[float]], ways: Sequence[str]) -> str:
    medians = seconds_of({"seconds": seconds})
    return " / ".join(f"{medians[THEIRS] / medians[way]:.1f}" for way in ways if way in medians)


def _memory(content: Found) -> str:
    words = [
        f"{row['beyond_bytes'] / 1e6:,.0f} MB at {row['patches']:,} patches{_of_plan(row)}"
        if row["status"] == "ok"
        else f"{row['status']} at {row['key']}"
        for row in content["rows"]
    ]
    return (
        f"**Memory** beyond weights and memory plan, peak of the process, bfloat16 (`tests/parity/test_full_size.py` holds it under "
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
    rows += [(row["key"], row["status"], "–", "–", "–") for row in content["rows"] if row["status"] != "ok"]
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


def _gpu(found: Stages) -> str:
    contents = [content for _, content in found.values()]
    drivers = {str(content.get("driver", "unknown")) for content in contents}
    versions = {
        f"torch {content['torch']}, Triton {content['triton']}, transformers {content['transformers']}"
        for content in contents
    }
    parts = [
        f"Measured on {machine(contents[0])} (driver {_joined(drivers)}), {_joined(versions, '; ')}, {_when(contents)}; "
        "random weights, bfloat16, medians. The whole campaign is in [`bench/results/`](bench/results)."
    ]
    if "towers" in found:
        parts.append(_gpu_towers(found["towers"][1], _peak_of(found)))
        image = found["towers"][0].with_suffix(".png")
        if image.is_file():
            parts.append(f"![Whole towers against transformers]({_relative(image)})")
    if "attention" in found:
        parts.append(_gpu_attention(found["attention"][1]))
    if "gemm" in found:
        parts.append(_gpu_products(found["gemm"][1]))
    if "stress" in found:
        parts.append(_gpu_stress(found["stress"][1]))
    return "\n\n".join(parts)


def _peak_of(found: Stages) -> float | None:
    """What the vendor's product of 8192³ reached on the day of the towers, operations a second."""
    if "peak" not in found or found["peak"][1]["date"][:10] != found["towers"][1]["date"][:10]:
        return None
    rows = [row for row in found["peak"][1]["rows"] if row["key"].startswith("product of 8192³, bfloat16")]
    return rows[0]["tflops"] * 1e12 if rows and rows[0]["status"] == "ok" else None


def _gpu_towers(content: Found, peak: float | None) -> str:
    compiled = RIVALS["compile"]
    columns = (
        "tower",
        "images",
        "patches",
        "ms",
        "without graphs, ms",
        "transformers sdpa, ms",
        "compiled, ms",
        "products alone, ms",
        "ratio",
        "% of a large product",
    )
    # A line is of one run, in which its candidates took turns: of a pass that was run twice, the one with more of them.
    by_pass: dict[tuple[str, str], Found] = {}
    for row in content["rows"]:
        if row["status"] == "ok":
            kept = by_pass.setdefault((row["family"], row["pack"]), row)
            if len(row["seconds"]) > len(kept["seconds"]):
                by_pass[row["family"], row["pack"]] = row
    rows = []
    for row in by_pass.values():
        seconds = seconds_of(row)
        ratio = fastest_rival(row)[1]
        share = None if peak is None else row["flops"] / seconds[OURS] / peak
        rows.append(
            (
                row["family"],
                _pack(row),
                f"{row['patches']:,}",
                _with_farthest(row["seconds"][OURS]),
                _milliseconds(seconds.get(EAGER)),
                _with_farthest(row["seconds"].get(RIVALS["sdpa"])),
                _with_farthest(row["seconds"].get(compiled)),
                _milliseconds(seconds.get(PRODUCTS)),
                "unchecked" if ratio is None else f"{ratio:.2f}",
                "–" if share is None else f"{100 * share:.0f}",
            )
        )
    of_what = "" if peak is None else f" ({peak / 1e12:,.0f} TFLOP/s, 8192³ by the vendor's library on the same day)"
    return (
        "**Whole towers**; *products alone* are those of rows by weights, by the vendor's library; the ratio is to "
        f"transformers' fastest, the last column to a large product{of_what}; ± says how far the farthest run lies from the "
        f"median{_failures(content)}:\n\n" + (_markdown(columns, rows))
    )


def _gpu_attention(content: Found) -> str:
    columns = ("case", "TFLOP/s", "best of torch, TFLOP/s", "best variant, TFLOP/s", "variant")
    chosen = {row["case"]: row for row in content["rows"] if row["status"] == "ok" and "config" not in row}
    rows = []
    for case, row in chosen.items():
        best_other = _best_rival(row)
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
                "–" if best_other is None else f"{row['flops'] / best_other / 1e12:,.0f}",
                f"{best['tflops']:,.0f}" if best else "–",
                best["case"].removeprefix(f"{case}, ") if best else "–",
            )
        )
    return (
        f"**Attention**, as chosen by default or by the tuned table, and the best variant tried{_failures(content)}:\n\n"
        + _markdown(columns, rows)
    )


def _gpu_products(content: Found) -> str:
    columns = ("product", "TFLOP/s", "torch, TFLOP/s", "ratio")
    rows = []
    for row in content["rows"]:
        if row["status"] != "ok" or "config" in row:
            continue
        best = _best_rival(row)
        rows.append(
            (
                f"{row['kernel']}: {row['case']}",
                f"{row['tflops']:,.0f}",
                "–" if best is None else f"{row['flops'] / best / 1e12:,.0f}",
                "–" if best is None else f"{best / row['seconds'][OURS]:.2f}",
            )
        )
    return (
        f"**Products** with their epilogues, against torch's operations for the same result{_failures(content)}:\n\n"
        + _markdown(columns, rows)
    )


def _best_rival(row: Found) -> float | None:
    """Seconds of the fastest that does the same work; ``None`` where none was timed."""
    return min(rival_seconds(row).values(), default=None)


def _failures(content: Found) -> str:
    """What the tables of single cases leave out."""
    failed = sum(row["status"] not in ("ok", "skipped") for row in content["rows"])
    return f" ({failed} of {len(content['rows'])} cases failed)" if failed else ""


def _gpu_stress(content: Found) -> str:
    launches: dict[str, int] = {}
    for row in content["rows"]:
        if "launches" in row:
            launches[row["variant"]] = launches.get(row["variant"], 0) + row["launches"]
    wrong = sum(row.get("wrong_draws", 0) for row in content["rows"])
    ended = sum("launches" not in row and row["status"] != "skipped" for row in content["rows"])
    counts = ", ".join(f"{variant} {count:,}" for variant, count in launches.items()) or "none"
    return (
        f"**Stress**, attention launches with random lengths: {counts}. Draws with a wrong result: {wrong:,}; "
        f"series that an error ended: {ended:,}."
    )


# -- cells ------------------------------------------------------------------------------------------------------------

_NAMED = {
    "448": "448²",
    "1024": "1024²",
    "small": "16 × 224²",
    "64small": "64 × 112²",
    "mixed": "6 mixed, 112 to 900",
}


def _pack(row: Mapping[str, Any]) -> str:
    return _NAMED.get(row["pack"], "one square" if row["images"] == 1 else f"{row['images']} of one size")


def _with_farthest(seconds: Sequence[float] | None) -> str:
    """The median, and how far the farthest run lies from it."""
    if not seconds:
        return "–"
    middle = Timing(tuple(seconds)).median
    farthest = max(abs(each - middle) for each in seconds) / middle
    return _milliseconds(middle) + (f" ± {100 * farthest:.0f} %" if len(seconds) > 1 else "")


def _with_quartiles(seconds: Sequence[float] | None) -> str:
    """The median, and half the distance of the quartiles: where one of many runs may be far off."""
    if not seconds:
        return "–"
    timing = Timing(tuple(seconds))
    return _milliseconds(timing.median) + (f" ± {50 * timing.spread:.0f} %" if len(seconds) > 1 else "")


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


def _draw(results: Path) -> None:
    for campaign, drawn in DRAWN.items():
        for stages in latest(results, campaign).values():
            for name, (path, content) in stages.items():
                if name in drawn:
                    plot({**content, "bench": "towers", "dtype": "bfloat16"}, path.with_suffix(".png"))


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--plots", action="store_true", help="draw the towers' results as PNG")
    arguments = parser.parse_args(words)
    before = README.read_text(encoding="utf-8")
    try:
        if arguments.plots:
            _draw(RESULTS)
        after = rewritten(before, generated())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
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
