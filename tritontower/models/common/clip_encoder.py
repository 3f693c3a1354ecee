"""CLIP and SigLIP encoders: configuration, tensor names, and the reference.

CLIP (Radford et al. 2021, arXiv 2103.00020) has a class token, a norm before the first block and a patch embedding without
bias; SigLIP (Zhai et al. 2023, arXiv 2303.15343) has a bias and neither of the other two.  Both have a learned position per
patch of their one image size, and the same block: pre-norm, separate q, k and v, biases everywhere.  The references are
``CLIPVisionModel`` and ``SiglipVisionModel`` of transformers.

transformers 5 dropped the level ``vision_model.`` from the tensor names, except in ``CLIPModel`` and ``SiglipModel``;
published checkpoints have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import (
    BOTH,
    ClassTokenFirst,
    OneFrame,
    RowSlice,
    Stacked,
    Stored,
    WeightMap,
    WithBatchDimension,
    map_parameters,
)
from tritontower.config import Normalization, PatchEmbedding, PositionTable, TowerConfig
from tritontower.preprocessing import FixedSize, MakeRule

from .config_fields import activation, positive, read_eps, whole_heads
from .family import Family
from .hf_reference import ModuleValue, ReferenceModel, block_values, module_values, stack_padded, tile_images

Kind = Literal["clip", "siglip"]

TOWER_TYPES: Mapping[str, Kind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""``vision_config.model_type`` → kind of encoder."""

PREFIXES_IN_MODEL = {
    "vision_tower.vision_model.": "tower.",
    "vision_tower.": "tower.",
    "multi_modal_projector.": "projector.",
}
"""Prefixes of tensor names in a vision-language model."""

PREFIXES_IN_CONTRASTIVE_MODEL = {"vision_model.": "tower."}
"""Prefixes in ``CLIPModel`` and ``SiglipModel``; the text encoder is not read."""

PREFIXES_OF_ENCODER = {"vision_model.": "tower.", "": "tower."}
"""Prefixes if the encoder is the whole model, with and without the level that transformers 5 dropped."""

IGNORED = (
    "tower.embeddings.position_ids",
    *(f"tower.{part}" for part in ("visual_projection.*", "text_projection.*", "text_model.*", "logit_*")),
)
"""Stored names that no tower needs: a buffer that old versions saved, and the rest of the contrastive model."""

CLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLASS_DEFAULTS: Mapping[Kind, Mapping[str, Any]] = {
    "clip": CLIP_DEFAULTS,
    "siglip": {**CLIP_DEFAULTS, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
"""Defaults of ``CLIPVisionConfig`` and ``SiglipVisionConfig``."""

MODULES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention_output": "self_attn.out_proj",
    "mlp_up": "mlp.fc1",
    "mlp_down": "mlp.fc2",
}
"""Modules of a block with parameters, ours → theirs."""
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
POOLING_MODULES = {
    "attention_output": "attention.out_proj",
    "norm": "layernorm",
    "mlp_up": "mlp.fc1",
    "mlp_down": "mlp.fc2",
}
"""The same of SigLIP's attention-pooling head."""

# Value of the layer graph → module of the reference and side of it.
CLIP_VALUES = {
    "placed_rows": ("embeddings", "output"),
    "input_norm_rows": ("pre_layrnorm", "output"),
    "pooled": ("post_layernorm", "output"),
}
SIGLIP_VALUES = {
    "placed_rows": ("embeddings", "output"),
    "output_norm_rows": ("post_layernorm", "output"),
    "pooling.attention_output_rows": ("head.layernorm", "input"),
    "pooling.norm_rows": ("head.layernorm", "output"),
    "pooling.mlp_up_rows": ("head.mlp.fc1", "output"),
    "pooling.mlp_hidden": ("head.mlp.fc2", "input"),
    "pooling.mlp_down_rows": ("head.mlp.fc2", "output"),
    "pooled": ("head", "output"),
}


def read_encoder(
    vision: ConfigReader, kind: Kind, *, family: str, defaults: Mapping[str, Any] | None = None
) -> TowerConfig:
    """Reads the encoder: its features are the rows after the last block, without output norm, pooling and class token.

    Missing keys have ``defaults``, then those of transformers' class.
    """
    usual = {**CLASS_DEFAULTS[kind], **(defaults or {})}

    def number(key: str) -> int:
        return positive(vision, key, usual[key])

    is_clip = kind == "clip"
    width, depth, patch, image = map(number, ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
    if image < patch:
        raise vision.error("image_size", image, f"at least one patch of {patch} pixels (patch_size)")
    norm = Normalization("layer_norm", eps=read_eps(vision, "layer_norm_eps", usual["layer_norm_eps"]))
    return TowerConfig(
        family=family,
        patch=PatchEmbedding(channels=positive(vision, "num_channels", 3), size=patch, temporal=1, bias=not is_clip),
        width=width,
        depth=depth,
        heads=whole_heads(vision, "num_attention_heads", width, usual["num_attention_heads"]),
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=number("intermediate_size"),
        mlp_bias=True,
        activation=activation(vision, "hidden_act", usual["hidden_act"]),
        # Pixels beyond the last whole patch are dropped: 384 pixels are 27 patches of 14.
        position_table=PositionTable(side=image // patch, sampling="exact"),
        class_token=is_clip,
        input_norm=norm if is_clip else None,
        output_norm=norm,
        features=(depth,),
    )


def encoder_tensors(config: TowerConfig) -> dict[str, WeightMap]:
    """Maps the encoder's weights, stored under ``tower.``; includes those after the last needed block."""
    embeddings = "tower.embeddings"
    table = f"{embeddings}.position_embedding.weight"
    tensors: dict[str, WeightMap] = {
        "patch_projection.weight": OneFrame(f"{embeddings}.patch_embedding.weight"),
        "position_table.weight": Stored(table),
        **map_parameters({"output_norm": "tower.post_layernorm"}),
    }
    if config.class_token:
        tensors["position_table.weight"] = ClassTokenFirst(table, f"{embeddings}.class_embedding")
        # The checkpoints have this typo.
        tensors |= map_parameters({"input_norm": "tower.pre_layrnorm"})
    else:
        tensors["patch_projection.bias"] = Stored(f"{embeddings}.patch_embedding.bias")
        # q, k and v of SigLIP's pooling head are one matrix of `torch.nn.MultiheadAttention`.
        tensors["pooling.probe"] = WithBatchDimension("tower.head.probe")
        tensors |= map_parameters(POOLING_MODULES, BOTH, "pooling", "tower.head")
        for role in BOTH:
            stacked = f"tower.head.attention.in_proj_{role}"
            tensors[f"pooling.query.{role}"] = RowSlice(stacked, first=0, taken=1, parts=3)
            tensors[f"pooling.keys_values.{role}"] = RowSlice(stacked, first=1, taken=2, parts=3)
    for block in range(config.depth):
        ours, theirs = f"blocks.{block}", f"tower.encoder.layers.{block}"
        tensors |= map_parameters(MODULES, BOTH, ours, theirs)
        for role in BOTH:
            tensors[f"{ours}.qkv.{role}"] = Stacked.of(*(f"{theirs}.{part}.{role}" for part in QKV))
    return tensors


def encoder_family(
    config: TowerConfig,
    reference: ReferenceModel,
    projector: Mapping[str, WeightMap] | None = None,
    *,
    prefixes: Mapping[str, str] = PREFIXES_IN_MODEL,
    resize_rule: MakeRule = FixedSize,
    **prompt: Any,
) -> Family:
    """Returns the family of a tower with this encoder.

    ``projector`` maps the weights after the encoder; ``prompt`` are fields of :class:`Family` about the language model.
    """
    return Family(
        config=config,
        prefixes=prefixes,
        tensors={**encoder_tensors(config), **(projector or {})},
        ignored=IGNORED,
        resize_rules={"hf": resize_rule},
        reference=reference,
        **prompt,
    )


def lone_encoder_family(config: TowerConfig, *, is_alone: bool) -> Family:
    """Returns the family of an encoder without a language model: the whole model, or half of a contrastive one."""
    return encoder_family(
        config,
        EncoderReference("" if is_alone else "vision_model"),
        prefixes=PREFIXES_OF_ENCODER if is_alone else PREFIXES_IN_CONTRASTIVE_MODEL,
    )


def encoder_values(config: TowerConfig, path: str) -> dict[str, ModuleValue]:
    """Locates the graph's values in transformers' model, whose encoder is the module at ``path``."""
    values = module_values(CLIP_VALUES if config.class_token else SIGLIP_VALUES, path)
    values |= block_values(
        config.depth,
        f"{path}.encoder.layers".lstrip("."),
        norms=("layer_norm1", "layer_norm2"),
        qkv=QKV,
        output="self_attn.out_proj",
        down="mlp.fc2",
        up="mlp.fc1",
    )
    return values if config.pooling is not None else {name: values[name] for name in values if "pool" not in name}


def encoder_pixels(encoder: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
    """Returns every tile of a batch as transformers' encoder takes it: ``[tiles, channels, side, side]``.

    The batch holds whole patches only; pixels beyond them, which the encoder ignores, are zero.
    """
    side = encoder.embeddings.image_size
    return stack_padded(tile_images(batch, config), side, side)


@dataclass(frozen=True)
class EncoderReference(ReferenceModel):
    """The encoder alone, which is the module at ``path`` of the loaded model."""

    path: str

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
        """Returns all tiles in one tensor."""
        return encoder_pixels(model.get_submodule(self.path), batch, config)

    def outputs(self, model: Any, inputs: torch.Tensor, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """Returns the selected hidden states, and with pooling the pooled row of every tile."""
        output = model.get_submodule(self.path)(inputs, output_hidden_states=True)
        states = [
            # Only `last_hidden_state` is after the norm, if there is one.
            output.last_hidden_state
            if config.features_normed and feature == config.depth
            else output.hidden_states[feature]
            for feature in config.features
        ]
        first = 1 if config.class_token and not config.keep_class_token else 0
        rows = {"embeddings": torch.cat(states, dim=-1)[:, first:].flatten(0, 1)}
        return rows if config.pooling is None else {**rows, "pooled": output.pooler_output}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns every value with a module boundary on both sides."""
        return encoder_values(config, self.path)
