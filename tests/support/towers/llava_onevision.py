"""LLaVA-OneVision, with canvases that are shrunk."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.vit import TINY_TEXT, by_llava, perturb, tiny_vision, write_processor

from . import TowerCase
from .llava import LLAVA_WRONG
from .llava_next import CASES as WITH_TILES
from .llava_next import WRONG_CANVASES

CANVASES = tuple((rows, columns) for rows in range(1, 5) for columns in range(1, 5))
"""Rows and columns of tiles."""


def save_llava_onevision(
    folder: Path,
    kind: str = "siglip",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    canvases: tuple[tuple[int, int], ...] = CANVASES,
    **changes: Any,
) -> Path:
    """Saves a whole small LLaVA-OneVision whose canvases are shrunk to four tiles' worth of tokens."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(seed)
    encoder = tiny_vision(kind, depth, {"vision_use_head": False, **(vision or {})})
    side = encoder["image_size"]
    pinpoints = [[rows * side, columns * side] for rows, columns in canvases]
    config = LlavaOnevisionConfig(
        vision_config=encoder,
        text_config={**TINY_TEXT, "model_type": "qwen2"},
        image_grid_pinpoints=pinpoints,
        **{"vision_aspect_ratio": "anyres_max_4", **changes},
    )
    perturb(LlavaOnevisionForConditionalGeneration(config)).to(dtype).save_pretrained(folder)
    kinds = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": pinpoints}
    write_processor(folder, "siglip", side, do_pad=True, **kinds)
    return folder


CASES = [
    TowerCase(
        name="llava_onevision",
        save=save_llava_onevision,
        reference=by_llava,
        others={
            "shrunk to two": {"vision_aspect_ratio": "anyres_max_2"},
            "never shrunk": {"vision_aspect_ratio": "anyres_max_16"},
            "one canvas": {"canvases": ((3, 4),)},
            "several layers": {"vision_feature_layer": [-2, 1]},
            "layer before the last": {"vision_feature_layer": -2},
            "without projector bias": {"multimodal_projector_bias": False},
            "heads of 72": {"vision": {"hidden_size": 144, "num_attention_heads": 2}},
            "with a pooling head": {"vision": {"vision_use_head": True}},
        },
        prefixes=WITH_TILES[0].prefixes,
        wrong={
            **LLAVA_WRONG,
            **WRONG_CANVASES,
            "vision_aspect_ratio": ["anyres", "square", "pad", "anyres_max_", "anyres_max_0", "anyres_max_9x", 9],
            "vision_feature_select_strategy": ["default"],
        },
    ),
    TowerCase(
        name="llava_onevision-clip",
        save=partial(save_llava_onevision, kind="clip", vision_feature_select_strategy="default"),
        reference=by_llava,
        wrong={"vision_feature_select_strategy": ["full", None]},
        repeats=True,
    ),
]
