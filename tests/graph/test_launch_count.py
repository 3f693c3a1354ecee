"""Launches are counted from the graph, and the executor launches exactly what was counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from support.configs import CONFIG, PASSES, TOWERS, graph_of
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.config import TowerConfig
from tritontower.engine.executor import Executor
from tritontower.engine.weight_loader import read_weights
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.graph.ir import Graph, Workload
from tritontower.graph.launch_count import Launches, count_launches
from tritontower.kernels.attention.attention import FlashAttentionConfig
from tritontower.kernels.gemm import linear as linears
from tritontower.kernels.gemm.linear_config import LinearConfig, parts_of
from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime.config import ARCHITECTURES

CASES = {case.name: case for case in all_cases()}
MANY = Workload(16384, 4096, 16384**2, tiles=1)


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Collects the name of every Triton kernel that is launched inside the block."""
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TowerCase], Path]:
    """A small checkpoint of a case, made once."""
    folders: dict[str, Path] = {}

    def save(case: TowerCase) -> Path:
        if case.name not in folders:
            folders[case.name] = case.save(tmp_path_factory.mktemp("towers") / case.name)
        return folders[case.name]

    return save


@pytest.mark.parametrize("passes", ["plain", "default", "kernels"])
@pytest.mark.parametrize("case", CASES)
def test_a_pass_launches_exactly_what_is_counted(
    case: str, passes: str, saved: Callable[[TowerCase], Path], kernel_device: torch.device
) -> None:
    tower = VisionTower.from_pretrained(saved(CASES[case]), device=kernel_device, delay_load=True)
    width, height = CASES[case].sizes[0]
    batch = tower.preprocess([noise(width, height, 0)]).to(kernel_device)
    graph = fold_still_images(fuse(build(tower.config), PASSES[passes]))
    with tower._checkpoint() as checkpoint:
        weights = read_weights(checkpoint, graph, tower.family.tensors, torch.float32, kernel_device)
    expected = count_launches(graph, batch.workload, dtype=torch.float32, device=kernel_device)
    seen: dict[str, int] = {}
    with counted_launches() as names:

        def watch(node: Any, _: Any) -> None:
            seen[node.name] = len(names) - sum(seen.values())

        executor = Executor(graph, weights)
        names.clear()  # binding a learned query multiplies it once
        executor.run(batch, watch)
    assert seen == {name: launches.kernels for name, launches in expected.nodes.items()}
    assert expected.total.kernels == len(names) > 0


def block_of(config: TowerConfig, passes: str, workload: Workload = MANY) -> Launches:
    return count_launches(graph_of(passes, config), workload).per_block


def test_a_block_takes_at_most_seven_launches_where_no_product_is_cut() -> None:
    assert block_of(CONFIG, "plain") == Launches(11)
    assert block_of(CONFIG, "default") == Launches(8)
    assert block_of(CONFIG, "kernels") == Launches(7)
    for name, config in TOWERS.items():
        assert block_of(config, "kernels").total <= 7, name
        assert block_of(config, "kernels").total < block_of(config, "plain").total, name


def still(patches: int) -> Workload:
    """One image."""
    return Workload(patches, patches // 4, patches**2, tiles=1)


def on(architecture: str, patches: int) -> tuple[int, int]:
    """Launches of a block and of a pass of Qwen2-VL's tower in bf16."""
    graph = fold_still_images(graph_of("kernels"))
    counts = count_launches(graph, still(patches), device=architecture)
    return counts.per_block.total, counts.total.total


def test_few_rows_take_more_launches_on_every_architecture() -> None:
    """By default each of a block's four products is cut up to 256 rows, and so are the projector's two by their own rows."""
    for architecture in ARCHITECTURES:
        found = [on(architecture, patches) for patches in (64, 256, 1024, 4096)]
        assert found == [(11, 32 * 11 + 7), (11, 32 * 11 + 7), (7, 32 * 7 + 7), (7, 32 * 7 + 5)], architecture


def test_tuned_configurations_are_counted() -> None:
    """A table whose MLP down splits K at 1,024 rows adds one launch to each block."""
    values = {
        "block_rows": 64, "block_columns": 64, "block_inner": 64, "group_rows": 8, "num_warps": 4, "num_stages": 3
    }  # fmt: skip
    down = {"columns": 1280, "inner": 5120, "activation": None, "residual": True}
    entries = [
        {"kernel": "gemm.linear", "dtype": "bfloat16", "constants": down, "sizes": {"rows": rows}, "config": config}
        for rows, config in ((1024, values | {"split": 4}), (4096, values))
    ]
    device = torch.device("cuda", 0)
    graph = fold_still_images(graph_of("kernels"))
    registry.fill(device, [registry.TunedTable(entries)])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tritontower.kernels.runtime.config.architecture", lambda _: "sm_90")
            found = [count_launches(graph, still(rows), device=device).per_block.total for rows in (1024, 4096)]
    finally:
        registry.clear()
    assert found == [8, 7]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_counts_like_a_device_of_it(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fold_still_images(graph_of("kernels"))
    counted = [count_launches(graph, still(patches), device=architecture).nodes for patches in (64, 256, 1024, 4096)]
    monkeypatch.setattr("tritontower.kernels.runtime.config.architecture", lambda _: architecture)
    gpu = torch.device("cuda", 0)
    assert [count_launches(graph, still(patches), device=gpu).nodes for patches in (64, 256, 1024, 4096)] == counted


def test_a_pass_takes_its_blocks_and_little_else() -> None:
    counts = count_launches(fold_still_images(graph_of("kernels")), MANY)
    # Patch projection, rotary table; the projector's norm and two products.
    assert counts.total == Launches(32 * 7 + 2 + 3)
    assert set(counts.blocks) == set(range(32))
    assert sum(counts.blocks.values(), Launches()) == Launches(32 * 7)


def test_an_mlp_takes_its_products_once_a_run_of_rows() -> None:
    longer = replace(MANY, patches=16385, scores=16385**2)
    assert block_of(CONFIG, "kernels", longer) == Launches(9)
    assert block_of(CONFIG, "default", longer) == Launches(10)


def test_rows_that_torch_gathers_or_copies_are_library_calls() -> None:
    selecting = count_launches(graph_of("default", TOWERS["class token"]), MANY)
    assert selecting.nodes["projector"] == Launches(kernels=2, library=1)
    several = count_launches(graph_of("default", TOWERS["several layers"]), MANY)
    assert several.nodes["features"] == Launches(kernels=3)
    means = count_launches(graph_of("plain", replace(CONFIG, depth=1, features=(0, 1))), MANY)
    assert means.nodes["features"] == Launches(library=2)


@pytest.mark.parametrize(("inner", "block", "split", "parts"), [(1280, 64, 4, 4), (640, 64, 8, 5), (64, 64, 8, 1)])
def test_a_short_product_is_cut_into_fewer_parts(inner: int, block: int, split: int, parts: int) -> None:
    assert parts_of(inner, LinearConfig(64, 64, block, 8, 4, 3, split)) == parts


def chosen(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Makes every product's configuration a given one, for the counter."""
    config = LinearConfig(**({"block_rows": 64, "block_columns": 64, "block_inner": 64, "group_rows": 8} | changes), num_warps=4, num_stages=3)  # fmt: skip
    monkeypatch.setattr("tritontower.graph.launch_count.choose_linear", lambda *_, **__: config)


def test_products_cut_into_parts_take_a_second_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(monkeypatch, split=4)
    counts = count_launches(graph_of("plain"), MANY, device=torch.device("cpu"))
    assert counts.nodes["blocks.0.mlp_up"] == Launches(2)
    assert counts.nodes["projector"] == Launches(1 + 2 + 2)
    assert count_launches(graph_of("plain"), MANY).nodes["blocks.0.mlp_up"] == Launches(1)


def test_attention_that_repairs_takes_a_second_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FlashAttentionConfig(128, 128, 4, 2, "specialized")
    monkeypatch.setattr("tritontower.graph.launch_count.choose_attention", lambda *_, **__: config)
    chosen(monkeypatch)
    graph, cpu = graph_of("kernels"), torch.device("cpu")
    monkeypatch.setattr("tritontower.graph.launch_count.choose_qkv", lambda *_, **__: LinearConfig(64, 64, 64, 8, 4, 3))
    assert count_launches(graph, MANY, device=cpu).per_block == Launches(8)
    assert count_launches(graph, MANY, device=cpu, dtype=torch.float16).per_block == Launches(7)
    assert count_launches(graph, MANY).per_block == Launches(7)


def test_a_librarys_product_counts_as_one_and_its_missing_epilogues_as_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen(monkeypatch, vendor=True)

    def nodes(config: TowerConfig) -> dict[str, Launches]:
        graph: Graph = fuse(build(config))
        return dict(count_launches(graph, MANY, device=torch.device("cpu")).nodes)

    with_bias, without = nodes(CONFIG), nodes(replace(CONFIG, mlp_bias=False, attention_bias=False))
    assert with_bias["blocks.0.mlp_up"] == Launches(kernels=1, library=1)
    assert with_bias["blocks.0.mlp_down"] == Launches(kernels=1, library=1)
    assert without["blocks.0.mlp_down"] == without["blocks.0.attention_output"] == Launches(library=1)
    assert nodes(TOWERS["gated"])["blocks.0.mlp_gate_up"] == Launches(1)


def test_split_products_are_launched_as_counted(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LinearConfig(16, 16, 16, 8, 4, 3, split=3)
    monkeypatch.setattr(linears, "choose_config", lambda *_, **__: config)
    x, weight = (torch.randn(5, 48, device=kernel_device) for _ in range(2))
    with counted_launches() as names:
        linears.linear(x, weight)
    assert len(names) == (1 if parts_of(48, config) == 1 else 2) == 2
