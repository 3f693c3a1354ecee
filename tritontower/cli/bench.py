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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.errors import UsageError

from . import options

if TYPE_CHECKING:
    import torch

    from tritontower import VisionTower
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all benchmarks."""
    parser.add_argument("kind", choices=OPTIONS, metavar="{" + ",".join(OPTIONS) + "}", help="the benchmark")
    options.add_model(parser, required=False)
    parser.add_argument(
        "--family", action="append", metavar="TITLE", help="a family instead of MODEL; may be repeated, or `all`"
    )
    parser.add_argument(
        "--depth",
        type=lambda text: 0 if text == "0" else options.positive_integer(text),
        metavar="N",
        help="at most N blocks of --family (0: as published)",
    )
    batches = parser.add_argument_group("batches (towers, preprocessing, launches, memory)")
    batches.add_argument(
        "--patches", type=options.patch_counts, metavar="N,N,...", help="one square still image of about N patches each"
    )
    batches.add_argument(
        "--size", type=options.image_size, action="append", metavar="WIDTHxHEIGHT", help="an image of noise"
    )
    batches.add_argument("--batch", action="append", metavar="NAME", help="448, 1024, small, 64small or mixed")
    parser.add_argument(
        "--against",
        metavar="NAMES",
        help="towers: how transformers' model runs: sdpa, eager, compile, openvino, zentorch, onnxruntime, separated by "
        "commas, or none (default: sdpa); "
        "kernels and loading: none drops the baselines",
    )
    parser.add_argument("--split", action="store_true", help="towers: also the time of each kind of node")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="kernels: only this one; may be repeated")
    options.add_device_and_dtype(parser)
    parser.add_argument(
        "--repeats", type=options.positive_integer, metavar="N", help="measured runs (default: 3, short ones 7)"
    )
    parser.add_argument(
        "--threads", type=options.positive_integer, metavar="N", help="threads of the CPU (default: torch's)"
    )
    options.add_json(parser)
    parser.add_argument(
        "--output", type=options.output_file, metavar="FILE", help="also write the report here, as JSON"
    )
    parser.add_argument("--plot", type=png_file, metavar="FILE.png", help="draw the report; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns 1 if any result was wrong."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1" and arguments.kind != "launches":
        raise UsageError("TRITON_INTERPRET must be unset for benchmarks, got 1; the interpreter's times mean nothing")
    _check_options(arguments)
    import torch

    from tritontower.benchmarks import plots
    from tritontower.devices import parse_device

    if arguments.plot is not None:
        plots.import_figure()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.device = parse_device(arguments.device)
    found = _MEASURE[arguments.kind](arguments)
    table = import_module(f"tritontower.benchmarks.{arguments.kind}").table(found)
    if arguments.plot is not None:
        plots.plot(found, arguments.plot)
    if arguments.json:
        print(table, file=sys.stderr)
        print(json.dumps(found))
    else:
        print(table)
    return int(any(row.get("status") == "failed" for row in found["rows"]))


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that the benchmark would ignore, and contradictions."""
    options.refuse_unused(arguments, OPTIONS, arguments.kind)
    if arguments.family and arguments.model:
        raise UsageError("MODEL and --family name different towers; give one of them")
    if arguments.revision and not arguments.model:
        raise UsageError("--revision needs a hub id; give it as MODEL")
    if arguments.depth and not arguments.family:
        raise UsageError("--depth needs --family; the depth of a checkpoint is fixed")
    if arguments.kind != "towers" and arguments.against not in (None, "none"):
        raise UsageError(f"--against of `bench {arguments.kind}` must be none, got {arguments.against}")
    from tritontower.benchmarks.images import BATCHES
    from tritontower.benchmarks.shapes import SIZES

    for option, known in (("batch", BATCHES), ("kernel", SIZES)):
        if unknown := sorted(set(getattr(arguments, option) or ()) - set(known)):
            raise UsageError(f"--{option} must be one of {', '.join(known)}, got {unknown[0]}")


def _kernels(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.kernels import benchmark_kernels

    return benchmark_kernels(
        device=arguments.device,
        dtype=_dtype(arguments),
        kernels=arguments.kernel,
        baselines=arguments.against != "none",
        path=arguments.output,
    )


def _dtype(arguments: argparse.Namespace) -> "torch.dtype":
    """The dtype of tensors that no checkpoint holds."""
    from tritontower.devices import DTYPES

    return DTYPES["bfloat16" if arguments.dtype == "auto" else arguments.dtype]


def _towers(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.towers import benchmark_towers

    return benchmark_towers(
        _sources(arguments),
        _batches(arguments),
        device=arguments.device,
        dtype=arguments.dtype,
        baselines=[] if arguments.against == "none" else (arguments.against or "sdpa").split(","),
        repeats=arguments.repeats,
        split=arguments.split,
        path=arguments.output,
    )


def _preprocessing(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.images import BATCHES
    from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, benchmark_preprocessing

    sizes = {name: BATCHES[name] for name in arguments.batch or ()}
    if arguments.size:
        sizes[_size_label(arguments)] = arguments.size
    with _unloaded_towers(arguments) as towers:
        return benchmark_preprocessing(
            towers, sizes=sizes or DEFAULT_SIZES, repeats=arguments.repeats or 5, path=arguments.output
        )


def _loading(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.loading import benchmark_loading

    return _of_one_checkpoint(
        arguments, benchmark_loading, repeats=arguments.repeats or 3, transformers=arguments.against != "none"
    )


def _launches(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.launches import benchmark_launches

    with _unloaded_towers(arguments) as towers:
        return benchmark_launches(towers, _batches(arguments), path=arguments.output)


def _memory(arguments: argparse.Namespace) -> "Document":
    from tritontower.benchmarks.memory import benchmark_memory

    return _of_one_checkpoint(arguments, benchmark_memory, patches=arguments.patches or [1024, 4096])


_MEASURE: Mapping[str, Callable[[argparse.Namespace], "Document"]] = {
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
    return options.output_file(text)


def _sources(arguments: argparse.Namespace, *, weights: bool = True) -> "Sequence[Source]":
    """The towers of the command line; without ``weights`` only their configurations are made or fetched."""
    from tritontower.benchmarks.images import family_checkpoint, list_families
    from tritontower.checkpoint.hub import locate
    from tritontower.demo.checkpoint import demonstration_checkpoint

    make = partial(family_checkpoint, depth=arguments.depth or 0, dtype=_dtype(arguments) if weights else None)
    if arguments.family:
        titles = list_families() if ALL in arguments.family else arguments.family
        return [(title, partial(make, title)) for title in titles]
    if arguments.model and weights:
        return [(None, lambda: nullcontext(_fetch(arguments)))]
    if arguments.model:
        return [(None, lambda: nullcontext(locate(arguments.model, revision=arguments.revision)))]
    if weights:
        return [(DEMO, lambda: nullcontext(demonstration_checkpoint()))]
    return [(DEMO, partial(make, "Qwen2-VL"))]


@contextmanager
def _unloaded_towers(arguments: argparse.Namespace) -> "Iterator[list[tuple[str | None, VisionTower]]]":
    from tritontower import VisionTower

    with ExitStack() as stack:
        folders = {title: stack.enter_context(source()) for title, source in _sources(arguments, weights=False)}
        yield [
            (title, VisionTower.from_pretrained(folder, device="cpu", delay_load=True))
            for title, folder in folders.items()
        ]


def _fetch(arguments: argparse.Namespace) -> Path:
    """Returns the folder of MODEL, after fetching the weight files that are missing."""
    from tritontower.models.common.assembly import open_checkpoint

    checkpoint = open_checkpoint(arguments.model, revision=arguments.revision)
    with checkpoint.open():
        return checkpoint.folder


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


def _of_one_checkpoint(arguments: argparse.Namespace, measure: "Callable[..., Document]", **given: Any) -> "Document":
    from tritontower import VisionTower

    (_, source), *others = _sources(arguments)
    if others:
        raise UsageError(f"--family of `bench {arguments.kind}` must be one title, got {len(others) + 1}")
    with source() as folder:
        dtype = VisionTower.from_pretrained(folder, dtype=arguments.dtype, device="cpu", delay_load=True).dtype
        return measure(folder, device=arguments.device, dtype=dtype, path=arguments.output, **given)
