"""Gemma 3, with and without pan-and-scan, ShieldGemma 2, which holds a whole Gemma 3, and PaliGemma."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import TINY_TEXT, by_transformers, save_model

from . import TowerCase, in_section
from .encoders import ENCODER_WRONG

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "vision_use_head": False,
}
PAN_AND_SCAN: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 24,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def save_gemma3(
    folder: Path,
    name: str = "Gemma3",
    *,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    tokens: int = 16,
    **options: Any,
) -> Path:
    """Saves a whole small Gemma 3, ShieldGemma 2 or PaliGemma (``name`` is the prefix of its classes).

    ``vision``, ``text`` and ``processor`` are changes of the sections; ``tokens`` is Gemma 3's ``mm_tokens_per_image``.
    """
    encoder = {**VISION, "num_hidden_layers": depth, **(vision or {})}
    language = {**TINY_TEXT, "head_dim": 12, **(text or {})}
    settings = {"size": {"height": encoder["image_size"], "width": encoder["image_size"]}, **(processor or {})}
    if name == "PaliGemma":
        own = {"projection_dim": language["hidden_size"], "text_config": {"model_type": "gemma", **language}}
        settings = {"image_processor_type": "SiglipImageProcessor", "resample": 3, **settings}
    else:
        own = {"mm_tokens_per_image": tokens, "text_config": {"model_type": "gemma3_text", **language}}
        settings = {"image_processor_type": "Gemma3ImageProcessor", **settings}
    return save_model(folder, name, {"vision_config": encoder, **own}, settings, **options)


def get_rows(model: Any, inputs: Any) -> torch.Tensor:
    """Returns the projected rows of all tiles."""
    holder = getattr(model, "model", model)
    rows: torch.Tensor = holder.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    return rows


# The processor's file does not state whether an image is converted.
by_gemma = partial(by_transformers, encode=get_rows, do_convert_rgb=False)

ENCODERS: dict[str, dict[str, Any]] = {
    "heads-of-72": {"depth": 2, "vision": {"hidden_size": 144, "num_attention_heads": 2}},
    "heads-of-80": {"depth": 5, "vision": {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 100}},
    "heads-of-104": {"depth": 2, "vision": {"hidden_size": 208, "num_attention_heads": 2}, "text": {"hidden_size": 40}},
    "erf-gelu-large-eps": {"vision": {"hidden_act": "gelu", "layer_norm_eps": 0.05}},
    "with-a-head": {"vision": {"vision_use_head": True}},
}

SIGLIP_WRONG = {**in_section(ENCODER_WRONG), "vision_config": [None], "vision_config.model_type": ["clip_vision_model"]}
WRONG: dict[str, Sequence[object]] = {
    **SIGLIP_WRONG,
    # The tile has 8 × 8 patches.
    "mm_tokens_per_image": [0, 15, 9, 81],
    "text_config.hidden_size": ["2560"],
    "text_config": [{"model_type": "mamba"}],
}

# Published checkpoints have a level `vision_model.` that transformers 5 no longer saves; the second is what 4.52 saved.
TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
PREFIXES = [
    [(TOWER, f"{TOWER}vision_model.")],
    [(TOWER, f"model.{TOWER}vision_model."), (PROJECTOR, f"model.{PROJECTOR}")],
    [(TOWER, f"model.{TOWER}"), (PROJECTOR, f"module.model.{PROJECTOR}")],
]
SHIELD_PREFIXES = [
    [(f"model.model.{TOWER}", f"model.{TOWER}vision_model."), (f"model.model.{PROJECTOR}", f"model.{PROJECTOR}")],
    [(f"model.model.{TOWER}", f"{TOWER}vision_model."), (f"model.model.{PROJECTOR}", PROJECTOR)],
]

CASES = [
    TowerCase(
        name="gemma3",
        save=save_gemma3,
        reference=by_gemma,
        others={
            **ENCODERS,
            "one-block": {"depth": 1, "seed": 1},
            "pooled-by-4": {"tokens": 4},
            "pooled-by-3": {"tokens": 9, "vision": {"image_size": 72, "patch_size": 8}},
            "not-pooled": {"tokens": 64},
            "one-token": {"tokens": 1, "vision": {"image_size": 70}},
            "rest-beyond-patches": {"vision": {"image_size": 117}},
            "lanczos-and-other-mean": {
                "processor": {"resample": 1, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
            },
        },
        prefixes=PREFIXES,
        wrong=WRONG,
    ),
    TowerCase(
        name="gemma3-pan-and-scan",
        save=partial(save_gemma3, processor=PAN_AND_SCAN),
        reference=by_gemma,
        others={
            "four-crops": {"processor": {**PAN_AND_SCAN, "pan_and_scan_max_num_crops": 4}},
            "rarely": {"processor": {**PAN_AND_SCAN, "pan_and_scan_min_ratio_to_activate": 2.5}},
        },
        prefixes=PREFIXES[:1],
        sizes=((28, 28), (157, 243), (300, 64), (30, 500), (90, 90)),
        repeats=True,
    ),
    TowerCase(
        name="shieldgemma2",
        save=partial(save_gemma3, name="ShieldGemma2", suffix="ForImageClassification"),
        reference=partial(by_gemma, auto_class="AutoModelForImageClassification"),
        others={"wider": {"vision": {"hidden_size": 96}, "depth": 2}},
        prefixes=SHIELD_PREFIXES,
        repeats=True,
    ),
    TowerCase(
        name="paligemma",
        save=partial(save_gemma3, name="PaliGemma"),
        reference=by_gemma,
        others={
            **ENCODERS,
            "one-block-one-head": {"depth": 1, "vision": {"hidden_size": 64, "num_attention_heads": 1}},
            "patches-of-10": {"vision": {"image_size": 70, "patch_size": 10, "intermediate_size": 100}},
            "rest-beyond-patches": {"vision": {"image_size": 97}},
            "second-generation-text": {"text": {"model_type": "gemma2", "hidden_size": 40, "head_dim": 10}},
        },
        prefixes=PREFIXES,
        wrong={**SIGLIP_WRONG, "projection_dim": [0, True]},
    ),
]
