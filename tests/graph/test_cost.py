"""FLOPs and bytes of nodes, and the summary that adds them up."""

import json
from dataclasses import replace

import pytest
from support.configs import CONFIG, DEEP, IMAGE, SIGLIP, TOWERS, WINDOWED, find_node, graph_of

from tritontower.config import TowerConfig
from tritontower.graph.builder import build
from tritontower.graph.cost import GraphLaunches, Launches, estimate_cost, estimate_total_cost
from tritontower.graph.fusion import chunk_mlp, fold_still_images, fuse, fuse_activations, fuse_residual_into_linear
from tritontower.graph.ir import Workload
from tritontower.graph.summary import Description

WINDOWS, TILES = Workload(1024, 256, 1024**2, window_scores=16 * 64**2), Workload(32, 32, 2 * 16**2, tiles=2)


def test_flops_are_those_of_the_published_tower() -> None:
    # Twice the multiply-adds of 1024 patches through the 7B tower: 1.49 TFLOP.
    assert estimate_total_cost(build(CONFIG), IMAGE, 2).flops / 1e12 == pytest.approx(1.49, abs=0.005)
    large = Workload(21316, 5329, 21316**2)
    assert estimate_total_cost(build(CONFIG), large, 2).flops / 1e12 == pytest.approx(101.8, abs=0.1)


@pytest.mark.parametrize(
    ("config", "node", "workload", "flops"),
    [
        (CONFIG, "blocks.0.mlp_up", IMAGE, 2 * 1024 * 1280 * 5120),
        (WINDOWED, "blocks.0.attention", WINDOWS, 4 * 16 * 64**2 * 1280),
        (WINDOWED, "blocks.1.attention", WINDOWS, 4 * 1024**2 * 1280),
        # One query per tile.
        (SIGLIP, "pooling.attention", TILES, 4 * 32 * 64),
        (SIGLIP, "pooling.mlp_up", TILES, 2 * 2 * 64 * 96),
        (SIGLIP, "pooling.keys_values", TILES, 2 * 32 * 64 * 128),
    ],
)
def test_a_node_costs_its_matmuls(config: TowerConfig, node: str, workload: Workload, flops: int) -> None:
    graph = build(config)
    assert estimate_cost(graph, find_node(graph, node), workload, 2).flops == flops


def test_only_selected_rows_are_projected() -> None:
    graph = build(TOWERS["tiles"])
    workload = Workload(85, 40, 5 * 17**2, selected=30, merged=30, tiles=5)
    assert estimate_cost(graph, find_node(graph, "projector"), workload, 2).flops == 2 * 30 * (64 * 96 + 96 * 48)
    # Four rows and their weights in, one row out, for each of 40 tokens; the 30 rows and the newline count once.
    expected = 2 * 48 * (30 + 40 + 1) + 40 * 4 * (4 + 4)
    assert estimate_cost(graph, find_node(graph, "assemble"), workload, 2).bytes == expected


def test_an_mlp_costs_its_two_matmuls() -> None:
    plain, workload = build(CONFIG), Workload(20000, 5000, 20000**2)
    fused = fuse(plain, (fuse_activations, fuse_residual_into_linear))
    chunked = fuse(fused, (chunk_mlp,))
    parts = [estimate_cost(fused, find_node(fused, f"blocks.0.{name}"), workload, 2) for name in ("mlp_up", "mlp_down")]
    whole = estimate_cost(chunked, find_node(chunked, "blocks.0.mlp"), workload, 2)
    assert whole.flops == sum(part.flops for part in parts)
    # The rows between the two matmuls are written once and read once, however few are in memory at a time.
    assert whole.bytes == sum(part.bytes for part in parts) - 20000 * 5120 * 2


def test_the_summary_adds_up() -> None:
    graph = fold_still_images(graph_of("default"))
    launches = GraphLaunches(graph, {node.name: Launches(1, library=int(node.block is None)) for node in graph.nodes})
    description = Description(graph, IMAGE, 2, launches)
    document = description.to_json()
    assert sum(node["flops"] for node in document["nodes"]) == document["flops"] == description.total.flops
    assert sum(node["bytes"] for node in document["nodes"]) == document["bytes"]
    outside = sum(node.block is None for node in graph.nodes)
    assert document["launches"] == {"kernels": len(graph.nodes), "library": outside, "per_block": 7}
    assert Description(graph, IMAGE, 2).to_json()["launches"] is None
    memory = document["memory"]
    assert memory["peak_bytes"] == sum(size for name, size in memory.items() if name != "peak_bytes")
    text = description.text()
    for part in (
        "675.8 M parameters",
        "blocks.*.mlp ×32",
        "mlp + quick_gelu + residual",
        f"{len(graph.nodes) + outside} launches, 7 a block",
    ):
        assert part in text
    assert text.count("blocks.*") == 7


def edges_of(dot: str) -> set[tuple[str, str]]:
    lines = [line.split("[")[0].split(" -> ") for line in dot.splitlines() if " -> " in line]
    return {(json.loads(source), json.loads(target)) for source, target in lines}


def test_dot_collapses_identical_blocks() -> None:
    dot = Description(graph_of("default"), IMAGE, 2).to_dot('A "tower" & more')
    assert dot.startswith("digraph {")
    assert 'label="A \\"tower\\" & more\\n' in dot
    assert dot.count("subgraph") == 1
    assert 'label="blocks 0–31 × 32"' in dot
    edges = edges_of(dot)
    assert {("pixels", "patch_projection"), ("patch_projection", "blocks.0.norm1")} < edges
    assert {("blocks.0.mlp", "projector"), ("rotary_table", "blocks.0.rope")} < edges
    assert ("blocks.0.mlp", "blocks.0.norm1") not in edges


def test_dot_has_a_cluster_per_kind_of_block() -> None:
    config = replace(WINDOWED, depth=6, features=(6,), windows=replace(WINDOWED.windows, full_blocks=(2, 5)))  # type: ignore[type-var]
    dot = Description(graph_of("default", config), IMAGE, 2).to_dot()
    assert 'label="blocks 0–1, 3–4 × 4"' in dot
    assert 'label="blocks 2, 5 × 2"' in dot
    assert {("blocks.0.mlp", "blocks.2.norm1"), ("blocks.2.mlp", "blocks.0.norm1")} < edges_of(dot)
    assert '"blocks.2.mlp" -> "blocks.0.norm1" [constraint=false, style=dashed]' in dot
    deep = edges_of(Description(graph_of("default", DEEP), IMAGE, 2).to_dot())
    assert {("blocks.0.mlp", "deepstack.0"), ("blocks.0.mlp", "deepstack.1")} < deep
