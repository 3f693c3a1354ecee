"""Measure kernels, towers, preprocessing, loading, launches or memory on this machine.

  kernels        every kernel at the towers' shapes, beside torch's own and the roofline; one with wrong numbers is not timed
  towers         the forward pass against transformers, after checking it against fp32 and both against each other
  preprocessing  images to patches, against transformers' image processor
  loading        seconds and memory to load the tower, against transformers' model of it
  launches       kernel launches of a block and of a pass: plain, fused, and by architecture (nothing runs)
  memory         the memory plan against what a process takes

Without MODEL the tower is that of Qwen2-VL-2B with random weights, made once and kept where weights are needed; --family takes
others at their published width, made for the occasion.  An option that a kind does not take is refused.  Exit code 1 if any numbers are wrong.

  tritontower bench towers MODEL --size 1024x768 --against sdpa,compile --dtype bfloat16
  tritontower bench towers --family all --depth 8 --pack mixed --output families.json
  tritontower bench kernels --kernel attention --kernel linear --json
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.errors import UsageError

from .options import add_dtype, add_json, image_size, output_file, patch_counts, positive_integer

if TYPE_CHECKING:
    import torch

    from tritontower.benchmarks.documents import Document
    from tritontower.benchmarks.towers import Pass, Source

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "tritontower bench towers Qwen/Qwen2-VL-2B-Instruct --patches 1024,4096 --plot towers.png"

_TOWER = ("model", "revision", "family")
_TAKES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "kernels": (
        ("kernel", "against", "device", "dtype", "threads", "plot"),
        "kernels are measured one by one, at the shapes of all towers",
    ),
    "towers": (
        (
            *_TOWER,
            "depth",
            "patches",
            "size",
            "pack",
            "against",
            "split",
            "device",
            "dtype",
            "repeats",
            "threads",
            "plot",
        ),
        "towers are measured as a whole; --split says what each kind of node takes",
    ),
    "preprocessing": (
        (*_TOWER, "size", "pack", "repeats", "threads", "plot"),
        "preprocessing is measured on images, on the CPU, against transformers; name them with --size or --pack",
    ),
    "loading": (
        (*_TOWER, "depth", "against", "device", "dtype", "repeats", "threads", "plot"),
        "loading is measured without a pass",
    ),
    "launches": (
        (*_TOWER, "depth", "patches", "size", "pack"),
        "launches are counted from the graph, and nothing runs",
    ),
    "memory": (
        (*_TOWER, "depth", "patches", "device", "dtype", "threads"),
        "memory is measured for square images, against the plan; name them with --patches",
    ),
}
"""Kind → the options that it takes, beside ``--json`` and ``--output``, and what to say of the others."""

KINDS = tuple(_TAKES)
ALL = "all"
REPEATS = 3
DEMONSTRATION = "Qwen2-VL-2B"
"""What is measured where no tower is named."""
EXIT_NO = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which towers and passes, and where the report goes."""
    parser.add_argument("kind", choices=KINDS, metavar="{" + ",".join(KINDS) + "}", help="what to measure")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a checkpoint: a local folder, or a hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--family", action="append", metavar="TITLE", help="a family instead of MODEL; may be repeated, or `all`"
    )
    parser.add_argument(
        "--depth",
        type=positive_integer,
        metavar="N",
        help="at most so many blocks of --family (default: as published)",
    )
    passes = parser.add_argument_group("passes (towers, preprocessing, launches, memory)")
    passes.add_argument(
        "--patches", type=patch_counts, metavar="N,N,...", help="one square still image of about so many patches each"
    )
    passes.add_argument("--size", type=image_size, action="append", metavar="WIDTHxHEIGHT", help="an image of noise")
    passes.add_argument("--pack", action="append", metavar="NAME", help="448, 1024, small, 64small or mixed")
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help="towers: how transformers runs: sdpa, eager, compile, separated by commas, or none (default: sdpa); "
        "kernels and loading: none leaves out what they are held against",
    )
    parser.add_argument("--split", action="store_true", help="towers: also the time of each kind of node")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="kernels: only this one; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or else the CPU)")
    add_dtype(parser)
    parser.add_argument("--repeats", type=positive_integer, metavar="N", help="runs that count (default: 3)")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads of the CPU (default: torch's)")
    add_json(parser)
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    parser.add_argument("--plot", type=_drawing, metavar="FILE.png", help="draw the report; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and keeps; returns 1 if anything was wrong."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1" and arguments.kind != "launches":
        raise UsageError("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it")
    _check_options(arguments)
    if arguments.plot is not None:
        _require_matplotlib()
    import torch

    from tritontower.benchmarks.documents import write_json

    from .parity import hide_reference_progress

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    hide_reference_progress()
    found, table = _MEASURE[arguments.kind](arguments)
    if arguments.output is not None:
        write_json(arguments.output, found)
    if arguments.plot is not None:
        from tritontower.benchmarks.plots import plot

        plot(found, arguments.plot)
    if arguments.json:
        print(table, file=sys.stderr)
        print(json.dumps(found))
    else:
        print(table)
    return EXIT_NO if any(row.get("status") == "failed" for row in found["rows"]) else 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses what the kind would ignore, and what contradicts itself."""
    taken, why = _TAKES[arguments.kind]
    every = {option for options, _ in _TAKES.values() for option in options}
    # An option that was not given is None or False; of the precision only "auto" says nothing.
    given = {name for name in every if getattr(arguments, name) and getattr(arguments, name) != "auto"}
    for name in sorted(given - set(taken)):
        option = "MODEL" if name == "model" else f"--{name}"
        raise UsageError(f"`bench {arguments.kind}` takes no {option}: {why}")
    if arguments.family and arguments.model:
        raise UsageError("MODEL and --family name different towers; give one of them")
    if arguments.revision and not arguments.model:
        raise UsageError("--revision is that of a hub id; name it as MODEL")
    if arguments.depth and not arguments.family:
        raise UsageError("--depth cuts the towers of --family; a checkpoint has the depth that it has")
    if arguments.kind != "towers" and arguments.against not in (None, "none"):
        raise UsageError(f"`bench {arguments.kind}` takes --against none or no --against, not {arguments.against}")


# -- what can be measured ---------------------------------------------------------------------------------------------

_Measured = tuple["Document", str]


def _kernels(arguments: argparse.Namespace) -> _Measured:
    import torch

    from tritontower.benchmarks.cases import KERNELS
    from tritontower.benchmarks.kernels import benchmark_kernels, kernel_table

    unknown = sorted(set(arguments.kernel or ()) - set(KERNELS))
    if unknown:
        raise UsageError(f"no kernel {unknown[0]!r}; there are {', '.join(KERNELS)}")
    dtype = torch.bfloat16 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    found = benchmark_kernels(
        device=_device(arguments), dtype=dtype, kernels=arguments.kernel, rivals=arguments.against != "none"
    )
    return found, kernel_table(found)


def _towers(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.towers import benchmark_towers, tower_table

    found = benchmark_towers(
        _sources(arguments),
        _passes(arguments),
        device=_device(arguments),
        dtype=arguments.dtype,
        rivals=[] if arguments.against == "none" else (arguments.against or "sdpa").split(","),
        repeats=arguments.repeats or REPEATS,
        split=arguments.split,
    )
    return found, tower_table(found)


def _loading(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.loading import benchmark_loading, loading_table

    found = _of_one_checkpoint(
        arguments,
        partial(benchmark_loading, repeats=arguments.repeats or REPEATS, transformers=arguments.against != "none"),
    )
    return found, loading_table(found)


def _preprocessing(arguments: argparse.Namespace) -> _Measured:
    from tritontower.benchmarks.images import PACKS
    from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, benchmark_preprocessing, preprocessing_table

    _check_packs(arguments)
    sizes = {name: PACKS[name] for name in arguments.pack or ()}
    if arguments.size:
        sizes[_size_label(arguments)] = arguments.size
    found = _of_one_checkpoint(
        arguments,
        partial(benchmark_preprocessing, sizes=sizes or DEFAULT_SIZES, repeats=arguments.repeats or REPEATS),
        weights=False,
    )
    return found, preprocessing_table(found)


def _launches(arguments: argparse.Namespace) -> _Measured:
    from contextlib import ExitStack

    from tritontower import VisionTower
    from tritontower.benchmarks.launches import benchmark_launches, launch_table

    with ExitStack() as stack:
        towers = []
        for title, source in _sources(arguments, weights=False):
            folder = stack.enter_context(source())
            towers.append((title, VisionTower.from_pretrained(folder, device="cpu", delay_load=True)))
        found = benchmark_launches(towers, _passes(arguments))
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


# -- what it is measured on -------------------------------------------------------------------------------------------


def _drawing(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a drawing; it is a PNG, so name it FILE.png")
    return output_file(text)


def _device(arguments: argparse.Namespace) -> "torch.device":
    from tritontower.devices import parse_device

    return parse_device(arguments.device)


def _sources(arguments: argparse.Namespace, *, weights: bool = True) -> "Sequence[Source]":
    """The towers that the command line names; without ``weights`` only their configurations are made or fetched."""
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
        return [(None, lambda: nullcontext(_folder(arguments)))]
    if arguments.model:
        return [(None, lambda: nullcontext(locate(arguments.model, revision=arguments.revision)))]
    if weights:
        return [(DEMONSTRATION, lambda: nullcontext(demonstration_checkpoint()))]
    return [(DEMONSTRATION, partial(make, "Qwen2-VL"))]


def _folder(arguments: argparse.Namespace) -> Path:
    """The folder of MODEL, with its weights in it."""
    from tritontower import VisionTower

    if Path(arguments.model).is_dir():
        return Path(arguments.model)
    # Loading it once fetches what loading it needs.
    return VisionTower.from_pretrained(arguments.model, revision=arguments.revision, device="cpu").folder


def _passes(arguments: argparse.Namespace) -> "Sequence[Pass]":
    """The passes that the command line names."""
    from tritontower.benchmarks.images import PACKS, images_of, square

    _check_packs(arguments)
    passes: list[Pass] = [(f"{count} patches", partial(square, patches=count)) for count in arguments.patches or ()]
    passes += [(name, partial(images_of, sizes=PACKS[name])) for name in arguments.pack or ()]
    if arguments.size:
        passes.append((_size_label(arguments), partial(images_of, sizes=arguments.size)))
    return passes or [("448", partial(images_of, sizes=PACKS["448"]))]


def _check_packs(arguments: argparse.Namespace) -> None:
    from tritontower.benchmarks.images import PACKS

    unknown = sorted(set(arguments.pack or ()) - set(PACKS))
    if unknown:
        raise UsageError(f"no pack {unknown[0]!r}; there are {', '.join(PACKS)}")


def _size_label(arguments: argparse.Namespace) -> str:
    return ", ".join(f"{width} × {height}" for width, height in arguments.size)


def _of_one_checkpoint(
    arguments: argparse.Namespace, measure: Callable[..., Any], *, weights: bool = True
) -> "Document":
    from tritontower import VisionTower

    (title, source), *others = _sources(arguments, weights=weights)
    if others:
        raise UsageError(f"{arguments.kind} is measured for one tower at a time")
    with source() as folder:
        tower = VisionTower.from_pretrained(folder, dtype=arguments.dtype, device="cpu", delay_load=True)
        dtype = tower.dtype if arguments.kind != "preprocessing" else None
        found = measure(folder, device=_device(arguments), dtype=dtype)
    return {**found, "family": title or tower.config.family}


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(
            'plots need matplotlib, which is not installed; install the `plot` extra (pip install "tritontower[plot]") or '
            "leave --plot out"
        )
