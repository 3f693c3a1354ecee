"""Find the best launch configurations of a tower's kernels: measured on this GPU, or predicted for any.

On a GPU the likeliest configurations are compiled, checked against fp32 numbers and timed; the best go into a table in
the user's cache folder, which every tower of the same shapes uses from then on.  With --static nothing is run: the
configurations are compiled for an architecture and a model predicts their times.  A run that is stopped goes on where it
was when it is started again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.errors import BackendUnavailableError, UsageError
from tritontower.text_table import text_table

from .options import add_dtype, add_json, output_file, patch_counts, positive_integer

if TYPE_CHECKING:
    import torch

    from tritontower.config import TowerConfig
    from tritontower.engine.tuned_tables import Identity
    from tritontower.tuning.tasks import Task
    from tritontower.tuning.tuner import Choice, Progress

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "tritontower tune Qwen/Qwen2-VL-2B-Instruct --patches 256,1024,4096 --budget 10"

_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")
"""As ``kernels.configs.ARCHITECTURES``, which is too slow to import for help; a test holds the two together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to tune, for what, how long, and where it goes."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a checkpoint: a local folder, or a hub id (its configuration only)"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json or params.json instead of MODEL")
    parser.add_argument(
        "--patches",
        type=patch_counts,
        metavar="N,N,...",
        help="patches of a pass to tune for (default: 64,256,1024,4096,16384)",
    )
    add_dtype(parser)
    parser.add_argument("--device", help="the GPU: cuda, cuda:1, ... (default: cuda)")
    parser.add_argument(
        "--arch", choices=_ARCHITECTURES, help="the architecture that --static, --show and --export are about"
    )
    parser.add_argument("--budget", type=_minutes, metavar="MINUTES", help="stop after so long, and keep what is done")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the table goes (default: the user's cache)"
    )
    parser.add_argument(
        "--workers", type=positive_integer, default=None, metavar="N", help="compilers at the same time"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--static", action="store_true", help="predict from compiles instead of measuring; needs --arch"
    )
    instead.add_argument("--show", action="store_true", help="tune nothing: show what the tables say, and which")
    instead.add_argument(
        "--export", type=output_file, metavar="FILE", help="copy the table of this GPU or --arch to FILE"
    )
    instead.add_argument("--import", dest="imported", type=Path, metavar="FILE", help="add the entries of a table")
    add_json(parser)


_TOWER = ("model", "revision", "config", "patches", "dtype")
_TAKES = {
    "measuring": (*_TOWER, "device", "budget", "output", "workers"),
    "--static": (*_TOWER, "arch", "budget", "output", "workers"),
    "--show": (*_TOWER, "device", "arch"),
    "--export": ("device", "arch", "output"),
    "--import": ("output",),
}
"""What is done → the options that have a say in it, beside ``--json``."""


def _what(arguments: argparse.Namespace) -> str:
    """What is to be done, of :data:`_TAKES`.

    Raises:
        UsageError: an option was given that has no say in it.
    """
    chosen = {
        "--static": arguments.static,
        "--show": arguments.show,
        "--export": arguments.export is not None,
        "--import": arguments.imported is not None,
    }
    what = next((name for name, given in chosen.items() if given), "measuring")
    given = {name for names in _TAKES.values() for name in names if getattr(arguments, name) not in (None, "auto")}
    for name in sorted(given - set(_TAKES[what])):
        shown = "MODEL" if name == "model" else f"--{name}"
        those = [other for other, names in _TAKES.items() if name in names]
        raise UsageError(f"{shown} has no say in {what}; it goes with {', '.join(those)}")
    return what


def run(arguments: argparse.Namespace) -> int:
    """Tunes, or does what else was asked for."""
    what = _what(arguments)
    if what == "--import":
        return _import(arguments)
    if what == "--export":
        return _export(arguments)
    if (arguments.model is None) == (arguments.config is None):
        raise UsageError("name one model, or --config FILE; see `tritontower tune --help`")
    if arguments.revision is not None and arguments.model is None:
        raise UsageError("--revision is of a hub id; --config names a file")
    if arguments.static and arguments.arch is None:
        raise UsageError("--static predicts for an architecture: name it with --arch, such as --arch sm_90")
    if arguments.arch is not None and arguments.device is not None:
        raise UsageError("--arch and --device both say whose tables are meant; name one of them")
    identity = _identity(arguments)
    tasks = _tasks(arguments)
    if arguments.show:
        return _show(tasks, identity, arguments.json)
    report = _tune(arguments, tasks, identity)
    print(json.dumps(report, indent=2) if arguments.json else _text(report))
    return 0 if report["tasks"] else 1


# -- types of arguments -----------------------------------------------------------------------------------------------


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above zero")
    return minutes


# -- what there is to do ----------------------------------------------------------------------------------------------


def _identity(arguments: argparse.Namespace) -> "Identity":
    """Whose table it is: that of the GPU, or of the architecture that was named."""
    from tritontower.tuning.table_writer import static_identity

    if arguments.arch is not None:
        return static_identity(arguments.arch)
    import torch

    from tritontower.devices import parse_device
    from tritontower.engine import tuned_tables as tables
    from tritontower.kernels.runtime._triton import HAS_TRITON

    if not HAS_TRITON or not torch.cuda.is_available():
        if arguments.show or arguments.export is not None:
            option = "--show" if arguments.show else "--export"
            raise BackendUnavailableError(
                f"there is no GPU here for {option} to be about; name an architecture with --arch, such as --arch sm_90"
            )
        raise BackendUnavailableError(
            "there is no GPU here to measure on; `--static --arch sm_90` predicts without one, for the architecture named"
        )
    device = parse_device(_device(arguments))
    if device.type != "cuda":
        raise UsageError(f"--device is {arguments.device!r}; configurations are measured on a GPU, such as cuda:0")
    return tables.identify(device)


def _device(arguments: argparse.Namespace) -> str:
    return str(arguments.device or "cuda")


def _tower(arguments: argparse.Namespace) -> "tuple[TowerConfig, torch.dtype]":
    """The tower's description and the precision to tune for."""
    import torch

    from tritontower.checkpoint.config_reader import ConfigReader
    from tritontower.checkpoint.hub import CONFIG_NAME, locate
    from tritontower.devices import parse_dtype
    from tritontower.errors import CheckpointNotFoundError
    from tritontower.models.common.family import MISTRAL_FORMAT
    from tritontower.models.common.registry import declared_dtype, read_family

    if arguments.config is not None:
        paths = [arguments.config.expanduser()]
    else:
        folder = locate(arguments.model, revision=arguments.revision)
        paths = [folder / name for name in (CONFIG_NAME, MISTRAL_FORMAT)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CheckpointNotFoundError(f"there is no configuration file {paths[0]}")
    reader = ConfigReader.from_file(path)
    dtype = parse_dtype(arguments.dtype) or declared_dtype(reader) or torch.bfloat16
    return read_family(reader).config, dtype


def _tasks(arguments: argparse.Namespace) -> "list[Task]":
    from tritontower.tuning.tasks import PATCHES, tasks_of

    config, dtype = _tower(arguments)
    return tasks_of(config, arguments.patches or PATCHES, dtype)


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the table goes; made and asked for before the work, not after."""
    import os

    from tritontower.engine import tuned_tables as tables

    folder = arguments.output.expanduser() if arguments.output is not None else tables.user_folder()
    if folder is None:
        raise UsageError("there is no home folder to keep tables in; name a folder with --output")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {str(folder)!r} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the folder {str(folder)!r} for the table cannot be made ({error.strerror}); name another with --output"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"nothing can be written into the folder {str(folder)!r}; name another with --output")
    return Path(folder)


# -- the commands -----------------------------------------------------------------------------------------------------


def _tune(arguments: argparse.Namespace, tasks: "list[Task]", identity: "Identity") -> dict[str, Any]:
    """Chooses, writes the table, and reports."""
    from tritontower.engine import tuned_tables as tables
    from tritontower.tuning.table_writer import Merged, entries_of, merge, table_key

    path = _folder(arguments) / tables.table_name(identity.gpu or identity.architecture)
    start = time.monotonic()
    ptxas = None
    if arguments.static:
        # How fast a norm is no model tells; none is predicted.
        tasks = [task for task in tasks if task.kernel != "norm"]
        choices = _predicted(arguments, tasks, identity, start)
    else:
        choices, ptxas = _measured(arguments, tasks, identity, start, path.with_suffix(".journal"))
    merged = merge(path, table_key(identity, ptxas), entries_of(choices)) if choices else Merged(0, 0, 0)
    missing = len(tasks) - len(choices)
    if not missing:
        # Everything is in the table; whoever tunes again wants new times.
        path.with_suffix(".journal").unlink(missing_ok=True)
    return {
        "table": str(path),
        "entries": merged.held,
        "added": merged.added,
        "given_up": merged.given_up,
        "measured": not arguments.static,
        "seconds": round(time.monotonic() - start, 1),
        "missing": missing,
        "tasks": [_described(choice, identity) for choice in choices],
    }


def _predicted(
    arguments: argparse.Namespace, tasks: "list[Task]", identity: "Identity", start: float
) -> "list[Choice]":
    from tritontower.tuning.tuner import choose_static

    with _progress_bar() as progress:
        return choose_static(tasks, identity.architecture, **_how(arguments, start, progress))


def _measured(
    arguments: argparse.Namespace, tasks: "list[Task]", identity: "Identity", start: float, journal: Path
) -> "tuple[list[Choice], str | None]":
    """What was chosen by times, and the release of the assembler that they are of."""
    import torch
    import triton

    from tritontower.benchmarks.measuring import provenance
    from tritontower.tuning.journal import Journal
    from tritontower.tuning.tuner import Gauge, choose_measured

    device = torch.device(_device(arguments))
    ptxas = provenance(device)["ptxas"]
    known = Journal(journal, f"{identity.gpu} {triton.__version__} {ptxas}")
    with _progress_bar() as progress:
        how = _how(arguments, start, progress)
        choices = choose_measured(tasks, Gauge(device), architecture=identity.architecture, journal=known, **how)
    return choices, ptxas


def _how(arguments: argparse.Namespace, start: float, progress: "Progress") -> dict[str, Any]:
    """What choosing takes, with a GPU and without."""
    import math
    import os

    from tritontower.tuning.compile.aot_compile import cache_folder

    return {
        "workers": arguments.workers or max(1, min(8, (os.cpu_count() or 2) // 2)),
        "cache": cache_folder(),
        "progress": progress,
        "deadline": math.inf if arguments.budget is None else start + 60 * arguments.budget,
    }


def _described(choice: "Choice", identity: "Identity") -> dict[str, Any]:
    from tritontower.tuning.predict import CHIPS

    best, measured = choice.best, choice.best.microseconds is not None
    peak = CHIPS[identity.architecture].peak / 1e12
    return {
        "task": choice.task.title,
        "kernel": choice.task.kernel,
        "launches": choice.task.launches,
        "config": dict(best.config),
        "microseconds": round(best.cost, 1),
        "measured": measured,
        "tflops": None if choice.tflops is None else round(choice.tflops, 1),
        "share_of_peak": None if choice.tflops is None else round(choice.tflops / peak, 3),
        "gain": None if choice.gain is None else round(choice.gain, 2),
        "verified": best.error,
        "dropped": [{"config": dict(each.config), "reason": each.dropped} for each in choice.dropped],
    }


def _show(tasks: "Sequence[Task]", identity: "Identity", as_json: bool) -> int:
    from tritontower.engine import tuned_tables as tables

    found = []
    loaded = tables.load_tables(identity)
    for task in tasks:
        question = task.kernel, task.dtype, dict(task.constants), dict(task.sizes)
        entries = ((each.table.nearest(*question), each.path) for each in loaded)
        entry = next(((fields, path) for fields, path in entries if fields is not None), None)
        described: dict[str, Any] = {"task": task.title, "config": None, "table": None, "measured": False}
        if entry is not None:
            fields, path = entry
            described |= {
                "config": fields["config"],
                "table": str(path),
                "measured": fields["microseconds"] is not None,
                "tuned_for": fields["sizes"],
            }
        found.append(described)
    places = [str(path) for path in tables.table_paths(identity.gpu)]
    if as_json:
        print(json.dumps({"tables": places, "tasks": found}, indent=2))
        return 0
    rows = [
        (
            each["task"],
            _config_text(each["config"]) if each["config"] else "the default",
            "–" if each["table"] is None else ("measured" if each["measured"] else "predicted"),
            str(places.index(each["table"]) + 1) if each["table"] else "–",
        )
        for each in found
    ]
    print(text_table("", ("task", "configuration", "how", "table"), rows))
    print("\ntables, first found first:")
    for number, place in enumerate(places, 1):
        print(f"  {number}  {place}{_remark(Path(place))}")
    return 0


def _remark(path: Path) -> str:
    from tritontower.engine import tuned_tables as tables

    try:
        tables.read_table(path)
    except FileNotFoundError:
        return "  (not there)"
    except (OSError, ValueError):
        return "  (ignored: no table of tuned configurations)"
    return ""


def _import(arguments: argparse.Namespace) -> int:
    from tritontower.engine import tuned_tables as tables
    from tritontower.tuning.table_writer import merge, read_checked

    table = read_checked(arguments.imported.expanduser())
    path = _folder(arguments) / tables.table_name(table.key["gpu"] or table.key["architecture"])
    merged = merge(path, table.key, table.entries)
    report = {
        "table": str(path),
        "read": len(table.entries),
        "imported": merged.added,
        "entries": merged.held,
        "given_up": merged.given_up,
    }
    text = f"{merged.added} of {len(table.entries)} entries added: {path} holds {merged.held}"
    if merged.added < len(table.entries):
        text += "; what the table knew better, or what did not agree with itself, was left out"
    print(json.dumps(report) if arguments.json else text + _given_up(merged.given_up))
    return 0


def _given_up(count: int) -> str:
    return f"; {count} entries for other sizes were given up: they take a row's sums in another order" if count else ""


def _export(arguments: argparse.Namespace) -> int:
    from tritontower.engine import tuned_tables as tables
    from tritontower.tuning.table_writer import read_checked, table_text

    identity = _identity(arguments)
    name = tables.table_name(identity.gpu or identity.architecture)
    paths = [path for path in tables.table_paths(identity.gpu) if path.name == name]
    if arguments.output is not None:
        paths = [arguments.output.expanduser() / name]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(f"there is no table {name} to export; looked for {', '.join(map(str, paths))}")
    table = read_checked(path)
    arguments.export.write_text(table_text(table.key, table.entries), encoding="utf-8")
    report = {"table": str(path), "exported": str(arguments.export), "entries": len(table.entries)}
    print(
        json.dumps(report) if arguments.json else f"{len(table.entries)} entries of {path} copied: {arguments.export}"
    )
    return 0


# -- output -----------------------------------------------------------------------------------------------------------


@contextmanager
def _progress_bar() -> "Iterator[Progress]":
    """A bar for each part of the work on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(unit="", leave=False, disable=hidden) as bar:

        def report(what: str, done: int, total: int) -> None:
            if not done:
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        yield report


_BLOCKS = ("rows", "columns", "inner", "queries", "keys")


def _config_text(config: Mapping[str, Any]) -> str:
    # Rows × columns × inner, or queries × keys, as everywhere; tables keep names in alphabetical order.
    blocks = "x".join(str(config[f"block_{name}"]) for name in _BLOCKS if f"block_{name}" in config)
    short = {"num_warps": "w", "num_stages": "s", "group_rows": "group ", "split": "split ", "rows": "rows "}
    words = [
        f"{short[name]}{value}" for name, value in config.items() if name in short and (name, value) != ("split", 1)
    ]
    words += [str(value) for value in config.values() if isinstance(value, str)]
    return " ".join(([blocks] if blocks else []) + words + ["vendor's"] * bool(config.get("vendor")))


def _text(report: Mapping[str, Any]) -> str:
    rows = [
        (
            each["task"],
            _config_text(each["config"]),
            f"{each['microseconds']:.1f}" + ("" if each["measured"] else " predicted"),
            "–" if each["tflops"] is None else f"{each['tflops']:.0f}",
            "–" if each["share_of_peak"] is None else f"{each['share_of_peak']:.0%}",
            "–" if each["gain"] is None else f"{each['gain']:.2f}",
        )
        for each in report["tasks"]
    ]
    headings = ("task", "best configuration", "microseconds", "TFLOP/s", "of peak", "times the default's speed")
    lines = [text_table("", headings, rows)] if rows else ["nothing was done in the time given"]
    reasons: dict[str, int] = {}
    for each in report["tasks"]:
        for dropped in each["dropped"]:
            kind = dropped["reason"].partition(" (")[0].partition(":")[0]
            reasons[kind] = reasons.get(kind, 0) + 1
    if reasons:
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))
        lines.append(f"\ndropped configurations: {said} (--json lists them)")
    if report["missing"]:
        lines.append(f"\n{report['missing']} tasks were not done in the time given; the next run goes on from here")
    if rows:
        held = f"{report['table']} holds {report['entries']}" + _given_up(report["given_up"])
        lines.append(f"\n{len(rows)} entries in {report['seconds']:.0f} s; {held}")
    return "\n".join(lines)
