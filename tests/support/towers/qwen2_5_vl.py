"""Qwen2.5-VL."""

from pathlib import Path
from typing import Any

import torch
from support.qwen import TINY_TEXT, by_transformers, save_model

from . import TowerCase, in_section

TINY_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 84,
    "num_heads": 4,
    "out_hidden_size": 48,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}


def save_qwen2_5_vl(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **vision: Any) -> Path:
    """Saves a whole small Qwen2.5-VL, with its image processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(vision_config={**TINY_VISION, **vision}, text_config=TINY_TEXT)
    return save_model(folder, Qwen2_5_VLForConditionalGeneration, config, dtype=dtype, seed=seed)


# Unpublished: the graph must follow from the configuration, not from the model's name.
OTHERS = {
    "one block": {"depth": 1},
    "every block full": {"fullatt_block_indexes": [0, 1, 2]},
    "no block full": {"fullatt_block_indexes": []},
    "windows of one token": {"window_size": 28},
    "windows that are no whole tokens": {"window_size": 100},
    "windows larger than images": {"window_size": 2800},
    "merge three": {"spatial_merge_size": 3, "window_size": 84},
    "merge one": {"spatial_merge_size": 1, "window_size": 42},
    "small patches": {"patch_size": 8, "window_size": 48},
    "one frame": {"temporal_patch_size": 1},
    "heads of 80": {"hidden_size": 160, "num_heads": 2},
    "heads of 72": {"hidden_size": 72, "num_heads": 1},
    "heads of 104": {"hidden_size": 104, "num_heads": 1, "out_hidden_size": 56},
    "a whole width": {"intermediate_size": 128},
    "an odd width": {"intermediate_size": 37},
    "another base": {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
}

WRONG = in_section(
    {
        "hidden_size": [None, 3584.0],
        "depth": [0, -3, 2.5],
        "num_heads": [0, 7, 32],
        "patch_size": [0, [14, 14]],
        "temporal_patch_size": [0],
        "spatial_merge_size": ["2", True],
        "model_type": ["siglip_vision_model"],
        "rope_parameters": [{"rope_type": "yarn"}, {"rope_theta": 0.0}],
        "out_hidden_size": [None, "2048"],
        "intermediate_size": [0],
        "hidden_act": ["gelu"],
        "window_size": [27, "112"],
        "fullatt_block_indexes": [7, [7, -1], [7, "15"]],
    }
)

CASES = [
    TowerCase(
        name="qwen2_5_vl",
        save=save_qwen2_5_vl,
        reference=by_transformers,
        others=OTHERS,
        prefixes=[[("visual.", "model.visual.")], [("visual.", "module.model.visual.")]],
        video=True,
        wrong=WRONG,
    )
]
