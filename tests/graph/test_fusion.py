"""Graph passes leave fewer nodes over the same tensors."""

import math
from dataclasses import replace

import pytest
import torch
from support.configs import CONFIG, IMAGE, PASSES, SIGLIP, TOWERS, find_node, graph_of

from tritontower.graph.builder import build
from tritontower.graph.cost import estimate_total_cost
from tritontower.graph.fusion import (
    CHUNK_ROWS,
    CPU_CHUNK_ROWS,
    KERNEL_PASSES,
    fold_still_images,
    fuse,
    select_passes,
)
from tritontower.graph.ir import Graph, Node, Value, Workload
from tritontower.graph.summary import Description
from tritontower.graph.weight_layout import HeadOrder
from tritontower.kernels.runtime import dispatch

PROJECT, ROTARY = "patch_projection", "rotary_table"
DEFAULT_TAIL = ["attention", "linear", "norm", "mlp"]


def kinds_of(graph: Graph, block: int | None) -> list[str]:
    return [node.kind for node in graph.nodes if node.block == block]


@pytest.mark.parametrize(
    ("tower", "passes", "outside", "block"),
    [
        ("plain", "default", [PROJECT, ROTARY, "projector"], ["norm", "linear", "rope", *DEFAULT_TAIL]),
        ("plain", "kernels", [PROJECT, ROTARY, "projector"], ["norm", "qkv_projection", *DEFAULT_TAIL]),
        ("gated", "kernels", [PROJECT, ROTARY, "projector"], ["norm", "qkv_projection", *DEFAULT_TAIL]),
        # A sum of four weighted rows of positions stays a node.
        ("deepstack", "default", [PROJECT, "add_positions", ROTARY, *3 * ["projector"]], None),
        ("windows", "default", [PROJECT, ROTARY, "projector"], None),
        ("class token", "default", [PROJECT, "norm", "projector"], ["norm", "linear", *DEFAULT_TAIL]),
        # A projector gathers one feature.
        ("several layers", "default", [PROJECT, "norm", "select", "projector"], None),
    ],
)
def test_passes_leave_few_nodes(tower: str, passes: str, outside: list[str], block: list[str] | None) -> None:
    graph, plain = graph_of(passes, TOWERS[tower]), build(TOWERS[tower])
    assert kinds_of(graph, None) == outside
    assert block is None or kinds_of(graph, 0) == block
    assert (graph.sources, graph.parameters) == (plain.sources, plain.parameters)
    workload = Workload(1024, 256, 1024**2, window_scores=1024, selected=1024, merged=256, tiles=1)
    assert estimate_total_cost(graph, workload, 2).flops == estimate_total_cost(plain, workload, 2).flops
    mlp = find_node(graph, "blocks.0.mlp")
    assert mlp.inputs[1] == find_node(plain, "blocks.0.mlp_residual").inputs[1]
    assert graph.values[mlp.scratch[0]].most_rows == CHUNK_ROWS


def test_norms_absorb_every_addition_except_the_last() -> None:
    graph = graph_of("norms")
    assert [node.name for node in graph.nodes if node.kind == "add"] == ["blocks.31.mlp_residual"]


def test_folding_still_images_halves_the_inner_dimension() -> None:
    graph = graph_of("default")
    folded = fold_still_images(graph)
    assert folded.values["pixels"].width == 588
    assert (folded.sources, folded.parameters) == (graph.sources, graph.parameters)
    assert fold_still_images(folded) == folded


@pytest.mark.parametrize("rotated", [True, False], ids=["rotary", "no rotary"])
def test_heads_of_72_are_padded_to_80(rotated: bool) -> None:
    config = replace(CONFIG if rotated else replace(SIGLIP, pooling=None), width=1152, heads=16, depth=1, features=(1,))
    graph = fuse(fuse(build(config)), KERNEL_PASSES)
    projection, attention = find_node(graph, "blocks.0.qkv"), find_node(graph, "blocks.0.attention")
    assert projection.kind == "qkv_projection"
    assert len(projection.inputs) == (3 if rotated else 1)
    assert graph.values[attention.inputs[0]].width == 3 * 16 * 80
    assert graph.values[attention.outputs[0]].width == 1152
    assert (attention.attributes["padded_head_dim"], attention.attributes["head_dim"]) == (80, 72)
    assert attention.attributes["queries_scaled"]
    assert projection.attributes["query_scale"] * math.log(2) == pytest.approx(72**-0.5)
    layouts = {role: graph.weights[name].weight_layout for role, name in projection.weights.items()}
    assert layouts == {
        "weight": HeadOrder(16, 72, 80, pairs=rotated),
        "bias": HeadOrder(16, 72, 80, pairs=rotated, ones=True),
    }
    assert estimate_total_cost(graph, IMAGE, 2).flops == estimate_total_cost(build(config), IMAGE, 2).flops
    assert graph.parameters == build(config).parameters
    assert "heads of 72 in 80 columns" in Description(graph, IMAGE, 2).text()


def test_only_kernels_get_reordered_weights() -> None:
    cpu = torch.device("cpu")
    with dispatch.use("reference"):
        assert not set(KERNEL_PASSES) & set(select_passes(cpu))
        graph = fuse(build(CONFIG), select_passes(cpu))
    assert graph.values["blocks.0.mlp_hidden"].most_rows == CPU_CHUNK_ROWS
    if torch.cuda.is_available():
        assert select_passes(torch.device("cuda")) == PASSES["kernels"]
    else:
        with dispatch.use("interpreter"):
            assert select_passes(cpu) == PASSES["kernels"]


def test_a_sum_of_two_matmuls_is_fused_once() -> None:
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
