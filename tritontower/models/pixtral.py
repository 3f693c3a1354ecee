"""Pixtral in transformers' format: a LLaVA with Pixtral's tower.

The tower of :mod:`tritontower.models.common.pixtral_encoder` and two linears with gelu between them; every patch is a token.
The reference is ``LlavaModel`` with a ``PixtralVisionModel``.
"""

from tritontower.checkpoint.config_reader import ConfigReader

from .common.config_fields import feature_layers, text_width, two_linears
from .common.family import Family
from .common.pixtral_encoder import PixtralReference, read_hf_family, read_tower_size, tower_config

MODEL_TYPES = ("llava/pixtral",)
PUBLISHED = ("pixtral",)

REFERENCE = PixtralReference({"projector.hidden": ("linear_2", "input")}, merges=False)


def read(reader: ConfigReader) -> Family:
    """Reads the tower, the feature layers and the projector.

    ``vision_feature_select_strategy`` is required and must be ``full``: its default, for towers with a class token, drops the
    first patch of a call, after which transformers cannot split the rows by image.
    """
    size = read_tower_size(reader.section("vision_config", optional=True))
    reader.get(str, "vision_feature_select_strategy", choices=("full",))
    projector = two_linears(reader, text_width(reader, "llama"))
    features = feature_layers(reader, "vision_feature_layer", size.depth, -2)
    config = tower_config(size, projector, family="pixtral", features=features, rotation="activation")
    return read_hf_family(reader, config, size, REFERENCE, image_token=32000)
