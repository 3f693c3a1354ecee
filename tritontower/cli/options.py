"""Options that several commands share; declaring them imports nothing slow."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.config import DTYPE_NAMES
from tritontower.errors import UsageError

if TYPE_CHECKING:
    from tritontower import VisionTower
    from tritontower.preprocessing import Bounds


MOST_PATCHES = 2**20
"""Largest forward pass of a command: an image of 14,336 × 14,336 pixels with patches of 14."""

DTYPES = (*DTYPE_NAMES, "auto")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds ``MODEL`` and ``--revision``."""
    nargs = None if required else "?"
    text = "a checkpoint: a local folder, or a hub id such as owner/name"
    parser.add_argument("model", metavar="MODEL", nargs=nargs, help=text)
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: its main branch)"
    )


def add_images(parser: argparse.ArgumentParser, *, required: bool, without: str = "") -> None:
    """Adds ``IMAGE ...``, local files; ``without`` describes the default."""
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+" if required else "*",
        type=image_path,
        help="image files, of any mix of sizes" + (f" (default: {without})" if without else ""),
    )


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device`` and ``--dtype``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or else the CPU)")
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype``: of weights and activations."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        default="auto",
        metavar="{" + ",".join(DTYPES) + "}",
        help="precision of weights and activations (default: auto, that of the checkpoint)",
    )


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """Adds ``--min-pixels``, ``--max-pixels`` and ``--longest-edge``: bounds of the resized image."""
    for bound, effect in (("min", "up to at least"), ("max", "down to at most")):
        parser.add_argument(
            f"--{bound}-pixels",
            type=positive_integer,
            metavar="N",
            help=f"scale images {effect} N = width x height pixels (default: as the checkpoint says)",
        )
    parser.add_argument(
        "--longest-edge",
        type=positive_integer,
        metavar="N",
        help="scale images down until no side is longer than N pixels (default: as the checkpoint says)",
    )


def read_bounds(arguments: argparse.Namespace) -> "Bounds":
    """The given bounds; a tower refuses those that its resize rule does not have."""
    return {
        "min_pixels": arguments.min_pixels,
        "max_pixels": arguments.max_pixels,
        "longest_edge": arguments.longest_edge,
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def dtype_name(text: str) -> str:
    """One of :data:`DTYPES`, with or without ``torch.``."""
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")
    return name


def positive_integer(text: str) -> int:
    """A decimal integer of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def patch_counts(text: str) -> list[int]:
    """``N,N,...``: distinct patch counts, in the given order."""
    counts = list(dict.fromkeys(positive_integer(part) for part in text.split(",")))
    if max(counts) > MOST_PATCHES:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_PATCHES} patches, got {max(counts)}")
    return counts


def image_size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT``, in pixels."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})[x×]([1-9][0-9]{0,8})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT such as 1024x768, got {text!r}")
    return int(match[1]), int(match[2])


def image_path(text: str) -> Path:
    """A file on this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"must be a local file, got the URL {text!r}; download the image first")
    path = Path(text).expanduser()
    if not path.is_file():
        found = "the folder" if path.is_dir() else "no file"
        raise argparse.ArgumentTypeError(f"must be an image file, got {found} {text!r}")
    return path


def output_file(text: str) -> Path:
    """A writable path, checked before the work."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in an existing folder, got {text!r}; create {str(path.parent)!r}")
    return path


def refuse_unused(arguments: argparse.Namespace, takes: Mapping[str, Sequence[str]], chosen: str) -> None:
    """Raises :class:`UsageError` for an option without effect on ``chosen``; ``takes``: action → options that it takes."""
    # An option that was not given is None or False, the dtype is "auto".
    names = dict.fromkeys(name for names in takes.values() for name in names)
    for name in names:
        if getattr(arguments, name) not in (None, False, "auto") and name not in takes[chosen]:
            option = "MODEL" if name == "model" else f"--{name}"
            others = ", ".join(action for action in takes if name in takes[action])
            raise UsageError(f"{option} has no effect on {chosen}; it goes with {others}")


def load_tower(arguments: argparse.Namespace, *, delay_load: bool = False) -> "VisionTower":
    """Loads the tower of ``MODEL``, ``--revision``, ``--device`` and ``--dtype`` with a progress bar."""
    from tritontower import VisionTower

    with progress_bar(unit="B", unit_scale=True) as report:
        return VisionTower.from_pretrained(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            revision=arguments.revision,
            delay_load=delay_load,
            progress=partial(report, "reading weights"),
        )


@contextmanager
def progress_bar(**style: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A callback that takes activity, steps done and their total, and shows a bar for each activity on a terminal."""
    from tqdm import tqdm

    with tqdm(leave=False, disable=not sys.stderr.isatty(), **{"unit": "", **style}) as bar:

        def report(activity: str, done: int, total: int) -> None:
            if not done or bar.total is None:
                bar.reset(total)
                bar.set_description(activity)
            bar.update(done - bar.n)

        yield report
