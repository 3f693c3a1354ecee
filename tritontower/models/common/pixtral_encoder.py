"""The tower of Pixtral (Agrawal et al. 2024, arXiv 2410.07073), which Mistral Small 3 also has.

Square patches without bias, an RMS norm, then pre-norm blocks without any bias: 2-D rotary embedding whose frequencies
alternate between the two axes, attention within one image, gated silu MLP.  All norms have an epsilon of 1e-5, which no
configuration file states.  The reference is ``PixtralVisionModel`` inside the vision-language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import OneFrame, Stacked, WeightMap, map_parameters
from tritontower.config import Normalization, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.preprocessing import LongestEdge, MakeRule, MistralResize
from tritontower.prompt.layout import PromptLayout

from .config_fields import positive, rotary_theta, whole_heads
from .family import Family
from .hf_reference import ModuleValue, ReferenceModel, block_values, module_values, stack_padded, tile_images
from .prompts import token

PREFIXES = {"vision_tower.": "tower.", "multi_modal_projector.": "projector."}
"""Prefixes of tensor names in transformers' models."""

IGNORED = ("tower.patch_positional_embedding.*",)
"""Stored names that no tower needs: the rotary frequencies follow from the configuration."""

NORM = Normalization("rms_norm", eps=1e-5, rounding="before_weight")

QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")

# Value of the layer graph → module of the reference and side of it.
OTHER_VALUES = {
    "patch_rows": ("vision_tower.ln_pre", "input"),
    "input_norm_rows": ("vision_tower.ln_pre", "output"),
    "embeddings": ("multi_modal_projector", "output"),
}


@dataclass(frozen=True)
class TowerSize:
    """Sizes of the tower, as a configuration file states them."""

    channels: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    theta: float
    longest_edge: int
    """Largest side of an image that the tower was trained with, pixels."""


def read_tower_size(vision: ConfigReader) -> TowerSize:
    """Reads transformers' ``vision_config``; missing keys have the defaults of ``PixtralVisionConfig``.

    Only ``hidden_act`` is required: its default is gelu, which no tower has.
    """
    vision.get(str, "model_type", default="pixtral", choices=("pixtral",))
    vision.get(str, "hidden_act", choices=("silu",))
    width = positive(vision, "hidden_size", 1024)
    heads = whole_heads(vision, "num_attention_heads", width, 16)
    head_dim = positive(vision, "head_dim", width // heads)
    if head_dim != width // heads:
        raise vision.error("head_dim", head_dim, f"{width // heads}: hidden_size divided by num_attention_heads")
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
    """Returns the tower with its projector; queries and keys are rotated in the dtype ``rotation``."""
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


def block_tensors(config: TowerConfig, *, output: str, gate: str, up: str, down: str) -> dict[str, WeightMap]:
    """Maps all weights except queries, keys and values; Mistral's format has other names for four of the modules."""
    tensors: dict[str, WeightMap] = {
        "patch_projection.weight": OneFrame("tower.patch_conv.weight"),
        **map_parameters({"input_norm": "tower.ln_pre"}, ("weight",)),
    }
    modules = {"norm1": "attention_norm", "attention_output": output, "norm2": "ffn_norm", "mlp_down": down}
    for block in range(config.depth):
        ours, layer = f"blocks.{block}", f"tower.transformer.layers.{block}"
        tensors |= map_parameters(modules, ("weight",), ours, layer)
        tensors[f"{ours}.mlp_gate_up.weight"] = Stacked.of(f"{layer}.{gate}.weight", f"{layer}.{up}.weight")
    return tensors


def read_hf_family(
    reader: ConfigReader,
    config: TowerConfig,
    size: TowerSize,
    reference: "PixtralReference",
    *,
    image_token: int,
    projector_tensors: Mapping[str, WeightMap] | None = None,
) -> Family:
    """Returns the family of a checkpoint in transformers' format.

    ``image_token`` is the default id of the image token; ``projector_tensors`` are those beyond the two linears.
    """
    tensors = block_tensors(
        config,
        output="attention.o_proj",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
    )
    for block in range(config.depth):
        layer = f"tower.transformer.layers.{block}"
        tensors[f"blocks.{block}.qkv.weight"] = Stacked.of(*(f"{layer}.{part}.weight" for part in QKV))
    # Biases are listed even if the tower has none.
    tensors |= map_parameters({name: name for name in ("projector.linear_1", "projector.linear_2")})
    # Each row of patches ends with a token, named as in transformers' processor.
    placeholder = token(reader, "image", image_token)
    prompt = PromptLayout(placeholder, merge=config.merge, row_break="[IMG_BREAK]", row_end="[IMG_END]")
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors={**tensors, **(projector_tensors or {})},
        ignored=IGNORED,
        resize_rules=make_resize_rules(size.longest_edge),
        reference=reference,
        prompt=prompt,
    )


def make_resize_rules(longest_edge: int, *, without_file: Mapping[str, Any] | None = None) -> dict[str, MakeRule]:
    """Returns transformers' way to prepare images and that of Mistral's own library, with the latter's longest edge.

    ``without_file`` has the settings of transformers' processor for a checkpoint without a file for it.
    """
    return {
        "hf": partial(LongestEdge, without_file=without_file),
        "mistral": partial(MistralResize, longest_edge=longest_edge),
    }


@dataclass(frozen=True)
class PixtralReference(ReferenceModel):
    """``vision_tower`` and ``multi_modal_projector`` of transformers' model.

    It does not call ``get_image_features``, which fails if all images together have a single token.

    Attributes:
        projector_values: value of the layer graph → module of the projector and side of it.
        merges: the projector merges patches, and takes the images' sizes.
    """

    projector_values: Mapping[str, tuple[str, str]]
    merges: bool

    row_order = "raster"

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Returns all images, padded to one size as transformers' processor does, and the height and width of each."""
        images = tile_images(batch, config)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        return stack_padded(images, height, width), sizes

    def outputs(
        self, model: Any, inputs: tuple[torch.Tensor, list[tuple[int, int]]], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """Returns the projected rows of all images, from one call."""
        pixels, sizes = inputs
        states = model.vision_tower(pixels, image_sizes=sizes, output_hidden_states=True).hidden_states
        rows = torch.cat([states[feature] for feature in config.features], dim=-1).squeeze(0)
        project = model.multi_modal_projector
        return {"embeddings": project(rows, sizes) if self.merges else project(rows)}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns every value with a module boundary on both sides."""
        values = module_values(OTHER_VALUES) | module_values(self.projector_values, "multi_modal_projector")
        return values | block_values(
            config.depth,
            "vision_tower.transformer.layers",
            norms=("attention_norm", "ffn_norm"),
            qkv=QKV,
            output="attention.o_proj",
            down="feed_forward.down_proj",
        )
