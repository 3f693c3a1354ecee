"""The plain graph has one node per step of the reference implementation, and is validated."""

from dataclasses import replace

import pytest
from support.configs import CLIP, CONFIG, DEEP, SIGLIP, TOWERS, WINDOWED, find_node

from tritontower.config import Pooling, TowerConfig
from tritontower.graph.builder import build
from tritontower.graph.ir import Value

ATTENTION = ["norm", "linear", "rope", "attention", "linear", "add"]
SIGLIP_HEAD = ["linear", "attention_pooling", "linear", "norm", "linear", "activation", "linear", "add"]


@pytest.mark.parametrize(
    ("tower", "kinds"),
    {
        "plain": ["patch_projection", "rotary_table", "projector"],
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
def test_each_part_of_a_tower_is_a_node(tower: str, kinds: list[str]) -> None:
    graph = build(TOWERS[tower])
    assert [node.kind for node in graph.nodes if node.block is None] == kinds
    if tower == "plain":
        block = [node.kind for node in graph.nodes if node.block == 1]
        assert block == [*ATTENTION, "norm", "linear", "activation", "linear", "add"]


def test_deepstack_features_are_projected_after_their_block() -> None:
    graph = build(DEEP)
    assert graph.outputs == ("embeddings", "deepstack.0", "deepstack.1")
    names = [node.name for node in graph.nodes]
    for level, block in enumerate(DEEP.deepstack):
        node = find_node(graph, f"deepstack.{level}")
        assert names[names.index(node.name) - 1] == f"blocks.{block}.mlp_residual"
        assert node.inputs == (f"blocks.{block}.block_rows",)
        assert graph.weights[node.weights["norm_weight"]].shape == (4 * 1280,)
        assert graph.values[f"deepstack.{level}.normed"].rows == "merged"
    assert graph.weights[find_node(graph, "projector").weights["norm_weight"]].shape == (1280,)


def test_blocks_after_the_last_feature_are_not_built() -> None:
    assert {node.block for node in build(CLIP).nodes} == {None, 0, 1, 2}
    assert {node.block for node in build(replace(CLIP, features=(0,))).nodes} == {None}
    assert {node.block for node in build(replace(DEEP, features=(1,))).nodes} == {None, 0, 1, 2}
    assert {node.block for node in build(replace(CLIP, pooling=Pooling("class_token"))).nodes} == {None, 0, 1, 2, 3}
    without_blocks = build(replace(CONFIG, features=(0,)))
    assert "positions" not in without_blocks.inputs
    assert [node.kind for node in without_blocks.nodes] == ["patch_projection", "projector"]


def test_attention_has_the_length_bound_of_the_tower() -> None:
    def bounds(config: TowerConfig) -> list[int | None]:
        return [node.attributes["length_bound"] for node in build(config).nodes if node.kind == "attention"]

    assert bounds(replace(CONFIG, depth=1, features=(1,))) == [None]
    assert bounds(WINDOWED) == [64, None, 64]
    assert bounds(replace(CLIP, depth=1, features=(1,))) == [17]
    assert bounds(replace(SIGLIP, depth=1, features=(1,))) == [16]


@pytest.mark.parametrize("fault", ["unset", "twice", "lost", "idle", "absent"])
def test_an_inconsistent_graph_is_rejected(fault: str) -> None:
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
