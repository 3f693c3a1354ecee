"""Checkpoints with random weights, in the shape and layout of published ones.

For machines without the real weights: a demonstration, a benchmark or a test needs the shapes, the tensor names and the
files, and the numbers may be anything.  Only the tower's tensors are written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .families import family_of
from .graph import build
from .reader import ConfigReader

__all__ = ["QWEN2_VL_2B", "QWEN2_VL_PROCESSOR", "write_random_checkpoint"]

QWEN2_VL_2B: Mapping[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_act": "quick_gelu",
        "hidden_size": 1536,
        "in_channels": 3,
        "mlp_ratio": 4,
        "model_type": "qwen2_vl",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""``config.json`` of Qwen2-VL-2B, as far as it concerns a tower, in its flat generation."""

QWEN2_VL_PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
"""``preprocessor_config.json`` of the Qwen2-VL models."""


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = QWEN2_VL_2B,
    processor: Mapping[str, Any] = QWEN2_VL_PROCESSOR,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` into ``folder``; returns it.

    Matrices and biases are normal with a deviation of 0.02, norm weights normal around one: the scale at which these
    towers are initialised.  The same arguments give the same file.
    """
    reader = ConfigReader(config, "config.json")
    family = family_of(reader)
    tower = family.read_config(reader)
    names = family.tensor_names(tower)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for source, shape in build(tower).sources.items():
        tensor = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        if "norm" in source and source.endswith("weight"):
            tensor += 1.0
        tensors[family.PREFIXES[-1] + names[source]] = tensor.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return folder
