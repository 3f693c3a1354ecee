"""Tables line up in a terminal."""

import pytest

from tritontower.errors import UsageError
from tritontower.text_table import text_table


def test_numbers_align_right_and_words_left() -> None:
    table = text_table("Costs", ("node", "GFLOP"), [("norm", "1.5"), ("attention", "1,024.25"), ("rope", None)])
    assert table.splitlines() == [
        "Costs",
        "node          GFLOP",
        "─────────  ────────",
        "norm            1.5",
        "attention  1,024.25",
        "rope              –",
    ]


def test_units_signs_and_exponents_are_numbers() -> None:
    table = text_table("", ("x",), [("3.4 GiB",), ("-1.2e-05",), ("12 %",), ("×32",)])
    assert {len(line) for line in table.splitlines()} == {8}
    assert table.splitlines()[-1] == "     ×32"


def test_a_word_among_numbers_makes_a_column_of_words() -> None:
    assert text_table("", ("x",), [("10",), ("none",)]).splitlines()[2] == "10"


def test_wide_characters_take_two_columns_and_accents_none() -> None:
    lines = text_table("", ("name", "n"), [("猫.png", 1), ("e\u0301.png", 22)]).splitlines()
    assert lines[2:] == ["猫.png   1", "e\u0301.png   22"]


def test_no_rows() -> None:
    assert text_table("", ("a", "bc"), []).splitlines() == ["a  bc", "─  ──"]


def test_ragged_rows_are_rejected() -> None:
    with pytest.raises(UsageError, match="row 1 must have 2 cells, got 1"):
        text_table("", ("a", "b"), [(1, 2), (1,)])
