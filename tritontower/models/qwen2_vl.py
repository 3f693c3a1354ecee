"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): 2B, 7B and 72B share one tower, with different outputs.

Patches of 14 × 14 pixels and two frames, no position table, 2-D rotary embedding, attention within one temporal patch,
quick-GELU, and a merger that joins 2 × 2 patches.  The reference is ``Qwen2VisionTransformerPretrainedModel`` of
``transformers.models.qwen2_vl.modeling_qwen2_vl``.

Published configurations come in two generations: the old one is flat (the language model's keys stand at the top level
and ``vision_config`` says ``model_type: qwen2_vl`` or nothing), the new one nests a ``text_config`` beside the
``vision_config``.  The tower's part reads the same in both.
"""

from functools import partial

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, TowerConfig
from tritontower.preprocessing import SmartResize
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import activation, positive
from .common.prompts import qwen_prompt
from .common.qwen_encoder import (
    ATTENTION,
    IGNORED,
    NORMS,
    PREFIXES,
    QWEN2_MERGER,
    QWEN2_PROCESSOR,
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

MODEL_TYPES = ("qwen2_vl",)

BLOCK_TENSORS = parameters({**NORMS, **ATTENTION, "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"})
OTHER_TENSORS = {
    "patch_projection.weight": "patch_embed.proj.weight",
    **merger_tensors("projector", "merger", QWEN2_MERGER),
}

# Value of the layer graph → module of the reference and side of it.
BLOCK_VALUES = block_values(up="mlp.fc1", down="mlp.fc2")
OTHER_VALUES = {
    "patch_rows": ("patch_embed", "output"),
    "embeddings": ("merger", "output"),
    **merger_values("projector", "merger", QWEN2_MERGER),
}

SUMMARIES = (
    FamilySummary(
        title="Qwen2-VL",
        checkpoints="Qwen2-VL 2B, 7B, 72B",
        images="any size, to multiples of 28 pixels within an area",
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
        processor=QWEN2_PROCESSOR,
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; what a sparse file leaves out has the defaults of ``Qwen2VLVisionConfig``.

    Only ``hidden_size`` (the language model's width) must be there: its default fits the 7B model alone.
    """
    config = read_config(reader)
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors=stored_blocks(config, BLOCK_TENSORS, OTHER_TENSORS),
        ignored=IGNORED,
        preprocessors={"hf": partial(SmartResize, frame_budget="per_frame")},
        reference=QwenReference(BLOCK_VALUES, OTHER_VALUES),
        prompt=qwen_prompt(reader),
        mrope=MropeRule(config.merge),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower of ``vision_config``."""
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_vl", choices=("qwen2_vl", "qwen2_vl_vision"))
    width = positive(vision, "embed_dim", 1280)
    norm = Normalization("layer_norm", eps=1e-6)
    depth = positive(vision, "depth", 32)
    return read_tower(
        vision,
        width,
        depth,
        family="qwen2_vl",
        patch=read_patch(vision, 14, bias=False),
        norm=norm,
        mlp_hidden=width * positive(vision, "mlp_ratio", 4),
        activation=activation(vision, "hidden_act", "quick_gelu"),
        projector=read_merger(vision, norm, width, "hidden_size"),
    )
