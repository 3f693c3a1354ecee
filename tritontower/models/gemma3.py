"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786): 4B, 12B and 27B share one SigLIP encoder; ShieldGemma 2 is the 4B model.

Every image is resized to one size, ignoring its aspect ratio; with pan-and-scan, crops of a long image are added.  After the
encoder's output norm, squares of 4 × 4 patches are averaged, normalized and projected by one matrix: 256 tokens per tile.  The
reference is ``Gemma3Model``; ``ShieldGemma2ForImageClassification`` holds a whole Gemma 3.

The projection is stored as ``[in, out]``, unlike a linear's weight.  Pan-and-scan is off unless the processor's file or
``processor_options={"do_pan_and_scan": True}`` turns it on.
"""

from dataclasses import replace
from functools import partial
from math import isqrt

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored, Transposed
from tritontower.config import Normalization, Projector, TowerConfig
from tritontower.preprocessing import FixedSize
from tritontower.prompt.layout import PromptLayout

from .common.clip_encoder import encoder_family
from .common.config_fields import positive, text_width
from .common.family import Family
from .common.gemma import GemmaReference, read_siglip
from .common.prompts import token

MODEL_TYPES = ("gemma3", "shieldgemma2")
PUBLISHED = ("gemma3", "shieldgemma2")

PROJECTOR_TENSORS = {
    "projector.norm.weight": Stored("projector.mm_soft_emb_norm.weight"),
    "projector.linear.weight": Transposed("projector.mm_input_projection_weight"),
}

# Value of the layer graph → module of the reference's projector and side of it.
PROJECTOR_VALUES = {
    "projector.pooled": ("mm_soft_emb_norm", "input"),
    "projector.norm_rows": ("mm_soft_emb_norm", "output"),
    "embeddings": ("", "output"),
}

REFERENCES = {
    "gemma3": GemmaReference(PROJECTOR_VALUES),
    "shieldgemma2": GemmaReference(PROJECTOR_VALUES, "AutoModelForImageClassification", "model.model"),
}


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``, ``mm_tokens_per_image`` and the language model's width.

    Missing keys of ``vision_config`` have the defaults of ``SiglipVisionConfig``.
    """
    encoder = read_siglip(reader, family="gemma3")
    config = replace(encoder, features_normed=True, projector=_read_projector(reader, encoder))
    # Empty lines and two tokens around the rows of every tile, and a text before the crops.
    begin = token(reader, "boi", 255_999)
    prompt = PromptLayout(
        placeholder=token(reader, "image", 262_144),
        marker=begin,
        tile_before=("\n\n", begin),
        tile_after=(token(reader, "eoi", 256_000), "\n\n"),
        between_tiles=("Here is the original image ", " and here are some crops to help you see better ", " "),
    )
    return encoder_family(
        config,
        REFERENCES[reader.get(str, "model_type", choices=MODEL_TYPES)],
        PROJECTOR_TENSORS,
        resize_rule=partial(FixedSize, pan_and_scan=True),
        prompt=prompt,
        bidirectional_tiles=True,
    )


def _read_projector(reader: ConfigReader, encoder: TowerConfig) -> Projector:
    return Projector(
        # The epsilon of the encoder's norms; only the reference's code says so.
        norm=Normalization("gemma_rms_norm", eps=encoder.norm.eps),
        merge=_read_pooling_side(reader, encoder),
        hidden=None,
        output=text_width(reader, "gemma3_text"),
        activation="gelu",
        bias=False,
        join="mean",
        norm_over="token",
    )


def _read_pooling_side(reader: ConfigReader, encoder: TowerConfig) -> int:
    """Reads the side of the square of patches that becomes one token.

    Raises:
        ConfigError: the tokens are no square, or their squares do not cover all patches; the reference drops the rest.
    """
    patches = isqrt(encoder.num_patches or 0)
    count = positive(reader, "mm_tokens_per_image", 256)
    tokens = isqrt(count)
    if tokens * tokens != count or patches % tokens:
        allowed = f"the square of a number that divides the {patches} patches on a side of an image"
        raise reader.error("mm_tokens_per_image", count, allowed)
    return patches // tokens
