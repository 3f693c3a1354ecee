"""The time of each kind of node: every kind of the graph, once, and a table of what was found."""

from contextlib import nullcontext

import numpy as np
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.benchmarks.split import node_seconds, split_table
from tritontower.benchmarks.towers import benchmark_towers, tower_table
from tritontower.kernels.runtime.dispatch import use


def small_tower(tmp_path):
    return VisionTower.from_pretrained(all_cases()[0].save(tmp_path / "model"), device="cpu").load()


def batch_of(tower):
    return tower.preprocess(np.zeros((64, 64, 3), np.uint8))


def test_every_kind_is_timed(tmp_path):
    tower = small_tower(tmp_path)
    with use("reference"):
        seconds = node_seconds(tower, batch_of(tower), repeats=1)
    assert set(seconds) == {node.kind for node in tower.graph.nodes}
    assert all(taken > 0 for taken in seconds.values())
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)


def test_table_has_a_line_for_each_pass_and_a_dash_for_what_it_lacks():
    table = split_table({"first": {"linear": 0.002, "rope": 0.001}, "second": {"linear": 0.0005}})
    first, second = (line for line in table.splitlines() if line.startswith(("first", "second")))
    assert first.split() == ["first", "2.0", "1.0", "3.0"]
    assert second.split()[1] == "0.5"
    assert second.split()[-1] == "0.5"


def test_towers_are_split_when_asked(tmp_path):
    folder = all_cases()[0].save(tmp_path / "model")
    source = ("small", lambda: nullcontext(folder))
    with use("reference"):
        found = benchmark_towers([source], [("one", batch_of)], rivals=[], repeats=1, split=True)
    assert found["rows"][0]["node_seconds"].keys() == {
        node.kind for node in small_tower(tmp_path / "again").graph.nodes
    }
    assert "by node kind" in tower_table(found)
