"""Batch sizes are rounded up to buckets, with little padding in segments of its own."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import noise
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.engine.buckets import (
    COARSE_STEPS,
    BucketPlanner,
    SegmentCapacity,
    round_up,
    round_up_workload,
    row_steps,
)
from tritontower.graph.ir import Workload
from tritontower.kernels.runtime.segments import Segments

Load = Callable[[str], VisionTower]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a tower of a case, without weights."""
    cases = {case.name: case for case in all_cases()}
    folder = tmp_path_factory.mktemp("buckets")

    def load(name: str) -> VisionTower:
        path: Path = folder / name
        return VisionTower.from_pretrained(
            path if path.exists() else cases[name].save(path), device="cpu", delay_load=True
        )

    return load


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_rounding_adds_less_than_one_step(steps: int) -> None:
    before = 0
    for count in range(1, 20_000, 37):
        segments = Segments([count])
        capacity = SegmentCapacity.for_segments(segments, round_up(count, row_steps(count)), None)
        assert len(capacity.pad_lengths(segments)) <= capacity.count
    for count in range(1, 20_000):
        size = round_up(count, steps)
        assert 0 <= size - count < max(1, count / steps)
        assert size >= before
        assert round_up(size, steps) == size
        before = size
    assert [round_up(count, 16) for count in (0, 1, 31, 33, 577, 1000, 16384)] == [0, 1, 31, 34, 608, 1024, 16384]
    assert len({round_up(count, steps) for count in range(2**12, 2**13 + 1)}) == steps + 1


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_rounded_workloads_stay_consistent(case: TowerCase, load: Load) -> None:
    tower = load(case.name)
    config, per_token = tower.config, tower.config.rows_per_token
    generator = random.Random(0)
    for images in (1, 2, 17, 33, 150):
        sizes = [(generator.randint(28, 120), generator.randint(28, 120)) for _ in range(images)]
        workload = tower.workload(sizes)
        most = 1 / 8 if workload.patches < 1024 else 1 / 16
        plan = round_up_workload(workload, rows_per_token=per_token, tile_rows=config.longest_segment)
        for dimension in ("patches", "selected", "merged", "tokens", "tiles"):
            valid, size = workload.rows(dimension), plan.rows(dimension)
            # Tokens that are gathered from several tiles cost little.
            is_cheap = dimension == "tokens" and workload.tokens != workload.rows("merged")
            assert valid <= size <= valid * (1 + (1 / COARSE_STEPS if is_cheap else most)), dimension
        assert plan.rows("selected") == plan.rows("merged") * per_token
        if workload.tokens == workload.rows("merged"):
            assert plan.tokens == plan.rows("merged")
        if workload.rows("selected") == workload.patches:
            assert plan.rows("selected") == plan.patches
        if config.longest_segment is not None:
            assert plan.patches == plan.tiles * config.longest_segment
        assert round_up_workload(plan, rows_per_token=per_token, tile_rows=config.longest_segment) == plan


def test_tiles_must_have_the_given_rows() -> None:
    with pytest.raises(ValueError, match="3 tiles of 5 rows have 15 rows, not 14"):
        round_up_workload(Workload(14, 14, 0, tiles=3), tile_rows=5)


@pytest.mark.parametrize("bound", [None, 4000])
def test_padding_is_in_short_segments_of_its_own(bound: int | None) -> None:
    segments = Segments([4000, 96, 1])
    capacity = SegmentCapacity.for_segments(segments, round_up(4097, 16), bound)
    lengths = capacity.pad_lengths(segments)
    assert lengths == (4000, 96, 1, 64, 64, 64, 63)
    assert sum(lengths) == capacity.total
    assert capacity.longest == (bound or 4096)
    short = Segments([5, 3])
    assert SegmentCapacity.for_segments(short, 10, None).pad_lengths(short) == (5, 3, 2)


def test_batches_of_similar_size_share_a_bucket(load: Load) -> None:
    tower = load("qwen2_vl")
    planner = BucketPlanner(tower.graph, tower.device)
    shapes = [(1400, 1400), (1372, 1400), (1400, 1386), (3640, 532)]
    buckets = [planner.bucket(tower.preprocess(np.zeros((h, w, 3), np.uint8))) for w, h in shapes]
    assert buckets[0] == buckets[1] == buckets[2]
    assert buckets[3] != buckets[0], "a side of more than 256 patches"


def test_tiles_of_several_sizes_have_no_bucket(load: Load) -> None:
    tower = load("clip")
    nodes = [
        replace(node, attributes={**node.attributes, "length_bound": None}) if node.kind == "attention" else node
        for node in tower.graph.nodes
    ]
    planner = BucketPlanner(tower.graph.with_nodes(nodes), tower.device)
    batch = tower.preprocess([noise(64, 64, 1)] * 2)
    assert planner.bucket(batch) is not None
    uneven = replace(batch.attention, tiles=Segments([1, batch.attention.segments.total - 1]))
    assert planner.bucket(replace(batch, attention=uneven)) is None
