"""Gemma 3, with and without pan-and-scan, and ShieldGemma 2, which holds a whole Gemma 3."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.vit import ENCODER_WRONG

from . import TowerCase, in_section

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
    "vision_use_head": False,
}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 64,
}
PAN_AND_SCAN: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 24,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def save_gemma3(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    kind: str = "gemma3",
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    tokens: int = 16,
) -> Path:
    """Saves a whole small Gemma 3 or ShieldGemma 2, with its image processor.

    ``vision``, ``text`` and ``processor`` are changes of the two sections and of the processor's settings; ``tokens`` is
    ``mm_tokens_per_image``.
    """
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        ShieldGemma2Config,
        ShieldGemma2ForImageClassification,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    torch.manual_seed(seed)
    sections = {
        "vision_config": {**VISION, "num_hidden_layers": depth, **(vision or {})},
        "text_config": {"model_type": "gemma3_text", **TEXT, **(text or {})},
        "mm_tokens_per_image": tokens,
    }
    model: Any
    if kind == "gemma3":
        model = Gemma3ForConditionalGeneration(Gemma3Config(**sections))
    else:
        model = ShieldGemma2ForImageClassification(ShieldGemma2Config(**sections))
    perturb(model)
    model.to(dtype).save_pretrained(folder)
    side = sections["vision_config"]["image_size"]
    size = {"height": side, "width": side}
    Gemma3ImageProcessorPil(size=size, **(processor or {})).save_pretrained(folder)
    return folder


def perturb(model: torch.nn.Module) -> None:
    """Moves norms, biases and Gemma's projection away from one and zero, so that swapped or missing ones are noticed."""
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name and "multi_modal_projector" not in name:
            continue
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        elif name.endswith("mm_input_projection_weight"):
            parameter.data.normal_(std=parameter.shape[0] ** -0.5)


def by_transformers(
    folder: Path, images: Sequence[np.ndarray], dtype: torch.dtype, *, model_class: str
) -> list[torch.Tensor]:
    """Returns the projected rows of each image, tile after tile."""
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    # Gemma 2, the language model of PaliGemma 2, has no SDPA.
    attention = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    model = (
        getattr(transformers, model_class).from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    )
    holder = model.model.model if model_class.startswith("Shield") else model.model
    embeddings = []
    for image in images:
        # The processor's file does not state whether an image is converted.
        tiles = processor(images=[Image.fromarray(image)], do_convert_rgb=False, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = holder.get_image_features(tiles.flatten(0, -4)).pooler_output
        embeddings.append(rows.flatten(0, 1))
    return embeddings


OTHERS: dict[str, dict[str, Any]] = {
    "one-block": {"depth": 1, "seed": 1},
    "heads-of-72": {"depth": 2, "vision": {"hidden_size": 144, "num_attention_heads": 2}},
    "heads-of-80": {"depth": 5, "vision": {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 100}},
    "heads-of-104": {"depth": 2, "vision": {"hidden_size": 208, "num_attention_heads": 2}, "text": {"hidden_size": 40}},
    "pooled-by-4": {"tokens": 4},
    "pooled-by-3": {"tokens": 9, "vision": {"image_size": 72, "patch_size": 8}},
    "not-pooled": {"tokens": 64},
    "one-token": {"tokens": 1, "vision": {"image_size": 70}},
    "large-eps": {"vision": {"layer_norm_eps": 0.05}},
    "erf-gelu": {"vision": {"hidden_act": "gelu"}},
    "rest-beyond-patches": {"vision": {"image_size": 117}},
    "with-a-head": {"vision": {"vision_use_head": True}},
    "lanczos-and-other-mean": {
        "processor": {"resample": 1, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    },
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
        reference=partial(by_transformers, model_class="Gemma3ForConditionalGeneration"),
        others=OTHERS,
        prefixes=PREFIXES,
        wrong=WRONG,
    ),
    TowerCase(
        name="gemma3-pan-and-scan",
        save=partial(save_gemma3, processor=PAN_AND_SCAN),
        reference=partial(by_transformers, model_class="Gemma3ForConditionalGeneration"),
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
        save=partial(save_gemma3, kind="shieldgemma2"),
        reference=partial(by_transformers, model_class="ShieldGemma2ForImageClassification"),
        others={"wider": {"vision": {"hidden_size": 96}, "depth": 2}},
        prefixes=SHIELD_PREFIXES,
        repeats=True,
    ),
]
