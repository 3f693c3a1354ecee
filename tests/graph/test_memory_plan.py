"""The memory plan against what a pass really takes, on towers of published widths."""

from dataclasses import replace

import pytest
import torch
from support.configs import CLIP, CONFIG, DEEP, GEMMA, TOWERS

from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.benchmarks.memory import allocated_peak, forward_peak
from tritontower.config import Normalization, PatchEmbedding, PositionTable, Projector, TowerConfig, Windows
from tritontower.engine.executor import Executor
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.graph.ir import Graph
from tritontower.graph.memory_plan import SMALL_WORKSPACE_BYTES, plan_memory

CPU = torch.device("cpu")
RMS_NORM = Normalization("rms_norm", 1e-6, "before_weight")
FAMILIES: dict[str, tuple[TowerConfig, list[tuple[int, int]]]] = {
    "qwen2_vl": (replace(CONFIG, depth=1, features=(1,)), [(32, 40)]),
    "qwen2_5_vl": (
        replace(TOWERS["gated"], norm=RMS_NORM, depth=2, windows=Windows(4, (1,))),
        [(24, 24), (32, 16)],
    ),
    "qwen3_vl": (
        replace(DEEP, width=1024, mlp_hidden=4096, activation="gelu_tanh", depth=1, features=(1,), deepstack=(0,)),
        [(40, 32)],
    ),
    "pixtral": (
        replace(
            CONFIG,
            patch=PatchEmbedding(3, 16, 1, bias=False),
            norm=RMS_NORM,
            width=1024,
            depth=1,
            features=(1,),
            qkv_bias=False,
            attention_bias=False,
            mlp_hidden=4096,
            mlp_bias=False,
            activation="silu",
            gated=True,
            segments="image",
            projector=Projector(None, 1, 5120, 5120, "gelu", bias=True),
        ),
        [(48, 24)],
    ),
    "llava": (
        replace(
            CLIP,
            width=1024,
            depth=1,
            heads=16,
            mlp_hidden=4096,
            features=(1,),
            position_table=PositionTable(24, "exact"),
            projector=Projector(None, 1, 4096, 4096, "gelu", bias=True),
        ),
        [(24, 24), (24, 24)],
    ),
    "gemma3": (
        replace(
            GEMMA,
            width=1152,
            depth=1,
            heads=16,
            mlp_hidden=4304,
            activation="gelu_tanh",
            features=(1,),
            position_table=PositionTable(32, "exact"),
            projector=replace(GEMMA.projector, merge=4, output=2560),
        ),
        [(32, 32)],
    ),
}


def executor_of(graph: Graph, dtype: torch.dtype) -> Executor:
    """``graph`` with small random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in graph.held_shapes.items()
    }
    return Executor(graph, weights)


def batch_of(config: TowerConfig, grids: list[tuple[int, int]]) -> PackedBatch:
    side = config.patch.size
    layouts = [ImageLayout.of_one_tile((1, height, width), side) for height, width in grids]
    pixels = torch.randn(sum(layout.patches for layout in layouts), config.patch.still_inner)
    facts = {"original_sizes": [(1, 1)] * len(grids), "content_hashes": [""] * len(grids)}
    return PackedBatch.pack(config, pixels, layouts, **facts)


def cpu_graph(config: TowerConfig) -> Graph:
    return fold_still_images(fuse(build(config), select_passes(CPU)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("restore_threads")
def test_the_plan_is_hardly_more_than_what_a_pass_takes(family: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    config, grids = FAMILIES[family]
    batch, graph = batch_of(config, grids), cpu_graph(config)
    assert batch.workload.patches >= 1024
    plan = plan_memory(graph, batch.workload, dtype.itemsize, cpu_dtype=dtype)
    taken = forward_peak(executor_of(graph, dtype), batch)
    assert taken <= plan.peak_bytes <= 1.02 * taken + SMALL_WORKSPACE_BYTES, (taken, plan)
    # What torch takes for itself is no small part of it: without it the plan would be wrong.
    assert plan.workspace_bytes > 0.1 * plan.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config", [*(config for config, _ in FAMILIES.values()), CONFIG, CLIP], ids=[*FAMILIES, "small", "clip"]
)
@pytest.mark.usefixtures("restore_threads")
def test_no_pass_however_small_takes_more_than_its_plan(config: TowerConfig, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    graph = cpu_graph(config)
    executor = executor_of(graph, dtype)
    side = config.position_table.side if config.num_patches and config.position_table else None
    for grid in [(4, 4), (8, 8), (16, 16)] if side is None else [(side, side)]:
        batch = batch_of(config, [grid])
        plan = plan_memory(graph, batch.workload, dtype.itemsize, cpu_dtype=dtype)
        assert forward_peak(executor, batch) <= plan.peak_bytes, (grid, plan)


@pytest.mark.usefixtures("restore_threads")
def test_many_tiles_take_no_more_than_their_plan() -> None:
    torch.set_num_threads(1)
    config, _ = FAMILIES["llava"]
    batch, graph = batch_of(config, [(24, 24)] * 7), cpu_graph(config)
    plan = plan_memory(graph, batch.workload, 2, cpu_dtype=torch.bfloat16)
    assert forward_peak(executor_of(graph, torch.bfloat16), batch) <= plan.peak_bytes


def test_temporaries_count_on_a_cpu_only_and_move_nothing() -> None:
    config, grids = FAMILIES["qwen2_vl"]
    graph, workload = cpu_graph(config), batch_of(config, grids).workload
    plan, with_temporaries = (plan_memory(graph, workload, 4, cpu_dtype=dtype) for dtype in (None, torch.float32))
    assert plan.workspace_bytes == 0
    assert replace(with_temporaries, workspace_bytes=0) == plan
    assert with_temporaries.peak_bytes == plan.peak_bytes + with_temporaries.workspace_bytes


def test_the_peak_of_a_call_is_what_lives_at_one_time() -> None:
    def call() -> None:
        first = torch.zeros(2**20)
        second = torch.zeros(2**20)
        del first
        third = torch.zeros(2**19)
        del second, third

    call()
    assert 8 * 2**20 <= allocated_peak(call, CPU) <= 8 * 2**20 + 4096
