"""Counted launches are the launches of the executor; configurations decide about second launches."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.graph.ir import Workload
from tritontower.graph.launch_count import Launches, count_launches
from tritontower.kernels.gemm import linear as linears
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.runtime.config import ARCHITECTURES

CASES = {case.name: case for case in all_cases()}
MANY = Workload(16384, 4096, 16384**2, tiles=1)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLAIN_CONFIG = LinearConfig(64, 64, 64, 8, 4, 3)


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """Collects the name of every launched Triton kernel."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    interpreted, compiled = GridExecutor.__call__, JITFunction.run

    def interpret(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return interpreted(self, *arguments, **options)

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        if not options.get("warmup"):
            names.append(self.fn.__name__)
        return compiled(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", interpret)
        patch.setattr(JITFunction, "run", run)
        yield names


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
    seen: dict[str, int] = {}
    with record_launches() as names:

        def watch(node: Any, _: Any) -> None:
            seen[node.name] = len(names) - sum(seen.values())

        executor = Executor(graph, weights)
        names.clear()  # binding a learned query multiplies it once
        executor.run(batch, watch)
    assert seen == {name: launches.kernels for name, launches in expected.nodes.items()}
    assert expected.total.kernels == len(names) > 0


def count_block(config: TowerConfig, passes: str, workload: Workload = MANY) -> Launches:
    return count_launches(graph_of(passes, config), workload).per_block


def test_a_block_is_seven_launches_without_split() -> None:
    assert count_block(CONFIG, "plain") == Launches(11)
    assert count_block(CONFIG, "default") == Launches(8)
    for name, config in TOWERS.items():
        assert count_block(config, "kernels").total <= 7, name
        assert count_block(config, "kernels").total < count_block(config, "plain").total, name
    counts = count_launches(fold_still_images(graph_of("kernels")), MANY)
    # The patch projection and the rotary table; the projector's norm and two matmuls.
    assert counts.total == Launches(32 * 7 + 2 + 3)
    assert counts.blocks == dict.fromkeys(range(32), Launches(7))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_rows_take_more_launches(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, a block's four matmuls and the projector's two split K up to 256 of their rows."""
    graph, workloads = (
        fold_still_images(graph_of("kernels")),
        [Workload(rows, rows // 4, rows**2, tiles=1) for rows in (64, 256, 1024, 4096)],
    )
    counts = [count_launches(graph, workload, device=architecture) for workload in workloads]
    found = [(each.per_block.total, each.total.total) for each in counts]
    assert found == [(11, 32 * 11 + 7), (11, 32 * 11 + 7), (7, 32 * 7 + 7), (7, 32 * 7 + 5)]
    monkeypatch.setattr("tritontower.kernels.runtime.config.architecture", lambda _: architecture)
    assert [count_launches(graph, workload, device=GPU) for workload in workloads] == counts, "like a device of it"


def test_an_mlp_launches_once_per_chunk_of_rows() -> None:
    longer = replace(MANY, patches=16385, scores=16385**2)
    assert count_block(CONFIG, "kernels", longer) == Launches(9)
    assert count_block(CONFIG, "default", longer) == Launches(10)


def test_gathers_and_copies_by_torch_are_library_calls() -> None:
    selecting = count_launches(graph_of("default", TOWERS["class token"]), MANY)
    assert selecting.nodes["projector"] == Launches(kernels=2, library=1)
    several = count_launches(graph_of("default", TOWERS["several layers"]), MANY)
    assert several.nodes["features"] == Launches(kernels=3)
    copies = count_launches(graph_of("plain", replace(CONFIG, depth=1, features=(0, 1))), MANY)
    assert copies.nodes["features"] == Launches(library=2)


def choose(monkeypatch: pytest.MonkeyPatch, module: Any, config: Any) -> None:
    """Makes ``config`` the configuration of every launch of ``module``."""
    monkeypatch.setattr(module, "choose_config", lambda *_, **__: config)


def test_vendor_gemms_leave_epilogues_to_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, linears, replace(PLAIN_CONFIG, vendor=True))

    def count(config: TowerConfig) -> dict[str, Launches]:
        return dict(count_launches(fuse(build(config)), MANY, device=CPU).nodes)

    with_bias, without = count(CONFIG), count(replace(CONFIG, mlp_bias=False, attention_bias=False))
    assert with_bias["blocks.0.mlp_up"] == Launches(kernels=1, library=1)
    assert with_bias["blocks.0.mlp_down"] == Launches(kernels=1, library=1)
    assert without["blocks.0.mlp_down"] == without["blocks.0.attention_output"] == Launches(library=1)
    assert count(TOWERS["gated"])["blocks.0.mlp_gate_up"] == Launches(1)
