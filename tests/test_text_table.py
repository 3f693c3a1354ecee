"""Tables line up in a terminal."""

import pytest

from tritontower.errors import UsageError
from tritontower.text_table import text_table


def test_numbers_align_right_and_words_left():
    # A word among numbers makes a column of words; wide characters take two columns and accents none.
    rows = [("norm", "10", "1.5", "3.4 GiB"), ("猫.png", "none", "1,024.25", "-1.2e-05"), ("e\u0301", "1", None, "×32")]
    assert text_table("Costs", ("name", "words", "GFLOP", "units"), rows).splitlines() == [
        "Costs",
        "name    words     GFLOP     units",
        "──────  ─────  ────────  ────────",
        "norm    10          1.5   3.4 GiB",
        "猫.png  none   1,024.25  -1.2e-05",
        "e\u0301       1             –       ×32",
    ]
    assert text_table("", ("a", "bc"), []).splitlines() == ["a  bc", "─  ──"]


def test_ragged_rows_are_rejected():
    with pytest.raises(UsageError, match="row 1 must have 2 cells, got 1"):
        text_table("", ("a", "b"), [(1, 2), (1,)])
