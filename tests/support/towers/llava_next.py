"""LLaVA-NeXT with a CLIP or a SigLIP encoder."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.vit import ENCODERS, PREFIXES_IN_MODEL, TINY_TEXT, by_llava, perturb, tiny_vision, write_processor

from . import TowerCase
from .llava import LLAVA_WRONG

CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles."""


def save_llava_next(
    folder: Path,
    kind: str = "clip",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
    canvases: tuple[tuple[int, int], ...] = CANVASES,
    **changes: Any,
) -> Path:
    """Saves a whole small LLaVA-NeXT; a SigLIP encoder's image is no multiple of its patches."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(seed)
    if kind == "siglip":
        changes = {"vision_feature_select_strategy": "full", **changes}
    encoder = tiny_vision(kind, depth, vision)
    side = encoder["image_size"]
    pinpoints = [[rows * side, columns * side] for rows, columns in canvases]
    config = LlavaNextConfig(vision_config=encoder, text_config=TINY_TEXT, image_grid_pinpoints=pinpoints, **changes)
    perturb(LlavaNextForConditionalGeneration(config)).to(dtype).save_pretrained(folder)
    # Published files of either kind scale by the shorter side, which has no other effect on a square tile.
    write_processor(
        folder, "clip", side, image_processor_type="LlavaNextImageProcessor", image_grid_pinpoints=pinpoints
    )
    return folder


WRONG_CANVASES: dict[str, list[object]] = {
    "image_grid_pinpoints": [336, [[336]], [[336, 672], [336, 0]], [[336, "672"]], ["336x672"]]
}

OTHERS: dict[str, dict[str, Any]] = {
    "many canvases": {"canvases": tuple((rows, columns) for rows in range(1, 4) for columns in range(1, 4))},
    "one canvas": {"canvases": ((2, 3),)},
    "several layers": {"vision_feature_layer": [-2, 1]},
    "last layer": {"vision_feature_layer": -1},
    "without projector bias": {"multimodal_projector_bias": False},
    "tanh projector": {"projector_hidden_act": "gelu_pytorch_tanh"},
}

CASES = [
    TowerCase(
        name="llava_next",
        save=save_llava_next,
        reference=by_llava,
        others={**OTHERS, "small patches": ENCODERS["small patches"]},
        prefixes=[
            (*pairs, ("image_newline", pairs[1][1].replace("multi_modal_projector.", "image_newline")))
            for pairs in PREFIXES_IN_MODEL
        ],
        # There is no place for class tokens among the tokens of tiles: 'full' needs a SigLIP encoder.
        wrong={**LLAVA_WRONG, **WRONG_CANVASES, "vision_feature_select_strategy": ["full"]},
    ),
    TowerCase(
        name="llava_next-siglip",
        save=partial(save_llava_next, kind="siglip"),
        reference=by_llava,
        others={"several layers": OTHERS["several layers"]},
        wrong={"vision_feature_select_strategy": ["default", None]},
        repeats=True,
    ),
]
