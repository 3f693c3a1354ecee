"""Graph passes leave fewer nodes over the same tensors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.configs import CLIP, CONFIG, DEEP, IMAGE, PASSES, SIGLIP, TOWERS, WINDOWED, find_node, graph_of

from tritontower.config import TowerConfig
from tritontower.graph.builder import build
from tritontower.graph.cost import estimate_total_cost
from tritontower.graph.fusion import (
    CHUNK_ROWS,
    CPU_CHUNK_ROWS,
    KERNEL_PASSES,
    fold_still_images,
    fuse,
    fuse_positions,
    fuse_selection,
    select_passes,
)
from tritontower.graph.ir import Graph, Node, Value
from tritontower.graph.layout_passes import interleave_gated, pad_heads
from tritontower.graph.summary import Description
from tritontower.graph.weight_layout import HeadOrder, InterleavedGates
from tritontower.kernels.runtime import dispatch


def kinds_of(graph: Graph, block: int | None) -> list[str]:
    return [node.kind for node in graph.nodes if node.block == block]


def test_folding_still_images_halves_the_inner_dimension() -> None:
    graph = graph_of("default")
    folded = fold_still_images(graph)
    assert folded.values["pixels"].width == 588
    assert (folded.sources, folded.parameters) == (graph.sources, graph.parameters)
    assert fold_still_images(folded) == folded
    single = replace(CONFIG, patch=replace(CONFIG.patch, temporal=1))
    assert fold_still_images(build(single)) == build(single)


def test_default_passes_leave_seven_nodes_in_a_block() -> None:
    graph = graph_of("default")
    assert kinds_of(graph, 7) == ["norm", "linear", "rope", "attention", "linear", "norm", "mlp"]
    mlp = find_node(graph, "blocks.7.mlp")
    assert mlp.attributes["activation"] == "quick_gelu"
    assert mlp.inputs == ("blocks.7.norm2_rows", "blocks.7.attended")
    assert mlp.outputs == ("blocks.7.block_rows",)
    assert mlp.weights == {
        f"{role}_{number}": f"blocks.7.{name}.{role}"
        for number, name in enumerate(("mlp_up", "mlp_down"), 1)
        for role in ("weight", "bias")
    }
    (hidden,) = mlp.scratch
    assert graph.values[hidden].most_rows == CHUNK_ROWS


def test_kernel_passes_rotate_in_the_projection() -> None:
    graph = graph_of("kernels")
    assert kinds_of(graph, 7) == ["norm", "qkv_projection", "attention", "linear", "norm", "mlp"]
    projection = find_node(graph, "blocks.7.qkv")
    assert projection.inputs == ("blocks.7.norm1_rows", "cosines", "sines")
    assert projection.outputs == ("blocks.7.rotated",)
    weight = graph.weights[projection.weights["weight"]]
    assert weight.weight_layout == HeadOrder(16, 80, pairs=True)
    assert weight.held_name not in graph.sources
    assert weight.held_shape == weight.source_shape == (3840, 1280)
    assert graph.sources == graph_of("default").sources
    assert estimate_total_cost(graph, IMAGE, 2).flops == estimate_total_cost(build(CONFIG), IMAGE, 2).flops


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


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"heads": 18}], ids=["no bias", "heads of 64"])
def test_other_heads_are_not_padded(change: dict[str, Any]) -> None:
    graph = fuse(build(replace(SIGLIP, width=1152, pooling=None, **{"heads": 16, **change})))
    assert pad_heads(graph) == graph


def test_gated_mlps_are_interleaved() -> None:
    interleaved = interleave_gated(graph_of("default", TOWERS["gated"]))
    mlp = find_node(interleaved, "blocks.1.mlp")
    assert mlp.attributes["activation"] == "silu_gated_interleaved"
    weight = interleaved.weights[mlp.weights["weight_1"]]
    assert isinstance(weight.weight_layout, InterleavedGates)
    assert weight.held_shape == (2 * 3456, 1280)
    assert interleaved.weights[mlp.weights["weight_2"]].weight_layout is None
    assert interleave_gated(graph_of("default")) == graph_of("default")


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


def test_norms_absorb_every_addition_except_the_last() -> None:
    graph = graph_of("norms")
    assert [node.name for node in graph.nodes if node.kind == "add"] == ["blocks.31.mlp_residual"]
    assert len([node for node in graph.nodes if node.kind == "norm" and len(node.inputs) == 2]) == 63


def test_the_projection_adds_single_rows_of_positions() -> None:
    plain, graph = build(CLIP), fuse(build(CLIP), (fuse_positions,))
    first = graph.nodes[0]
    assert (first.kind, first.inputs) == ("patch_projection", ("pixels", "position_index"))
    assert first.outputs == ("placed_rows",)
    assert set(first.weights) == {"weight", "position_table"}
    assert len(graph.nodes) == len(plain.nodes) - 1
    assert "patch_rows" not in graph.values
    assert graph.sources == plain.sources
    assert fuse(build(DEEP), (fuse_positions,)) == build(DEEP), "a sum of four weighted rows stays a node"


@pytest.mark.parametrize("tower", ["windows", "class token"])
def test_the_projector_gathers_selected_rows(tower: str) -> None:
    plain, graph = build(TOWERS[tower]), fuse(build(TOWERS[tower]), (fuse_selection,))
    rows, index = find_node(plain, "features").inputs
    projector = find_node(graph, "projector")
    assert projector.inputs == (rows, index)
    assert "select" not in kinds_of(graph, None)
    # Without a norm that gathers as it reads, the selected rows need memory.
    scratch = "features" if tower == "class token" else "projector.normed"
    assert projector.scratch == ("projector.hidden", scratch)
    assert graph.values[scratch].rows == "selected"
    assert ("features" in graph.values) == (tower == "class token")


@pytest.mark.parametrize(
    "config",
    [
        TOWERS["several layers"],
        replace(WINDOWED, projector=DEEP.deepstack_projector),
        replace(CONFIG, depth=3, features=(1, 3)),
    ],
    ids=["several layers", "norm over tokens", "no selection"],
)
def test_a_projector_that_cannot_gather_is_unchanged(config: TowerConfig) -> None:
    assert fuse(build(config), (fuse_selection,)) == build(config)


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
