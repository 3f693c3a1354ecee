"""Checkpoints with random weights, in the shape and layout of published ones; only the tower's tensors are written."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Shape
from tritontower.graph.builder import build
from tritontower.models.common.family import Family
from tritontower.models.common.registry import read_family


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` into ``folder``; returns it.

    Matrices and biases are normal with a standard deviation of 0.02, norm weights normal around 1, as these towers are
    initialized.  The same arguments give the same file.
    """
    reader = ConfigReader(config, "config.json")
    family = read_family(reader)
    prefix = {inner: outer for outer, inner in family.prefixes.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _published_shapes(family).items():
        tensor = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):
            tensor += 1.0
        inner = max((inner for inner in prefix if name.startswith(inner)), key=len)
        tensors[prefix[inner] + name[len(inner) :]] = tensor.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    declared = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(declared, indent=2) + "\n", encoding="utf-8")
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return folder


def _published_shapes(family: Family) -> dict[str, Shape]:
    """Tensors of a published checkpoint, including the blocks and the norm after the last feature."""
    config = family.config
    whole = replace(
        config,
        features=(config.depth,) * len(config.features),
        output_norm=config.output_norm or config.norm,
        features_normed=True,
    )
    sources = {name: shape for name, shape in build(whole).sources.items() if name in family.tensors}
    sources |= build(config).sources
    shapes: dict[str, Shape] = {}
    for name, shape in sources.items():
        shapes |= family.tensors[name].stored_shapes(shape)
    return shapes
