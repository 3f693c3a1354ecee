"""What the encoders of CLIP and SigLIP have in common: how they are configured, stored, and laid out in transformers.

CLIP (Radford et al. 2021, arXiv 2103.00020) has a class token, a norm before the first block and a patch embedding without
bias; SigLIP (Zhai et al. 2023, arXiv 2303.15343) has none of the two norms and tokens, and a bias.  Both have a table with
one learned position per patch of their one image size, and the same block: pre-norm, separate q, k and v, all with biases.
The references are ``CLIPVisionModel`` and ``SiglipVisionModel`` of transformers.

transformers 5 dropped the level ``vision_model.`` from the names of its tensors, wherever the encoder is not a part of
``CLIPModel`` or ``SiglipModel``; published checkpoints have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import (
    ClassTokenFirst,
    OneFrame,
    RowSlice,
    Stacked,
    Stored,
    WeightMap,
    WithBatchDimension,
)
from tritontower.config import Normalization, PatchEmbedding, PositionTable, TowerConfig
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel, tile_images

from .config_fields import activation, positive, whole_heads

__all__ = [
    "IGNORED",
    "PREFIXES_IN_CONTRASTIVE_MODEL",
    "PREFIXES_IN_MODEL",
    "PREFIXES_OF_ENCODER",
    "SIGLIP_PROCESSOR",
    "SIGLIP_SO400M",
    "TOWER_TYPES",
    "EncoderReference",
    "Kind",
    "encoder_pixels",
    "encoder_tensors",
    "encoder_values",
    "read_encoder",
]

Kind = Literal["clip", "siglip"]

TOWER_TYPES: Mapping[str, Kind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
"""``vision_config.model_type`` → which of the two it is."""

PREFIXES_IN_MODEL = {
    "vision_tower.vision_model.": "tower.",
    "vision_tower.": "tower.",
    "multi_modal_projector.": "projector.",
}
"""Beginnings of the names of tensors in a vision-language model."""

PREFIXES_IN_CONTRASTIVE_MODEL = {"vision_model.": "tower."}
"""The same in ``CLIPModel`` and ``SiglipModel``; the text encoder is never looked at."""

PREFIXES_OF_ENCODER = {"vision_model.": "tower.", "": "tower."}
"""The same where the encoder is the whole model: with and without the level that transformers 5 dropped."""

IGNORED = (
    "tower.embeddings.position_ids",
    *(f"tower.{part}" for part in ("visual_projection.*", "text_projection.*", "text_model.*", "logit_*")),
)
"""Stored names that no tower needs: a buffer that old versions saved, and what stands beside a lone encoder."""

CLASS_DEFAULTS: Mapping[Kind, Mapping[str, Any]] = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
"""What a key that a file leaves out means: the defaults of ``CLIPVisionConfig`` and ``SiglipVisionConfig``."""

SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
"""The encoder that most models with a SigLIP have, for one image size or another."""

SIGLIP_PROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
"""What the processor files of such models have in common."""

NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
LINEARS = {"attention_output": "self_attn.out_proj", "mlp_up": "mlp.fc1", "mlp_down": "mlp.fc2"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# Value of the layer graph → module of a block of the reference and side of it.
BLOCK_VALUES = {
    "norm1_rows": ("layer_norm1", "output"),
    "mixed": ("self_attn.out_proj", "input"),
    "attention_output_rows": ("self_attn.out_proj", "output"),
    "attended": ("layer_norm2", "input"),
    "norm2_rows": ("layer_norm2", "output"),
    "mlp_up_rows": ("mlp.fc1", "output"),
    "mlp_hidden": ("mlp.fc2", "input"),
    "mlp_down_rows": ("mlp.fc2", "output"),
    "block_rows": ("", "output"),
}
POOLING_VALUES = {
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
    """The encoder alone: its features are the rows behind the last block, without output norm, pooling and class token.

    Args:
        vision: the section that describes it; what it leaves out has the defaults of transformers' class.
        kind: which of the two it is.
        family: for messages.
        defaults: other defaults than the class's, for models that have some.

    Raises:
        ConfigError: a value cannot be right.
    """
    usual = {**CLASS_DEFAULTS[kind], **(defaults or {})}

    def number(key: str) -> int:
        return positive(vision, key, usual[key])

    video = kind == "clip"
    width, depth, patch, image = map(number, ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
    if image < patch:
        raise vision.error("image_size", image, f"at least one patch of {patch} pixels (patch_size)")
    eps = vision.get(float, "layer_norm_eps", default=usual["layer_norm_eps"], minimum=0.0, maximum=1.0)
    norm = Normalization("layer_norm", eps=eps)
    heads = whole_heads(vision, "num_attention_heads", width, usual["num_attention_heads"])
    return TowerConfig(
        family=family,
        patch=PatchEmbedding(
            channels=positive(vision, "num_channels", 3),
            size=patch,
            temporal=1,
            bias=not video,
        ),
        width=width,
        depth=depth,
        heads=heads,
        norm=norm,
        qkv_bias=True,
        attention_bias=True,
        mlp_hidden=number("intermediate_size"),
        mlp_bias=True,
        activation=activation(vision, "hidden_act", usual["hidden_act"]),
        # What is left of an image beyond whole patches is not seen: 384 pixels are 27 patches of 14.
        position_table=PositionTable(side=image // patch, sampling="exact"),
        class_token=video,
        input_norm=norm if video else None,
        output_norm=norm,
        features=(depth,),
    )


def encoder_tensors(config: TowerConfig) -> dict[str, WeightMap]:
    """How the encoder is stored, its names beginning with ``tower.``; those behind the last needed block are listed too."""
    embeddings = "tower.embeddings"
    table = f"{embeddings}.position_embedding.weight"
    tensors: dict[str, WeightMap] = {
        "patch_projection.weight": OneFrame(f"{embeddings}.patch_embedding.weight"),
        "position_table.weight": Stored(table),
        **_parameters("output_norm", "tower.post_layernorm"),
    }
    if config.class_token:
        tensors["position_table.weight"] = ClassTokenFirst(table, f"{embeddings}.class_embedding")
        # So it is spelled.
        tensors |= _parameters("input_norm", "tower.pre_layrnorm")
    else:
        tensors["patch_projection.bias"] = Stored(f"{embeddings}.patch_embedding.bias")
        tensors |= _pooling_tensors()
    for block in range(config.depth):
        ours, theirs = f"blocks.{block}", f"tower.encoder.layers.{block}"
        for name, stored in {**NORMS, **LINEARS}.items():
            tensors |= _parameters(f"{ours}.{name}", f"{theirs}.{stored}")
        for role in ("weight", "bias"):
            tensors[f"{ours}.qkv.{role}"] = Stacked.of(*(f"{theirs}.{part}.{role}" for part in QKV))
    return tensors


def _parameters(ours: str, theirs: str) -> dict[str, WeightMap]:
    return {f"{ours}.{role}": Stored(f"{theirs}.{role}") for role in ("weight", "bias")}


def _pooling_tensors() -> dict[str, WeightMap]:
    """SigLIP's attention-pooling head, whose q, k and v are one matrix of ``torch.nn.MultiheadAttention``."""
    tensors: dict[str, WeightMap] = {
        "pooling.probe": WithBatchDimension("tower.head.probe"),
        **_parameters("pooling.attention_output", "tower.head.attention.out_proj"),
        **_parameters("pooling.norm", "tower.head.layernorm"),
        **_parameters("pooling.mlp_up", "tower.head.mlp.fc1"),
        **_parameters("pooling.mlp_down", "tower.head.mlp.fc2"),
    }
    for role in ("weight", "bias"):
        stacked = f"tower.head.attention.in_proj_{role}"
        tensors[f"pooling.query.{role}"] = RowSlice(stacked, first=0, taken=1, parts=3)
        tensors[f"pooling.keys_values.{role}"] = RowSlice(stacked, first=1, taken=2, parts=3)
    return tensors


def encoder_values(config: TowerConfig, path: str) -> dict[str, ModuleValue]:
    """Value of the layer graph → where it is found in transformers' model, whose encoder is the module at ``path``."""
    inside = f"{path}." if path else ""
    values = {"placed_rows": ModuleValue.output(f"{inside}embeddings")}
    if config.class_token:
        values["input_norm_rows"] = ModuleValue.output(f"{inside}pre_layrnorm")
        values["pooled"] = ModuleValue.output(f"{inside}post_layernorm")
    else:
        values["output_norm_rows"] = ModuleValue.output(f"{inside}post_layernorm")
        values |= {name: ModuleValue.at(f"{inside}{module}", side) for name, (module, side) in POOLING_VALUES.items()}
    for block in range(config.depth):
        layer = f"{inside}encoder.layers.{block}"
        values[f"blocks.{block}.qkv_rows"] = ModuleValue.output(*(f"{layer}.{part}" for part in QKV))
        for name, (module, side) in BLOCK_VALUES.items():
            values[f"blocks.{block}.{name}"] = ModuleValue.at(f"{layer}.{module}", side)
    return values if config.pooling is not None else {name: values[name] for name in values if "pool" not in name}


def encoder_pixels(encoder: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
    """``[tiles, channels, side, side]``: every tile of a batch, as transformers' encoder takes it.

    The batch holds whole patches alone; what its image size has beyond them, where the encoder looks at nothing, is zero.
    """
    side = encoder.embeddings.image_size
    pixels = batch.pixels.new_zeros(len(batch.images.tile_grids), config.patch.channels, side, side)
    for place, image in zip(pixels, tile_images(batch, config), strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return pixels


@dataclass(frozen=True)
class EncoderReference(ReferenceModel):
    """The encoder alone, as transformers has it.

    Attributes:
        path: the module of the loaded model that it is; empty where it is the whole model.
    """

    path: str

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
        """All tiles in one tensor."""
        return encoder_pixels(model.get_submodule(self.path), batch, config)

    def outputs(self, model: Any, inputs: torch.Tensor, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """The selected hidden states, and the pooled row of every tile where there is pooling."""
        output = model.get_submodule(self.path)(inputs, output_hidden_states=True)
        states = [
            # Only this one is behind the norm, where there is one.
            output.last_hidden_state
            if config.features_normed and feature == config.depth
            else output.hidden_states[feature]
            for feature in config.features
        ]
        first = 1 if config.class_token and not config.keep_class_token else 0
        rows = {"embeddings": torch.cat(states, dim=-1)[:, first:].flatten(0, 1)}
        return rows if config.pooling is None else {**rows, "pooled": output.pooler_output}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Every value that has a module's boundary on one side."""
        return encoder_values(config, self.path)
