"""Small tower configurations that the tests of graph, batch and engine share, and reading of configuration files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import (
    Normalization,
    PatchEmbedding,
    Pooling,
    PositionTable,
    Projector,
    RotaryEmbedding,
    TowerConfig,
    Windows,
)
from tritontower.graph.builder import build
from tritontower.graph.fusion import (
    DEFAULT_PASSES,
    KERNEL_PASSES,
    chunk_mlp,
    fuse,
    fuse_activations,
    fuse_residual_into_norm,
)
from tritontower.graph.ir import Graph, Node, Workload
from tritontower.models.common.registry import read_family

LAYER_NORM = Normalization("layer_norm", 1e-6)
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
IMAGE = Workload(1024, 256, 1024 * 1024)

TWO_LINEARS = Projector(None, merge=1, hidden=96, output=48, activation="gelu", bias=True)
WINDOWED = replace(CONFIG, depth=3, features=(3,), windows=Windows(side=4, full_blocks=(1,)))
DEEP = replace(
    CONFIG,
    depth=3,
    features=(3,),
    position_table=PositionTable(side=48, sampling="bilinear"),
    deepstack=(0, 2),
    deepstack_projector=Projector(LAYER_NORM, 2, 5120, 3584, "gelu", bias=True, norm_over="token"),
)
CLIP = replace(
    CONFIG,
    patch=PatchEmbedding(channels=3, size=14, temporal=1, bias=False),
    rotary=None,
    width=64,
    depth=4,
    heads=4,
    mlp_hidden=96,
    position_table=PositionTable(side=4, sampling="exact"),
    class_token=True,
    input_norm=LAYER_NORM,
    output_norm=LAYER_NORM,
    features=(3,),
    projector=TWO_LINEARS,
)
SIGLIP = replace(
    CLIP,
    class_token=False,
    input_norm=None,
    features=(4,),
    features_normed=True,
    projector=None,
    pooling=Pooling("attention", LAYER_NORM),
)
GEMMA_NORM = Normalization("gemma_rms_norm", 1e-6)
GEMMA = replace(
    SIGLIP,
    pooling=None,
    projector=Projector(GEMMA_NORM, 2, None, 48, "gelu", bias=False, join="mean", norm_over="token"),
)
TOWERS = {
    "plain": replace(CONFIG, depth=3, features=(3,)),
    "windows": WINDOWED,
    "deepstack": DEEP,
    "class token": CLIP,
    "pooled class token": replace(CLIP, keep_class_token=True, pooling=Pooling("class_token"), projector=None),
    "attention pooling": SIGLIP,
    "means": GEMMA,
    "tiles": replace(CLIP, newline=True, assembly_taps=4),
    "several layers": replace(CLIP, features=(0, 2, 3)),
    "merging linear": replace(CONFIG, depth=2, features=(2,), projector=replace(CONFIG.projector, merging_linear=True)),
    "gated": replace(CONFIG, depth=2, features=(2,), mlp_hidden=3420, activation="silu", gated=True),
}
PASSES = {
    "plain": (),
    "default": (*DEFAULT_PASSES, chunk_mlp),
    "kernels": (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES),
    "norms": (fuse_activations, fuse_residual_into_norm),
}


def read_config(values: Mapping[str, Any]) -> TowerConfig:
    return read_family(ConfigReader(values)).config


def graph_of(passes: str, config: TowerConfig = CONFIG) -> Graph:
    return fuse(build(config), PASSES[passes])


def find_node(graph: Graph, name: str) -> Node:
    (node,) = (node for node in graph.nodes if node.name == name)
    return node


FIXED = replace(
    CLIP,
    patch=PatchEmbedding(channels=3, size=2, temporal=1, bias=False),
    depth=2,
    mlp_hidden=64,
    activation="gelu",
    position_table=PositionTable(side=3, sampling="exact"),
    input_norm=None,
    output_norm=None,
    segments="image",
    features=(2,),
    projector=None,
)
TILED = replace(FIXED, newline=True, projector=Projector(None, 1, 8, 8, "gelu", bias=True))
