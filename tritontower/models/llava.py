"""LLaVA 1.5 and similar models (Liu et al. 2023, arXiv 2310.03744): a CLIP or SigLIP encoder and two linears.

The features are hidden states of the encoder, by default those before its last block, which is then neither built nor read.
The class token is dropped.  The reference is ``LlavaModel``.  :mod:`.pixtral` reads a LLaVA with a Pixtral tower.
"""

from tritontower.checkpoint.config_reader import ConfigReader

from .common.family import Family
from .common.llava import LLAVA_DEFAULTS, list_model_types, read_llava

MODEL_TYPES = list_model_types("llava")
PUBLISHED = ("llava",)


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features and projector; missing keys have the defaults of ``LlavaConfig``."""
    return read_llava(reader, "llava", LLAVA_DEFAULTS)
