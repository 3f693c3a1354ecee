"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786): 4B, 12B and 27B share one SigLIP encoder; ShieldGemma 2 is the 4B model.

Every image is squashed to one size; with pan-and-scan, crops of a long one are seen beside it.  Behind the encoder's
output norm, squares of 4 × 4 patches are averaged, normalized and projected by one matrix, so that each tile has 256 tokens.
The reference is ``Gemma3Model`` of ``transformers.models.gemma3.modeling_gemma3``; ``ShieldGemma2ForImageClassification``
holds a whole Gemma 3.

The projection is stored as ``[in, out]``, unlike a linear's weight.  Pan-and-scan is off unless the processor's file or
``processor_options={"do_pan_and_scan": True}`` turns it on.
"""

from functools import partial
from math import isqrt

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored, Transposed
from tritontower.config import Normalization, Projector, TowerConfig
from tritontower.preprocessing import FixedSize
from tritontower.prompt.layout import PromptLayout

from .common.clip_encoder import IGNORED, PREFIXES_IN_MODEL, SIGLIP_PROCESSOR, SIGLIP_SO400M, encoder_tensors
from .common.config_fields import positive, text_width
from .common.gemma import GemmaReference, read_siglip, with_projector
from .common.prompts import token
from .common.registry import Family, FamilySummary

MODEL_TYPES = ("gemma3", "shieldgemma2")

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

EXAMPLE = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "model_type": "gemma3_text"},
    "torch_dtype": "bfloat16",
    "vision_config": {
        **SIGLIP_SO400M,
        "image_size": 896,
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
    },
}
PROCESSOR = {
    **SIGLIP_PROCESSOR,
    "do_convert_rgb": None,
    "do_pan_and_scan": None,
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "resample": 2,
    "size": {"height": 896, "width": 896},
}

SUMMARIES = (
    FamilySummary(
        title="Gemma 3",
        checkpoints="Gemma 3 4B, 12B, 27B",
        images="squashed to 896 × 896; with pan-and-scan, crops of long ones beside it",
        video=False,
        tokens="256 a tile",
        example=EXAMPLE,
        processor=PROCESSOR,
    ),
    FamilySummary(
        title="ShieldGemma 2",
        checkpoints="ShieldGemma 2 4B",
        images="squashed to 896 × 896",
        video=False,
        tokens="256 a tile",
        example={
            **EXAMPLE,
            "architectures": ["ShieldGemma2ForImageClassification"],
            "model_type": "shieldgemma2",
        },
        processor=PROCESSOR,
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_config``, ``mm_tokens_per_image`` and the language model's width.

    What a sparse ``vision_config`` leaves out has the defaults of ``SiglipVisionConfig``.
    """
    config = read_config(reader)
    return Family(
        config=config,
        prefixes=PREFIXES_IN_MODEL,
        tensors={**encoder_tensors(config), **PROJECTOR_TENSORS},
        ignored=IGNORED,
        preprocessors={"hf": partial(FixedSize, pan_and_scan=True)},
        reference=REFERENCES[reader.get(str, "model_type", choices=MODEL_TYPES)],
        prompt=read_prompt(reader),
        bidirectional_tiles=True,
    )


def read_prompt(reader: ConfigReader) -> PromptLayout:
    """Empty lines and two tokens round the rows of every tile; crops come with an explanation."""
    begin = token(reader, "boi", 255_999)
    return PromptLayout(
        placeholder=token(reader, "image", 262_144),
        marker=begin,
        tile_before=("\n\n", begin),
        tile_after=(token(reader, "eoi", 256_000), "\n\n"),
        between_tiles=("Here is the original image ", " and here are some crops to help you see better ", " "),
    )


def read_config(reader: ConfigReader) -> TowerConfig:
    """The tower."""
    encoder = read_siglip(reader, family="gemma3")
    # The same number as in the encoder's norms, and nothing says so but the reference.
    norm = Normalization("gemma_rms_norm", eps=encoder.norm.eps)
    projector = Projector(
        norm=norm,
        merge=_pooled_side(reader, encoder),
        hidden=None,
        output=text_width(reader, "gemma3_text"),
        activation="gelu",
        bias=False,
        join="mean",
        norm_over="token",
    )
    return with_projector(encoder, projector)


def _pooled_side(reader: ConfigReader, encoder: TowerConfig) -> int:
    """Side of the square of patches that becomes one token.

    Raises:
        ConfigError: the tokens are no square, or their squares would leave patches over, which the reference drops.
    """
    patches = isqrt(encoder.num_patches or 0)
    count = positive(reader, "mm_tokens_per_image", 256)
    tokens = isqrt(count)
    if tokens * tokens != count or patches % tokens:
        allowed = f"the square of a number that divides the {patches} patches on a side of an image"
        raise reader.error("mm_tokens_per_image", count, allowed)
    return patches // tokens
