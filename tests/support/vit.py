"""Small random models with CLIP or SigLIP encoders, and their encoding by transformers alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = [
    "ENCODERS",
    "PREFIXES_IN_MODEL",
    "TINY_TEXT",
    "by_encoder",
    "by_llava",
    "perturb",
    "save_encoder",
    "tiny_vision",
    "write_processor",
]

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "one block": {"depth": 1},
    "heads of 72": {"vision": {"hidden_size": 144, "num_attention_heads": 2}},
    "heads of 80": {"vision": {"hidden_size": 80, "num_attention_heads": 1}},
    "heads of 104": {"vision": {"hidden_size": 208, "num_attention_heads": 2}},
    "narrow MLP": {"vision": {"intermediate_size": 40}},
    "small patches": {"vision": {"patch_size": 8, "image_size": 40}},
    "an image of no whole patches": {"vision": {"patch_size": 16, "image_size": 55}},
    "one patch": {"vision": {"image_size": 14}},
    "erf": {"vision": {"hidden_act": "gelu"}},
    "large epsilon": {"vision": {"layer_norm_eps": 0.1}},
}
"""Unpublished configurations of an encoder."""
ENCODER_WRONG: Mapping[str, Sequence[object]] = {
    "hidden_size": [0, "768", True],
    "num_hidden_layers": [-1, 2.5],
    "num_attention_heads": [7, 0, 512],
    "patch_size": [0, [14, 14]],
    "image_size": [8, [224, 224]],
    "num_channels": [0],
    "layer_norm_eps": [-1e-5, "1e-5"],
    "hidden_act": ["mish"],
}
"""Values that must be rejected, as in :attr:`support.towers.TowerCase.wrong`."""
PREFIXES_IN_MODEL = (
    (("vision_tower.", "vision_tower.vision_model."), ("multi_modal_projector.", "multi_modal_projector.")),
    (("vision_tower.", "model.vision_tower.vision_model."), ("multi_modal_projector.", "model.multi_modal_projector.")),
    (("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")),
    (
        ("vision_tower.", "module.model.vision_tower."),
        ("multi_modal_projector.", "module.model.multi_modal_projector."),
    ),
)
"""Generations of the names in a vision-language model: prefix that is saved now → published prefix."""

TINY_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}

TINY_TEXT_HALF = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

CLIP_COLORS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tiny_vision(kind: str, depth: int, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the configuration of a small encoder; SigLIP's image size is no multiple of its patch size."""
    return {
        "model_type": f"{kind}_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "image_size": 56 if kind == "clip" else 60,
        "patch_size": 14,
        **(changes or {}),
    }


def perturb(model: Any) -> Any:
    """Moves parameters away from their initial one, zero or tiny values, so that swapped or missing ones are noticed."""
    for name, parameter in model.named_parameters():
        if "language_model" in name or "text_model" in name:
            continue
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        elif "position_embedding" in name or "probe" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
        else:
            # Large enough for the curvature of activations and for a non-uniform softmax.
            parameter.data.mul_(1.5)
    return model


def save_encoder(
    kind: str,
    folder: Path,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    depth: int = 3,
    vision: Mapping[str, Any] | None = None,
) -> Path:
    """Saves an encoder (``kind`` is ``"clip"`` or ``"siglip"``) alone, or the ``whole`` contrastive model."""
    import transformers

    torch.manual_seed(seed)
    name, encoder = {"clip": "CLIP", "siglip": "Siglip"}[kind], tiny_vision(kind, depth, vision)
    if whole:
        config = getattr(transformers, f"{name}Config")(vision_config=encoder, text_config=TINY_TEXT_HALF)
        model = getattr(transformers, f"{name}Model")(config)
    else:
        config = getattr(transformers, f"{name}VisionConfig")(**encoder)
        model = getattr(transformers, f"{name}VisionModel")(config)
    perturb(model).to(dtype).save_pretrained(folder)
    write_processor(folder, kind, encoder["image_size"])
    return folder


def write_processor(folder: Path, kind: str, side: int, **changes: Any) -> None:
    """Writes the image processor's file for an encoder, in the form of old checkpoints."""
    settings: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    square = {"height": side, "width": side}
    if kind == "clip":
        settings |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, **CLIP_COLORS}
        settings |= {"do_center_crop": True, "crop_size": square, "do_convert_rgb": True}
    else:
        settings |= {"image_processor_type": "SiglipImageProcessor", "size": square, **HALF}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))


def _processor(folder: Path) -> Any:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def by_encoder(folder: Path, images: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns ``last_hidden_state`` of each image."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    inputs = _processor(folder)(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.inference_mode():
        return list(getattr(model, "vision_model", model)(inputs["pixel_values"]).last_hidden_state)


def by_llava(folder: Path, images: Sequence[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the rows that each image has in a prompt of its own."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    processor = _processor(folder)
    found = []
    for image in images:
        inputs = processor(images=[Image.fromarray(image)], return_tensors="pt")
        tiles = {name: inputs[name] for name in ("image_sizes", "batch_num_images") if name in inputs}
        with torch.inference_mode():
            output = model.model.get_image_features(inputs["pixel_values"], **tiles)
        found += list(output.pooler_output)
    return found
