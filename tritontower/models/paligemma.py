"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726) and PaliGemma 2 (Steiner et al. 2024, arXiv 2412.03555).

A SigLIP encoder for one image size (224, 448 or 896 pixels), its output norm, and one linear: one token per patch.  The
reference is ``PaliGemmaModel``.  Old releases of transformers divided the projected rows by the root of their width, and the
language model multiplied them again; supported releases do neither.
"""

from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import map_parameters
from tritontower.config import Projector
from tritontower.prompt.layout import PromptLayout

from .common.clip_encoder import encoder_family
from .common.config_fields import positive
from .common.family import Family
from .common.gemma import GemmaReference, read_siglip
from .common.prompts import token

MODEL_TYPES = ("paligemma",)
PUBLISHED = ("paligemma",)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config`` and ``projection_dim``.

    Missing keys of ``vision_config`` have the defaults of ``SiglipVisionConfig``: an image size of 224 pixels, for one.
    """
    projector = Projector(
        norm=None,
        merge=1,
        hidden=None,
        # The reference overwrites the key of the same name in `vision_config` with this one.
        output=positive(reader, "projection_dim", 2048),
        activation="gelu",
        bias=True,
    )
    config = replace(read_siglip(reader, family="paligemma"), features_normed=True, projector=projector)
    # Images first, then the text, which ends in a line break (section 3.2 of the paper).
    prompt = PromptLayout(
        placeholder=token(reader, "image", 256_000),
        after_images=(reader.get(int, "bos_token_id", default=2, minimum=0),),
        ending="\n",
        special_tokens=False,
    )
    reference = GemmaReference({"embeddings": ("linear", "output")})
    linear = map_parameters({"projector.linear": "projector.linear"})
    return encoder_family(config, reference, linear, prompt=prompt)
