"""Statements about a GPU without one."""

import json
import re
from pathlib import Path

import pytest

from bench import expectation, graph_cache
from tritontower.kernels.runtime import dispatch


@pytest.mark.slow
def test_mixed_traffic_is_mostly_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert graph_cache.main(["--passes", "300"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    least = {"one image": (0.7, 0.9), "batches of 2-8": (0.6, 0.7), "ten sizes": (0.96, 1.0)}
    assert found.keys() == least.keys()
    for kind, (replayed, second_half) in least.items():
        assert found[kind]["replayed"] >= replayed
        assert found[kind]["second_half"] >= second_half
        assert 0 < found[kind]["padding"] <= 1 / 16
    assert found["ten sizes"]["captures"] <= 10


def test_the_status_page_states_the_computed_expectation(capsys: pytest.CaptureFixture[str]) -> None:
    with dispatch.use("triton"):  # the graph as kernels run it
        expectation.main()
    computed = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[3:]]
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text(encoding="utf-8")
    assert len(computed) == len(expectation.PATCHES)
    assert [row for row in computed if f"| {' | '.join(row)} |" not in page] == []
    # The bounds are in order, and quantization matters less the more tiles there are.
    bounds = [(float(ideal), float(waves)) for _, _, ideal, waves, _ in computed]
    assert all(ideal <= waves for ideal, waves in bounds)
    assert sorted(bounds, key=lambda bound: bound[1] / bound[0]) == bounds[::-1]
