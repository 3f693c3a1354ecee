"""List the supported model families, with the tokens of an image.

Token counts are those of one published checkpoint per family; `tritontower inspect MODEL` counts for a checkpoint.
"""

import argparse
import json
from dataclasses import asdict

from tritontower.text_table import text_table

EXAMPLE = "tritontower families --markdown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json`` and ``--markdown``."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table of the documentation")


def run(arguments: argparse.Namespace) -> int:
    """Prints the catalog."""
    from tritontower.models.common.catalog import COUNTED_SIDES, catalog, families_table, weight_formats

    if arguments.markdown:
        print(families_table())
    elif arguments.json:
        print(json.dumps([asdict(entry) for entry in catalog()], indent=2))
    else:
        columns = ("family", "checkpoints", "video", *(f"tokens at {side}²" for side in COUNTED_SIDES))
        rows = [
            (each.title, each.checkpoints, "yes" if each.video else None, *(f"{n:,}" for n in each.counted.values()))
            for each in catalog()
        ]
        print(f"{text_table('', columns, rows)}\n\n{weight_formats()}")
    return 0
