"""A small random Qwen2-VL checkpoint, changed copies of checkpoints, and images of noise."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TINY_VISION: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 64,
    "hidden_size": 48,
    "num_heads": 4,
    "mlp_ratio": 2,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160_000,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]},
}


def save_qwen2_vl(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **vision: Any) -> Path:
    """Saves a whole small Qwen2-VL, with its image processor."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    config = Qwen2VLConfig(vision_config={**TINY_VISION, **vision}, text_config=TINY_TEXT)
    model = Qwen2VLForConditionalGeneration(config)
    # Initial norms are exactly one and biases zero: a swapped or missing one would not be noticed.
    for name, parameter in model.named_parameters():
        if "visual" in name and parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder)
    sizes = {
        "patch_size": config.vision_config.patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
    }
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056, **sizes).save_pretrained(folder)
    return folder


def change_tensors(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copies a single-file checkpoint; ``change`` modifies its tensors."""
    _copy_settings(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rename_tensors(source: Path, target: Path, old: str, new: str) -> Path:
    """Copies a single-file checkpoint, with the prefix ``old`` of tensor names replaced by ``new``."""
    return rename_all(source, target, [(old, new)])


def rename_all(source: Path, target: Path, prefixes: Sequence[tuple[str, str]]) -> Path:
    """Copies a single-file checkpoint, with prefixes of tensor names replaced; the first match applies."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {_rename(name, prefixes): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    return change_tensors(source, target, rename)


def _rename(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _copy_settings(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())


def shard(source: Path, target: Path, shards: int = 3) -> Path:
    """Copies a single-file checkpoint into several files with an index."""
    _copy_settings(source, target)
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, target / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Returns an image ``[height, width, 3]`` uint8 of smooth colors and noise, different for every seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7.0 + k) + seed) * np.cos(y / (11.0 - k)) for k in range(3)]
    image = 127.5 + 90.0 * np.stack(waves, -1) + generator.normal(0.0, 20.0, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)
