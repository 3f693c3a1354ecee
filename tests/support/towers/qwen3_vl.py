"""Qwen3-VL and Qwen3.5, dense and with experts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.qwen import TINY_TEXT, by_transformers, save_model

from . import TowerCase, in_section

TINY_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 49,
}
DEEPSTACK: dict[str, Any] = {"deepstack_visual_indexes": [0, 2]}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
HYBRID: dict[str, Any] = {
    "layer_types": ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": ("Qwen3VL", DEEPSTACK, {}),
    "qwen3_vl_moe": ("Qwen3VLMoe", DEEPSTACK, EXPERTS),
    "qwen3_5": ("Qwen3_5", {}, HYBRID),
    "qwen3_5_moe": ("Qwen3_5Moe", {}, {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 16}),
}
"""Model type → prefix of its classes' names, and its own settings of the tower and of the language model."""


def save_qwen3(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **vision: Any
) -> Path:
    """Saves a whole small model of ``model_type``, with its image processor."""
    import transformers

    name, tower, text = MODELS[model_type]
    config = getattr(transformers, f"{name}Config")(
        vision_config={**TINY_VISION, **tower, **vision}, text_config={**TINY_TEXT, "head_dim": 12, **text}
    )
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    half = [0.5, 0.5, 0.5]
    return save_model(
        folder, model_class, config, dtype=dtype, seed=seed, area=(4096, 16777216), image_mean=half, image_std=half
    )


def save_of(model_type: str) -> Callable[..., Path]:
    """:func:`save_qwen3` of one model type."""
    return partial(save_qwen3, model_type)


# Unpublished: the graph must follow from the configuration, not from the model's name.
OTHERS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "heads of 72": {"hidden_size": 144, "num_heads": 2},
    "heads of 80": {"hidden_size": 160, "num_heads": 2},
    "heads of 104": {"hidden_size": 104, "num_heads": 1, "out_hidden_size": 56},
    "merge three": {"spatial_merge_size": 3},
    "merge one": {"spatial_merge_size": 1},
    "patches of 14": {"patch_size": 14},
    "one frame": {"temporal_patch_size": 1},
    "a table of one place": {"num_position_embeddings": 1},
    "a large table": {"num_position_embeddings": 2304},
    "erf gelu": {"hidden_act": "gelu"},
    "silu": {"hidden_act": "silu", "intermediate_size": 96},
}
OTHER_DEEPSTACKS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1, "deepstack_visual_indexes": [0]},
    "no deepstack": {"deepstack_visual_indexes": []},
    "deepstack after the last block": {"deepstack_visual_indexes": [2]},
    "deepstack after every block": {"deepstack_visual_indexes": [0, 1, 2]},
}

PREFIXES = [[("model.visual.", "visual.")], [("model.visual.", "module.model.visual.")]]
SIZES = ((32, 32), (157, 243), (300, 64), (14, 700), (90, 90))

WRONG_DEEPSTACK = {"vision_config.deepstack_visual_indexes": [1, [0, "2"], [-1], [0, 3], [2, 0], [1, 1], None]}
WRONG = in_section(
    {
        "hidden_size": ["1152"],
        "depth": [0, -3, 2.5],
        "num_heads": [0, 7, 32],
        "patch_size": [0, [14, 14]],
        "temporal_patch_size": [0],
        "spatial_merge_size": ["2", True],
        "model_type": ["siglip_vision_model"],
        "rope_parameters": [{"rope_type": "yarn"}, {"rope_theta": 0.0}],
        "out_hidden_size": [None, 0],
        "intermediate_size": [-1],
        "hidden_act": ["mish"],
        "num_position_embeddings": [0, 2303, True],
    }
)

CASES = [
    TowerCase(
        name=model_type,
        save=save_of(model_type),
        reference=by_transformers,
        others=others,
        prefixes=PREFIXES,
        sizes=SIZES,
        video=True,
        video_frames=(2, 3, 5),
        wrong={**WRONG, **(WRONG_DEEPSTACK if model_type == "qwen3_vl" else {})},
        repeats=model_type.endswith("_moe"),
    )
    for model_type, others in {
        "qwen3_vl": {**OTHERS, **OTHER_DEEPSTACKS},
        "qwen3_vl_moe": {"no deepstack": {"deepstack_visual_indexes": []}},
        "qwen3_5": OTHERS,
        "qwen3_5_moe": {"one block": {"depth": 1}},
    }.items()
]
