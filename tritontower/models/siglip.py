"""SigLIP's image encoder (Zhai et al. 2023, arXiv 2303.15343), without a language model.

The tokens are the rows after the last block and the post norm.  The pooled vector comes from an attention-pooling head with a
learned query, if the checkpoint has one.

``siglip`` is the whole contrastive model, whose text half is not read; fixed-size SigLIP 2 checkpoints are of that type too.
``siglip_vision_model`` is its image half; its configuration is at the top level, and its tensor names may have the level
``vision_model.``.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Pooling

from .common.clip_encoder import lone_encoder_family, read_encoder
from .common.family import Family

MODEL_TYPES = ("siglip", "siglip_vision_model")
PUBLISHED = ("siglip",)


def read(reader: ConfigReader) -> Family:
    """Reads the image encoder; missing keys have the defaults of ``SiglipVisionConfig``."""
    is_alone = reader.get(str, "model_type") == "siglip_vision_model"
    vision = reader if is_alone else reader.section("vision_config", optional=True)
    vision.get(str, "model_type", default="siglip_vision_model", choices=("siglip_vision_model",))
    config = read_encoder(vision, "siglip", family="siglip")
    has_head = vision.get(bool, "vision_use_head", default=True)
    config = replace(config, features_normed=True, pooling=Pooling("attention", norm=config.norm) if has_head else None)
    return lone_encoder_family(config, is_alone=is_alone)
