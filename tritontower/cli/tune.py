"""Tune the launch configurations of a tower's kernels for this GPU.

Candidate configurations are compiled, checked against fp32 results and timed.  The fastest ones go into a table in the user's
cache folder, which every tower with the same shapes uses.  With --static nothing is launched: the configurations are compiled
for an architecture, and the report shows registers, spills, shared memory, occupancy and tensor-core instructions.  An
interrupted run continues when it is started again.  Of MODEL only the configuration is read.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.errors import BackendUnavailableError, UsageError
from tritontower.text_table import text_table

from . import options

if TYPE_CHECKING:
    from tritontower.engine.tuned_tables import Identity
    from tritontower.tuning.candidate import Candidate, Choice
    from tritontower.tuning.tasks import Task
    from tritontower.tuning.tuner import Progress

EXAMPLE = "tritontower tune Qwen/Qwen2-VL-2B-Instruct --patches 256,1024,4096 --budget 10"

_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""As ``kernels.runtime.config.ARCHITECTURES``, which is too slow to import for help; a test compares them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    options.add_model(parser, required=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json or params.json instead of MODEL")
    parser.add_argument(
        "--patches",
        type=options.patch_counts,
        metavar="N,N,...",
        help="patches of a batch to tune for (default: 64,256,1024,4096,16384)",
    )
    options.add_dtype(parser)
    parser.add_argument("--device", help="the GPU: cuda, cuda:1, ... (default: cuda)")
    parser.add_argument("--arch", choices=_ARCHITECTURES, help="the architecture for --static and --show")
    parser.add_argument(
        "--budget", type=_minutes, metavar="MINUTES", help="stop after this time, and keep what is done"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the table (default: the user's cache)")
    parser.add_argument("--workers", type=options.positive_integer, metavar="N", help="compilers at the same time")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--static", action="store_true", help="compile without measuring; needs --arch, no GPU")
    instead.add_argument(
        "--show", action="store_true", help="tune nothing: show the configurations in use, and their tables"
    )
    instead.add_argument(
        "--export", type=options.output_file, metavar="FILE", help="copy the table of this GPU to FILE"
    )
    instead.add_argument("--import", type=Path, metavar="FILE", help="add the entries of a table")
    options.add_json(parser)


_TOWER = ("model", "revision", "config", "patches", "dtype")
_TAKES = {
    "measuring": (*_TOWER, "device", "budget", "output", "workers"),
    "--static": (*_TOWER, "arch", "budget", "workers"),
    "--show": (*_TOWER, "device", "arch"),
    "--export": ("device", "output"),
    "--import": ("output",),
}
"""Action → the options that have an effect on it, besides ``--json``."""


def _action(arguments: argparse.Namespace) -> str:
    """Returns a key of :data:`_TAKES`; raises :class:`UsageError` for an option without effect on it."""
    names = ("static", "show", "export", "import")
    action = next((f"--{name}" for name in names if getattr(arguments, name)), "measuring")
    options.refuse_unused(arguments, _TAKES, action)
    return action


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    action = _action(arguments)
    if action == "--import":
        return _import(arguments)
    if action == "--export":
        return _export(arguments)
    if (arguments.model is None) == (arguments.config is None):
        raise UsageError("name one model, or --config FILE; see `tritontower tune --help`")
    if arguments.revision is not None and arguments.model is None:
        raise UsageError("--revision must come with a hub id; --config names a file")
    if arguments.static and arguments.arch is None:
        raise UsageError("--static needs an architecture; name it with --arch, such as --arch sm_90")
    if arguments.arch is not None and arguments.device is not None:
        raise UsageError("--arch and --device exclude each other; name one of them")
    identity = None if arguments.arch is not None else _identify(arguments)
    tasks = _tasks(arguments)
    if arguments.show:
        return _show(tasks, identity, arguments)
    report = _tune(arguments, tasks, identity) if identity else _compile(arguments, tasks)
    text = _measured_text if identity else _static_text
    print(json.dumps(report, indent=2) if arguments.json else text(report))
    return 0 if report["tasks"] else 1


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above zero")
    return minutes


def _identify(arguments: argparse.Namespace) -> "Identity":
    """Returns the identity of the GPU."""
    import torch

    from tritontower.devices import parse_device
    from tritontower.engine.tuned_tables import identify
    from tritontower.kernels.runtime._triton import HAS_TRITON

    if not HAS_TRITON or not torch.cuda.is_available():
        remedies = {
            "--show": "; `--show --arch sm_90` shows the defaults of an architecture",
            "measuring": "; `--static --arch sm_90` compiles without one",
        }
        action = _action(arguments)
        raise BackendUnavailableError(f"{action} needs a GPU, and there is none here{remedies.get(action, '')}")
    device = parse_device(arguments.device or "cuda")
    if device.type != "cuda":
        raise UsageError(f"--device must be a GPU, such as cuda:0, got {arguments.device!r}")
    return identify(device)


def _tasks(arguments: argparse.Namespace) -> "list[Task]":
    """Lists the tasks of the tower in the precision to tune for."""
    import torch

    from tritontower.checkpoint.config_reader import ConfigReader
    from tritontower.checkpoint.hub import locate
    from tritontower.devices import parse_dtype
    from tritontower.models.common.registry import declared_dtype, open_config, read_family
    from tritontower.tuning.tasks import PATCHES, list_tasks

    if arguments.config is None:
        reader = open_config(locate(arguments.model, revision=arguments.revision))
    else:
        reader = ConfigReader.from_file(arguments.config.expanduser())
    dtype = parse_dtype(arguments.dtype) or declared_dtype(reader) or torch.bfloat16
    return list_tasks(read_family(reader).config, arguments.patches or PATCHES, dtype)


def _folder(arguments: argparse.Namespace) -> Path:
    """Makes the folder of the table before the work starts."""
    from tritontower.engine.tuned_tables import user_folder

    folder = arguments.output.expanduser() if arguments.output is not None else user_folder()
    if folder is None:
        raise UsageError("there is no home folder for tables; name a folder with --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        raise UsageError(
            f"--output must be a folder that can be written, got {str(folder)!r} ({error.strerror}); name another"
        ) from error


def _options(arguments: argparse.Namespace, progress: "Progress") -> dict[str, Any]:
    """Returns the options of a compile, with or without a GPU."""
    from tritontower.tuning.compile.aot_compile import cache_folder

    return {
        "workers": arguments.workers or max(1, min(8, (os.cpu_count() or 2) // 2)),
        "cache": cache_folder(),
        "progress": progress,
        "deadline": math.inf if arguments.budget is None else time.monotonic() + 60 * arguments.budget,
    }


def _compile(arguments: argparse.Namespace, tasks: "list[Task]") -> dict[str, Any]:
    """Compiles the candidates of all tasks for an architecture, and reports."""
    from tritontower.tuning.tuner import compile_tasks

    start = time.monotonic()
    with options.progress_bar() as progress:
        found = compile_tasks(tasks, arguments.arch, **_options(arguments, progress))
    done = [
        (task, {"candidates": [_compiled(each) for each in candidates if each.compile_result]})
        for task, candidates in found.items()
    ]
    return _report(tasks, start, done, architecture=arguments.arch)


def _report(
    tasks: "list[Task]", start: float, done: "list[tuple[Task, dict[str, Any]]]", **fields: object
) -> dict[str, Any]:
    return {
        **fields,
        "seconds": round(time.monotonic() - start, 1),
        "missing": len(tasks) - len(done),
        "tasks": [
            {"task": task.title, "kernel": task.kernel, "launches": task.launches, **found} for task, found in done
        ],
    }


def _compiled(candidate: "Candidate") -> dict[str, Any]:
    result = candidate.compile_result
    described: dict[str, Any] = {"config": dict(candidate.config), "problem": candidate.dropped or None}
    if result is not None and result.launches:
        names = ("registers", "spills", "shared_memory", "occupancy", "tensor_core", "loop_instructions")
        described |= {name: getattr(result.main, name) for name in names}
    return described


def _tune(arguments: argparse.Namespace, tasks: "list[Task]", identity: "Identity") -> dict[str, Any]:
    """Measures all tasks, writes the table, and reports."""
    import torch
    import triton

    from tritontower.benchmarks.measuring import provenance
    from tritontower.engine.tuned_tables import table_name
    from tritontower.tuning.journal import Journal
    from tritontower.tuning.table_writer import Merged, make_entries, merge, table_key
    from tritontower.tuning.tuner import Gauge, choose

    start = time.monotonic()
    path = _folder(arguments) / table_name(identity.gpu)
    journal_path = path.with_suffix(".journal")
    device = torch.device(arguments.device or "cuda")
    ptxas = provenance(device)["ptxas"]
    journal = Journal(journal_path, f"{identity.gpu} {triton.__version__} {ptxas}")
    with options.progress_bar() as progress:
        given = _options(arguments, progress)
        choices = choose(tasks, Gauge(device), architecture=identity.architecture, journal=journal, **given)
    merged = merge(path, table_key(identity, ptxas), make_entries(choices)) if choices else Merged(0, 0, 0)
    if len(choices) == len(tasks):
        # Everything is in the table; the next run measures anew.
        journal_path.unlink(missing_ok=True)
    fields = {"table": str(path), "entries": merged.held, "added": merged.added, "given_up": merged.given_up}
    return _report(tasks, start, [(choice.task, _described(choice)) for choice in choices], **fields)


def _described(choice: "Choice") -> dict[str, Any]:
    return {
        "config": dict(choice.best.config),
        "microseconds": round(choice.best.cost, 1),
        "tflops": None if choice.tflops is None else round(choice.tflops, 1),
        "speedup": None if choice.speedup is None else round(choice.speedup, 2),
        "verified": choice.best.error,
        "dropped": [{"config": dict(each.config), "reason": each.dropped} for each in choice.dropped],
    }


def _show(tasks: "Sequence[Task]", identity: "Identity | None", arguments: argparse.Namespace) -> int:
    """Prints the configuration of every task: from the tables of a GPU, or the default of an architecture."""
    from tritontower.engine.tuned_tables import load_tables, table_paths
    from tritontower.tuning.search_space import default_values

    loaded = load_tables(identity) if identity else []
    places = [str(path) for path in table_paths(identity.gpu)] if identity else []
    found = []
    for task in tasks:
        shape = task.kernel, task.dtype, dict(task.constants), dict(task.sizes)
        described: dict[str, Any] = {"task": task.title, "table": None}
        for table in loaded:
            entry = table.table.nearest(*shape)
            if entry is not None:
                described |= {"config": entry["config"], "table": str(table.path), "tuned_for": entry["sizes"]}
                break
        else:
            described["config"] = default_values(task, identity.architecture if identity else arguments.arch)
        found.append(described)
    if arguments.json:
        print(json.dumps({"tables": places, "tasks": found}, indent=2))
        return 0
    numbers = {place: number for number, place in enumerate(places, 1)}
    rows = [(each["task"], _config_text(each["config"]), numbers.get(each["table"], "default")) for each in found]
    print(text_table("", ("task", "configuration", "table"), rows))
    for place, number in numbers.items():
        print(f"  {number}  {place}{_remark(Path(place))}")
    return 0


def _remark(path: Path) -> str:
    from tritontower.engine.tuned_tables import read_table

    try:
        read_table(path)
    except FileNotFoundError:
        return "  (not there)"
    except (OSError, ValueError):
        return "  (ignored: no table of tuned configurations)"
    return ""


def _import(arguments: argparse.Namespace) -> int:
    from tritontower.engine.tuned_tables import table_name
    from tritontower.tuning.table_writer import merge, read_checked

    table = read_checked(vars(arguments)["import"].expanduser())
    path = _folder(arguments) / table_name(table.key["gpu"])
    merged = merge(path, table.key, table.entries)
    report = {"table": str(path), "read": len(table.entries), "imported": merged.added}
    report |= {"entries": merged.held, "given_up": merged.given_up}
    text = f"{merged.added} of {len(table.entries)} entries added: {path} has {merged.held}"
    if merged.added < len(table.entries):
        text += "; stale entries, and entries that disagree with each other, were left out"
    print(json.dumps(report) if arguments.json else text + _given_up(merged.given_up))
    return 0


def _given_up(count: int) -> str:
    return f"; {count} entries for other sizes were removed: they sum a row in another order" if count else ""


def _export(arguments: argparse.Namespace) -> int:
    from tritontower.engine.tuned_tables import table_name, table_paths
    from tritontower.tuning.table_writer import read_checked, table_text

    gpu = _identify(arguments).gpu
    paths = table_paths(gpu) if arguments.output is None else [arguments.output.expanduser() / table_name(gpu)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(f"there is no table of {gpu} to export; looked for {', '.join(map(str, paths))}")
    table = read_checked(path)
    arguments.export.write_text(table_text(table.key, table.entries), encoding="utf-8")
    report = {"table": str(path), "exported": str(arguments.export), "entries": len(table.entries)}
    text = f"{len(table.entries)} entries of {path} copied: {arguments.export}"
    print(json.dumps(report) if arguments.json else text)
    return 0


def _config_text(config: Mapping[str, Any]) -> str:
    # Tables keep names in alphabetical order.
    order = ("rows", "columns", "inner", "queries", "keys")
    blocks = "x".join(str(config[f"block_{name}"]) for name in order if f"block_{name}" in config)
    short = {"num_warps": "w", "num_stages": "s", "group_rows": "group ", "split": "split ", "rows": "rows "}
    words = [
        f"{short[name]}{value}" for name, value in config.items() if name in short and (name, value) != ("split", 1)
    ]
    words += [str(value) for value in config.values() if isinstance(value, str)]
    return " ".join(([blocks] if blocks else []) + words + ["vendor"] * bool(config.get("vendor")))


def _measured_text(report: Mapping[str, Any]) -> str:
    rows = [
        (
            each["task"],
            _config_text(each["config"]),
            f"{each['microseconds']:.1f}",
            None if each["tflops"] is None else f"{each['tflops']:.0f}",
            None if each["speedup"] is None else f"{each['speedup']:.2f}",
        )
        for each in report["tasks"]
    ]
    headings = ("task", "best configuration", "microseconds", "TFLOP/s", "speedup over the default")
    text = _text(report, headings, rows, [each["reason"] for task in report["tasks"] for each in task["dropped"]])
    if rows:
        held = f"{report['table']} has {report['entries']}" + _given_up(report["given_up"])
        text += f"\n\n{len(rows)} entries in {report['seconds']:.0f} s; {held}"
    return text


def _static_text(report: Mapping[str, Any]) -> str:
    rows = []
    for task in report["tasks"]:
        default, usable = task["candidates"][0], sum(each["problem"] is None for each in task["candidates"])
        numbers = [default.get(name) for name in ("registers", "spills", "shared_memory", "occupancy")]
        opcodes = ", ".join(f"{count} {opcode}" for opcode, count in default.get("tensor_core", {}).items()) or None
        loop, share = default.get("loop_instructions"), f"{usable} of {len(task['candidates'])}"
        rows.append((task["task"], _config_text(default["config"]), *numbers, opcodes, loop, share))
    headings = (
        "task", "default configuration", "registers", "spills", "shared memory", "programs per SM",
        "tensor-core instructions", "hot loop", "usable configurations",
    )  # fmt: skip
    problems = [each["problem"] for task in report["tasks"] for each in task["candidates"] if each["problem"]]
    return _text(report, headings, rows, problems)


def _text(
    report: Mapping[str, Any], headings: Sequence[str], rows: Sequence[Sequence[object]], reasons: Sequence[str]
) -> str:
    lines = [text_table("", headings, rows) if rows else "nothing was done in the given time"]
    kinds = Counter(reason.partition(" (")[0].partition(":")[0] for reason in reasons)
    if kinds:
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines.append(f"\ndropped configurations: {counted} (--json lists them)")
    if report["missing"]:
        lines.append(f"\n{report['missing']} tasks were not done in the given time; the next run continues")
    return "\n".join(lines)
