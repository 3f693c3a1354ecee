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


def _summary(steps: Steps) -> str:
    """Three rows for the README: a medium and a large image, and mixed sizes in one batch."""
    content = steps["towers"][1]
    found = [row for name in ("towers", "batches") if name in steps for row in steps[name][1]["rows"] if _ran(row)]
    mixed = [row for row in found if row["batch"] == "mixed"][:1]
    rows = [row for row in found if row["batch"] != "mixed"][:2] + mixed
    columns = {
        "tower": lambda row: f"{row['family']}, {row['blocks']} blocks",
        **{name: TOWERS[name] for name in ("images", "patches", "tritontower, ms", "transformers, ms", "ratio")},
    }
    return (
        f"{_markdown(columns, rows)}\n\n{describe_machine(content)}, bfloat16, torch {content['torch']}, "
        f"transformers {content['transformers']} (SDPA), {str(content['date'])[:10]}."
    )


def _sections(steps: Steps) -> Iterable[str]:
    for name, (title, columns) in SECTIONS.items():
        if name in steps:
            rows = [each for row in steps[name][1]["rows"] for each in row.get("loads", [row])]
            table = _markdown(columns, [row for row in rows if _ran(row)])
            failed = sum(row.get("status") == "failed" for row in rows)
            yield f"**{title}**\n\n{table}" + (f"\n\n{failed} cases failed." if failed else "")


Columns = Mapping[str, Callable[[Found], str]]
"""Heading → text of a row's cell; a column that is empty in every row is left out."""


def _ran(row: Found) -> bool:
    return bool(row.get("status", "ok") == "ok")


def _time(name: str) -> Callable[[Found], str]:
    """Median and farthest run of a candidate."""

    def cell(row: Found) -> str:
        seconds = row["seconds"].get(name)
        if not seconds:
            return ""
        middle = Timing(tuple(seconds)).median
        farthest = max(abs(each - middle) for each in seconds) / middle
        return f"{_milliseconds(middle)} ± {100 * farthest:.0f} %"

    return cell


def _median_and_ratio(name: str) -> Callable[[Found], str]:
    """Median of a way of preprocessing, and transformers' median ÷ it."""

    def cell(row: Found) -> str:
        medians = median_seconds(row)
        if name not in medians:
            return ""
        ratio = "" if name == THEIRS else f" ({medians[THEIRS] / medians[name]:.1f})"
        return _milliseconds(medians[name]) + ratio

    return cell


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _batch(row: Found) -> str:
    if row["batch"] in BATCH_NAMES:
        return BATCH_NAMES[row["batch"]]
    return "one square" if row.get("images", 1) == 1 else f"{row['images']} of one size"


def _best_of_torch(row: Found) -> str:
    best = min(baseline_seconds(row).values(), default=None)
    return "" if best is None else f"{best / row['seconds'][OURS]:.2f}"


TOWERS: Columns = {
    "family": lambda row: str(row["family"]),
    "images": _batch,
    "patches": lambda row: f"{row['patches']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "tritontower, ms": _time(OURS),
    "without graphs, ms": _time(EAGER),
    "transformers, ms": _time(BASELINES["sdpa"]),
    "compiled, ms": _time(BASELINES["compile"]),
    "matmul only, ms": _time(MATMUL_ONLY),
    "ratio": lambda row: f"{row['ratio']:.2f}" if row["ratio"] else "unchecked",
}
PREPROCESSING: Columns = {
    "images": lambda row: str(row["label"]),
    "fp32, ms": _median_and_ratio(OURS),
    "with digests, ms": _median_and_ratio(DIGESTS),
    "bytes, ms": _median_and_ratio(BYTES),
    "transformers, ms": _median_and_ratio(THEIRS),
}
MEMORY: Columns = {
    "patches": lambda row: f"{row['patches']:,}",
    "allocated ÷ planned": lambda row: f"{row['allocated_bytes'] / row['planned_bytes']:.3f}",
    "libraries, MB": lambda row: "" if row["beyond_bytes"] is None else f"{row['beyond_bytes'] / 1e6:,.0f}",
}
LOADING: Columns = {
    "loaded by": lambda row: str(row["by"]),
    "files": lambda row: str(row["files"]),
    "seconds": lambda row: f"{row['seconds']:.2f}",
    "peak growth, MB": lambda row: f"{row['growth_bytes'] / 1e6:,.0f}",
    "weights, MB": lambda row: f"{row['weights_bytes'] / 1e6:,.0f}",
}
KERNELS: Columns = {
    "kernel": lambda row: str(row["kernel"]),
    "case": lambda row: str(row["case"]),
    "µs": lambda row: f"{row['seconds'][OURS] * 1e6:,.1f}",
    "TFLOP/s": lambda row: f"{row['tflops']:,.1f}",
    "torch ÷ tritontower": _best_of_torch,
}
STRESS: Columns = {
    "variant": lambda row: str(row["variant"]),
    "head": lambda row: f"{row['head_dim']} in {row['padded']}",
    "launches": lambda row: f"{row['launches']:,}",
    "wrong draws": lambda row: str(row["wrong_draws"]),
}
SECTIONS: Mapping[str, tuple[str, Columns]] = {
    "towers": ("The tower of Qwen2-VL, one square still image, bfloat16", TOWERS),
    "towers-compiled": ("The same, against compiled transformers", TOWERS),
    "towers-float32": ("The same in float32", TOWERS),
    "families": ("Every family at its published width, bfloat16", TOWERS),
    "batches": ("Large images, many small ones, and mixed sizes in one batch, 8 blocks, bfloat16", TOWERS),
    "preprocessing": (
        "Preprocessing, bit for bit transformers' pixels; in parentheses transformers ÷ this",
        PREPROCESSING,
    ),
    "memory": ("Memory of a forward pass against the memory plan, Qwen2-VL-2B, bfloat16", MEMORY),
    "loading": (
        "Loading the tower of Qwen2-VL-2B, bfloat16; transformers maps the file and reads it on first use",
        LOADING,
    ),
    "kernels": ("Kernels at the towers' shapes, against torch's equivalent", KERNELS),
    "attention": ("Attention in every variant", KERNELS),
    "gemm": ("GEMMs by pointers, by descriptors and by the vendor's library", KERNELS),
    "stress": ("Attention with random lengths", STRESS),
}


def _markdown(columns: Columns, rows: Sequence[Found]) -> str:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    kept = {name: texts for name, texts in cells.items() if any(texts)}
    lines = [list(kept), ["---"] * len(kept), *(list(line) for line in zip(*kept.values(), strict=True))]
    return "\n".join(f"| {' | '.join(text or '–' for text in line)} |" for line in lines)


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
