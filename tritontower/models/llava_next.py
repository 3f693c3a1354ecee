"""LLaVA-NeXT, also called LLaVA 1.6 (Liu et al. 2024): LLaVA over tiles.

An image is seen once as a whole and once in tiles, on the canvas of ``image_grid_pinpoints`` that fits it best.  The
tiles' tokens are put together, the canvas's padding is left out, and a learned newline embedding ends every row.  The
reference is ``LlavaNextModel`` of ``transformers.models.llava_next.modeling_llava_next``.
"""

from dataclasses import replace
from functools import partial

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.preprocessing import AnyResolution

from .common.clip_encoder import IGNORED, PREFIXES_IN_MODEL
from .common.llava import (
    CLIP_LARGE_336_EXAMPLE,
    CLIP_LARGE_336_PROCESSOR,
    LLAVA_DEFAULTS,
    LlavaReference,
    claimed,
    llava_tensors,
    read_llava,
    refuse_class_token,
)
from .common.prompts import placeholder_prompt
from .common.registry import Family, FamilySummary

MODEL_TYPES = claimed("llava_next")

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The canvases of a file that names none."""

SUMMARIES = (
    FamilySummary(
        title="LLaVA-NeXT",
        checkpoints="LLaVA-v1.6 Mistral 7B, Vicuna 7B and 13B, 34B; LLaVA-NeXT Llama 3 8B, 72B, 110B",
        images="whole at 336 pixels, and in tiles of 336 on the canvas that fits best",
        video=False,
        tokens="(size / patch)², and those of the tiles without padding, and one at the end of each of their rows",
        example={
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["MistralForCausalLM"],
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "model_type": "mistral",
                "num_key_value_heads": 8,
                "torch_dtype": "bfloat16",
                "vocab_size": 32064,
            },
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "vision_config": CLIP_LARGE_336_EXAMPLE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
        processor={
            **CLIP_LARGE_336_PROCESSOR,
            "aspect_ratio_setting": "anyres",
            "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features, projector and canvases; what is left out has the defaults of ``LlavaNextConfig``."""
    config = read_llava(reader, "llava_next", LLAVA_DEFAULTS)
    refuse_class_token(reader, config)
    config = replace(config, newline=True)
    pinpoints = reader.get_rows(int, "image_grid_pinpoints", PINPOINTS, length=2, minimum=1)
    return Family(
        config=config,
        prefixes={**PREFIXES_IN_MODEL, "image_newline": "image_newline"},
        tensors=llava_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": partial(AnyResolution, pinpoints=pinpoints)},
        reference=LlavaReference(),
        prompt=placeholder_prompt(reader, 32000),
    )
