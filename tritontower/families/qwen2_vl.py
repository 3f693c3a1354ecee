"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): 2B, 7B and 72B share one tower, with different outputs.

Patches of 14 × 14 pixels and two frames, no position table, 2-D rotary embedding, attention within one temporal patch,
quick-GELU, and a merger that joins 2 × 2 patches.  The reference is ``Qwen2VisionTransformerPretrainedModel`` of
``transformers.models.qwen2_vl.modeling_qwen2_vl``.

Published configurations come in two generations: the old one is flat (the language model's keys stand at the top level
and ``vision_config`` says ``model_type: qwen2_vl`` or nothing), the new one nests a ``text_config`` beside the
``vision_config``.  The tower's part reads the same in both.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from tritontower.config import Activation, Normalisation, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.reader import ConfigReader

MODEL_TYPES = ("qwen2_vl",)
PREFIXES = ("model.visual.", "visual.")
IGNORED = ("rotary_pos_emb.inv_freq",)
SHRINKS_VIDEO_TO = (128 * 28 * 28, 768 * 28 * 28)

ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}

BLOCK_TENSORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "qkv.weight": "attn.qkv.weight",
    "qkv.bias": "attn.qkv.bias",
    "attention_output.weight": "attn.proj.weight",
    "attention_output.bias": "attn.proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp_up.weight": "mlp.fc1.weight",
    "mlp_up.bias": "mlp.fc1.bias",
    "mlp_down.weight": "mlp.fc2.weight",
    "mlp_down.bias": "mlp.fc2.bias",
}
OTHER_TENSORS = {
    "patch_projection.weight": "patch_embed.proj.weight",
    "projector.norm.weight": "merger.ln_q.weight",
    "projector.norm.bias": "merger.ln_q.bias",
    "projector.linear_1.weight": "merger.mlp.0.weight",
    "projector.linear_1.bias": "merger.mlp.0.bias",
    "projector.linear_2.weight": "merger.mlp.2.weight",
    "projector.linear_2.bias": "merger.mlp.2.bias",
}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = {
    "norm1_rows": ("norm1", "output"),
    "qkv_rows": ("attn.qkv", "output"),
    "mixed": ("attn.proj", "input"),
    "attention_output_rows": ("attn.proj", "output"),
    "attended": ("norm2", "input"),
    "norm2_rows": ("norm2", "output"),
    "mlp_up_rows": ("mlp.fc1", "output"),
    "mlp_hidden": ("mlp.fc2", "input"),
    "mlp_down_rows": ("mlp.fc2", "output"),
    "block_rows": ("", "output"),
}
OTHER_VALUES = {
    "patch_rows": ("patch_embed", "output"),
    "projector.normed": ("merger.ln_q", "output"),
    "projector.hidden": ("merger.mlp.2", "input"),
    "embeddings": ("merger", "output"),
}


def read_config(reader: ConfigReader) -> TowerConfig:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen2VLVisionConfig``.

    Only ``hidden_size`` (the language model's width) must be there: its default fits the 7B model alone.
    """

    def positive(key: str, default: int | None = None) -> int:
        if default is None:
            return reader.get(int, f"vision_config.{key}", minimum=1)
        return reader.get(int, f"vision_config.{key}", default=default, minimum=1)

    reader.get(str, "vision_config.model_type", default="qwen2_vl", choices=("qwen2_vl", "qwen2_vl_vision"))
    width = positive("embed_dim", 1280)
    heads = positive("num_heads", 16)
    if width % heads or (width // heads) % 4:
        allowed = f"a number that divides embed_dim ({width}) into heads whose width is a multiple of 4"
        raise reader.error("vision_config.num_heads", heads, allowed)
    merge = positive("spatial_merge_size", 2)
    activation = reader.get(str, "vision_config.hidden_act", default="quick_gelu", choices=tuple(ACTIVATIONS))
    reader.get(str, "vision_config.rope_parameters.rope_type", default="axial", choices=("axial", "default"))
    theta = reader.get(float, "vision_config.rope_parameters.rope_theta", default=10000.0, minimum=1.0)
    norm = Normalisation("layer_norm", eps=1e-6)
    return TowerConfig(
        family="qwen2_vl",
        patch=PatchEmbedding(
            channels=positive("in_channels", 3),
            size=positive("patch_size", 14),
            temporal=positive("temporal_patch_size", 2),
            bias=False,
        ),
        width=width,
        depth=positive("depth", 32),
        heads=heads,
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=width * positive("mlp_ratio", 4),
        mlp_bias=True,
        activation=ACTIVATIONS[activation],
        rotary=RotaryEmbedding(theta=theta, layout="halves"),
        segments="frame",
        projector=Projector(
            norm=norm,
            merge=merge,
            hidden=width * merge * merge,
            output=positive("hidden_size"),
            activation="gelu",
            bias=True,
        ),
    )


def tensor_names(config: TowerConfig) -> Mapping[str, str]:
    """Weight of the layer graph → tensor of the checkpoint, without its prefix."""
    names = dict(OTHER_TENSORS)
    for block in range(config.depth):
        names |= {f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in BLOCK_TENSORS.items()}
    return names


def resized(width: int, height: int, factor: int, area: tuple[int, int]) -> tuple[int, int]:
    """The ``smart_resize`` rule: round both sides to ``factor``, then scale into ``area``, keeping the aspect ratio.

    The rule of ``transformers.models.qwen2_vl.image_processing_qwen2_vl``; rounding is to the nearest even multiple on
    ties, and the scale comes from the original sides, not from the rounded ones.
    """
    least, greatest = area
    rounded_width, rounded_height = round(width / factor) * factor, round(height / factor) * factor
    if rounded_width * rounded_height > greatest:
        shrink = math.sqrt(width * height / greatest)
        return (
            max(factor, math.floor(width / shrink / factor) * factor),
            max(factor, math.floor(height / shrink / factor) * factor),
        )
    if rounded_width * rounded_height < least:
        grow = math.sqrt(least / (width * height))
        return math.ceil(width * grow / factor) * factor, math.ceil(height * grow / factor) * factor
    return rounded_width, rounded_height


def reference_class() -> Any:
    """The class of transformers that is the tower's reference."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    return Qwen2VisionTransformerPretrainedModel


def reference_embeddings(output: Any) -> torch.Tensor:
    """The merged rows; ``last_hidden_state`` holds the rows before the merger."""
    embeddings: torch.Tensor = output.pooler_output
    return embeddings


def reference_values(config: TowerConfig) -> Mapping[str, tuple[str, str]]:
    """Value of the layer graph → module of the reference, and which side of it."""
    values = dict(OTHER_VALUES)
    for block in range(config.depth):
        for ours, (path, side) in BLOCK_VALUES.items():
            values[f"blocks.{block}.{ours}"] = (f"blocks.{block}.{path}".rstrip("."), side)
    return values
