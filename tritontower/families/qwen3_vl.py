"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631) and Qwen3.5, dense and with experts: one kind of tower.

Patches of 16 × 16 pixels and two frames with a bias, a learned table of positions that is stretched over every picture,
rotary embedding, attention within one temporal patch, tanh-GELU, and Qwen2-VL's merger.  Qwen3-VL has mergers behind a
few earlier blocks as well (DeepStack, arXiv 2406.04334), whose rows the language model adds behind its first layers;
Qwen3.5 has none, even where its file still speaks of them.  The references are ``Qwen3VLVisionModel`` and
``Qwen3_5VisionModel`` of ``transformers.models``.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isqrt

from tritontower.config import Normalisation, PatchEmbedding, PositionTable, Projector, RotaryEmbedding, TowerConfig
from tritontower.preprocessing import SmartResize
from tritontower.reader import ConfigReader

from . import Family, FamilySummary
from ._qwen import ROOTS, QwenReference, stored_blocks
from ._reading import activation, positive, rotary_theta, whole_heads

WITH_DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
MODEL_TYPES = (*WITH_DEEPSTACK, "qwen3_5", "qwen3_5_moe")

BLOCK_TENSORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "qkv.weight": "attn.qkv.weight",
    "qkv.bias": "attn.qkv.bias",
    "attention_output.weight": "attn.proj.weight",
    "attention_output.bias": "attn.proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp_up.weight": "mlp.linear_fc1.weight",
    "mlp_up.bias": "mlp.linear_fc1.bias",
    "mlp_down.weight": "mlp.linear_fc2.weight",
    "mlp_down.bias": "mlp.linear_fc2.bias",
}
OTHER_TENSORS = {
    "patch_projection.weight": "patch_embed.proj.weight",
    "patch_projection.bias": "patch_embed.proj.bias",
    "position_table.weight": "pos_embed.weight",
}
MERGER_PARTS = {"norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = {
    "norm1_rows": ("norm1", "output"),
    "qkv_rows": ("attn.qkv", "output"),
    "mixed": ("attn.proj", "input"),
    "attention_output_rows": ("attn.proj", "output"),
    "attended": ("norm2", "input"),
    "norm2_rows": ("norm2", "output"),
    "mlp_up_rows": ("mlp.linear_fc1", "output"),
    "mlp_hidden": ("mlp.linear_fc2", "input"),
    "mlp_down_rows": ("mlp.linear_fc2", "output"),
    "block_rows": ("", "output"),
}
OTHER_VALUES = {
    "patch_rows": ("patch_embed", "output"),
    "placed_rows": ("blocks.0.norm1", "input"),
    "embeddings": ("merger", "output"),
}

PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "temporal_patch_size": 2,
}
SUMMARIES = (
    FamilySummary(
        title="Qwen3-VL",
        checkpoints="Qwen3-VL 2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B",
        pictures="any size, to multiples of 32 pixels within an area",
        video=True,
        tokens="width/32 × height/32",
        example={
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {"dtype": "bfloat16", "hidden_size": 4096, "model_type": "qwen3_vl_text"},
            "vision_config": {
                "deepstack_visual_indexes": [8, 16, 24],
                "depth": 27,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": 4304,
                "model_type": "qwen3_vl",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 4096,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        processor=PROCESSOR,
    ),
    FamilySummary(
        title="Qwen3.5",
        checkpoints="Qwen3.5, dense (27B) and with experts (35B-A3B)",
        pictures="any size, to multiples of 32 pixels within an area",
        video=True,
        tokens="width/32 × height/32",
        example={
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "text_config": {"dtype": "bfloat16", "hidden_size": 5120, "model_type": "qwen3_5_text"},
            "vision_config": {
                "deepstack_visual_indexes": [],
                "depth": 27,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": 4304,
                "model_type": "qwen3_5",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 5120,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        processor=PROCESSOR,
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen3VLVisionConfig``.

    Only ``out_hidden_size`` (the language model's width) must be there: its default fits no published model.
    """
    config = read_config(reader)
    mergers = {"projector": "merger"} | {
        f"deepstack.{level}": f"deepstack_merger_list.{level}" for level in range(len(config.deepstack))
    }
    tensors = OTHER_TENSORS | {
        f"{ours}.{part}.{kind}": f"{theirs}.{stored}.{kind}"
        for ours, theirs in mergers.items()
        for part, stored in MERGER_PARTS.items()
        for kind in ("weight", "bias")
    }
    values = dict(OTHER_VALUES)
    for ours, theirs in mergers.items():
        values[f"{ours}.normed"] = (f"{theirs}.norm", "output")
        values[f"{ours}.hidden"] = (f"{theirs}.linear_fc2", "input")
        if ours != "projector":
            values[ours] = (theirs, "output")
    return Family(
        config=config,
        roots=ROOTS,
        tensors=stored_blocks(config, BLOCK_TENSORS, tensors),
        ignored=("rotary_pos_emb.inv_freq",),
        preprocessors={"hf": partial(SmartResize, frame_budget="per_clip")},
        reference=QwenReference(BLOCK_VALUES, values),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    known = [name for model_type in MODEL_TYPES for name in (model_type, f"{model_type}_vision")]
    vision.get(str, "model_type", default="qwen3_vl", choices=known)
    width = positive(vision, "hidden_size", 1152)
    merge = positive(vision, "spatial_merge_size", 2)
    norm = Normalisation("layer_norm", eps=1e-6)
    depth = positive(vision, "depth", 27)
    projector = Projector(
        norm=norm,
        merge=merge,
        hidden=width * merge * merge,
        output=positive(vision, "out_hidden_size"),
        activation="gelu",
        bias=True,
    )
    deepstack = _deepstack(vision, depth) if reader.get(str, "model_type") in WITH_DEEPSTACK else ()
    return TowerConfig(
        family="qwen3_vl",
        patch=PatchEmbedding(
            channels=positive(vision, "in_channels", 3),
            size=positive(vision, "patch_size", 16),
            temporal=positive(vision, "temporal_patch_size", 2),
            bias=True,
        ),
        width=width,
        depth=depth,
        heads=whole_heads(vision, "num_heads", width, positive(vision, "num_heads", 16), multiple=4),
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=positive(vision, "intermediate_size", 4304),
        mlp_bias=True,
        activation=activation(vision, "hidden_act", "gelu_pytorch_tanh"),
        rotary=RotaryEmbedding(theta=rotary_theta(vision), layout="halves"),
        position_table=PositionTable(side=_table_side(vision), sampling="bilinear"),
        segments="frame",
        features=(depth,),
        deepstack=deepstack,
        deepstack_projector=replace(projector, norm_over="token") if deepstack else None,
        projector=projector,
    )


def _table_side(vision: ConfigReader) -> int:
    places = positive(vision, "num_position_embeddings", 2304)
    side = isqrt(places)
    if side * side != places:
        raise vision.error("num_position_embeddings", places, "the places of a square grid, such as 2304 = 48 × 48")
    return side


def _deepstack(vision: ConfigReader, depth: int) -> tuple[int, ...]:
    """The blocks behind which there are mergers; the language model takes their rows in this order."""
    key = "deepstack_visual_indexes"
    blocks = vision.get_list(int, key, default=(8, 16, 24), minimum=0)
    if any(later <= earlier for earlier, later in pairwise(blocks)) or max(blocks, default=0) >= depth:
        raise vision.error(key, list(blocks), f"some of the blocks 0 … {depth - 1} in ascending order, each once")
    return blocks
