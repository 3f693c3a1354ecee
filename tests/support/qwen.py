"""Small random Qwen-VL models, and their encoding by transformers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["TINY_TEXT", "by_transformers", "save_model"]

TINY_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
}


def save_model(
    folder: Path,
    model_class: Any,
    config: Any,
    *,
    dtype: torch.dtype,
    seed: int,
    area: tuple[int, int] = (56 * 56, 12845056),
    **processor: Any,
) -> Path:
    """Saves any of the Qwen-VL models with random weights, and their common image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "visual" not in name:
            continue
        if parameter.ndim == 1:
            # Initial norms are exactly one and biases zero: a swapped or missing one would not be noticed.
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            # Makes each branch of a block as large as its input.
            parameter.data.normal_(0.0, 1.0 if "pos_embed" in name else parameter.flatten(1).shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    vision = config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": area[0], "longest_edge": area[1]},
    }
    Qwen2VLImageProcessorPil(**sizes, **processor).save_pretrained(folder)
    return folder


def by_transformers(folder: Path, images: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the merged rows of each image, by the Qwen-VL model in the folder."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.inference_mode():
        rows = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    per_token = model.config.vision_config.spatial_merge_size**2
    return list(rows.split((inputs["image_grid_thw"].prod(1) // per_token).tolist()))
