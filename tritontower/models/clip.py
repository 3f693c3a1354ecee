"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020), without a language model.

The tokens are the rows after the last block, the class token's first.  The pooled vector is the class token's row after the
post norm, before ``visual_projection``, which belongs to the contrastive model.

``CLIPModel`` is the whole contrastive model, whose text half is not read.  ``CLIPVisionModel`` is its image half; its
configuration is at the top level, and its tensor names may have the level ``vision_model.``.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Pooling

from .common.clip_encoder import lone_encoder_family, read_encoder
from .common.family import Family

MODEL_TYPES = ("clip", "clip_vision_model")
PUBLISHED = ("clip",)


def read(reader: ConfigReader) -> Family:
    """Reads the image encoder; missing keys have the defaults of ``CLIPVisionConfig``."""
    is_alone = reader.get(str, "model_type") == "clip_vision_model"
    config = read_encoder(reader if is_alone else _read_section(reader), "clip", family="clip")
    config = replace(config, keep_class_token=True, pooling=Pooling("class_token"))
    return lone_encoder_family(config, is_alone=is_alone)


def _read_section(reader: ConfigReader) -> ConfigReader:
    """Returns the encoder's section; old files have two, of which transformers uses ``vision_config_dict``."""
    key = "vision_config_dict" if reader.has("vision_config_dict") else "vision_config"
    vision = reader.section(key, optional=True)
    vision.get(str, "model_type", default="clip_vision_model", choices=("clip_vision_model",))
    return vision
