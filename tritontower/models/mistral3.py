"""Mistral Small 3.1 and its variants in transformers' format: Pixtral's tower, whose patches are merged before the projector.

After the tower of :mod:`tritontower.models.common.pixtral_encoder`, every patch goes through an RMS norm; squares of patches
are joined, and a linear takes them back to the tower's width; then two linears with gelu between them.  The joined columns are
stored channel by channel, in the order of ``torch.nn.functional.unfold``.  The reference is ``Mistral3Model``.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import ChannelMajor, Stored
from tritontower.config import Normalization

from .common.config_fields import feature_layers, positive, read_eps, text_width, two_linears
from .common.family import Family
from .common.pixtral_encoder import PixtralReference, read_hf_family, read_tower_size, tower_config

MODEL_TYPES = ("mistral3", "mistral3/pixtral")
PUBLISHED = ("mistral3",)

TEXT_EPS = {"ministral3": 1e-5, "mistral": 1e-6, "mistral4": 1e-6}
"""``model_type`` of a language model → default epsilon of its class."""

PROJECTOR_VALUES = {
    "projector.norm_rows": ("norm", "output"),
    "projector.merging_rows": ("patch_merger", "output"),
    "projector.hidden": ("linear_2", "input"),
}
REFERENCE = PixtralReference(PROJECTOR_VALUES, merges=True)


def read(reader: ConfigReader) -> Family:
    """Reads the tower and the projector, whose norm has the epsilon of the language model's norms.

    ``text_config`` is required: no class's default matches the width of a published model.  The configuration's class allows
    several feature layers, but the norm has a weight for one only.
    """
    size = read_tower_size(reader.section("vision_config", optional=True))
    features = feature_layers(reader, "vision_feature_layer", size.depth, -1)
    if len(features) > 1:
        raise reader.error("vision_feature_layer", list(features), "one layer: the projector's norm is as wide as one")
    merge = positive(reader, "spatial_merge_size", 2)
    text = reader.section("text_config")
    eps = read_eps(text, "rms_norm_eps", TEXT_EPS.get(text.get(str, "model_type", default="mistral")))
    projector = replace(
        two_linears(reader, text_width(reader, "mistral"), bias=False, merge=merge, merging_linear=True),
        norm=Normalization("rms_norm", eps=eps, rounding="before_weight"),
    )
    config = tower_config(size, projector, family="mistral3", features=features, rotation="activation")
    merging = {
        "projector.norm.weight": Stored("projector.norm.weight"),
        "projector.merging.weight": ChannelMajor("projector.patch_merger.merging_layer.weight", merge * merge),
    }
    return read_hf_family(reader, config, size, REFERENCE, image_token=10, projector_tensors=merging)
