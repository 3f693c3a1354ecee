"""Mistral's own format: conversion of checkpoints into it, and the definition of the tower.

Neither uses the package: the conversion copies row by row; the definition uses complex numbers and ``unfold``, like Mistral's
own implementation.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, gelu, silu, softmax, unfold

Tensors = dict[str, torch.Tensor]

PARTS = {
    "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk",
    "attention.v_proj": "attention.wv",
    "attention.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.down_proj": "feed_forward.w2",
    "feed_forward.up_proj": "feed_forward.w3",
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "multi_modal_projector.patch_merger": "patch_merger",
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "vision_tower": "vision_encoder",
}


def to_mistral_format(source: Path, target: Path, *, files: str = "one", **vision: Any) -> Path:
    """Converts a checkpoint in transformers' format (Pixtral or Mistral 3).

    Args:
        source: a folder with one ``model.safetensors``.
        target: a folder that does not exist yet.
        files: ``"one"`` file, shards with an ``"index"``, ``"numbered"`` shards without, or files by ``"rank"``.
        **vision: changed keys of ``vision_encoder``; ``None`` leaves one out.
    """
    config = json.loads((source / "config.json").read_text())
    heads = config["vision_config"]["num_attention_heads"]
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.startswith("vision_tower") and (".q_proj." in name or ".k_proj." in name):
            tensor = interleaved(tensor, heads)
        for theirs, native in PARTS.items():
            name = name.replace(theirs, native)
        tensors[name.replace("language_model.model.", "")] = tensor
    target.mkdir(parents=True)
    _write(tensors, target, files)
    encoder = {key: value for key, value in {**_vision_encoder(config), **vision}.items() if value is not None}
    params = {"dim": config["text_config"]["hidden_size"], "norm_eps": 1e-5, "vision_encoder": encoder}
    (target / "params.json").write_text(json.dumps(params))
    return target


def interleaved(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders rows from halves of a head to adjacent rotary pairs."""
    rows = matrix.clone()
    head_dim = len(matrix) // heads
    for head in range(heads):
        for pair in range(head_dim // 2):
            first = head * head_dim
            rows[first + 2 * pair] = matrix[first + pair]
            rows[first + 2 * pair + 1] = matrix[first + pair + head_dim // 2]
    return rows


def _vision_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    same = ("hidden_size", "num_channels", "image_size", "patch_size", "intermediate_size", "num_hidden_layers")
    encoder = {key: vision[key] for key in (*same, "num_attention_heads")}
    encoder |= {"rope_theta": vision["rope_parameters"]["rope_theta"], "image_token_id": 10}
    if config["model_type"] == "mistral3":
        encoder |= {
            "max_image_size": vision["image_size"],
            "adapter_bias": config["multimodal_projector_bias"],
            "mm_projector_id": "patch_merge",
            "spatial_merge_size": config["spatial_merge_size"],
            "add_pre_mm_projector_layer_norm": True,
        }
    return encoder


def _write(tensors: Tensors, folder: Path, files: str) -> None:
    names = sorted(tensors)
    parts = [names] if files == "one" else [names[0::2], names[1::2]]
    spelling = {"one": "consolidated", "rank": "consolidated.{:02}"}.get(files, "consolidated-{:05}-of-00002")
    weight_map = {}
    for number, part in enumerate(parts, 0 if files == "rank" else 1):
        file = spelling.format(number) + ".safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if files == "index":
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))


def by_definition(folder: Path, image: torch.Tensor) -> torch.Tensor:
    """``[tokens, dim]`` in fp64 of one preprocessed image ``[channels, height, width]``, from one file of weights."""
    params = json.loads((folder / "params.json").read_text())
    vision = params["vision_encoder"]
    stored = {name: tensor.double() for name, tensor in load_file(folder / "consolidated.safetensors").items()}
    convolved = conv2d(image.double()[None], stored["vision_encoder.patch_conv.weight"], stride=vision["patch_size"])
    height, width = convolved.shape[2:]
    rows = _rms(convolved.flatten(2)[0].T, stored["vision_encoder.ln_pre.weight"])
    angles = _angles(height, width, rows.shape[1] // vision["num_attention_heads"], vision["rope_theta"])
    for block in range(vision["num_hidden_layers"]):
        prefix = f"vision_encoder.transformer.layers.{block}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        normed = _rms(rows, layer["attention_norm.weight"])
        rows = rows + _attention(normed, layer, vision["num_attention_heads"], angles)
        normed = _rms(rows, layer["ffn_norm.weight"])
        gate, up = normed @ layer["feed_forward.w1.weight"].T, normed @ layer["feed_forward.w3.weight"].T
        rows = rows + (silu(gate) * up) @ layer["feed_forward.w2.weight"].T
    if vision.get("add_pre_mm_projector_layer_norm"):
        rows = _rms(rows, stored["pre_mm_projector_norm.weight"])
    if vision.get("mm_projector_id") == "patch_merge":
        merge = vision["spatial_merge_size"]
        decoded = rows.T.reshape(1, -1, height, width)
        rows = unfold(decoded, merge, stride=merge)[0].T @ stored["patch_merger.merging_layer.weight"].T
    return _adapted(rows, stored)


def _rms(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _angles(height: int, width: int, head_dim: int, theta: float) -> torch.Tensor:
    """``[patches, 1, head_dim / 2]`` numbers of the unit circle."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    vertical = torch.outer(torch.arange(height).double(), frequencies[::2])[:, None].expand(-1, width, -1)
    horizontal = torch.outer(torch.arange(width).double(), frequencies[1::2])[None].expand(height, -1, -1)
    turns = torch.cat((vertical, horizontal), -1).flatten(0, 1)
    return torch.polar(torch.ones_like(turns), turns)[:, None]


def _attention(rows: torch.Tensor, layer: Mapping[str, torch.Tensor], heads: int, angles: torch.Tensor) -> torch.Tensor:
    q, k, v = ((rows @ layer[f"attention.{part}.weight"].T).unflatten(1, (heads, -1)) for part in ("wq", "wk", "wv"))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2)).contiguous()) * angles).flatten(2)

    scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / q.shape[2] ** 0.5
    mixed = torch.einsum("hqk,khd->qhd", softmax(scores, -1), v).flatten(1)
    return mixed @ layer["attention.wo.weight"].T


def _adapted(rows: torch.Tensor, stored: Tensors) -> torch.Tensor:
    for name in ("w_in", "w_out"):
        rows = rows @ stored[f"vision_language_adapter.{name}.weight"].T
        rows = rows + stored.get(f"vision_language_adapter.{name}.bias", torch.zeros(1))
        rows = gelu(rows) if name == "w_in" else rows
    return rows
