"""Measure kernels, towers, preprocessing, loading, launches or memory on this machine.

  kernels        every kernel at the towers' shapes, next to torch's equivalent and the roofline
  towers         the forward pass against transformers, after checking both against fp32
  preprocessing  images to patches, against transformers' image processor
  loading        time and memory to load the tower, against transformers' model of it
  launches       kernel launches of a block and of a forward pass, by architecture (runs nothing)
  memory         the memory plan against the process

Without MODEL the tower is Qwen2-VL-2B's with random weights; --family uses other families at their published width.  A wrong
result is never timed, and the exit code is 1.

  tritontower bench towers MODEL --size 1024x768 --against sdpa,compile --dtype bfloat16
  tritontower bench towers --family all --depth 8 --batch mixed --output families.json
  tritontower bench kernels --kernel attention --kernel linear --json
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.errors import UsageError

from .options import add_dtype, add_json, image_size, output_file, patch_counts, positive_integer

if TYPE_CHECKING:
    import torch

    from tritontower.benchmarks.documents import Document
    from tritontower.benchmarks.towers import MakeBatch, Source

EXAMPLE = "tritontower bench towers Qwen/Qwen2-VL-2B-Instruct --patches 1024,4096 --plot towers.png"

_TOWER = ("model", "revision", "family")
_BATCH = ("patches", "size", "batch")
_RUN = ("device", "dtype", "threads")
OPTIONS: Mapping[str, Sequence[str]] = {
    "kernels": ("kernel", "against", *_RUN, "plot"),
    "towers": (*_TOWER, "depth", *_BATCH, "against", "split", *_RUN, "repeats", "plot"),
    "preprocessing": (*_TOWER, "size", "batch", "repeats", "threads", "plot"),
    "loading": (*_TOWER, "depth", "against", *_RUN, "repeats", "plot"),
    "launches": (*_TOWER, "depth", *_BATCH),
    "memory": (*_TOWER, "depth", "patches", *_RUN),
}
"""Benchmark → its options, besides ``--json`` and ``--output``."""

ALL = "all"
DEMO = "Qwen2-VL-2B"
"""The tower that is measured when none is named."""
EXIT_NO = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all benchmarks."""
    parser.add_argument("kind", choices=OPTIONS, metavar="{" + ",".join(OPTIONS) + "}", help="the benchmark")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a checkpoint: a local folder, or a hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--family", action="append", metavar="TITLE", help="a family instead of MODEL; may be repeated, or `all`"
    )
    parser.add_argument(
        "--depth", type=positive_integer_or_zero, metavar="N", help="at most N blocks of --family (0: as published)"
    )
    batches = parser.add_argument_group("batches (towers, preprocessing, launches, memory)")
    batches.add_argument(
        "--patches", type=patch_counts, metavar="N,N,...", help="one square still image of about N patches each"
    )
    batches.add_argument("--size", type=image_size, action="append", metavar="WIDTHxHEIGHT", help="an image of noise")
    batches.add_argument("--batch", action="append", metavar="NAME", help="448, 1024, small, 64small or mixed")
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help="towers: how transformers runs: sdpa, eager, compile, separated by commas, or none (default: sdpa); "
        "kernels and loading: none drops the baselines",
    )
    parser.add_argument("--split", action="store_true", help="towers: also the time of each kind of node")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="kernels: only this one; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or else the CPU)")
    add_dtype(parser)
    parser.add_argument(
        "--repeats", type=positive_integer, metavar="N", help="measured runs (default: 3, short ones 7)"
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of the CPU (default: torch's)")
    add_json(parser)
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    parser.add_argument("--plot", type=png_file, metavar="FILE.png", help="draw the report; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns 1 if any result was wrong."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1" and arguments.kind != "launches":
        raise UsageError("TRITON_INTERPRET must be unset for benchmarks, got 1; the interpreter's times mean nothing")
    _check_options(arguments)
    if arguments.plot is not None:
        _require_matplotlib()
    import torch

    from tritontower.benchmarks import plots

    from .parity import hide_reference_progress

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    hide_reference_progress()
    found, table = _MEASURE[arguments.kind](arguments)
    if arguments.plot is not None:
        plots.plot(found, arguments.plot)
    if arguments.json:
        print(table, file=sys.stderr)
        print(json.dumps(found))
    else:
        print(table)
    return EXIT_NO if any(row.get("status") == "failed" for row in found["rows"]) else 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that the benchmark would ignore, and contradictions."""
    every = {option for options in OPTIONS.values() for option in options}
    # An option that was not given is None or False, the dtype is "auto".
    given = {name for name in every if getattr(arguments, name) and getattr(arguments, name) != "auto"}
    for name in sorted(given - set(OPTIONS[arguments.kind])):
        option = "MODEL" if name == "model" else f"--{name}"
        raise UsageError(f"{option} must be left out of `bench {arguments.kind}`, which does not use it")
    if arguments.family and arguments.model:
        raise UsageError("MODEL and --family name different towers; give one of them")
    if arguments.revision and not arguments.model:
        raise UsageError("--revision needs a hub id; give it as MODEL")
    if arguments.depth and not arguments.family:
        raise UsageError("--depth needs --family; the depth of a checkpoint is fixed")
    if arguments.kind != "towers" and arguments.against not in (None, "none"):
        raise UsageError(f"--against of `bench {arguments.kind}` must be none, got {arguments.against}")
    from tritontower.benchmarks.images import BATCHES

    if unknown := sorted(set(arguments.batch or ()) - set(BATCHES)):
        raise UsageError(f"--batch must be one of {', '.join(BATCHES)}, got {unknown[0]}")


_Measured = tuple["Document", str]


def _kernels(arguments: argparse.Namespace) -> _Measured:
    import torch

    from tritontower.benchmarks.kernels import benchmark_kernels, kernel_table
    from tritontower.benchmarks.shapes import KERNELS

    if unknown := sorted(set(arguments.kernel or ()) - set(KERNELS)):
        raise UsageError(f"--kernel must be one of {', '.join(KERNELS)}, got {unknown[0]}")
    found = benchmark_kernels(
        device=_device(arguments),
        dtype=torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        kernels=arguments.kernel,
        baselines=arguments.against != "none",
        path=arguments.output,
    )
    return found, kernel_table(found)


def _towers(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.towers import benchmark_towers, tower_table

    found = benchmark_towers(
        _sources(arguments),
        _batches(arguments),
        device=_device(arguments),
        dtype=arguments.dtype,
        baselines=[] if arguments.against == "none" else (arguments.against or "sdpa").split(","),
        repeats=arguments.repeats,
        split=arguments.split,
        path=arguments.output,
    )
    return found, tower_table(found)


def _preprocessing(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.images import BATCHES
    from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, benchmark_preprocessing, preprocessing_table

    sizes = {name: BATCHES[name] for name in arguments.batch or ()}
    if arguments.size:
        sizes[_size_label(arguments)] = arguments.size
    with _one_source(arguments, weights=False) as folder:
        found = benchmark_preprocessing(
            folder, sizes=sizes or DEFAULT_SIZES, repeats=arguments.repeats or 5, path=arguments.output
        )
    return found, preprocessing_table(found)


def _loading(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.loading import benchmark_loading, loading_table

    found = _of_one_checkpoint(
        arguments,
        partial(benchmark_loading, repeats=arguments.repeats or 3, transformers=arguments.against != "none"),
    )
    return found, loading_table(found)


def _launches(arguments: argparse.Namespace) -> _Measured:
    from tritontower import VisionTower
    from tritontower.benchmarks.launches import benchmark_launches, launch_table

    with ExitStack() as stack:
        towers = []
        for title, source in _sources(arguments, weights=False):
            folder = stack.enter_context(source())
            towers.append((title, VisionTower.from_pretrained(folder, device="cpu", delay_load=True)))
        found = benchmark_launches(towers, _batches(arguments), path=arguments.output)
    return found, launch_table(found)


def _memory(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.memory import benchmark_memory, memory_table

    found = _of_one_checkpoint(arguments, partial(benchmark_memory, patches=arguments.patches or [1024, 4096]))
    return found, memory_table(found)


_MEASURE: Mapping[str, Callable[[argparse.Namespace], _Measured]] = {
    "kernels": _kernels,
    "towers": _towers,
    "preprocessing": _preprocessing,
    "loading": _loading,
    "launches": _launches,
    "memory": _memory,
}


def png_file(text: str) -> Path:
    """A writable path that ends in .png."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return output_file(text)


def positive_integer_or_zero(text: str) -> int:
    """A count, or 0."""
    return 0 if text == "0" else positive_integer(text)


def _device(arguments: argparse.Namespace) -> "torch.device":
    from tritontower.devices import parse_device

    return parse_device(arguments.device)


def _sources(arguments: argparse.Namespace, *, weights: bool = True) -> "Sequence[Source]":
    """The towers of the command line; without ``weights`` only their configurations are made or fetched."""
    import torch

    from tritontower.benchmarks.images import family_checkpoint, family_configuration, family_titles
    from tritontower.checkpoint.hub import locate
    from tritontower.demo.checkpoint import demonstration_checkpoint

    depth = arguments.depth or 0
    dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    make: Callable[[str], AbstractContextManager[Path]] = partial(family_configuration, depth=depth)
    if weights:
        make = partial(family_checkpoint, dtype=dtype, depth=depth)
    if arguments.family:
        titles = family_titles() if ALL in arguments.family else arguments.family
        return [(title, partial(make, title)) for title in titles]
    if arguments.model and weights:
        return [(None, lambda: nullcontext(_folder_with_weights(arguments)))]
    if arguments.model:
        return [(None, lambda: nullcontext(locate(arguments.model, revision=arguments.revision)))]
    if weights:
        return [(DEMO, lambda: nullcontext(demonstration_checkpoint()))]
    return [(DEMO, partial(make, "Qwen2-VL"))]


def _folder_with_weights(arguments: argparse.Namespace) -> Path:
    from tritontower import VisionTower

    if Path(arguments.model).is_dir():
        return Path(arguments.model)
    # Loading once fetches the files.
    return VisionTower.from_pretrained(arguments.model, revision=arguments.revision, device="cpu").folder


def _batches(arguments: argparse.Namespace) -> "Sequence[MakeBatch]":
    from tritontower.benchmarks.images import BATCHES, noise_batch, square_batch

    made: list[MakeBatch] = [
        (f"{count} patches", partial(square_batch, patches=count)) for count in arguments.patches or ()
    ]
    made += [(name, partial(noise_batch, sizes=BATCHES[name])) for name in arguments.batch or ()]
    if arguments.size:
        made.append((_size_label(arguments), partial(noise_batch, sizes=arguments.size)))
    return made or [("448", partial(noise_batch, sizes=BATCHES["448"]))]


def _size_label(arguments: argparse.Namespace) -> str:
    return ", ".join(f"{width} × {height}" for width, height in arguments.size)


def _one_source(arguments: argparse.Namespace, *, weights: bool = True) -> AbstractContextManager[Path]:
    (_, source), *others = _sources(arguments, weights=weights)
    if others:
        raise UsageError(f"--family of `bench {arguments.kind}` must be one title, got {len(others) + 1}")
    return source()


def _of_one_checkpoint(arguments: argparse.Namespace, measure: Callable[..., Any]) -> "Document":
    from tritontower import VisionTower

    with _one_source(arguments) as folder:
        dtype = VisionTower.from_pretrained(folder, dtype=arguments.dtype, device="cpu", delay_load=True).dtype
        found: Document = measure(folder, device=_device(arguments), dtype=dtype, path=arguments.output)
    return found


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(
            'plots need matplotlib, which is not installed; run pip install "tritontower[plot]" or drop --plot'
        )
