"""Counted launches are the launches of the executor; configurations decide about second launches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from support.configs import CONFIG, PASSES, TOWERS, graph_of
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.config import TowerConfig
from tritontower.engine.executor import Executor
from tritontower.engine.launch_count import count_launches
from tritontower.graph.builder import build
from tritontower.graph.cost import GraphLaunches, Launches
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.graph.ir import Workload
from tritontower.kernels.gemm import linear as linears
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.runtime.config import ARCHITECTURES
from tritontower.kernels.runtime.launch import LaunchList, Workspace

CASES = {case.name: case for case in all_cases()}
MANY = Workload(16384, 4096, 16384**2, tiles=1)
PLAIN_CONFIG = LinearConfig(64, 64, 64, 8, 4, 3)


@pytest.mark.parametrize(
    ("case", "passes"),
    [*((name, "kernels") for name in CASES), *((name, "plain") for name in ("clip", "qwen2_vl", "siglip"))],
)
def test_the_executor_launches_what_is_counted(
    case: str, passes: str, tmp_path: Path, kernel_device: torch.device
) -> None:
    tower = VisionTower.from_pretrained(CASES[case].save(tmp_path / "m"), device=kernel_device, delay_load=True)
    width, height = CASES[case].sizes[0]
    batch = tower.preprocess([noise(width, height, 0)]).to(kernel_device)
    graph = fold_still_images(fuse(build(tower.config), PASSES[passes]))
    weights = {name: torch.zeros(shape, device=kernel_device) for name, shape in graph.held_shapes.items()}
    expected = count_launches(graph, batch.workload, dtype=torch.float32, device=kernel_device)
    executor, launches, seen = Executor(graph, weights), LaunchList(Workspace()), dict[str, Launches]()

    def watch(node: Any, _: Any) -> None:
        before = sum(seen.values(), Launches())
        seen[node.name] = Launches(len(launches.kernels) - before.kernels, launches.library_calls - before.library)

    with launches.record():
        executor.run(batch, watch)
    assert seen == expected.nodes
    assert expected.total.kernels > 0


def count(config: TowerConfig, passes: str, workload: Workload = MANY) -> GraphLaunches:
    tokens = workload.patches if config.projector is None else workload.patches // config.projector.merge**2
    return count_launches(graph_of(passes, config), replace(workload, tokens=tokens), device="sm_80")


def count_block(config: TowerConfig, passes: str, workload: Workload = MANY) -> int:
    return count(config, passes, workload).per_block


def test_a_block_is_seven_launches_without_split() -> None:
    assert (count_block(CONFIG, "plain"), count_block(CONFIG, "default")) == (11, 8)
    for name, config in TOWERS.items():
        assert count_block(config, "kernels") <= 7, name
        assert count_block(config, "kernels") < count_block(config, "plain"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_rows_take_more_launches(architecture: str) -> None:
    """By default, a block's four matmuls and the projector's two split K up to 256 of their rows."""
    graph = fold_still_images(graph_of("kernels"))
    workloads = [Workload(rows, rows // 4, rows**2, tiles=1) for rows in (64, 256, 1024, 4096)]
    counts = [count_launches(graph, workload, device=architecture) for workload in workloads]
    found = [(each.per_block, each.total.total) for each in counts]
    assert found == [(11, 32 * 11 + 7), (11, 32 * 11 + 7), (7, 32 * 7 + 7), (7, 32 * 7 + 5)]


def test_an_mlp_launches_once_per_chunk_of_rows() -> None:
    longer = Workload(16388, 4097, 16388**2)
    assert count_block(CONFIG, "kernels", longer) == 9
    assert count_block(CONFIG, "default", longer) == 10


def test_gathers_and_copies_by_torch_are_library_calls() -> None:
    selecting = count(TOWERS["class token"], "default")
    assert selecting.nodes["projector"] == Launches(kernels=2, library=1)
    copies = count(replace(CONFIG, depth=1, features=(0, 1)), "plain")
    assert copies.nodes["features"] == Launches(library=2)


def test_vendor_gemms_leave_epilogues_to_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "choose_config", lambda *_, **__: replace(PLAIN_CONFIG, vendor=True))
    graph = fuse(build(replace(CONFIG, depth=1, features=(1,), mlp_bias=False, attention_bias=False)))
    counts = count_launches(graph, MANY, device="sm_80")
    assert counts.nodes["blocks.0.mlp_up"] == Launches(kernels=1, library=1)
    assert counts.nodes["blocks.0.mlp_down"] == Launches(library=1)
    assert count_launches(graph, Workload(0, 0, 0), device="sm_80").total == Launches()
