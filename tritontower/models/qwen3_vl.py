"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631) and Qwen3.5, dense and with experts: one kind of tower.

Patches of 16 × 16 pixels and two frames with a bias, a learned table of positions that is stretched over every image,
rotary embedding, attention within one temporal patch, tanh-GELU, and Qwen2-VL's merger.  Qwen3-VL has mergers behind a
few earlier blocks as well (DeepStack, arXiv 2406.04334), whose rows the language model adds behind its first layers;
Qwen3.5 has none, even where its file still speaks of them.  The references are ``Qwen3VLVisionModel`` and
``Qwen3_5VisionModel`` of ``transformers.models``.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isqrt

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, PositionTable, TowerConfig
from tritontower.preprocessing import SmartResize
from tritontower.prompt.layout import PromptLayout
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import activation, positive
from .common.prompts import QWEN_TOKENS, qwen_prompt
from .common.qwen_encoder import (
    ATTENTION,
    IGNORED,
    NORMS,
    PREFIXES,
    QwenReference,
    block_values,
    merger_tensors,
    merger_values,
    parameters,
    read_merger,
    read_patch,
    read_tower,
    stored_blocks,
)
from .common.registry import Family, FamilySummary

WITH_DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
QWEN3_5 = ("qwen3_5", "qwen3_5_moe")
MODEL_TYPES = (*WITH_DEEPSTACK, *QWEN3_5)

# As transformers' configurations of Qwen3.5 have them by default.
QWEN3_5_TOKENS = {"image": 248056, "video": 248057, "vision_start": 248053, "vision_end": 248054}

BLOCK_TENSORS = parameters({**NORMS, **ATTENTION, "mlp_up": "mlp.linear_fc1", "mlp_down": "mlp.linear_fc2"})
OTHER_TENSORS = {**parameters({"patch_projection": "patch_embed.proj"}), "position_table.weight": "pos_embed.weight"}
MERGER = {"norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = block_values(up="mlp.linear_fc1", down="mlp.linear_fc2")
OTHER_VALUES = {
    "patch_rows": ("patch_embed", "output"),
    "placed_rows": ("blocks.0.norm1", "input"),
    "embeddings": ("merger", "output"),
}

VISION_EXAMPLE = {
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
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
QWEN3_VL = FamilySummary(
    title="Qwen3-VL",
    checkpoints="Qwen3-VL 2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B",
    images="any size, to multiples of 32 pixels within an area",
    video=True,
    tokens="width/32 × height/32",
    example={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {"dtype": "bfloat16", "hidden_size": 4096, "model_type": "qwen3_vl_text"},
        "vision_config": {
            **VISION_EXAMPLE,
            "deepstack_visual_indexes": [8, 16, 24],
            "model_type": "qwen3_vl",
            "out_hidden_size": 4096,
        },
    },
    processor=PROCESSOR,
)
SUMMARIES = (
    QWEN3_VL,
    replace(
        QWEN3_VL,
        title="Qwen3.5",
        checkpoints="Qwen3.5, dense (27B) and with experts (35B-A3B)",
        example={
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "text_config": {"dtype": "bfloat16", "hidden_size": 5120, "model_type": "qwen3_5_text"},
            "vision_config": {
                **VISION_EXAMPLE,
                "deepstack_visual_indexes": [],
                "model_type": "qwen3_5",
                "out_hidden_size": 5120,
            },
        },
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
    tensors, values = dict(OTHER_TENSORS), dict(OTHER_VALUES)
    for ours, theirs in mergers.items():
        tensors |= merger_tensors(ours, theirs, MERGER)
        values |= merger_values(ours, theirs, MERGER)
        if ours != "projector":
            values[ours] = (theirs, "output")
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors=stored_blocks(config, BLOCK_TENSORS, tensors),
        ignored=IGNORED,
        preprocessors={"hf": partial(SmartResize, frame_budget="per_video")},
        reference=QwenReference(BLOCK_VALUES, values),
        prompt=_prompt(reader),
        mrope=MropeRule(config.merge, split_videos=True),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    known = [name for model_type in MODEL_TYPES for name in (model_type, f"{model_type}_vision")]
    vision.get(str, "model_type", default="qwen3_vl", choices=known)
    width = positive(vision, "hidden_size", 1152)
    norm = Normalization("layer_norm", eps=1e-6)
    depth = positive(vision, "depth", 27)
    projector = read_merger(vision, norm, width, "out_hidden_size")
    deepstack = _deepstack(vision, depth) if reader.get(str, "model_type") in WITH_DEEPSTACK else ()
    return read_tower(
        vision,
        width,
        depth,
        family="qwen3_vl",
        patch=read_patch(vision, 16, bias=True),
        norm=norm,
        mlp_hidden=positive(vision, "intermediate_size", 4304),
        activation=activation(vision, "hidden_act", "gelu_pytorch_tanh"),
        position_table=PositionTable(side=_table_side(vision), sampling="bilinear"),
        deepstack=deepstack,
        deepstack_projector=replace(projector, norm_over="token") if deepstack else None,
        projector=projector,
    )


def _prompt(reader: ConfigReader) -> PromptLayout:
    """A video's temporal patches stand apart, each behind the second at its middle."""
    tokens = QWEN3_5_TOKENS if reader.get(str, "model_type") in QWEN3_5 else QWEN_TOKENS
    return qwen_prompt(reader, timestamp="<{:.1f} seconds>", defaults=tokens)


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
