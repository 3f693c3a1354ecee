"""CLIP's and SigLIP's image encoders, alone and as half of the contrastive model."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import HALF, by_transformers, save_model

from . import TowerCase, in_section

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "one block": {"depth": 1},
    "heads of 72": {"vision": {"hidden_size": 144, "num_attention_heads": 2}},
    "heads of 80": {"vision": {"hidden_size": 80, "num_attention_heads": 1}},
    "heads of 104": {"vision": {"hidden_size": 208, "num_attention_heads": 2, "intermediate_size": 40}},
    "small patches": {"vision": {"patch_size": 8, "image_size": 40}},
    "an image of no whole patches": {"vision": {"patch_size": 16, "image_size": 55}},
    "one patch": {"vision": {"image_size": 14}},
    "erf and a large epsilon": {"vision": {"hidden_act": "gelu", "layer_norm_eps": 0.1}},
}
"""Unpublished configurations of an encoder."""
ENCODER_WRONG: Mapping[str, Sequence[object]] = {
    "hidden_size": [0, "768", True],
    "num_hidden_layers": [-1, 2.5],
    "num_attention_heads": [7, 0, 512],
    "patch_size": [0, [14, 14]],
    "image_size": [8, [224, 224]],
    "num_channels": [0],
    "layer_norm_eps": [-1e-5, "1e-5"],
    "hidden_act": ["mish"],
}
"""Values that must be rejected, as in :attr:`support.towers.TowerCase.wrong`."""

CLIP_COLORS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TEXT_HALF = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def tiny_vision(kind: str, depth: int, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the configuration of a small encoder; SigLIP's image size is no multiple of its patch size."""
    return {
        "model_type": f"{kind}_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "image_size": 56 if kind == "clip" else 60,
        "patch_size": 14,
        **(changes or {}),
    }


def make_processor(kind: str, side: int, **changes: Any) -> dict[str, Any]:
    """Returns the image processor's file for an encoder, in the form of old checkpoints."""
    settings: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    square = {"height": side, "width": side}
    if kind == "clip":
        settings |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, **CLIP_COLORS}
        settings |= {"do_center_crop": True, "crop_size": square, "do_convert_rgb": True}
    else:
        settings |= {"image_processor_type": "SiglipImageProcessor", "size": square, **HALF}
    return {**settings, **changes}


def save_encoder(
    name: str,
    folder: Path,
    *,
    whole: bool = False,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Saves an encoder (``name`` is ``"CLIP"`` or ``"Siglip"``) alone, or the ``whole`` contrastive model."""
    encoder = tiny_vision(name.lower(), depth, vision)
    processor = make_processor(name.lower(), encoder["image_size"])
    if whole:
        sections = {"vision_config": encoder, "text_config": TEXT_HALF}
        return save_model(folder, name, sections, processor, suffix="Model", **options)
    return save_model(folder, f"{name}Vision", encoder, processor, suffix="Model", **options)


def run_encoder(model: Any, inputs: Any) -> torch.Tensor:
    rows: torch.Tensor = getattr(model, "vision_model", model)(inputs["pixel_values"]).last_hidden_state[0]
    return rows


by_encoder = partial(by_transformers, encode=run_encoder)
save_clip_vision = partial(save_encoder, "CLIP")
save_siglip = partial(save_encoder, "Siglip", whole=True)
save_siglip_vision = partial(save_encoder, "Siglip")

NO_HEAD = {"without pooling": {"vision": {"vision_use_head": False}}}
CONTRASTIVE_PREFIXES = [[("vision_model.", "module.vision_model.")], [("vision_model.", "model.vision_model.")]]
ENCODER_PREFIXES = [[("", "vision_model.")], [("", "module.vision_model.")], [("", "model.")]]

CASES = [
    TowerCase(
        name="clip",
        save=partial(save_encoder, "CLIP", whole=True),
        reference=by_encoder,
        prefixes=CONTRASTIVE_PREFIXES,
        wrong=in_section({**ENCODER_WRONG, "model_type": ["siglip_vision_model"]}),
        repeats=True,
    ),
    TowerCase(
        name="siglip",
        save=save_siglip,
        reference=by_encoder,
        prefixes=CONTRASTIVE_PREFIXES,
        wrong=in_section({**ENCODER_WRONG, "vision_use_head": ["no"], "model_type": ["siglip2_vision_model"]}),
        repeats=True,
    ),
    *(
        TowerCase(
            name=name,
            save=save,
            reference=by_encoder,
            others={**ENCODERS, **others},
            prefixes=ENCODER_PREFIXES,
            wrong=ENCODER_WRONG,
        )
        for name, save, others in (
            ("clip_vision_model", save_clip_vision, {}),
            ("siglip_vision_model", save_siglip_vision, NO_HEAD),
        )
    ),
]
