"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326): tiles of a SigLIP encoder, shrunk where they are many.

As LLaVA-NeXT, with larger canvases: one whose tokens are more than ``anyres_max_9`` allows, nine tiles' worth, is shrunk by
bilinear interpolation of its projected rows.  The features are those behind the last block (published checkpoints have
26 of SigLIP's 27), without the post norm.  The reference is ``LlavaOnevisionModel`` of
``transformers.models.llava_onevision.modeling_llava_onevision``; video frames, whose tokens it pools, are not encoded here.
"""

import re
from dataclasses import replace
from functools import partial

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.preprocessing import AnyResolution

from .common.clip_encoder import IGNORED, PREFIXES_IN_MODEL, SIGLIP_PROCESSOR, SIGLIP_SO400M
from .common.llava import ClassDefaults, LlavaReference, claimed, llava_tensors, read_llava, refuse_class_token
from .common.prompts import placeholder_prompt
from .common.registry import Family, FamilySummary

MODEL_TYPES = claimed("llava_onevision")

DEFAULTS = ClassDefaults(
    tower="siglip_vision_model",
    vision={**SIGLIP_SO400M, "num_hidden_layers": 26, "image_size": 384},
    text="qwen2",
    layer=-1,
    strategy="full",
)
PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
"""The canvases of a file that names none."""

SUMMARIES = (
    FamilySummary(
        title="LLaVA-OneVision",
        checkpoints="LLaVA-OneVision Qwen2 0.5B, 7B, 72B",
        images="whole at 384 pixels, and in tiles of 384 on the canvas that fits best",
        video=False,
        tokens="729, and those of the tiles without padding (shrunk to 6561 if more), and one at the end of each of their rows",
        example={
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
            "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
            "image_token_index": 151646,
            "projector_hidden_act": "gelu",
            "text_config": {"hidden_size": 3584, "model_type": "qwen2", "num_attention_heads": 28},
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "video_token_index": 151647,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_config": {
                **DEFAULTS.vision,
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        processor={
            **SIGLIP_PROCESSOR,
            "do_convert_rgb": True,
            "do_pad": True,
            "image_grid_pinpoints": [list(canvas) for canvas in PINPOINTS],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": 384, "width": 384},
        },
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features, projector and canvases; what is left out has the defaults of ``LlavaOnevisionConfig``."""
    config = read_llava(reader, "llava_onevision", DEFAULTS)
    refuse_class_token(reader, config)
    # A token of a shrunk canvas is made of four of its own.
    config = replace(config, newline=True, assembly_taps=4)
    pinpoints = reader.get_rows(int, "image_grid_pinpoints", PINPOINTS, length=2, minimum=1)
    return Family(
        config=config,
        prefixes={**PREFIXES_IN_MODEL, "image_newline": "image_newline"},
        tensors=llava_tensors(config),
        ignored=IGNORED,
        preprocessors={"hf": partial(AnyResolution, pinpoints=pinpoints, shrink_limit=_most_tiles(reader))},
        reference=LlavaReference(),
        prompt=placeholder_prompt(reader, 151646),
    )


def _most_tiles(reader: ConfigReader) -> int:
    """How many tiles' worth of tokens a canvas may have."""
    aspect = reader.get(str, "vision_aspect_ratio", default="anyres_max_9")
    number = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", aspect)
    if number is None:
        raise reader.error("vision_aspect_ratio", aspect, "'anyres_max_N', N the tiles' worth of tokens, such as 9")
    return int(number[1])
