"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): 2B, 7B and 72B share one tower, with different outputs.

Patches of 14 × 14 pixels and two frames, no position table, 2-D rotary embedding, attention within one temporal patch,
quick-GELU, and a merger that joins 2 × 2 patches.  The reference is ``Qwen2VisionTransformerPretrainedModel`` of
``transformers.models.qwen2_vl.modeling_qwen2_vl``.

Published configurations come in two generations: the old one is flat (the language model's keys stand at the top level
and ``vision_config`` says ``model_type: qwen2_vl`` or nothing), the new one nests a ``text_config`` beside the
``vision_config``.  The tower's part reads the same in both.
"""

from functools import partial

from tritontower.config import Normalisation, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.preprocessing import SmartResize
from tritontower.reader import ConfigReader

from . import Family, FamilySummary
from ._qwen import ROOTS, QwenReference, stored_blocks
from ._reading import activation, positive, rotary_theta, whole_heads

MODEL_TYPES = ("qwen2_vl",)

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

SUMMARIES = (
    FamilySummary(
        title="Qwen2-VL",
        checkpoints="Qwen2-VL 2B, 7B, 72B",
        pictures="any size, to multiples of 28 pixels within an area",
        video=True,
        tokens="width/28 × height/28",
        example={
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "hidden_size": 1536,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_act": "quick_gelu",
                "hidden_size": 1536,
                "in_channels": 3,
                "mlp_ratio": 4,
                "model_type": "qwen2_vl",
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "temporal_patch_size": 2,
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen2VLVisionConfig``.

    Only ``hidden_size`` (the language model's width) must be there: its default fits the 7B model alone.
    """
    config = read_config(reader)
    return Family(
        config=config,
        roots=ROOTS,
        tensors=stored_blocks(config, BLOCK_TENSORS, OTHER_TENSORS),
        ignored=("rotary_pos_emb.inv_freq",),
        preprocessors={"hf": partial(SmartResize, frame_budget="per_frame")},
        reference=QwenReference(BLOCK_VALUES, OTHER_VALUES),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_vl", choices=("qwen2_vl", "qwen2_vl_vision"))
    width = positive(vision, "embed_dim", 1280)
    merge = positive(vision, "spatial_merge_size", 2)
    norm = Normalisation("layer_norm", eps=1e-6)
    depth = positive(vision, "depth", 32)
    return TowerConfig(
        family="qwen2_vl",
        patch=PatchEmbedding(
            channels=positive(vision, "in_channels", 3),
            size=positive(vision, "patch_size", 14),
            temporal=positive(vision, "temporal_patch_size", 2),
            bias=False,
        ),
        width=width,
        depth=depth,
        heads=whole_heads(vision, "num_heads", width, positive(vision, "num_heads", 16), multiple=4),
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=width * positive(vision, "mlp_ratio", 4),
        mlp_bias=True,
        activation=activation(vision, "hidden_act", "quick_gelu"),
        rotary=RotaryEmbedding(theta=rotary_theta(vision), layout="halves"),
        segments="frame",
        features=(depth,),
        projector=Projector(
            norm=norm,
            merge=merge,
            hidden=width * merge * merge,
            output=positive(vision, "hidden_size"),
            activation="gelu",
            bias=True,
        ),
    )
