"""LLaVA with a CLIP or a SigLIP encoder."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.vit import (
    ENCODER_WRONG,
    ENCODERS,
    PREFIXES_IN_MODEL,
    TINY_TEXT,
    by_llava,
    perturb,
    tiny_vision,
    write_processor,
)

from . import TowerCase, in_section


def save_llava(
    folder: Path,
    kind: str = "clip",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Saves a whole small LLaVA; a SigLIP encoder's image is no multiple of its patches."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    if kind == "siglip":
        changes = {"vision_feature_select_strategy": "full", **changes}
    config = LlavaConfig(
        vision_config=tiny_vision(kind, depth, vision), text_config={**TINY_TEXT, **(text or {})}, **changes
    )
    perturb(LlavaForConditionalGeneration(config)).to(dtype).save_pretrained(folder)
    write_processor(folder, kind, config.vision_config.image_size)
    return folder


LLAVA_WRONG: dict[str, Sequence[object]] = {
    **in_section(ENCODER_WRONG),
    "vision_feature_layer": [27, -28, "-2", True, [], [1, 99], [1.5]],
    "vision_feature_select_strategy": ["cls_patch"],
    "projector_hidden_act": ["swish2"],
    "multimodal_projector_bias": ["yes"],
    "vision_config": [[1]],
    "text_config.hidden_size": [0],
    "text_config": [{"model_type": "rwkv"}],
}

OTHERS: dict[str, dict[str, Any]] = {
    "last layer": {"vision_feature_layer": -1},
    "positive layer": {"vision_feature_layer": 1},
    "what enters, in a list": {"vision_feature_layer": [0]},
    "several layers": {"vision_feature_layer": [-2, 0, 3]},
    "without projector bias": {"multimodal_projector_bias": False},
    "quick projector": {"projector_hidden_act": "quick_gelu"},
    "wide text": {"text": {"hidden_size": 80}},
}

CASES = [
    TowerCase(
        name="llava",
        save=save_llava,
        reference=by_llava,
        others={
            **OTHERS,
            **{name: ENCODERS[name] for name in ("one block", "heads of 72", "an image of no whole patches")},
            "class token kept": {"vision_feature_select_strategy": "full"},
            "class tokens of several layers": {
                "vision_feature_select_strategy": "full",
                "vision_feature_layer": [1, -1],
            },
        },
        prefixes=PREFIXES_IN_MODEL,
        wrong=LLAVA_WRONG,
    ),
    TowerCase(
        name="llava-siglip",
        save=partial(save_llava, kind="siglip"),
        reference=by_llava,
        others={name: OTHERS[name] for name in ("last layer", "several layers")},
        prefixes=PREFIXES_IN_MODEL[:1],
        # 'default' would drop the first patch of an encoder without class token.
        wrong={"vision_feature_select_strategy": ["default", None]},
        repeats=True,
    ),
]
