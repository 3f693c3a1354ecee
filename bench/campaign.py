"""The campaign: everything that is worth measuring on a machine, in stages that stand on their own.

    python -m bench.campaign                                 # on a GPU: all stages, at most nine minutes each
    python -m bench.campaign --stage attention --stage gemm  # these; going on where they stopped
    python -m bench.campaign --cpu                           # the CPU's tables
    python -m bench.campaign --list

A stage is a process of its own with a time limit; one that dies or hangs takes no other with it.  What it has found is in
``bench/results/MACHINE/DATE/STAGE.json`` as soon as it ends, its output in ``logs/`` beside it.  Run again with the same
--output (or on the same day), a campaign goes on where it stopped; --again starts a stage over.  Results of another commit,
version, GPU or number of threads are neither gone on with nor taken for done.

Exit codes: 0, 1 (something failed or is unfinished), 2 (no GPU, bad usage, or results of other conditions).
"""

import argparse
import shlex
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tritontower.benchmarks.documents import machine_slug
from tritontower.benchmarks.measuring import provenance
from tritontower.cli.parity import hide_reference_progress

from .cpu_stages import CPU_STAGES
from .runner import (
    ROOT,
    OtherConditionsError,
    Setting,
    Stage,
    check_conditions,
    facts_of,
    is_complete,
    run_items,
    run_stage,
)
from .stages import GPU_STAGES

__all__ = ["main"]

MINUTES = {"cpu": 20.0, "gpu": 9.0}
"""For one stage: machines with a GPU are often lent by the quarter of an hour."""


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="say what the stages are")
    parser.add_argument("--cpu", action="store_true", help="the CPU's stages")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: bench/results/MACHINE/DATE")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"for one stage (default: {MINUTES['gpu']:g}; with --cpu, {MINUTES['cpu']:g})",
    )
    parser.add_argument("--again", action="store_true", help="start the stages over")
    parser.add_argument("--archive", type=Path, metavar="FILE.tar.gz", help="pack the folder into one file at the end")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on a CPU: shows that the code runs, measures nothing"
    )
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--items-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    stages = CPU_STAGES if arguments.cpu else GPU_STAGES
    if arguments.list:
        width = max(len(stage.name) for stage in stages)
        print("\n".join(f"{stage.name:<{width}}  {stage.summary}" for stage in stages))
        return 0
    unknown = sorted(set(arguments.stage or ()) - {stage.name for stage in stages})
    if unknown:
        print(f"no stage {unknown[0]!r}; there are {', '.join(stage.name for stage in stages)}", file=sys.stderr)
        return 2
    on_cpu = arguments.cpu or arguments.dry_run
    if not on_cpu and not torch.cuda.is_available():
        print(
            f"the campaign needs a GPU, and torch {torch.__version__} sees none here; --cpu measures the CPU's tables",
            file=sys.stderr,
        )
        return 2
    campaign = "cpu" if arguments.cpu else "gpu"
    minutes = MINUTES[campaign] if arguments.minutes is None else arguments.minutes
    if not minutes > 0 or (arguments.threads is not None and arguments.threads < 1):
        print("--minutes and --threads have to be above zero", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cpu" if on_cpu else "cuda")
    folder = arguments.output or _default_folder(device, campaign, dry=arguments.dry_run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"results cannot go to {folder} ({error.strerror}); name another folder with --output", file=sys.stderr)
        return 2
    seconds = arguments.seconds or 60 * minutes
    setting = Setting(device=device, folder=folder.resolve(), dry=arguments.dry_run, seconds=seconds)
    if arguments.items_of:
        hide_reference_progress()
        (stage,) = (stage for stage in stages if stage.name == arguments.items_of)
        run_items(stage, setting, _facts(stage, campaign, arguments))
        return 0
    wanted = [stage for stage in stages if not arguments.stage or stage.name in arguments.stage]
    if not setting.dry and str(provenance(device)["commit"]).endswith("+"):
        print("this checkout differs from its commit, and bench.report refuses what is measured in it", file=sys.stderr)
    good = True
    try:
        if not arguments.again:
            # Before anything is measured: the first stage may take minutes.
            for stage in wanted:
                check_conditions(stage, setting.folder, facts_of(stage, setting, _facts(stage, campaign, arguments)))
        for stage in wanted:
            good = _run(stage, setting, _facts(stage, campaign, arguments), arguments) and good
    except OtherConditionsError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.archive:
        with tarfile.open(arguments.archive, "w:gz") as archive:
            archive.add(setting.folder, arcname=setting.folder.name)
    return 0 if good else 1


def _run(stage: Stage, setting: Setting, facts: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Runs a stage unless it is complete; says in a line how it went."""
    if arguments.again:
        for suffix in ("json", "jsonl"):
            (setting.folder / f"{stage.name}.{suffix}").unlink(missing_ok=True)
    if is_complete(stage, setting.folder, facts_of(stage, setting, facts)):
        print(f"{stage.name}: complete already; --again starts it over")
        return True
    command = ["-m", "bench.campaign", "--items-of", stage.name, "--output", str(setting.folder)]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--cpu"] if arguments.cpu else []
    command += ["--dry-run"] if setting.dry else []
    print(f"{stage.name}: {stage.summary} …", flush=True)
    found = run_stage(stage, setting, command)
    if found is None:
        print(f"{stage.name}: nothing came of it; see {setting.folder / 'logs' / stage.name}.log")
        return False
    bad = [row for row in found["rows"] if row.get("status") not in ("ok", "skipped")]
    state = "complete" if found["complete"] else "not complete, run it again to go on"
    print(f"{stage.name}: {len(found['rows'])} results, {len(bad)} of them failed; {state}", flush=True)
    return bool(found["complete"]) and not bad


def _facts(stage: Stage, campaign: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {"campaign": campaign, "command": _command(stage, arguments)}


def _command(stage: Stage, arguments: argparse.Namespace) -> str:
    """What a person types for a stage, whose own process has a longer command line."""
    words = ["python", "-m", "bench.campaign", *(["--cpu"] if arguments.cpu else []), "--stage", stage.name]
    words += ["--threads", str(torch.get_num_threads())] if arguments.cpu else []
    return shlex.join([*words, *(["--dry-run"] if arguments.dry_run else [])])


def _default_folder(device: torch.device, campaign: str, *, dry: bool) -> Path:
    if dry:
        return Path("dry-run-results") / campaign
    return ROOT / "bench" / "results" / machine_slug(provenance(device)) / datetime.now(UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    sys.exit(main())
