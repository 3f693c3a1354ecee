"""The layer graph as data: structure, validation, costs, memory, description."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.configs import (
    CLIP,
    CONFIG,
    DEEP,
    IMAGE,
    PASSES,
    SIGLIP,
    TOWERS,
    WINDOWED,
    each_tower,
    graph_of,
)

from tritontower.config import (
    Pooling,
    TowerConfig,
)
from tritontower.graph.builder import build
from tritontower.graph.cost import estimate_cost, estimate_total_cost
from tritontower.graph.fusion import (
    CHUNK_ROWS,
    CPU_CHUNK_ROWS,
    KERNEL_PASSES,
    chunk_mlp,
    fold_still_images,
    fuse,
    fuse_activations,
    fuse_positions,
    fuse_residual_into_linear,
    fuse_selection,
    select_passes,
)
from tritontower.graph.ir import Graph, Node, Value, Workload
from tritontower.graph.layout_passes import interleave_gated, pad_heads
from tritontower.graph.memory_plan import find_memory_owners, plan_memory
from tritontower.graph.summary import Description
from tritontower.graph.weight_layout import HeadOrder, InterleavedGates
from tritontower.kernels.runtime import dispatch


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


def outside_the_blocks(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes if node.block is None]


def node_of(graph: Graph, name: str) -> Node:
    (node,) = [node for node in graph.nodes if node.name == name]
    return node


SIGLIP_HEAD = ["linear", "attention_pooling", "linear", "norm", "linear", "activation", "linear", "add"]


@pytest.mark.parametrize(
    ("tower", "kinds"),
    {
        "windows": ["patch_projection", "rotary_table", "select", "projector"],
        "deepstack": ["patch_projection", "add_positions", "rotary_table", "projector", "projector", "projector"],
        "class token": ["patch_projection", "add_positions", "norm", "select", "projector"],
        "pooled class token": ["patch_projection", "add_positions", "norm", "select", "select", "norm"],
        "attention pooling": ["patch_projection", "add_positions", "norm", "select", *SIGLIP_HEAD],
        "means": ["patch_projection", "add_positions", "norm", "pool", "norm", "linear"],
        "tiles": ["patch_projection", "add_positions", "norm", "select", "projector", "assemble"],
        "merging linear": ["patch_projection", "rotary_table", "norm", "linear", "projector"],
    }.items(),
)
def test_every_part_of_a_tower_is_a_node_outside_the_blocks(tower: str, kinds: list[str]) -> None:
    assert outside_the_blocks(build(TOWERS[tower])) == kinds


def test_deepstack_rows_leave_right_behind_their_block() -> None:
    graph = build(DEEP)
    assert graph.outputs == ("embeddings", "deepstack.0", "deepstack.1")
    names = [node.name for node in graph.nodes]
    for level, block in enumerate(DEEP.deepstack):
        node = node_of(graph, f"deepstack.{level}")
        assert names[names.index(node.name) - 1] == f"blocks.{block}.mlp_residual"
        assert node.inputs == (f"blocks.{block}.block_rows",)
        assert graph.weights[node.weights["norm_weight"]].shape == (4 * 1280,)
        assert graph.values[f"deepstack.{level}.normed"].rows == "merged"
    assert graph.weights[node_of(graph, "projector").weights["norm_weight"]].shape == (1280,)


def test_blocks_behind_the_last_feature_are_not_built() -> None:
    assert {node.block for node in build(CLIP).nodes} == {None, 0, 1, 2}
    assert {node.block for node in build(replace(CLIP, features=(0,))).nodes} == {None}
    assert {node.block for node in build(replace(DEEP, features=(1,))).nodes} == {None, 0, 1, 2}
    assert {node.block for node in build(replace(CLIP, pooling=Pooling("class_token"))).nodes} == {None, 0, 1, 2, 3}


def test_several_features_stand_side_by_side() -> None:
    graph = build(TOWERS["several layers"])
    node = node_of(graph, "features")
    assert node.inputs == ("input_norm_rows", "blocks.1.block_rows", "blocks.2.block_rows", "selection")
    assert node.attributes["features"] == 3
    assert graph.values["features"].width == 3 * 64
    assert graph.sources["projector.linear_1.weight"] == (96, 3 * 64)


def test_a_gated_mlp_is_held_wider_than_it_is_stored() -> None:
    graph = build(TOWERS["gated"])
    name = "blocks.0.mlp_gate_up.weight"
    assert (graph.sources[name], graph.held_shapes[name]) == ((2 * 3420, 1280), (2 * 3456, 1280))
    name = "blocks.0.mlp_down.weight"
    assert (graph.sources[name], graph.held_shapes[name]) == ((1280, 3420), (1280, 3456))
    wide = build(replace(TOWERS["gated"], mlp_hidden=3456))
    # Weights of 36 columns more in two blocks of three matrices, and the biases of gate and up.
    assert wide.parameters - graph.parameters == 2 * 36 * (3 * 1280 + 2)


def test_flops_are_those_of_the_published_tower() -> None:
    # Twice the multiply-adds of 1024 patches through the 7B tower: 1.49 TFLOP.
    assert estimate_total_cost(build(CONFIG), IMAGE, 2).flops / 1e12 == pytest.approx(1.49, abs=0.005)
    large = Workload(21316, 5329, 21316**2)
    assert estimate_total_cost(build(CONFIG), large, 2).flops / 1e12 == pytest.approx(101.8, abs=0.1)


def test_cost_of_a_linear_counts_its_product_and_its_bytes() -> None:
    graph = build(CONFIG)
    node = next(node for node in graph.nodes if node.name == "blocks.0.mlp_up")
    cost = estimate_cost(graph, node, IMAGE, 2)
    assert cost.flops == 2 * 1024 * 1280 * 5120
    assert cost.bytes == 2 * (1024 * 1280 + 1024 * 5120 + 5120 * 1280 + 5120)


def test_attention_costs_what_its_windows_hold() -> None:
    graph, workload = build(WINDOWED), Workload(1024, 256, scores=1024**2, window_scores=16 * 64**2)
    costs = [estimate_cost(graph, node_of(graph, f"blocks.{block}.attention"), workload, 2) for block in range(3)]
    assert [cost.flops for cost in costs] == [4 * scores * 1280 for scores in (16 * 64**2, 1024**2, 16 * 64**2)]
    assert len({cost.bytes for cost in costs}) == 1


def test_pooling_by_attention_costs_one_query_a_view() -> None:
    graph, workload = build(SIGLIP), Workload(32, 32, 2 * 16**2, tiles=2)
    assert estimate_cost(graph, node_of(graph, "pooling.attention"), workload, 2).flops == 4 * 32 * 64
    assert estimate_cost(graph, node_of(graph, "pooling.mlp_up"), workload, 2).flops == 2 * 2 * 64 * 96
    assert estimate_cost(graph, node_of(graph, "pooling.keys_values"), workload, 2).flops == 2 * 32 * 64 * 128


def test_only_selected_rows_are_projected_and_only_tokens_leave() -> None:
    graph = build(TOWERS["tiles"])
    workload = Workload(85, 40, 5 * 17**2, selected=30, merged=30, tiles=5)
    assert estimate_cost(graph, node_of(graph, "projector"), workload, 2).flops == 2 * 30 * (64 * 96 + 96 * 48)
    # Four rows and their shares in, one row out, for each of 40 tokens; the 30 rows and the newline count once.
    assert estimate_cost(graph, node_of(graph, "assemble"), workload, 2).bytes == 2 * 48 * (30 + 40 + 1) + 40 * 4 * (
        4 + 4
    )


@each_tower
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("patches", [4, 1000])
def test_values_that_live_at_the_same_time_never_share_memory(passes: str, patches: int, tower: str) -> None:
    graph = graph_of(passes, TOWERS[tower])
    workload = Workload(patches, patches // 4, patches**2, selected=patches, merged=patches // 4, tiles=2)
    plan = plan_memory(graph, workload, 2)
    live: dict[str, list[int]] = {}
    for step, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs, *node.scratch):
            live.setdefault(name, []).append(step)
    owners = find_memory_owners(graph)
    assert set(plan.offsets) == set(graph.values) - {*graph.inputs, *graph.outputs}
    for (first, a), (second, b) in itertools.combinations(plan.offsets.items(), 2):
        begin, end = max(min(live[first]), min(live[second])), min(max(live[first]), max(live[second]))
        if begin > end:
            continue
        if owners[first] == owners[second]:
            # One is written where the other is read for the last time, by the same node.
            assert a == b
            assert begin == end
            node = graph.nodes[begin]
            assert {first, second} in ({node.inputs[0], *node.outputs}, {node.residual, *node.outputs})
            continue
        size = {name: graph.values[name].size(workload, 2) for name in (first, second)}
        assert a + size[first] <= b or b + size[second] <= a, (first, second)
    ends = [offset + graph.values[name].size(workload, 2) for name, offset in plan.offsets.items()]
    assert max(ends) <= plan.arena_bytes
    assert all(offset % 256 == 0 for offset in plan.offsets.values())


def test_arena_is_near_the_least_possible() -> None:
    # While an MLP runs, what it reads and what it adds to (1 width each) and what is between its products (4) are alive, and
    # the rotary table; its result takes the place of what it adds to.
    width, table = 2 * 1280, 2 * 40 * 4
    plan = plan_memory(graph_of("default"), Workload(4096, 1024, 4096**2), 2)
    assert plan.arena_bytes == 4096 * (6 * width + table)
    # Beyond CHUNK_ROWS the MLP asks for no more, and attention decides: q, k, v, what it writes, and the residual.
    rows = 8 * CHUNK_ROWS
    plan = plan_memory(graph_of("default"), Workload(rows, rows // 4, rows**2), 2)
    assert plan.arena_bytes == rows * (5 * width + table)
    assert plan.arena_bytes <= 16_000 * rows


def test_a_sum_takes_the_place_of_a_residual_that_nothing_reads_later() -> None:
    graph = fuse(build(DEEP))
    owners = find_memory_owners(graph)
    shared = {name for name in owners if owners[name] == owners["placed_rows"]}
    assert {"blocks.0.attended", "blocks.2.block_rows"} < shared
    several = fuse(build(replace(CLIP, features=(0, 2, 3))))
    owners = find_memory_owners(several)
    # What becomes a feature is read once more, far behind.
    assert owners["blocks.0.attended"] != owners["input_norm_rows"]
    assert owners["blocks.1.attended"] == owners["blocks.1.block_rows"] == owners["blocks.0.attended"]
    assert owners["blocks.2.attended"] != owners["blocks.1.block_rows"]


def test_folding_still_images_halves_the_inner_dimension_and_keeps_the_tensors() -> None:
    graph = graph_of("default")
    folded = fold_still_images(graph)
    assert folded.values["pixels"].width == 588
    assert folded.sources == graph.sources
    assert folded.parameters == graph.parameters
    assert fold_still_images(folded) == folded
    single = replace(CONFIG, patch=replace(CONFIG.patch, temporal=1))
    assert fold_still_images(build(single)) == build(single)


def test_default_passes_leave_seven_nodes_in_a_block() -> None:
    graph = graph_of("default")
    block = [node.kind for node in graph.nodes if node.block == 7]
    assert block == ["norm", "linear", "rope", "attention", "linear", "norm", "mlp"]
    mlp = node_of(graph, "blocks.7.mlp")
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


def test_an_mlp_costs_what_its_two_products_do() -> None:
    plain, workload = build(CONFIG), Workload(20000, 5000, 20000**2)
    fused = fuse(plain, (fuse_activations, fuse_residual_into_linear))
    chunked = fuse(fused, (chunk_mlp,))
    parts = [estimate_cost(fused, node_of(fused, f"blocks.0.{name}"), workload, 2) for name in ("mlp_up", "mlp_down")]
    whole = estimate_cost(chunked, node_of(chunked, "blocks.0.mlp"), workload, 2)
    assert whole.flops == sum(part.flops for part in parts)
    # The rows between the two products are written by one and read by the other, however few are held at once.
    assert whole.bytes == sum(part.bytes for part in parts) - 20000 * 5120 * 2


def test_kernels_rotate_in_the_projection_and_leave_six_nodes() -> None:
    graph = graph_of("kernels")
    block = [node.kind for node in graph.nodes if node.block == 7]
    assert block == ["norm", "qkv_projection", "attention", "linear", "norm", "mlp"]
    projection = node_of(graph, "blocks.7.qkv")
    assert projection.inputs == ("blocks.7.norm1_rows", "cosines", "sines")
    assert projection.outputs == ("blocks.7.rotated",)
    weight = graph.weights[projection.weights["weight"]]
    assert weight.weight_layout == HeadOrder(16, 80, pairs=True)
    assert weight.held_name not in graph.sources
    assert weight.held_shape == weight.source_shape == (3840, 1280)
    assert graph.sources == graph_of("default").sources
    assert estimate_total_cost(graph, IMAGE, 2).flops == estimate_total_cost(build(CONFIG), IMAGE, 2).flops


@pytest.mark.parametrize("rotated", [True, False], ids=["rotary", "no rotary"])
def test_heads_of_72_get_eight_columns_of_padding(rotated: bool) -> None:
    config = replace(CONFIG if rotated else replace(SIGLIP, pooling=None), width=1152, heads=16, depth=1, features=(1,))
    graph = fuse(fuse(build(config)), KERNEL_PASSES)
    projection, attention = node_of(graph, "blocks.0.qkv"), node_of(graph, "blocks.0.attention")
    assert projection.kind == "qkv_projection"
    assert len(projection.inputs) == (3 if rotated else 1)
    assert graph.values[attention.inputs[0]].width == 3 * 16 * 80
    assert graph.values[attention.outputs[0]].width == 1152
    assert attention.attributes["padded_head_dim"] == 80
    assert attention.attributes["head_dim"] == 72
    assert attention.attributes["queries_scaled"]
    assert projection.attributes["query_scale"] * math.log(2) == pytest.approx(72**-0.5)
    weight_layout = {role: graph.weights[name].weight_layout for role, name in projection.weights.items()}
    assert weight_layout == {
        "weight": HeadOrder(16, 72, 80, pairs=rotated),
        "bias": HeadOrder(16, 72, 80, pairs=rotated, ones=True),
    }
    assert estimate_total_cost(graph, IMAGE, 2).flops == estimate_total_cost(build(config), IMAGE, 2).flops
    assert graph.parameters == build(config).parameters
    assert "heads of 72 in 80 columns" in Description(graph, IMAGE, 2).text()


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"heads": 18}], ids=["no bias", "heads of 64"])
def test_other_heads_are_left_as_they_are(change: dict[str, Any]) -> None:
    graph = fuse(build(replace(SIGLIP, width=1152, pooling=None, **{"heads": 16, **change})))
    assert pad_heads(graph) == graph


def test_gates_and_ups_take_turns_in_a_gated_mlp() -> None:
    graph = graph_of("default", TOWERS["gated"])
    interleaved = interleave_gated(graph)
    mlp = node_of(interleaved, "blocks.1.mlp")
    assert mlp.attributes["activation"] == "silu_gated_interleaved"
    weight = interleaved.weights[mlp.weights["weight_1"]]
    assert isinstance(weight.weight_layout, InterleavedGates)
    assert weight.held_shape == (2 * 3456, 1280)
    assert interleaved.weights[mlp.weights["weight_2"]].weight_layout is None
    assert interleave_gated(graph_of("default")) == graph_of("default")


def test_kernels_have_passes_of_their_own() -> None:
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


def test_attention_knows_how_long_a_segment_can_be() -> None:
    def bounds(config: TowerConfig) -> list[int | None]:
        return [node.attributes["length_bound"] for node in build(config).nodes if node.kind == "attention"]

    assert bounds(replace(CONFIG, depth=1, features=(1,))) == [None]
    assert bounds(WINDOWED) == [64, None, 64]
    assert bounds(replace(CLIP, depth=1, features=(1,))) == [17]
    assert bounds(replace(SIGLIP, depth=1, features=(1,))) == [16]


def test_residual_into_norm_leaves_only_the_last_addition() -> None:
    graph = graph_of("norms")
    # Every addition is followed by a norm but the last, which the projector's own norm follows.
    assert [node.name for node in graph.nodes if node.kind == "add"] == ["blocks.31.mlp_residual"]
    norms = [node for node in graph.nodes if node.kind == "norm" and len(node.inputs) == 2]
    assert len(norms) == 63


def test_a_position_of_one_row_is_added_by_the_projection() -> None:
    plain, graph = build(CLIP), fuse(build(CLIP), (fuse_positions,))
    first = graph.nodes[0]
    assert (first.kind, first.inputs, first.outputs) == (
        "patch_projection",
        ("pixels", "position_index"),
        ("placed_rows",),
    )
    assert set(first.weights) == {"weight", "position_table"}
    assert len(graph.nodes) == len(plain.nodes) - 1
    assert "patch_rows" not in graph.values
    assert graph.sources == plain.sources


def test_a_position_of_four_weighted_rows_stays_a_node() -> None:
    assert fuse(build(DEEP), (fuse_positions,)) == build(DEEP)


@pytest.mark.parametrize("tower", ["windows", "class token"])
def test_a_projector_reads_the_selected_rows_where_they_are(tower: str) -> None:
    plain, graph = build(TOWERS[tower]), fuse(build(TOWERS[tower]), (fuse_selection,))
    rows, index = node_of(plain, "features").inputs
    projector = node_of(graph, "projector")
    assert projector.inputs == (rows, index)
    assert "select" not in outside_the_blocks(graph)
    # Without a norm that gathers as it reads, the selected rows need a place.
    place = "features" if tower == "class token" else "projector.normed"
    assert projector.scratch == ("projector.hidden", place)
    assert graph.values[place].rows == "selected"
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
def test_a_projector_that_cannot_gather_is_left_as_it_is(config: TowerConfig) -> None:
    assert fuse(build(config), (fuse_selection,)) == build(config)


MEAN, TOKEN = {"join": "mean"}, {"norm_over": "token"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(CLIP, windows=WINDOWED.windows, rotary=CONFIG.rotary), "no place in windows"),
        (lambda: replace(CLIP, patch=replace(CLIP.patch, bias=True)), "without bias"),
        (lambda: replace(CLIP, projector=CONFIG.projector), "joins no patches"),
        (lambda: replace(CLIP, newline=True, keep_class_token=True), "among the tokens of tiles"),
        (lambda: replace(CLIP, features=(5,)), "some of 0 … 4"),
        (lambda: replace(CLIP, features=()), "some of 0 … 4"),
        (lambda: replace(CLIP, gated=True), "not quick_gelu"),
        (lambda: replace(SIGLIP, output_norm=None), "need an output norm"),
        (lambda: replace(SIGLIP, pooling=Pooling("attention")), "norm of its own"),
        (lambda: replace(SIGLIP, windows=WINDOWED.windows), "rotary embedding"),
        (lambda: replace(DEEP, deepstack_projector=None), "come together"),
        (lambda: replace(CONFIG.projector, **MEAN), "must be 'token'"),
        (lambda: replace(CONFIG.projector, **TOKEN, hidden=None), "must be 'patch'"),
        (lambda: replace(CONFIG.projector, **TOKEN, merging_linear=True), "must be 'patch'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


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
    graph = fold_still_images(graph_of("default"))
    description = Description(graph, IMAGE, 2)
    document = description.to_json()
    assert sum(node["flops"] for node in document["nodes"]) == document["flops"] == description.total.flops
    assert sum(node["bytes"] for node in document["nodes"]) == document["bytes"]
    text = description.text()
    assert "675.8 M parameters" in text
    assert "blocks.*.mlp ×32" in text
    assert "mlp + quick_gelu + residual" in text
    assert text.count("blocks.*") == 7
    assert sum(node["launches"] for node in document["nodes"]) == 32 * 8 + 5
    assert document["launches"] == {"kernels": 32 * 8 + 5, "library": 0, "per_block": 8}
    assert "261 launches, 8 a block" in text


def test_features_in_front_of_the_first_block_need_no_angles() -> None:
    graph = build(replace(CONFIG, features=(0,)))
    assert "positions" not in graph.inputs
    assert [node.kind for node in graph.nodes] == ["patch_projection", "projector"]
