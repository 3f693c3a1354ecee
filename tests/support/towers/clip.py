"""CLIP's image encoder: alone, and as half of the contrastive model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.vit import ENCODERS, by_encoder, perturb, tiny_vision, write_processor

from . import TowerCase

TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def save_clip_vision(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """A ``CLIPVisionModel``, whose names begin with nothing."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(**tiny_vision("clip", depth, vision))
    perturb(CLIPVisionModel(config)).to(dtype).save_pretrained(folder)
    write_processor(folder, "clip", config.image_size)
    return folder


def save_clip(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """A ``CLIPModel``, with its text half."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    config = CLIPConfig(vision_config=tiny_vision("clip", depth, vision), text_config=TINY_TEXT, projection_dim=24)
    perturb(CLIPModel(config)).to(dtype).save_pretrained(folder)
    write_processor(folder, "clip", config.vision_config.image_size)
    return folder


CASES = [
    TowerCase(
        name="clip",
        save=save_clip,
        reference=by_encoder,
        prefixes=[[("vision_model.", "module.vision_model.")], [("vision_model.", "model.vision_model.")]],
    ),
    TowerCase(
        name="clip_vision_model",
        save=save_clip_vision,
        reference=by_encoder,
        others=ENCODERS,
        prefixes=[[("", "vision_model.")], [("", "module.vision_model.")], [("", "model.")]],
    ),
]
