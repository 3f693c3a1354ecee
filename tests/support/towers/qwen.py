"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5; the last two dense and with experts."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import HALF, TINY_TEXT, by_transformers, save_model

from . import TowerCase, in_section

TEXT: dict[str, Any] = {
    **TINY_TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
}
TINY_VISION: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"depth": 3, "embed_dim": 64, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 84,
        "num_heads": 4,
        "out_hidden_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "Qwen3": {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 48,
        "num_position_embeddings": 49,
    },
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
QWEN3_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": ("Qwen3VL", DEEPSTACK, {}),
    "qwen3_vl_moe": ("Qwen3VLMoe", DEEPSTACK, EXPERTS),
    "qwen3_5": ("Qwen3_5", {}, HYBRID),
    "qwen3_5_moe": ("Qwen3_5Moe", {}, {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 16}),
}
"""Model type → prefix of its classes' names, and its own settings of the tower and of the language model."""


def save_qwen(
    name: str,
    folder: Path,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    area: tuple[int, int] = (56 * 56, 12845056),
    colors: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Saves any of the Qwen-VL models (``name`` is the prefix of its classes), and their common image processor."""
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.get("patch_size", 16 if name.startswith("Qwen3") else 14),
        "merge_size": vision.get("spatial_merge_size", 2),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
        "size": {"shortest_edge": area[0], "longest_edge": area[1]},
        **(colors or {}),
    }
    return save_model(folder, name, {"vision_config": vision, "text_config": {**TEXT, **text}}, processor, **options)


def save_qwen2(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text: Mapping[str, Any] | None = None,
    **vision: Any,
) -> Path:
    """Saves a whole small Qwen2-VL or Qwen2.5-VL (``name`` is the prefix of its classes)."""
    return save_qwen(name, folder, {**TINY_VISION[name], **vision}, text or {}, dtype=dtype, seed=seed)


# Its vocabulary has the published ids of image tokens.
save_qwen2_vl = partial(save_qwen2, "Qwen2VL", text={"vocab_size": 160_000})
save_qwen2_5_vl = partial(save_qwen2, "Qwen2_5_VL")


def save_qwen3(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **vision: Any
) -> Path:
    """Saves a whole small Qwen3-VL or Qwen3.5 of ``model_type``."""
    name, tower, text = QWEN3_MODELS[model_type]
    sections = {**TINY_VISION["Qwen3"], **tower, **vision}, {"head_dim": 12, **text}
    return save_qwen(name, folder, *sections, area=(4096, 16777216), colors=HALF, dtype=dtype, seed=seed)


def get_merged_rows(model: Any, inputs: Any) -> torch.Tensor:
    rows: torch.Tensor = model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return rows


by_qwen = partial(by_transformers, encode=get_merged_rows)

# Unpublished: the graph must follow from the configuration, not from the model's name.
QWEN2_OTHERS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "wide heads": {"embed_dim": 160, "num_heads": 2},
    "merge three": {"spatial_merge_size": 3, "hidden_act": "silu"},
    "merge one": {"spatial_merge_size": 1, "hidden_act": "gelu_pytorch_tanh"},
    "small patches": {"patch_size": 8, "hidden_size": 56},
    "one frame": {"temporal_patch_size": 1},
    "three frames, gelu": {"temporal_patch_size": 3, "hidden_act": "gelu", "mlp_ratio": 3},
}
QWEN2_5_OTHERS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "every block full": {"fullatt_block_indexes": [0, 1, 2]},
    "no block full": {"fullatt_block_indexes": []},
    "windows of one token": {"window_size": 28},
    "windows that are no whole tokens": {"window_size": 100, "intermediate_size": 128},
    "windows larger than images": {"window_size": 2800, "intermediate_size": 37},
    "merge three": {"spatial_merge_size": 3, "window_size": 84},
    "merge one": {"spatial_merge_size": 1, "window_size": 42},
    "small patches, one frame": {"patch_size": 8, "window_size": 48, "temporal_patch_size": 1},
    "heads of 80": {"hidden_size": 160, "num_heads": 2},
    "heads of 72": {"hidden_size": 72, "num_heads": 1},
    "heads of 104": {"hidden_size": 104, "num_heads": 1, "out_hidden_size": 56},
    "another base": {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
}
QWEN3_OTHERS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1},
    "heads of 72": {"hidden_size": 144, "num_heads": 2},
    "heads of 80": {"hidden_size": 160, "num_heads": 2},
    "heads of 104": {"hidden_size": 104, "num_heads": 1, "out_hidden_size": 56},
    "merge three": {"spatial_merge_size": 3},
    "merge one": {"spatial_merge_size": 1},
    "patches of 14, erf gelu": {"patch_size": 14, "hidden_act": "gelu"},
    "one frame": {"temporal_patch_size": 1},
    "a table of one place": {"num_position_embeddings": 1},
    "a large table, silu": {"num_position_embeddings": 2304, "hidden_act": "silu", "intermediate_size": 96},
}
OTHER_DEEPSTACKS: dict[str, dict[str, Any]] = {
    "one block": {"depth": 1, "deepstack_visual_indexes": [0]},
    "no deepstack": {"deepstack_visual_indexes": []},
    "deepstack after the last block": {"deepstack_visual_indexes": [2]},
    "deepstack after every block": {"deepstack_visual_indexes": [0, 1, 2]},
}

WRONG = in_section(
    {
        "depth": [0, -3, 2.5],
        "num_heads": [0, 7, 32],
        "patch_size": [0, [14, 14]],
        "temporal_patch_size": [0],
        "spatial_merge_size": ["2", True],
        "model_type": ["siglip_vision_model"],
        "rope_parameters": [{"rope_type": "yarn"}, {"rope_theta": 0.0}],
    }
)
QWEN2_WRONG = in_section({"hidden_size": [None, "1536", 0, True], "hidden_act": ["mish"]})
QWEN2_5_WRONG = in_section(
    {
        "hidden_size": [None, 3584.0],
        "out_hidden_size": [None, "2048"],
        "intermediate_size": [0],
        "hidden_act": ["gelu"],
        "window_size": [27, "112"],
        "fullatt_block_indexes": [7, [7, -1], [7, "15"]],
    }
)
QWEN3_WRONG = in_section(
    {
        "hidden_size": ["1152"],
        "out_hidden_size": [None, 0],
        "intermediate_size": [-1],
        "hidden_act": ["mish"],
        "num_position_embeddings": [0, 2303, True],
    }
)
WRONG_DEEPSTACK = {"vision_config.deepstack_visual_indexes": [1, [0, "2"], [-1], [0, 3], [2, 0], [1, 1], None]}

CASES = [
    *(
        TowerCase(
            name=name,
            save=save,
            reference=by_qwen,
            others=others,
            prefixes=[[("visual.", "model.visual.")], [("visual.", "module.model.visual.")]],
            video=True,
            wrong={**WRONG, **wrong},
        )
        for name, save, others, wrong in (
            ("qwen2_5_vl", save_qwen2_5_vl, QWEN2_5_OTHERS, QWEN2_5_WRONG),
            ("qwen2_vl", save_qwen2_vl, QWEN2_OTHERS, QWEN2_WRONG),
        )
    ),
    *(
        TowerCase(
            name=model_type,
            save=partial(save_qwen3, model_type),
            reference=by_qwen,
            others=others,
            prefixes=[[("model.visual.", "visual.")], [("model.visual.", "module.model.visual.")]],
            sizes=((32, 32), (157, 243), (300, 64), (14, 700), (90, 90)),
            video=True,
            video_frames=(2, 3, 5),
            wrong={**WRONG, **QWEN3_WRONG, **(WRONG_DEEPSTACK if model_type == "qwen3_vl" else {})},
            repeats=model_type.endswith("_moe"),
        )
        for model_type, others in {
            "qwen3_vl": {**QWEN3_OTHERS, **OTHER_DEEPSTACKS},
            "qwen3_vl_moe": {"no deepstack": OTHER_DEEPSTACKS["no deepstack"]},
            "qwen3_5": QWEN3_OTHERS,
            "qwen3_5_moe": {"one block": {"depth": 1}},
        }.items()
    ),
]
