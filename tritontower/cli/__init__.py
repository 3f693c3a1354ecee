"""The command line: one module per command.

A command module has

* a docstring: its first line is the entry in ``tritontower --help``, the whole is the description in its own help;
* ``EXAMPLE``: a complete command, shown at the end of its help;
* ``add_arguments(parser)`` and ``run(arguments) -> int``.

Command modules import torch and other slow packages inside :func:`run`, so that help and mistyped options respond at once.

Exit codes: 0, 1 (it ran, and the answer is no), 2 (bad usage or input), 130 (interrupted).
"""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from tritontower import __version__
from tritontower.errors import TowerError, UsageError

COMMANDS = ("demo", "env", "families", "inspect", "encode", "parity", "bench", "tune")
"""The commands, in the order of the overview; each is a module of this package."""

EXIT_YES = 0
EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """Interface of a command module."""

    __doc__: str | None
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Runs the command and returns the exit code."""
        ...


class _Parser(argparse.ArgumentParser):
    """Reports bad usage as a UsageError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        argv: the words after the program's name; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of stdout exited (`tritontower env | head -1`).  Python would flush once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("tritontower: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (TowerError, OSError) as error:
        if "--traceback" in words:
            traceback.print_exc()
        print(f"tritontower: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(words: list[str]) -> int:
    if not words:
        print(_overview(), file=sys.stderr)
        return EXIT_BAD_INPUT
    name, *rest = words
    if name in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_YES
    if name in ("-V", "--version"):
        print(f"tritontower {__version__}")
        return EXIT_YES
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}{hint}")
    try:
        arguments = build_parser(name).parse_args(rest)
    except SystemExit as stop:  # --help has been printed
        return int(stop.code or 0)
    return _load(name).run(arguments)


def _load(name: str) -> Command:
    return cast(Command, import_module(f"{__name__}.{name}"))


def build_parser(name: str) -> argparse.ArgumentParser:
    """The argument parser of the command ``name``."""
    command = _load(name)
    parser = _Parser(
        prog=f"tritontower {name}",
        description=command.__doc__,
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _overview() -> str:
    summaries = {name: (_load(name).__doc__ or "").partition("\n")[0] for name in COMMANDS}
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: tritontower COMMAND ...",
            "",
            "Triton kernels for the vision towers of vision-language models.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {summary}" for name, summary in summaries.items()),
            "",
            "`tritontower COMMAND --help` explains one; `tritontower --version` prints the version.",
        ]
    )
