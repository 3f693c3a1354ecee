"""Qwen2-VL."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.checkpoints import save_qwen2_vl

from . import TowerCase


def by_transformers(folder: Path, pictures: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """The merged rows of each picture."""
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    inputs = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    with torch.inference_mode():
        rows = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    per_token = model.config.vision_config.spatial_merge_size**2
    return list(rows.split((inputs["image_grid_thw"].prod(1) // per_token).tolist()))


# None of these is published: the graph has to come from the configuration, not from the model's name.
OTHERS = {
    "one block": {"depth": 1},
    "wide heads": {"embed_dim": 160, "num_heads": 2},
    "merge three": {"spatial_merge_size": 3},
    "merge one": {"spatial_merge_size": 1},
    "small patches": {"patch_size": 8},
    "one frame": {"temporal_patch_size": 1},
    "three frames": {"temporal_patch_size": 3},
    "gelu": {"hidden_act": "gelu", "mlp_ratio": 3},
    "silu": {"hidden_act": "silu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "one channel more": {"hidden_size": 56},
}

CASES = [
    TowerCase(
        name="qwen2_vl",
        save=save_qwen2_vl,
        reference=by_transformers,
        others=OTHERS,
        prefixes=[[("visual.", "model.visual.")], [("visual.", "module.model.visual.")]],
        video=True,
    )
]
