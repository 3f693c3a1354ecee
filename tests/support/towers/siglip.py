"""SigLIP's image encoder: alone, and as half of the contrastive model."""

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


def save_siglip_vision(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """A ``SiglipVisionModel``, whose names begin with nothing."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    config = SiglipVisionConfig(**tiny_vision("siglip", depth, vision))
    perturb(SiglipVisionModel(config)).to(dtype).save_pretrained(folder)
    write_processor(folder, "siglip", config.image_size)
    return folder


def save_siglip(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """A ``SiglipModel``, with its text half."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    config = SiglipConfig(vision_config=tiny_vision("siglip", depth, vision), text_config=TINY_TEXT)
    perturb(SiglipModel(config)).to(dtype).save_pretrained(folder)
    write_processor(folder, "siglip", config.vision_config.image_size)
    return folder


CASES = [
    TowerCase(
        name="siglip",
        save=save_siglip,
        reference=by_encoder,
        prefixes=[[("vision_model.", "module.vision_model.")], [("vision_model.", "model.vision_model.")]],
    ),
    TowerCase(
        name="siglip_vision_model",
        save=save_siglip_vision,
        reference=by_encoder,
        others={**ENCODERS, "without pooling": {"vision": {"vision_use_head": False}}},
        prefixes=[[("", "vision_model.")], [("", "module.vision_model.")], [("", "model.")]],
    ),
]
