"""Writes the campaign's results into ``docs/benchmarks.md`` and the README, between ``<!-- bench:... -->`` markers.

    python -m bench.report             # rewrite the tables
    python -m bench.report --check     # exit code 1 if the pages and the results differ

The latest complete result of each step and machine counts.  Results of a checkout with uncommitted changes are refused.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritontower.benchmarks.documents import describe_machine, machine_slug, median_seconds
from tritontower.benchmarks.kernels import OURS, baseline_seconds
from tritontower.benchmarks.measuring import Timing
from tritontower.benchmarks.preprocessing import BYTES, DIGESTS, THEIRS
from tritontower.benchmarks.towers import BASELINES, EAGER, MATMUL_ONLY

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
Found = Mapping[str, Any]
Steps = Mapping[str, tuple[Path, Found]]
"""Step → file and content of one machine's result."""

NO_GPU = (
    "No GPU has run the campaign yet (`make gpu`): there is no GPU figure on this page, and none is claimed anywhere."
)
BATCH_NAMES = {
    "448": "448²",
    "1024": "1024²",
    "small": "16 × 224²",
    "64small": "64 × 112²",
    "mixed": "6 mixed, 112 to 900",
}


def latest(results: Path) -> dict[str, dict[str, tuple[Path, Found]]]:
    """Machine (:func:`machine_slug`) → step → file and content of its latest complete result.

    Raises:
        ValueError: a result that counts was measured with uncommitted changes.
    """
    found: dict[str, dict[str, tuple[Path, Found]]] = {}
    for path in sorted(results.glob("*/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        steps = found.setdefault(machine_slug(content), {})
        if content["complete"] and (path.stem not in steps or content["date"] >= steps[path.stem][1]["date"]):
            steps[path.stem] = (path, content)
    for steps in found.values():
        for name, (path, content) in steps.items():
            if str(content.get("commit")).endswith("+"):
                raise ValueError(
                    f"{path.name} must be measured in a clean checkout, got commit {content['commit']}; commit, then run "
                    f"`python -m bench.campaign --step {name} --again`"
                )
    return dict(sorted(found.items()))


def generate(results: Path) -> dict[str, str]:
    """Section of a page → its text."""
    cpus: list[str] = []
    gpus: list[str] = []
    summary = ""
    for steps in latest(results).values():
        contents = [content for _, content in steps.values()]
        text = "\n\n".join([_preamble(contents), *_sections(steps)])
        (gpus if contents[0].get("gpu") else cpus).append(text)
        if "towers" in steps and (not summary or contents[0].get("gpu")):
            summary = _summary(steps)
    return {
        "cpu": "\n\n".join(cpus) or "The CPU campaign (`python -m bench.campaign --cpu`) has no results yet.",
        "gpu": "\n\n".join(gpus) or NO_GPU,
        "summary": summary or "No results yet.",
    }


def rewrite(page: str, sections: Mapping[str, str]) -> str:
    """``page`` with the sections that it marks replaced.

    Raises:
        ValueError: a section is marked more than once, or never closed.
    """
    for name, text in sections.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if (page.count(begin), page.count(end)) == (0, 0):
            continue
        if (page.count(begin), page.count(end)) != (1, 1):
            raise ValueError(f"a page must have {begin} and {end} once each")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


# -- sections ---------------------------------------------------------------------------------------------------------


def _preamble(contents: Sequence[Found]) -> str:
    versions = {f"torch {each['torch']}, transformers {each['transformers']}" for each in contents}
    commits = {f"`{each['commit']}`" for each in contents}
    dates = {str(each["date"])[:10] for each in contents}
    return (
        f"Measured on {describe_machine(contents[0])}, {'; '.join(sorted(versions))}, commit {' and '.join(sorted(commits))}, "
        f"{' and '.join(sorted(dates))}. Random weights; medians of runs that take turns with transformers (SDPA) on the same "
        "preprocessed pixels; ratio: transformers ÷ tritontower; ±: distance of the farthest run from the median. *matmul "
        "only*: the tower's matrix multiplications alone, by the same library; a lower bound for the forward pass."
    )


def _sections(steps: Steps) -> Iterable[str]:
    for name, (title, describe) in SECTIONS.items():
        if name in steps:
            yield f"**{title}**\n\n{describe(steps[name][1])}"


def _summary(steps: Steps) -> str:
    """Three rows for the README: a medium and a large image, and many sizes in one batch."""
    rows = [row for row in steps["towers"][1]["rows"] if row["status"] == "ok"][:2]
    rows += [
        row
        for name in ("batches", "towers")
        if name in steps
        for row in steps[name][1]["rows"]
        if row["status"] == "ok" and row["batch"] == "mixed"
    ][:1]
    columns = ("tower", "images", "patches", "tritontower, ms", "transformers, ms", "ratio")
    cells = [
        (
            f"{row['family']}, {row['blocks']} blocks",
            _batch(row),
            f"{row['patches']:,}",
            _with_farthest(row["seconds"][OURS]),
            _with_farthest(row["seconds"].get(BASELINES["sdpa"])),
            _ratio(row),
        )
        for row in rows
    ]
    content = steps["towers"][1]
    return (
        f"{_markdown(columns, cells)}\n\n{describe_machine(content)}, bfloat16, torch {content['torch']}, "
        f"transformers {content['transformers']} (SDPA), {str(content['date'])[:10]}."
    )


def _towers(content: Found) -> str:
    candidates = {
        name: title
        for name, title in {
            OURS: "tritontower, ms",
            EAGER: "without graphs, ms",
            BASELINES["sdpa"]: "transformers, ms",
            BASELINES["compile"]: "compiled, ms",
            MATMUL_ONLY: "matmul only, ms",
        }.items()
        if any(name in row.get("seconds", ()) for row in content["rows"])
    }
    rows = []
    for row in content["rows"]:
        ran = row["status"] == "ok"
        rows.append(
            (
                row["family"],
                _batch(row),
                f"{row['patches']:,}" if ran else "–",
                f"{row['tokens']:,}" if ran else "–",
                *(_with_farthest(row["seconds"].get(name)) if ran else "–" for name in candidates),
                _ratio(row) if ran else row["status"],
            )
        )
    return _markdown(("family", "images", "patches", "tokens", *candidates.values(), "ratio"), rows)


def _preprocessing(content: Found) -> str:
    ways = (OURS, DIGESTS, BYTES)
    columns = ("images", "fp32, ms", "with digests, ms", "bytes, ms", "transformers, ms", "ratios", "of first calls")
    rows = []
    for row in content["rows"]:
        if row["status"] != "ok":
            rows.append((row["label"], "–", "–", "–", "–", "–", row["status"]))
            continue
        ratios = []
        for key in ("seconds", "in_turn"):
            medians = median_seconds(row, key)
            ratios.append(" / ".join(f"{medians[THEIRS] / medians[way]:.1f}" for way in ways if way in medians))
        rows.append((row["label"], *(_with_quartiles(row["seconds"].get(way)) for way in (*ways, THEIRS)), *ratios))
    return (
        "From PIL images to patches, with the same pixels bit for bit. Ratios are those of fp32 / with digests / bytes; ± is "
        "half the distance of the quartiles.\n\n" + _markdown(columns, rows)
    )


def _memory(content: Found) -> str:
    columns = ("patches", "allocated ÷ planned", "libraries, MB")
    rows = [
        (
            f"{row['patches']:,}",
            f"{row['allocated_bytes'] / row['planned_bytes']:.3f}",
            "–" if row["beyond_bytes"] is None else f"{row['beyond_bytes'] / 1e6:,.0f}",
        )
        for row in content["rows"]
    ]
    return _markdown(columns, rows)


def _loading(content: Found) -> str:
    columns = ("loaded by", "files", "seconds", "peak growth, MB", "weights, MB")
    loads = [load for row in content["rows"] for load in row.get("loads", [row])]
    rows = [
        (
            load["by"],
            load["files"],
            f"{load['seconds']:.2f}",
            f"{load['growth_bytes'] / 1e6:,.0f}",
            f"{load['weights_bytes'] / 1e6:,.0f}",
        )
        for load in loads
    ]
    return (
        "tritontower reads, checks and prepacks the weights; transformers (without the layers of its language model) maps the "
        "file and reads most of it on first use, which neither figure contains.\n\n" + _markdown(columns, rows)
    )


def _kernels(content: Found) -> str:
    columns = ("kernel", "case", "µs", "TFLOP/s", "best of torch, µs", "ratio")
    rows = []
    for row in content["rows"]:
        if row["status"] == "ok":
            ours, best = row["seconds"][OURS], min(baseline_seconds(row).values(), default=None)
            against = ("–", "–") if best is None else (f"{best * 1e6:,.1f}", f"{best / ours:.2f}")
            rows.append((row["kernel"], row["case"], f"{ours * 1e6:,.1f}", f"{row['tflops']:,.1f}", *against))
    failed = sum(row["status"] == "failed" for row in content["rows"])
    return _markdown(columns, rows) + (f"\n\n{failed} cases failed." if failed else "")


def _stress(content: Found) -> str:
    rows = [
        (row["variant"], f"{row['head_dim']} in {row['padded']}", f"{row['launches']:,}", str(row["wrong_draws"]))
        for row in content["rows"]
        if row["status"] != "skipped"
    ]
    return _markdown(("variant", "head", "launches", "wrong draws"), rows)


SECTIONS: Mapping[str, tuple[str, Callable[[Found], str]]] = {
    "towers": ("The tower of Qwen2-VL, one square still image, bfloat16", _towers),
    "towers-compiled": ("The same, against compiled transformers", _towers),
    "towers-float32": ("The same in float32", _towers),
    "families": ("Every family at its published width, bfloat16", _towers),
    "batches": ("Large images, many small ones, and mixed sizes in one batch, 8 blocks, bfloat16", _towers),
    "preprocessing": ("Preprocessing against transformers' image processor", _preprocessing),
    "memory": ("Memory of a forward pass against the memory plan, Qwen2-VL-2B, bfloat16", _memory),
    "loading": ("Loading the tower of Qwen2-VL-2B, bfloat16", _loading),
    "kernels": ("Kernels at the towers' shapes, against torch's equivalent", _kernels),
    "attention": ("Attention in every variant", _kernels),
    "gemm": ("GEMMs by pointers, by descriptors and by the vendor's library", _kernels),
    "stress": ("Attention with random lengths", _stress),
}


# -- cells ------------------------------------------------------------------------------------------------------------


def _batch(row: Found) -> str:
    if row["batch"] in BATCH_NAMES:
        return BATCH_NAMES[row["batch"]]
    return "one square" if row.get("images", 1) == 1 else f"{row['images']} of one size"


def _ratio(row: Found) -> str:
    return f"{row['ratio']:.2f}" if row["ratio"] else "unchecked"


def _with_farthest(seconds: Sequence[float] | None) -> str:
    if not seconds:
        return "–"
    middle = Timing(tuple(seconds)).median
    farthest = max(abs(each - middle) for each in seconds) / middle
    return f"{_milliseconds(middle)} ± {100 * farthest:.0f} %"


def _with_quartiles(seconds: Sequence[float] | None) -> str:
    if not seconds:
        return "–"
    timing = Timing(tuple(seconds))
    return f"{_milliseconds(timing.median)} ± {50 * timing.spread:.0f} %"


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def main(words: Sequence[str] | None = None, *, pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Rewrites or checks the pages."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    arguments = parser.parse_args(words)
    try:
        sections = generate(results)
        texts = {page: rewrite(page.read_text(encoding="utf-8"), sections) for page in pages}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changed = [page.name for page, text in texts.items() if page.read_text(encoding="utf-8") != text]
    if arguments.check:
        print(f"out of date: {', '.join(changed)}; run python -m bench.report" if changed else "up to date")
        return int(bool(changed))
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
