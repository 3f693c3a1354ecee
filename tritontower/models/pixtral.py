"""Pixtral in transformers' format: a LLaVA whose tower is Pixtral's.

The tower of :mod:`tritontower.models.common.pixtral_encoder` and two linears with gelu between them; every patch is a token.  The
reference is ``LlavaModel`` of ``transformers.models.llava.modeling_llava`` with a ``PixtralVisionModel``.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Projector

from .common.config_fields import activation, feature_layers, text_width
from .common.pixtral_encoder import (
    IGNORED,
    PREFIXES,
    PixtralReference,
    preprocessors,
    processor_example,
    projector_tensors,
    read_tower_size,
    tower_config,
    tower_tensors,
)
from .common.prompts import pixtral_prompt
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("llava/pixtral",)

PROJECTOR_VALUES = {"projector.hidden": ("linear_2", "input")}

SUMMARIES = (
    FamilySummary(
        title="Pixtral",
        checkpoints="Pixtral 12B",
        images="any size, shrunk to 1024 pixels on the longer side, to multiples of 16",
        video=False,
        tokens="⌈width/16⌉ × ⌈height/16⌉",
        example={
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 10,
            "model_type": "llava",
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "text_config": {"hidden_size": 5120, "model_type": "mistral", "rms_norm_eps": 1e-05},
            "torch_dtype": "bfloat16",
            "vision_config": {
                "head_dim": 64,
                "hidden_act": "silu",
                "image_size": 1024,
                "model_type": "pixtral",
                "patch_size": 16,
                "rope_theta": 10000.0,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        processor=processor_example(1024, {"height": 16, "width": 16}),
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads the tower, and which of its rows become tokens how.

    ``vision_feature_select_strategy`` must be there and say ``full``: its default, made for towers with a class token, leaves
    out the first patch of a call, and transformers then fails to tell the images' rows apart.
    """
    size = read_tower_size(reader.section("vision_config", optional=True))
    reader.get(str, "vision_feature_select_strategy", choices=("full",))
    width = text_width(reader, "llama")
    projector = Projector(
        norm=None,
        merge=1,
        hidden=width,
        output=width,
        activation=activation(reader, "projector_hidden_act", "gelu"),
        bias=reader.get(bool, "multimodal_projector_bias", default=True),
    )
    features = feature_layers(reader, "vision_feature_layer", size.depth, -2)
    config = tower_config(size, projector, family="pixtral", features=features, rotation="activation")
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors={**tower_tensors(config), **projector_tensors("linear_1", "linear_2")},
        ignored=IGNORED,
        preprocessors=preprocessors(size.longest_edge),
        reference=PixtralReference(PROJECTOR_VALUES, merges=False),
        prompt=pixtral_prompt(reader, config, 32000),
    )
