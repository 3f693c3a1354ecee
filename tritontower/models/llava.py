"""LLaVA 1.5 and its relatives (Liu et al. 2023, arXiv 2310.03744): a CLIP or SigLIP encoder and two linears.

The features are hidden states in front of the end of the encoder, by default those in front of its last block, which is
then neither built nor read; the class token is left out.  The reference is ``LlavaModel`` of
``transformers.models.llava.modeling_llava``.  A LLaVA with a Pixtral tower is another family.
"""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.preprocessing import FixedSize

from .common.clip_encoder import IGNORED, PREFIXES_IN_MODEL
from .common.llava import (
    CLIP_LARGE_336_EXAMPLE,
    CLIP_LARGE_336_PROCESSOR,
    LLAVA_DEFAULTS,
    LlavaReference,
    claimed,
    llava_tensors,
    read_llava,
)
from .common.prompts import placeholder_prompt
from .common.registry import Family, FamilySummary

MODEL_TYPES = claimed("llava")

SUMMARIES = (
    FamilySummary(
        title="LLaVA",
        checkpoints="LLaVA-1.5 7B, 13B, and models of that form with a CLIP or SigLIP encoder",
        images="one size (336 pixels): the shorter side is scaled to it, the middle is cropped",
        video=False,
        tokens="(size / patch)²",
        example={
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "torch_dtype": "float16",
            "vision_config": CLIP_LARGE_336_EXAMPLE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
        processor={
            **CLIP_LARGE_336_PROCESSOR,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features and projector; what a sparse file leaves out has the defaults of ``LlavaConfig``."""
    config = read_llava(reader, "llava", LLAVA_DEFAULTS)
    return Family(
        config=config,
        prefixes=PREFIXES_IN_MODEL,
        tensors=llava_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": FixedSize},
        reference=LlavaReference(),
        prompt=placeholder_prompt(reader, 32000),
    )
