"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631) and Qwen3.5, dense and with experts: one kind of tower.

Patches of 16 × 16 pixels and two frames with a bias, a learned table of positions that is interpolated to every image's grid,
rotary embedding, attention within one temporal patch, tanh-GELU, and Qwen2-VL's merger.  Qwen3-VL also has mergers after a
few earlier blocks (DeepStack, arXiv 2406.04334), whose rows the language model adds after its first layers.  Qwen3.5 has none,
even if its file lists some.  The references are ``Qwen3VLVisionModel`` and ``Qwen3_5VisionModel``.
"""

from dataclasses import replace
from itertools import pairwise
from math import isqrt

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored
from tritontower.config import Normalization, PositionTable, TowerConfig
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import activation, positive
from .common.family import Family
from .common.prompts import QWEN_TOKENS, qwen_prompt
from .common.qwen_encoder import qwen_family, read_merger, read_patch, read_tower

WITH_DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
QWEN3_5 = ("qwen3_5", "qwen3_5_moe")
MODEL_TYPES = (*WITH_DEEPSTACK, *QWEN3_5)
PUBLISHED = ("qwen3_vl", "qwen3_5")

QWEN3_5_TOKENS = {"image": 248056, "video": 248057, "vision_start": 248053, "vision_end": 248054}
"""Default token ids of Qwen3.5 in transformers."""

MLP = {"mlp_up": "mlp.linear_fc1", "mlp_down": "mlp.linear_fc2"}
MERGER = {"norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; missing keys have the defaults of ``Qwen3VLVisionConfig``.

    Only ``out_hidden_size`` (the language model's width) is required: its default matches no published model.
    """
    config = _read_config(reader)
    tokens = QWEN3_5_TOKENS if reader.get(str, "model_type") in QWEN3_5 else QWEN_TOKENS
    return qwen_family(
        config,
        MLP,
        MERGER,
        frame_budget="per_video",
        tensors={"position_table.weight": Stored("pos_embed.weight")},
        values={"placed_rows": ("blocks.0.norm1", "input")},
        # Each temporal patch of a video follows the time at its middle, in seconds.
        prompt=qwen_prompt(reader, timestamp="<{:.1f} seconds>", defaults=tokens),
        mrope=MropeRule(config.merge, split_videos=True),
    )


def _read_config(reader: ConfigReader) -> TowerConfig:
    vision = reader.section("vision_config", optional=True)
    known = [name for model_type in MODEL_TYPES for name in (model_type, f"{model_type}_vision")]
    vision.get(str, "model_type", default="qwen3_vl", choices=known)
    width, depth = positive(vision, "hidden_size", 1152), positive(vision, "depth", 27)
    norm = Normalization("layer_norm", eps=1e-6)
    projector = read_merger(vision, norm, width, "out_hidden_size")
    deepstack = _read_deepstack(vision, depth) if reader.get(str, "model_type") in WITH_DEEPSTACK else ()
    return read_tower(
        vision,
        width,
        depth,
        family="qwen3_vl",
        patch=read_patch(vision, 16, bias=True),
        norm=norm,
        mlp_hidden=positive(vision, "intermediate_size", 4304),
        activation=activation(vision, "hidden_act", "gelu_pytorch_tanh"),
        position_table=PositionTable(side=_read_table_side(vision), sampling="bilinear"),
        deepstack=deepstack,
        deepstack_projector=replace(projector, norm_over="token") if deepstack else None,
        projector=projector,
    )


def _read_table_side(vision: ConfigReader) -> int:
    places = positive(vision, "num_position_embeddings", 2304)
    side = isqrt(places)
    if side * side != places:
        raise vision.error("num_position_embeddings", places, "the positions of a square grid, such as 2304 = 48 × 48")
    return side


def _read_deepstack(vision: ConfigReader, depth: int) -> tuple[int, ...]:
    """Reads the blocks after which there are mergers, in the order in which the language model takes their rows."""
    key = "deepstack_visual_indexes"
    blocks = vision.get_list(int, key, default=(8, 16, 24), minimum=0)
    if any(later <= earlier for earlier, later in pairwise(blocks)) or max(blocks, default=0) >= depth:
        raise vision.error(key, list(blocks), f"some of the blocks 0 … {depth - 1} in ascending order, each once")
    return blocks
