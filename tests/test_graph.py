"""The layer graph as data: structure, validation, costs, memory, description."""

import itertools
from dataclasses import replace

import pytest

from tritontower.config import Normalisation, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.costs import cost_of, total_cost
from tritontower.description import Description
from tritontower.fusion import fold_still_pictures, fuse, fuse_activations, fuse_residual_into_norm
from tritontower.graph import Graph, Node, Value, Workload, build
from tritontower.memory import plan_memory

LAYER_NORM = Normalisation("layer_norm", 1e-6)
CONFIG = TowerConfig(
    family="test",
    patch=PatchEmbedding(channels=3, size=14, temporal=2, bias=False),
    width=1280,
    depth=32,
    heads=16,
    norm=LAYER_NORM,
    qkv_bias=True,
    attention_bias=True,
    mlp_hidden=5120,
    mlp_bias=True,
    activation="quick_gelu",
    rotary=RotaryEmbedding(10000.0, "halves"),
    segments="frame",
    features=(32,),
    projector=Projector(LAYER_NORM, merge=2, hidden=5120, output=3584, activation="gelu", bias=True),
)
PICTURE = Workload(1024, 256, 1024 * 1024)
PASSES = {"plain": (), "default": None, "norms": (fuse_activations, fuse_residual_into_norm)}


def graph_of(passes: str, config: TowerConfig = CONFIG) -> Graph:
    plain = build(config)
    return fuse(plain) if PASSES[passes] is None else fuse(plain, PASSES[passes])


def test_plain_graph_is_one_node_per_step() -> None:
    graph = build(CONFIG)
    block = [node.kind for node in graph.nodes if node.block == 5]
    attention = ["norm", "linear", "rope", "attention", "linear", "add"]
    assert block == [*attention, "norm", "linear", "activation", "linear", "add"]
    assert [node.kind for node in graph.nodes if node.block is None] == [
        "patch_projection",
        "rotary_table",
        "projector",
    ]


def test_flops_are_those_of_the_published_tower() -> None:
    # Twice the multiply-adds of 1024 patches through the 7B tower: 1.49 TFLOP.
    assert total_cost(build(CONFIG), PICTURE, 2).flops / 1e12 == pytest.approx(1.49, abs=0.005)
    large = Workload(21316, 5329, 21316**2)
    assert total_cost(build(CONFIG), large, 2).flops / 1e12 == pytest.approx(101.8, abs=0.1)


def test_cost_of_a_linear_counts_its_product_and_its_bytes() -> None:
    graph = build(CONFIG)
    node = next(node for node in graph.nodes if node.name == "blocks.0.mlp_up")
    cost = cost_of(graph, node, PICTURE, 2)
    assert cost.flops == 2 * 1024 * 1280 * 5120
    assert cost.bytes == 2 * (1024 * 1280 + 1024 * 5120 + 5120 * 1280 + 5120)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("patches", [4, 1000, 4096])
def test_values_that_live_at_the_same_time_never_share_memory(passes: str, patches: int) -> None:
    graph = graph_of(passes, replace(CONFIG, depth=3, features=(3,)))
    workload = Workload(patches, patches // 4, patches**2)
    plan = plan_memory(graph, workload, 2)
    live: dict[str, list[int]] = {}
    for step, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs, *node.scratch):
            live.setdefault(name, []).append(step)
    in_place = {(node.inputs[0], node.outputs[0]) for node in graph.nodes if node.in_place}
    assert set(plan.offsets) == set(graph.values) - {*graph.inputs, *graph.outputs}
    for (first, a), (second, b) in itertools.combinations(plan.offsets.items(), 2):
        if (first, second) in in_place or (second, first) in in_place:
            assert a == b
            continue
        if max(min(live[first]), min(live[second])) > min(max(live[first]), max(live[second])):
            continue
        size = {name: graph.values[name].size(workload, 2) for name in (first, second)}
        assert a + size[first] <= b or b + size[second] <= a, (first, second)
    ends = [offset + graph.values[name].size(workload, 2) for name, offset in plan.offsets.items()]
    assert max(ends) <= plan.arena_bytes
    assert all(offset % 256 == 0 for offset in plan.offsets.values())


def test_arena_is_near_the_least_possible() -> None:
    # While mlp_down runs, its input (4 widths), its output and its residual (1 each) and the rotary table are alive.
    plan = plan_memory(graph_of("default"), Workload(4096, 1024, 4096**2), 2)
    assert plan.arena_bytes <= 4096 * (6 * 1280 * 2 + 2 * 40 * 4)


def test_folding_still_pictures_halves_the_inner_dimension_and_keeps_the_tensors() -> None:
    graph = graph_of("default")
    folded = fold_still_pictures(graph)
    assert folded.values["pixels"].width == 588
    assert folded.sources == graph.sources
    assert folded.parameters == graph.parameters
    assert fold_still_pictures(folded) == folded
    single = replace(CONFIG, patch=replace(CONFIG.patch, temporal=1))
    assert fold_still_pictures(build(single)) == build(single)


def test_default_passes_leave_eight_nodes_in_a_block() -> None:
    graph = graph_of("default")
    block = [node.kind for node in graph.nodes if node.block == 7]
    assert block == ["norm", "linear", "rope", "attention", "linear", "norm", "linear", "linear"]
    assert [node.attributes["activation"] for node in graph.nodes if node.name == "blocks.7.mlp_up"] == ["quick_gelu"]


def test_residual_into_norm_leaves_only_the_last_addition() -> None:
    graph = graph_of("norms")
    # Every addition is followed by a norm but the last, which the projector's own norm follows.
    assert [node.name for node in graph.nodes if node.kind == "add"] == ["blocks.31.mlp_residual"]
    norms = [node for node in graph.nodes if node.kind == "norm" and len(node.inputs) == 2]
    assert len(norms) == 63


def test_a_sum_of_two_products_is_fused_once() -> None:
    values = {name: Value(name, "patches", 8) for name in ("x", "a", "b", "c")}
    weights = build(CONFIG).weights
    name = "blocks.0.attention_output.weight"
    linear = {"weights": {"weight": name}, "attributes": {"activation": None}}
    nodes = (
        Node("left", "linear", ("x",), ("a",), **linear),
        Node("right", "linear", ("x",), ("b",), **linear),
        Node("sum", "add", ("a", "b"), ("c",)),
    )
    fused = fuse(Graph(nodes, values, {name: weights[name]}, ("x",), ("c",)))
    assert [(node.name, node.inputs, node.outputs) for node in fused.nodes] == [
        ("right", ("x",), ("b",)),
        ("left", ("x", "b"), ("c",)),
    ]


@pytest.mark.parametrize("fault", ["unset", "twice", "lost", "idle", "absent"])
def test_a_broken_graph_is_refused(fault: str) -> None:
    graph = build(replace(CONFIG, depth=1, features=(1,)))
    nodes, values, weights = list(graph.nodes), dict(graph.values), dict(graph.weights)
    if fault == "unset":
        nodes.insert(0, nodes.pop(4))
    elif fault == "twice":
        nodes.append(nodes[-1])
    elif fault == "lost":
        values["nowhere"] = Value("nowhere", "patches", 1)
    elif fault == "idle":
        weights["spare"] = next(iter(weights.values()))
    else:
        del weights["blocks.0.qkv.weight"]
    with pytest.raises(ValueError, match=r"reads|second time|listed|does not list"):
        replace(graph, nodes=tuple(nodes), values=values, weights=weights)


def test_description_adds_up() -> None:
    graph = fold_still_pictures(graph_of("default"))
    description = Description(graph, PICTURE, 2)
    document = description.to_json()
    assert sum(node["flops"] for node in document["nodes"]) == document["flops"] == description.total.flops
    assert sum(node["bytes"] for node in document["nodes"]) == document["bytes"]
    text = description.text()
    assert "675.8 M parameters" in text
    assert "blocks.*.mlp_up ×32" in text
    assert "linear + quick_gelu" in text
    assert text.count("blocks.*") == 8
    svg = description.svg()
    assert svg.startswith("<svg")
    assert "32" in svg
