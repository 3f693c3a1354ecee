"""Aligned tables for a terminal."""

import re
import unicodedata
from collections.abc import Sequence

from tritontower.errors import UsageError

# A number may carry a sign, separators, an exponent and a unit: "1,024", "-0.5", "1.2e-05", "3.4 GiB", "×32", "12 %".
_NUMBER = re.compile(r"[-+×]?\d[\d,.]*(e[-+]?\d+)?( ?[%A-Za-zµ/]{1,8})?")
_DASH = "–"


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats an aligned table: columns of numbers to the right, all others to the left, ``None`` as a dash."""
    cells = [[_DASH if cell is None else str(cell) for cell in row] for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(columns):
            raise UsageError(f"row {number} must have {len(columns)} cells, got {len(row)}")
    by_column = [[row[index] for row in cells] for index in range(len(columns))]
    widths = [max(map(_display_width, [heading, *column])) for heading, column in zip(columns, by_column, strict=True)]
    numeric = [bool(column) and all(map(_is_number, column)) for column in by_column]

    def line(row: Sequence[str]) -> str:
        padded = []
        for text, width, to_the_right in zip(row, widths, numeric, strict=True):
            space = " " * (width - _display_width(text))
            padded.append(space + text if to_the_right else text + space)
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([*([title] if title else []), line(columns), rule, *map(line, cells)])


def _display_width(text: str) -> int:
    """Returns the number of terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _is_number(text: str) -> bool:
    return text == _DASH or _NUMBER.fullmatch(text) is not None
