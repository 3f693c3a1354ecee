"""Pixtral and Mistral 3 in transformers' format: one tower, two projectors."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.tiny_models import TINY_TEXT, load_reference, save_model

from . import TowerCase, in_section

TEXT = {"model_type": "mistral", "rms_norm_eps": 1e-5, "head_dim": 12, **TINY_TEXT}
VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "hidden_act": "silu",
}
TOP: dict[str, dict[str, Any]] = {
    "llava": {
        "image_token_index": 10,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
    },
    "mistral3": {"vision_feature_layer": -1, "multimodal_projector_bias": False, "projector_hidden_act": "gelu"},
}
PATCH = {"llava": 16, "mistral3": 14}
LONGEST_EDGE = {"llava": 160, "mistral3": 168}


def save(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, depth: int = 3, **changes: Any
) -> Path:
    """Saves a whole small model, with its processor.

    Args:
        kind: ``"llava"`` or ``"mistral3"``.
        **changes: keys of ``text_config`` (with ``text_`` before them), of the top level, or of ``vision_config``.
    """
    longest_edge = changes.pop("longest_edge", LONGEST_EDGE[kind])
    top = {key: changes.pop(key) for key in (*TOP[kind], "spatial_merge_size") if key in changes}
    text = {key.removeprefix("text_"): changes.pop(key) for key in list(changes) if key.startswith("text_")}
    vision = {**VISION, "patch_size": PATCH[kind], "image_size": longest_edge, "num_hidden_layers": depth, **changes}
    sections = {"vision_config": vision, "text_config": {**TEXT, **text}, **TOP[kind], **top}
    processor = {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": longest_edge},
        "patch_size": {"height": vision["patch_size"], "width": vision["patch_size"]},
    }
    return save_model(folder, kind.capitalize(), sections, processor, dtype=dtype, seed=seed)


def by_pixtral(folder: Path, images: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the projected rows of each image; transformers fails if all images together have a single token."""
    model, processor = load_reference(folder, dtype)
    # As PixtralProcessor calls it: sides must be multiples of the side of a token.
    side = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    decoded = [Image.fromarray(image) for image in images]
    inputs = processor(images=decoded, patch_size={"height": side, "width": side}, return_tensors="pt")
    layer = model.config.vision_feature_layer
    with torch.inference_mode():
        return list(model.get_image_features(**inputs, vision_feature_layer=layer).pooler_output)


# Unpublished: the graph must follow from the configuration, not from the model's name.
OTHERS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "heads of 72": {"hidden_size": 144, "num_attention_heads": 2},
    "heads of 104, odd mlp": {"hidden_size": 208, "num_attention_heads": 2, "intermediate_size": 77},
    "small patches": {"patch_size": 8, "longest_edge": 96},
    "another base": {"rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}},
    "an inner layer, quick gelu projector": {"projector_hidden_act": "quick_gelu", "vision_feature_layer": -2},
    "silu projector": {"projector_hidden_act": "silu", "text_hidden_size": 56},
}

WRONG: dict[str, Sequence[object]] = {
    **in_section(
        {
            "hidden_act": [None, "gelu"],
            "hidden_size": [0, "1024"],
            "num_attention_heads": [7],
            "head_dim": [80],
            "num_hidden_layers": [0],
            "intermediate_size": [4096.5],
            "patch_size": [[16, 16]],
            "num_channels": [True],
            "image_size": [-1],
            "rope_parameters.rope_type": ["yarn"],
            "rope_parameters.rope_theta": [0.5],
        }
    ),
    "vision_feature_layer": [25, "last", []],
    "projector_hidden_act": ["mish"],
    "multimodal_projector_bias": ["yes"],
}

GENERATIONS = [
    [(part, before + part) for part in ("vision_tower.", "multi_modal_projector.", "language_model.")]
    for before in ("model.", "module.model.")
]

CASES = [
    TowerCase(
        name="pixtral",
        save=partial(save, "llava"),
        reference=by_pixtral,
        others={
            **OTHERS,
            "no biases": {"multimodal_projector_bias": False},
            "two layers": {"vision_feature_layer": [-1, 1]},
            "the first rows": {"vision_feature_layer": [0, -1]},
        },
        prefixes=GENERATIONS,
        # 'default' would drop the first patch of a call.
        wrong={**WRONG, "vision_feature_select_strategy": ["default", None]},
    ),
    TowerCase(
        name="mistral3",
        save=partial(save, "mistral3"),
        reference=by_pixtral,
        others={
            **OTHERS,
            "biases": {"multimodal_projector_bias": True},
            "merge one": {"spatial_merge_size": 1},
            "merge three": {"spatial_merge_size": 3, "patch_size": 8, "longest_edge": 144},
            "loose epsilon": {"text_rms_norm_eps": 0.05},
            "one layer in a list": {"vision_feature_layer": [2]},
        },
        prefixes=GENERATIONS,
        wrong={**WRONG, "vision_feature_layer": [[-1, -2]], "spatial_merge_size": [0], "text_config": [None]},
    ),
]
