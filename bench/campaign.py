"""The campaign: runs every benchmark of a machine, one process and one result file per step.

    python -m bench.campaign                            # on a GPU: all steps, at most nine minutes each
    python -m bench.campaign --step towers --step tune
    python -m bench.campaign --cpu --threads 2          # the tables for CPUs
    python -m bench.campaign --list                     # the steps and their commands

A step writes ``bench/results/MACHINE/DATE/STEP.json`` and its output to ``logs/STEP.log`` beside it.  Benchmarks save
after every row, so a step that is killed keeps what it measured.  A step whose result is complete is skipped; ``--again``
repeats it.  Exit codes: 0, 1 (a step failed or ran out of time), 2 (bad usage, or no GPU).
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from tritontower.benchmarks.documents import child_environment, machine_slug
from tritontower.benchmarks.measuring import provenance
from tritontower.models.common.family import read_summary

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {"cpu": 20.0, "gpu": 9.0}
"""Time limit of one step: GPUs are often lent by the quarter of an hour."""
TOWERS = "tritontower bench towers --dtype bfloat16"
PYTEST = "pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib -W ignore::pytest.PytestConfigWarning"


@dataclass(frozen=True)
class Step:
    """One command of the campaign.

    Attributes:
        name: also the name of its result.
        summary: the question that it answers.
        command: arguments of ``python -m``; ``{result}`` and ``{config}`` (Qwen2-VL's) are filled in.  Benchmarks also get
            ``--output``, and ``--threads`` on a CPU.
    """

    name: str
    summary: str
    command: str

    def arguments(self, result: Path, threads: int | None) -> list[str]:
        """The complete command as a list of words; ``threads`` is ``None`` on a GPU."""
        config = result.with_name("qwen2_vl.config")
        words = [word.format(result=result, config=config) for word in shlex.split(self.command)]
        if not self.command.startswith(("tritontower bench", "bench.")):
            return words
        return [*words, "--output", str(result), *([] if threads is None else ["--threads", str(threads)])]


PREPROCESSING = Step(
    "preprocessing",
    "images to patches",
    "tritontower bench preprocessing --family Qwen2-VL --family 'Gemma 3' --family Pixtral --repeats 15",
)
GPU_STEPS = (
    Step("tests", "all tests marked gpu", f"{PYTEST} -m gpu --junitxml {{result}} tests"),
    Step(
        "kernel-tests", "compiled kernels against fp64", f"{PYTEST} -m 'not slow' --junitxml {{result}} tests/kernels"
    ),
    Step("kernels", "each kernel, torch's equivalent, the peak of today", "tritontower bench kernels"),
    Step("attention", "attention in every form and configuration", "bench.variants attention"),
    Step("gemm", "GEMMs by pointers, by descriptors, by cuBLAS", "bench.variants linear"),
    Step(
        "towers",
        "Qwen2-VL against transformers",
        f"{TOWERS} --family Qwen2-VL --patches 1024,4096,256,16384 --batch mixed --batch small --repeats 15",
    ),
    Step(
        "towers-compiled",
        "Qwen2-VL against compiled transformers",
        f"{TOWERS} --family Qwen2-VL --patches 1024,4096,256 --against sdpa,compile --repeats 15",
    ),
    PREPROCESSING,
    Step("tune", "the tuner within its budget", "tritontower tune --config {config} --budget 7 --json"),
    Step("stress", "10,000 launches of each attention form", "bench.stress"),
    Step("families", "every family at full depth", f"{TOWERS} --family all --batch 448 --batch mixed"),
)
CPU_STEPS = (
    Step("towers", "Qwen2-VL-2B against transformers, bfloat16", f"{TOWERS} --patches 1024,4096"),
    Step("towers-float32", "the same in float32", "tritontower bench towers --dtype float32 --patches 1024"),
    Step("families", "every family at its published width, 8 blocks", f"{TOWERS} --family all --depth 8 --batch 448"),
    Step(
        "batches",
        "large images, many small ones, mixed sizes",
        f"{TOWERS} --family Qwen2-VL --family Qwen2.5-VL --family Qwen3-VL --family Pixtral --depth 8 "
        "--batch 1024 --batch 64small --batch mixed",
    ),
    PREPROCESSING,
    Step("memory", "peak memory against the plan", "tritontower bench memory --dtype bfloat16"),
    Step("loading", "time and memory to load Qwen2-VL-2B", "tritontower bench loading --dtype bfloat16"),
)


def is_complete(result: Path) -> bool:
    """Tells whether a step has left a complete result."""
    if not result.is_file():
        return False
    return result.suffix != ".json" or json.loads(result.read_text(encoding="utf-8")).get("complete", True)


def run_step(step: Step, folder: Path, *, minutes: float, threads: int | None) -> bool:
    """Runs a step in its own process; returns whether it succeeded within ``minutes``."""
    result = folder / f"{step.name}.{'xml' if 'junitxml' in step.command else 'json'}"
    if is_complete(result):
        print(f"{step.name}: already complete; --again repeats it")
        return True
    print(f"{step.name}: {step.summary} ...", flush=True)
    log_path = folder / "logs" / f"{step.name}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if "{config}" in step.command:
        example = json.dumps(read_summary("qwen2_vl").example)
        result.with_name("qwen2_vl.config").write_text(example, encoding="utf-8")
    command = [sys.executable, "-m", *step.arguments(result, threads)]
    with open(log_path, "w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=child_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{step.name}: stopped after {minutes:g} minutes; see {log_path}")
            return False
    outcome = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    print(f"{step.name}: {outcome}; see {log_path}", flush=True)
    return done.returncode == 0


def main(words: Sequence[str] | None = None) -> int:
    """Runs the chosen steps in order."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="append", metavar="NAME", help="run only this step; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    parser.add_argument("--cpu", action="store_true", help="run the steps for CPUs")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: bench/results/MACHINE/DATE")
    parser.add_argument("--minutes", type=float, help="limit of one step (default: 9; with --cpu, 20)")
    parser.add_argument("--again", action="store_true", help="repeat complete steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    arguments = parser.parse_args(words)
    threads = arguments.threads if arguments.cpu else None
    steps = {step.name: step for step in (CPU_STEPS if arguments.cpu else GPU_STEPS)}
    if arguments.list:
        for step in steps.values():
            command = shlex.join(step.arguments(Path(f"{step.name}.json"), threads))
            print(f"{step.name}: {step.summary}\n  python -m {command}")
        return 0
    chosen = arguments.step or list(steps)
    if unknown := sorted(set(chosen) - steps.keys()):
        parser.error(f"--step must be one of {', '.join(steps)}, got {unknown[0]}")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error(f"the campaign needs a GPU, and torch {torch.__version__} sees none; --cpu measures the CPU")
    torch.set_num_threads(arguments.threads)
    facts = provenance(torch.device("cpu" if arguments.cpu else "cuda"))
    if str(facts["commit"]).endswith("+"):
        print(
            "warning: the checkout differs from its commit, and bench.report will refuse the results", file=sys.stderr
        )
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    folder = (arguments.output or ROOT / "bench" / "results" / machine_slug(facts) / today).resolve()
    if arguments.again:
        for path in (path for name in chosen for path in folder.glob(f"{name}.*")):
            path.unlink()
    minutes = arguments.minutes or MINUTES["cpu" if arguments.cpu else "gpu"]
    succeeded = [run_step(steps[name], folder, minutes=minutes, threads=threads) for name in chosen]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
