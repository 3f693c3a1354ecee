"""Mistral Small 3.1 and its variants in transformers' format: Pixtral's tower, whose patches are merged before the projector.

Behind the tower of :mod:`tritontower.models.common.pixtral_encoder` every patch goes through an RMS norm; squares of patches are joined
and taken back to the tower's width by a linear; then two linears with gelu between them.  The joined columns are stored
channel by channel, as ``torch.nn.functional.unfold`` gives them.  The reference is ``Mistral3Model`` of
``transformers.models.mistral3.modeling_mistral3``.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import ChannelMajor, Stored
from tritontower.config import Normalization, Projector

from .common.config_fields import activation, feature_layers, positive, text_width
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

MODEL_TYPES = ("mistral3", "mistral3/pixtral")

TEXT_EPS = {"ministral3": 1e-5, "mistral": 1e-6, "mistral4": 1e-6}
"""``model_type`` of a language model → its class's epsilon where a file says nothing."""

PROJECTOR_VALUES = {
    "projector.norm_rows": ("norm", "output"),
    "projector.merging_rows": ("patch_merger", "output"),
    "projector.hidden": ("linear_2", "input"),
}

SUMMARIES = (
    FamilySummary(
        title="Mistral Small 3",
        checkpoints="Mistral Small 3.1, 3.2; Magistral Small; Devstral and Ministral 3 with vision",
        images="any size, shrunk to 1540 pixels on the longer side, to multiples of 28",
        video=False,
        tokens="⌈width/28⌉ × ⌈height/28⌉",
        example={
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "text_config": {"hidden_size": 5120, "model_type": "mistral", "rms_norm_eps": 1e-05},
            "torch_dtype": "bfloat16",
            "vision_config": {
                "attention_dropout": 0.0,
                "head_dim": 64,
                "hidden_act": "silu",
                "hidden_size": 1024,
                "image_size": 1540,
                "intermediate_size": 4096,
                "model_type": "pixtral",
                "num_attention_heads": 16,
                "num_channels": 3,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "rope_theta": 10000.0,
            },
            "vision_feature_layer": -1,
        },
        processor=processor_example(1540, 14),
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads the tower and the projector, whose norm has the epsilon of the language model's norms.

    ``text_config`` must be there: no class's default fits the width of a published model.  The configuration's class has room
    for several feature layers side by side, but the norm has a weight for one only.
    """
    size = read_tower_size(reader.section("vision_config", optional=True))
    features = feature_layers(reader, "vision_feature_layer", size.depth, -1)
    if len(features) > 1:
        raise reader.error("vision_feature_layer", list(features), "one layer: the projector's norm is as wide as one")
    width = text_width(reader, "mistral")
    merge = positive(reader, "spatial_merge_size", 2)
    projector = Projector(
        norm=Normalization("rms_norm", eps=_text_eps(reader), rounding="before_weight"),
        merge=merge,
        hidden=width,
        output=width,
        activation=activation(reader, "projector_hidden_act", "gelu"),
        bias=reader.get(bool, "multimodal_projector_bias", default=False),
        merging_linear=True,
    )
    config = tower_config(size, projector, family="mistral3", features=features, rotation="activation")
    merging = {
        "projector.norm.weight": Stored("projector.norm.weight"),
        "projector.merging.weight": ChannelMajor("projector.patch_merger.merging_layer.weight", merge * merge),
    }
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors={**tower_tensors(config), **projector_tensors("linear_1", "linear_2"), **merging},
        ignored=IGNORED,
        preprocessors=preprocessors(size.longest_edge),
        reference=PixtralReference(PROJECTOR_VALUES, merges=True),
        prompt=pixtral_prompt(reader, config, 10),
    )


def _text_eps(reader: ConfigReader) -> float:
    text = reader.section("text_config")
    usual = TEXT_EPS.get(text.get(str, "model_type", default="mistral"))
    if usual is None:
        return text.get(float, "rms_norm_eps", minimum=0.0, maximum=1.0)
    return text.get(float, "rms_norm_eps", default=usual, minimum=0.0, maximum=1.0)
