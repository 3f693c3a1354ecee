"""Small random models of transformers, and their encoding by transformers alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TINY_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save_model(
    folder: Path,
    name: str,
    sections: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    suffix: str = "ForConditionalGeneration",
) -> Path:
    """Saves the model ``<name><suffix>`` of transformers with random weights, and the file of its image processor."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}{suffix}")(getattr(transformers, f"{name}Config")(**sections))
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("language_model", "text_model", "lm_head")):
            continue
        if parameter.ndim <= 1:
            # Initial norms are exactly one and biases zero: a swapped or missing one would not be noticed.
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            # Makes each branch of a block as large as its input.
            is_table = any(part in parameter_name for part in ("pos_embed", "position_embedding", "probe"))
            parameter.data.normal_(0.0, 1.0 if is_table else parameter.flatten(1).shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def load_reference(folder: Path, dtype: torch.dtype, auto_class: str = "AutoModel") -> tuple[Any, Any]:
    """Returns transformers' model and image processor."""
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    # Gemma 2, the language model of PaliGemma 2, has no SDPA.
    attention = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    model_class = getattr(transformers, auto_class)
    model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    return model, AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def get_image_features(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the rows of one image, from transformers' method of the same name."""
    return torch.cat(list(model.get_image_features(**inputs).pooler_output))


def by_transformers(
    folder: Path,
    images: Sequence[np.ndarray],
    dtype: torch.dtype,
    *,
    encode: Callable[[Any, Any], torch.Tensor] = get_image_features,
    auto_class: str = "AutoModel",
    **options: Any,
) -> list[torch.Tensor]:
    """Returns the rows of each image, encoded alone, with ``options`` of the image processor."""
    model, processor = load_reference(folder, dtype, auto_class)
    with torch.inference_mode():
        return [
            encode(model, processor(images=[Image.fromarray(image)], return_tensors="pt", **options))
            for image in images
        ]
