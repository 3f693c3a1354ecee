"""The tower of Pixtral (Agrawal et al. 2024, arXiv 2410.07073), which Mistral Small 3 has as well.

Square patches without bias, an RMS norm, then pre-norm blocks without any bias: 2-D rotary embedding whose frequencies the
two axes take in turn, attention within one image, gated silu MLP.  All norms have an epsilon of 1e-5, which no
configuration file says.  The reference is ``PixtralVisionModel`` of ``transformers.models.pixtral.modeling_pixtral``, inside
the vision-language model that has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import OneFrame, Stacked, Stored, WeightMap
from tritontower.config import Normalization, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel, tile_images
from tritontower.preprocessing import LongestEdge, MistralResize

from .config_fields import positive, rotary_theta, whole_heads
from .registry import MakePreprocessor

__all__ = [
    "IGNORED",
    "NORM",
    "PREFIXES",
    "PixtralReference",
    "TowerSize",
    "block_tensors",
    "preprocessors",
    "processor_example",
    "projector_tensors",
    "read_tower_size",
    "tower_config",
    "tower_tensors",
]

PREFIXES = {"vision_tower.": "tower.", "multi_modal_projector.": "projector."}
"""Beginnings of the names of tensors in transformers' models."""

IGNORED = ("tower.patch_positional_embedding.*",)
"""Stored names that hold nothing: the rotary frequencies, which follow from the configuration."""

NORM = Normalization("rms_norm", eps=1e-5, rounding="before_weight")

QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")

# Value of the layer graph → module of a block of the reference and side of it.
BLOCK_VALUES = {
    "norm1_rows": ("attention_norm", "output"),
    "mixed": ("attention.o_proj", "input"),
    "attention_output_rows": ("attention.o_proj", "output"),
    "attended": ("ffn_norm", "input"),
    "norm2_rows": ("ffn_norm", "output"),
    "mlp_hidden": ("feed_forward.down_proj", "input"),
    "mlp_down_rows": ("feed_forward.down_proj", "output"),
    "block_rows": ("", "output"),
}


@dataclass(frozen=True)
class TowerSize:
    """What a configuration file says about the tower alone."""

    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    theta: float
    longest_edge: int
    """Greatest side of an image that the tower was trained with, pixels."""


def read_tower_size(vision: ConfigReader) -> TowerSize:
    """The ``vision_config`` of transformers; what a sparse file leaves out has the defaults of ``PixtralVisionConfig``.

    Only ``hidden_act`` must be there: its default is gelu, but no tower has it.
    """
    vision.get(str, "model_type", default="pixtral", choices=("pixtral",))
    vision.get(str, "hidden_act", choices=("silu",))
    width = positive(vision, "hidden_size", 1024)
    heads = whole_heads(vision, "num_attention_heads", width, 16)
    if positive(vision, "head_dim", width // heads) != width // heads:
        said = positive(vision, "head_dim")
        raise vision.error("head_dim", said, f"{width // heads}: hidden_size divided by num_attention_heads")
    return TowerSize(
        channels=positive(vision, "num_channels", 3),
        patch=positive(vision, "patch_size", 16),
        width=width,
        depth=positive(vision, "num_hidden_layers", 24),
        heads=heads,
        mlp_hidden=positive(vision, "intermediate_size", 4096),
        theta=rotary_theta(vision),
        longest_edge=positive(vision, "image_size", 1024),
    )


def tower_config(
    size: TowerSize,
    projector: Projector,
    *,
    family: str,
    features: tuple[int, ...],
    rotation: Literal["float32", "activation"],
) -> TowerConfig:
    """The tower with what stands behind it.

    Args:
        size: what the configuration file says about the tower.
        projector: what makes its rows tokens.
        family: for messages.
        features: blocks behind which the rows are taken.
        rotation: the dtype in which queries and keys are rotated.
    """
    return TowerConfig(
        family=family,
        patch=PatchEmbedding(channels=size.channels, size=size.patch, temporal=1, bias=False),
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        norm=NORM,
        qkv_bias=False,
        attention_bias=False,
        mlp_hidden=size.mlp_hidden,
        mlp_bias=False,
        activation="silu",
        gated=True,
        rotary=RotaryEmbedding(theta=size.theta, layout="alternating", rotation=rotation),
        input_norm=NORM,
        segments="image",
        features=features,
        projector=projector,
    )


def tower_tensors(config: TowerConfig) -> dict[str, WeightMap]:
    """How transformers stores the tower."""
    tensors = block_tensors(config, output="attention.o_proj", gate="gate_proj", up="up_proj", down="down_proj")
    for block in range(config.depth):
        layer = f"tower.transformer.layers.{block}"
        tensors[f"blocks.{block}.qkv.weight"] = Stacked.of(*(f"{layer}.{part}.weight" for part in QKV))
    return tensors


def block_tensors(config: TowerConfig, *, output: str, gate: str, up: str, down: str) -> dict[str, WeightMap]:
    """Everything but queries, keys and values, which are stored the same way under two sets of names."""
    tensors: dict[str, WeightMap] = {
        "patch_projection.weight": OneFrame("tower.patch_conv.weight"),
        "input_norm.weight": Stored("tower.ln_pre.weight"),
    }
    for block in range(config.depth):
        ours, layer = f"blocks.{block}", f"tower.transformer.layers.{block}"
        mlp = f"{layer}.feed_forward"
        tensors[f"{ours}.norm1.weight"] = Stored(f"{layer}.attention_norm.weight")
        tensors[f"{ours}.attention_output.weight"] = Stored(f"{layer}.{output}.weight")
        tensors[f"{ours}.norm2.weight"] = Stored(f"{layer}.ffn_norm.weight")
        tensors[f"{ours}.mlp_gate_up.weight"] = Stacked.of(f"{mlp}.{gate}.weight", f"{mlp}.{up}.weight")
        tensors[f"{ours}.mlp_down.weight"] = Stored(f"{mlp}.{down}.weight")
    return tensors


def projector_tensors(first: str, second: str) -> dict[str, WeightMap]:
    """The two linears; their biases are listed even where the tower has none."""
    return {
        f"projector.{ours}.{role}": Stored(f"projector.{theirs}.{role}")
        for ours, theirs in (("linear_1", first), ("linear_2", second))
        for role in ("weight", "bias")
    }


def processor_example(longest_edge: int, patch: int | Mapping[str, int]) -> dict[str, Any]:
    """A processor file as it is published with such a tower; ``patch`` is spelled in two ways."""
    return {
        "image_processor_type": "PixtralImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": patch,
        "resample": 3,
        "size": {"longest_edge": longest_edge},
    }


def preprocessors(longest_edge: int, *, without_file: Mapping[str, Any] | None = None) -> dict[str, MakePreprocessor]:
    """Images as transformers prepares them, and as Mistral's own library does.

    Args:
        longest_edge: greatest side of an image, pixels; what Mistral's own library goes by.
        without_file: the settings of transformers' processor where the checkpoint ships none.
    """
    return {
        "hf": partial(LongestEdge, without_file=without_file),
        "mistral": partial(MistralResize, longest_edge=longest_edge),
    }


class PixtralReference(ReferenceModel):
    """``vision_tower`` and ``multi_modal_projector`` of transformers' model, one after the other.

    Not its ``get_image_features``, which does just that, but fails where all images together make a single token.

    Args:
        projector_values: value of the layer graph → module of the projector and side of it.
        merges: whether the projector merges patches, and so has to be told the images' sizes.
    """

    row_order: ClassVar[Literal["tower", "raster"]] = "raster"

    def __init__(self, projector_values: Mapping[str, tuple[str, str]], *, merges: bool) -> None:
        self.projector_values = projector_values
        self.merges = merges

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """All images, padded to one size as transformers' processor pads them, and the height and width of each."""
        images = tile_images(batch, config)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        pixels = batch.pixels.new_zeros(len(images), config.patch.channels, height, width)
        for place, image in zip(pixels, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return pixels, sizes

    def outputs(
        self, model: Any, inputs: tuple[torch.Tensor, list[tuple[int, int]]], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """The projected rows of all images, from one call."""
        pixels, sizes = inputs
        states = model.vision_tower(pixels, image_sizes=sizes, output_hidden_states=True).hidden_states
        rows = torch.cat([states[feature] for feature in config.features], dim=-1).squeeze(0)
        project = model.multi_modal_projector
        return {"embeddings": project(rows, sizes) if self.merges else project(rows)}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Every value that has a module's boundary on both sides."""
        values = {
            "patch_rows": ModuleValue.input("vision_tower.ln_pre"),
            "input_norm_rows": ModuleValue.output("vision_tower.ln_pre"),
            "embeddings": ModuleValue.output("multi_modal_projector"),
        }
        for name, (module, side) in self.projector_values.items():
            values[name] = ModuleValue.at(f"multi_modal_projector.{module}", side)
        for block in range(config.depth):
            layer = f"vision_tower.transformer.layers.{block}"
            values[f"blocks.{block}.qkv_rows"] = ModuleValue.output(*(f"{layer}.{part}" for part in QKV))
            for name, (module, side) in BLOCK_VALUES.items():
                values[f"blocks.{block}.{name}"] = ModuleValue.at(f"{layer}.{module}", side)
        return values
