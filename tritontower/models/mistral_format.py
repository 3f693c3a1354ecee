"""Pixtral and Mistral Small 3 in Mistral's own format: ``params.json`` and ``consolidated*.safetensors``.

The tower and the projectors are those of :mod:`tritontower.models.pixtral` and :mod:`tritontower.models.mistral3`, under other
names: ``w1``, ``w3`` and ``w2`` are gate, up and down; the rows of ``wq`` and ``wk`` interleave the two halves of a rotary pair;
``vision_language_adapter`` holds the two linears.  ``vision_encoder`` in ``params.json`` states whether patches are merged
(``mm_projector_id``) and normalized before (``add_pre_mm_projector_layer_norm``).  It often does not state whether the two
linears have biases; the checkpoint's tensors then decide.

transformers cannot read such a checkpoint.  Mistral's own implementation rotates queries and keys in fp32, and so does this one;
transformers rotates the same weights in the activation dtype.  In fp32 there is no difference.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import (
    ChannelMajor,
    InterleavedRotary,
    Stacked,
    Stored,
    WeightMap,
    map_parameters,
)
from tritontower.config import Projector, TowerConfig
from tritontower.prompt.layout import PromptLayout

from .common.config_fields import positive, whole_heads
from .common.family import MISTRAL_FORMAT, Family
from .common.pixtral_encoder import NORM, TowerSize, block_tensors, make_resize_rules, tower_config
from .common.prompts import token

MODEL_TYPES = (MISTRAL_FORMAT,)
PUBLISHED = ("pixtral_mistral_format", "mistral3_mistral_format")

PATCH_MERGE = "patch_merge"
PREFIXES = {
    "vision_encoder.": "tower.",
    "vision_language_adapter.": "projector.",
    "patch_merger.": "projector.patch_merger.",
    "pre_mm_projector_norm.": "projector.norm.",
}
BIASES = ("projector.w_in.bias", "projector.w_out.bias")


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_encoder`` and the language model's width, ``dim``; both are required."""
    vision = reader.section("vision_encoder")
    size = _read_size(vision)
    projector = _read_projector(vision, positive(reader, "dim"))
    config = tower_config(size, projector, family="mistral_format", features=(size.depth,), rotation="float32")
    processor = {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": size.patch,
        "size": {"longest_edge": size.longest_edge},
    }
    return Family(
        config=config,
        prefixes=PREFIXES,
        tensors=_map_tensors(config),
        resize_rules=make_resize_rules(size.longest_edge, without_file=processor),
        reference=None,
        layout="mistral",
        # transformers' layout; the configuration has the id of every token.
        prompt=PromptLayout(
            placeholder=token(vision, "image", 10),
            merge=config.merge,
            row_break=token(vision, "image_break", 12),
            row_end=token(vision, "image_end", 13),
        ),
        settle=_settle,
    )


def _read_size(vision: ConfigReader) -> TowerSize:
    width = positive(vision, "hidden_size")
    edge = "max_image_size" if vision.has("max_image_size") else "image_size"
    return TowerSize(
        channels=positive(vision, "num_channels", 3),
        patch=positive(vision, "patch_size"),
        width=width,
        depth=positive(vision, "num_hidden_layers"),
        heads=whole_heads(vision, "num_attention_heads", width),
        mlp_hidden=positive(vision, "intermediate_size"),
        theta=vision.get(float, "rope_theta", default=10000.0, minimum=1.0),
        longest_edge=positive(vision, edge),
    )


def _read_projector(vision: ConfigReader, width: int) -> Projector:
    # Files without merging leave this out or empty.
    kind = vision.get(str, "mm_projector_id", default="", choices=("", PATCH_MERGE))
    merge = positive(vision, "spatial_merge_size", 1)
    if merge > 1 and kind != PATCH_MERGE:
        raise vision.error("spatial_merge_size", merge, f"1, or mm_projector_id {PATCH_MERGE!r}")
    return Projector(
        norm=NORM if vision.get(bool, "add_pre_mm_projector_layer_norm", default=False) else None,
        merge=merge,
        hidden=width,
        output=width,
        activation="gelu",
        bias=vision.get(bool, "adapter_bias", default=True),
        merging_linear=kind == PATCH_MERGE,
    )


def _map_tensors(config: TowerConfig) -> Mapping[str, WeightMap]:
    tensors = block_tensors(
        config, output="attention.wo", gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2"
    )
    for block in range(config.depth):
        attention = f"tower.transformer.layers.{block}.attention"
        rotated = [InterleavedRotary(f"{attention}.{part}.weight", config.heads) for part in ("wq", "wk")]
        tensors[f"blocks.{block}.qkv.weight"] = Stacked((*rotated, Stored(f"{attention}.wv.weight")))
    merging = ChannelMajor("projector.patch_merger.merging_layer.weight", config.rows_per_token)
    return {
        **tensors,
        **map_parameters({"projector.linear_1": "projector.w_in", "projector.linear_2": "projector.w_out"}),
        "projector.norm.weight": Stored("projector.norm.weight"),
        "projector.merging.weight": merging,
    }


def _settle(family: Family, names: Collection[str]) -> Family:
    """Takes the biases of the linears from the checkpoint: published files without ``adapter_bias`` are of both kinds."""
    projector = family.config.projector
    if projector is None:
        return family
    biased = replace(projector, bias=any(name in names for name in BIASES))
    return replace(family, config=replace(family.config, projector=biased))
