"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): 2B, 7B and 72B share one tower, with different output widths.

Patches of 14 × 14 pixels and two frames, no position table, 2-D rotary embedding, attention within one temporal patch,
quick-GELU, and a merger that joins 2 × 2 patches.  The reference is ``Qwen2VisionTransformerPretrainedModel``.

Published configurations are flat (old: the language model's keys are at the top level) or nested (new: ``text_config`` and
``vision_config``).  The tower's part reads the same in both.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization
from tritontower.prompt.mrope import MropeRule

from .common.config_fields import activation, positive
from .common.family import Family
from .common.prompts import qwen_prompt
from .common.qwen_encoder import QWEN2_MERGER, qwen_family, read_merger, read_patch, read_tower

MODEL_TYPES = ("qwen2_vl",)
PUBLISHED = ("qwen2_vl",)

MLP = {"mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"}


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``; missing keys have the defaults of ``Qwen2VLVisionConfig``.

    Only ``hidden_size`` (the language model's width) is required: its default matches the 7B model alone.
    """
    vision = reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="qwen2_vl", choices=("qwen2_vl", "qwen2_vl_vision"))
    width = positive(vision, "embed_dim", 1280)
    norm = Normalization("layer_norm", eps=1e-6)
    config = read_tower(
        vision,
        width,
        positive(vision, "depth", 32),
        family="qwen2_vl",
        patch=read_patch(vision, 14, bias=False),
        norm=norm,
        mlp_hidden=width * positive(vision, "mlp_ratio", 4),
        activation=activation(vision, "hidden_act", "quick_gelu"),
        projector=read_merger(vision, norm, width, "hidden_size"),
    )
    return qwen_family(config, MLP, QWEN2_MERGER, prompt=qwen_prompt(reader), mrope=MropeRule(config.merge))
