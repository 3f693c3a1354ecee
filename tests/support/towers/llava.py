"""LLaVA, LLaVA-NeXT and LLaVA-OneVision, each with a CLIP or a SigLIP encoder."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import TINY_TEXT, by_transformers, save_model

from . import TowerCase, in_section
from .encoders import ENCODER_WRONG, ENCODERS, make_processor, tiny_vision

CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles."""
MANY_CANVASES = tuple((rows, columns) for rows in range(1, 5) for columns in range(1, 5))


def save_llava(
    folder: Path,
    kind: str = "clip",
    *,
    name: str = "Llava",
    depth: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    canvases: tuple[tuple[int, int], ...] = (),
    **changes: Any,
) -> Path:
    """Saves a whole small LLaVA (``name`` is the prefix of its classes), with ``changes`` of the top level."""
    encoder = tiny_vision(kind, depth, vision)
    side = encoder["image_size"]
    sections = {"vision_config": encoder, "text_config": {"model_type": "llama", **TINY_TEXT, **(text or {})}}
    processor = make_processor(kind, side)
    if kind == "siglip":
        sections["vision_feature_select_strategy"] = "full"
    if canvases:
        pinpoints = [[rows * side, columns * side] for rows, columns in canvases]
        sections["image_grid_pinpoints"] = pinpoints
        kinds = {"image_processor_type": f"{name}ImageProcessor", "image_grid_pinpoints": pinpoints}
        # Published files of LLaVA-NeXT scale by the shorter side, which has no other effect on a square tile.
        if name == "LlavaNext":
            processor = make_processor("clip", side, **kinds)
        else:
            processor = make_processor("siglip", side, do_pad=True, **kinds)
    return save_model(folder, name, {**sections, **changes}, processor, dtype=dtype, seed=seed)


save_llava_next = partial(save_llava, name="LlavaNext", canvases=CANVASES)
# Its canvases are shrunk to four tiles' worth of tokens.
save_llava_onevision = partial(
    save_llava,
    name="LlavaOnevision",
    kind="siglip",
    text={"model_type": "qwen2"},
    canvases=MANY_CANVASES,
    vision_aspect_ratio="anyres_max_4",
)

PREFIXES = [
    [
        (part, f"{before}{part}{level if part == 'vision_tower.' else ''}")
        for part in ("vision_tower.", "multi_modal_projector.")
    ]
    for before, level in (("", "vision_model."), ("model.", "vision_model."), ("model.", ""), ("module.model.", ""))
]
"""Generations of the names in a vision-language model: prefix that is saved now → published prefix."""
TILED_PREFIXES = [
    [*pairs, ("image_newline", pairs[1][1].replace("multi_modal_projector.", "image_newline"))] for pairs in PREFIXES
]

WRONG: dict[str, Sequence[object]] = {
    **in_section(ENCODER_WRONG),
    "vision_feature_layer": [27, -28, "-2", True, [], [1, 99], [1.5]],
    "vision_feature_select_strategy": ["cls_patch"],
    "projector_hidden_act": ["swish2"],
    "multimodal_projector_bias": ["yes"],
    "vision_config": [[1]],
    "text_config.hidden_size": [0],
    "text_config": [{"model_type": "rwkv"}],
}
WRONG_TILED: dict[str, Sequence[object]] = {
    **WRONG,
    "image_grid_pinpoints": [336, [[336]], [[336, 672], [336, 0]], [[336, "672"]], ["336x672"]],
}

SEVERAL_LAYERS: dict[str, dict[str, Any]] = {"several layers": {"vision_feature_layer": [-2, 1]}}
OTHERS: dict[str, dict[str, Any]] = {
    **SEVERAL_LAYERS,
    "last layer": {"vision_feature_layer": -1},
    "without projector bias": {"multimodal_projector_bias": False},
}

CASES = [
    TowerCase(
        name="llava",
        save=save_llava,
        reference=by_transformers,
        others={
            **OTHERS,
            **{name: ENCODERS[name] for name in ("one block", "heads of 72", "an image of no whole patches")},
            "positive layer": {"vision_feature_layer": 1},
            "what enters, in a list": {"vision_feature_layer": [0]},
            "quick projector of a wide text": {"projector_hidden_act": "quick_gelu", "text": {"hidden_size": 80}},
            "class token kept": {"vision_feature_select_strategy": "full"},
            "class tokens of several layers": {
                "vision_feature_select_strategy": "full",
                "vision_feature_layer": [1, -1],
            },
        },
        prefixes=PREFIXES,
        wrong=WRONG,
    ),
    TowerCase(
        name="llava-siglip",
        save=partial(save_llava, kind="siglip"),
        reference=by_transformers,
        others={"last layer": OTHERS["last layer"], **SEVERAL_LAYERS},
        prefixes=PREFIXES[:1],
        # 'default' would drop the first patch of an encoder without class token.
        wrong={"vision_feature_select_strategy": ["default", None]},
        repeats=True,
    ),
    TowerCase(
        name="llava_next",
        save=save_llava_next,
        reference=by_transformers,
        others={
            **OTHERS,
            "many canvases": {"canvases": MANY_CANVASES},
            "one canvas": {"canvases": ((2, 3),)},
            "tanh projector": {"projector_hidden_act": "gelu_pytorch_tanh"},
            "small patches": ENCODERS["small patches"],
        },
        prefixes=TILED_PREFIXES,
        # There is no place for class tokens among the tokens of tiles: 'full' needs a SigLIP encoder.
        wrong={**WRONG_TILED, "vision_feature_select_strategy": ["full"]},
    ),
    TowerCase(
        name="llava_next-siglip",
        save=partial(save_llava_next, kind="siglip"),
        reference=by_transformers,
        others=SEVERAL_LAYERS,
        wrong={"vision_feature_select_strategy": ["default", None]},
        repeats=True,
    ),
    TowerCase(
        name="llava_onevision",
        save=save_llava_onevision,
        reference=by_transformers,
        others={
            **SEVERAL_LAYERS,
            "shrunk to two": {"vision_aspect_ratio": "anyres_max_2"},
            "never shrunk": {"vision_aspect_ratio": "anyres_max_16"},
            "one canvas": {"canvases": ((3, 4),)},
            "layer before the last": {"vision_feature_layer": -2, "multimodal_projector_bias": False},
            "heads of 72": ENCODERS["heads of 72"],
            "without a pooling head": {"vision": {"vision_use_head": False}},
        },
        prefixes=TILED_PREFIXES,
        wrong={
            **WRONG_TILED,
            "vision_aspect_ratio": ["anyres", "square", "pad", "anyres_max_", "anyres_max_0", "anyres_max_9x", 9],
            "vision_feature_select_strategy": ["default"],
        },
    ),
    TowerCase(
        name="llava_onevision-clip",
        save=partial(save_llava_onevision, kind="clip", vision_feature_select_strategy="default"),
        reference=by_transformers,
        wrong={"vision_feature_select_strategy": ["full", None]},
        repeats=True,
    ),
]
