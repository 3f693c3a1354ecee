"""The simulated traffic of `bench.graph_cache` is mostly replayed."""

import json

import pytest

from bench import graph_cache


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
