"""Options and habits that several commands share.  Declaring an option loads nothing slow."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tritontower.config import DTYPE_NAMES

if TYPE_CHECKING:
    from tritontower import VisionTower
    from tritontower.preprocessing import Bounds

__all__ = [
    "DTYPES",
    "add_bounds",
    "add_images",
    "add_json",
    "add_model",
    "add_placement",
    "bounds_of",
    "image_size",
    "load_tower",
    "output_file",
    "patch_counts",
    "positive_integer",
    "reading_weights",
]

MOST_PATCHES = 2**20
"""Of a pass that a command makes up: an image of 14,336 × 14,336 pixels at 14 a patch."""

DTYPES = (*DTYPE_NAMES, "auto")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``MODEL`` and ``--revision``."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint: a local folder, or a hub id such as owner/name")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: its main branch)"
    )


def add_images(parser: argparse.ArgumentParser, *, required: bool, without: str = "") -> None:
    """``IMAGE ...``, files on this machine; ``without`` says what happens when there are none."""
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+" if required else "*",
        type=image_path,
        help="image files, of any mix of sizes" + (f" (default: {without})" if without else ""),
    )


def add_placement(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``: where the tower runs, and in which precision."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or else the CPU)")
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """``--dtype``: the precision of weights and activations."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        default="auto",
        metavar="{" + ",".join(DTYPES) + "}",
        help="precision of weights and activations (default: auto, that of the checkpoint)",
    )


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """``--min-pixels``, ``--max-pixels``, ``--longest-edge``: what an image is scaled to before it is cut into patches."""
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


def bounds_of(arguments: argparse.Namespace) -> "Bounds":
    """The bounds that were given; a tower refuses those that its resizing rule does not have."""
    return {
        "min_pixels": arguments.min_pixels,
        "max_pixels": arguments.max_pixels,
        "longest_edge": arguments.longest_edge,
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: the same report for programs."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


# -- types of arguments -----------------------------------------------------------------------------------------------


def dtype_name(text: str) -> str:
    """One of :data:`DTYPES`, alone or behind ``torch.``."""
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a precision that towers run in: {', '.join(DTYPES)}")
    return name


def positive_integer(text: str) -> int:
    """A decimal integer of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def patch_counts(text: str) -> list[int]:
    """``N,N,...``: patches of passes, each of them once, in the order given."""
    counts = list(dict.fromkeys(positive_integer(part) for part in text.split(",")))
    if max(counts) > MOST_PATCHES:
        raise argparse.ArgumentTypeError(f"{max(counts)} patches are more than a pass has; the limit is {MOST_PATCHES}")
    return counts


def image_size(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT``, in pixels."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})[x×]([1-9][0-9]{0,8})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, such as 1024x768")
    return int(match[1]), int(match[2])


def image_path(text: str) -> Path:
    """A file on this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URL; download the image and name the file")
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a folder, not an image file' if path.is_dir() else 'no file'}")
    return path


def output_file(text: str) -> Path:
    """A file that can be written; asked before the work, not after."""
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {str(path.parent)!r}")
    return path


# -- work -------------------------------------------------------------------------------------------------------------


def load_tower(arguments: argparse.Namespace, *, delay_load: bool = False) -> "VisionTower":
    """The tower that ``MODEL``, ``--revision``, ``--device`` and ``--dtype`` describe, behind a progress bar."""
    from tritontower import VisionTower

    with reading_weights() as progress:
        return VisionTower.from_pretrained(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            revision=arguments.revision,
            delay_load=delay_load,
            progress=progress,
        )


@contextmanager
def reading_weights() -> Iterator[Callable[[int, int], None]]:
    """A callback that draws a progress bar on a terminal, and does nothing elsewhere."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(desc="reading weights", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
