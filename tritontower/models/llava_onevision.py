"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326): tiles of a SigLIP encoder, shrunk if there are many.

It is LLaVA-NeXT with larger canvases.  A canvas with more tokens than ``anyres_max_9`` allows, those of nine tiles, is shrunk
by bilinear interpolation of its projected rows.  The features are those after the last block (published checkpoints have 26 of
SigLIP's 27), without the post norm.  The reference is ``LlavaOnevisionModel``.  Videos, whose tokens it pools, are not
supported.
"""

import re

from tritontower.checkpoint.config_reader import ConfigReader

from .common.family import Family
from .common.llava import ClassDefaults, list_model_types, read_tiled

MODEL_TYPES = list_model_types("llava_onevision")
PUBLISHED = ("llava_onevision",)

DEFAULTS = ClassDefaults(
    tower="siglip_vision_model",
    vision={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    text="qwen2",
    layer=-1,
    strategy="full",
    image_token=151646,
)
PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
"""Default canvases of ``LlavaOnevisionConfig``."""


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features, projector and canvases; missing keys have the defaults of ``LlavaOnevisionConfig``."""
    aspect = reader.get(str, "vision_aspect_ratio", default="anyres_max_9")
    number = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", aspect)
    if number is None:
        raise reader.error("vision_aspect_ratio", aspect, "'anyres_max_N', N the tiles' worth of tokens, such as 9")
    return read_tiled(reader, "llava_onevision", DEFAULTS, PINPOINTS, shrink_limit=int(number[1]))
