"""PaliGemma."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import TowerCase
from .gemma3 import PREFIXES, SIGLIP_WRONG, TEXT, VISION, by_transformers, perturb


def save_paligemma(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Path:
    """Saves a whole small PaliGemma, with its image processor; arguments as for Gemma 3."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(seed)
    vision = {**VISION, "image_size": 84, "num_hidden_layers": depth, **(vision or {})}
    text = {"model_type": "gemma", **TEXT, **(text or {})}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=text["hidden_size"])
    model = PaliGemmaForConditionalGeneration(config)
    perturb(model)
    model.to(dtype).save_pretrained(folder)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    SiglipImageProcessorPil(size=size, resample=3, **(processor or {})).save_pretrained(folder)
    return folder


CASES = [
    TowerCase(
        name="paligemma",
        save=save_paligemma,
        reference=partial(by_transformers, model_class="PaliGemmaForConditionalGeneration"),
        others={
            "one-block-one-head": {"depth": 1, "vision": {"hidden_size": 64, "num_attention_heads": 1}},
            "heads-of-72": {"depth": 2, "vision": {"hidden_size": 144, "num_attention_heads": 2}},
            "heads-of-80": {"depth": 4, "vision": {"hidden_size": 160, "num_attention_heads": 2}},
            "heads-of-104": {"depth": 2, "vision": {"hidden_size": 208, "num_attention_heads": 2}},
            "patches-of-10": {"vision": {"image_size": 70, "patch_size": 10, "intermediate_size": 100}},
            "rest-beyond-patches": {"vision": {"image_size": 97}},
            "erf-gelu-large-eps": {"vision": {"hidden_act": "gelu", "layer_norm_eps": 0.05}},
            "second-generation-text": {"text": {"model_type": "gemma2", "hidden_size": 40, "head_dim": 10}},
            "with-a-head": {"vision": {"vision_use_head": True}},
        },
        prefixes=PREFIXES,
        wrong={**SIGLIP_WRONG, "projection_dim": [0, True]},
    )
]
