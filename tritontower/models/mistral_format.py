"""Pixtral and Mistral Small 3 in Mistral's own format: ``params.json`` and ``consolidated*.safetensors``.

The tower and the projectors are those of :mod:`tritontower.models.pixtral` and :mod:`tritontower.models.mistral3`,
spelled otherwise: ``w1``, ``w3`` and ``w2`` are gate, up and down; the rows of ``wq`` and ``wk`` have a rotary pair side by
side; ``vision_language_adapter`` holds the two linears.  ``params.json`` says in ``vision_encoder`` whether patches are
merged (``mm_projector_id``) and normed before (``add_pre_mm_projector_layer_norm``); whether the two linears have biases is
often left out, and then the checkpoint's tensors decide.

transformers reads no such checkpoint.  Mistral's own implementation rotates queries and keys in fp32, and so does this; in
transformers' format of the same weights they are rotated in the activation dtype, as transformers does.  In fp32 there is no
difference.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import ChannelMajor, InterleavedRotary, Stacked, Stored, WeightMap
from tritontower.config import Projector, TowerConfig
from tritontower.prompt.layout import PromptLayout

from .common.config_fields import positive, whole_heads
from .common.pixtral_encoder import NORM, TowerSize, block_tensors, preprocessors, projector_tensors, tower_config
from .common.prompts import token
from .common.registry import MISTRAL_FORMAT, Family, FamilySummary

MODEL_TYPES = (MISTRAL_FORMAT,)

PATCH_MERGE = "patch_merge"
PREFIXES = {
    "vision_encoder.": "tower.",
    "vision_language_adapter.": "projector.",
    "patch_merger.": "projector.patch_merger.",
    "pre_mm_projector_norm.": "projector.norm.",
}
BIASES = ("projector.w_in.bias", "projector.w_out.bias")

ENCODER_EXAMPLE = {
    "hidden_size": 1024,
    "num_channels": 3,
    "rope_theta": 10000.0,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_token_id": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
}
SUMMARIES = (
    FamilySummary(
        title="Pixtral, Mistral's own format",
        checkpoints="Pixtral 12B and Large (params.json)",
        images="any size, shrunk to 1024 pixels on the longer side, to multiples of 16",
        video=False,
        tokens="⌈width/16⌉ × ⌈height/16⌉",
        example={
            "dim": 5120,
            "vision_encoder": {
                **ENCODER_EXAMPLE,
                "image_size": 1024,
                "patch_size": 16,
            },
        },
        processor={},
    ),
    FamilySummary(
        title="Mistral Small 3, Mistral's own format",
        checkpoints="Mistral Small 3.1, 3.2 and their variants (params.json)",
        images="any size, shrunk to 1540 pixels on the longer side, to multiples of 28",
        video=False,
        tokens="⌈width/28⌉ × ⌈height/28⌉",
        example={
            "dim": 5120,
            "vision_encoder": {
                **ENCODER_EXAMPLE,
                "image_size": 1540,
                "max_image_size": 1540,
                "patch_size": 14,
                "adapter_bias": False,
                "mm_projector_id": PATCH_MERGE,
                "spatial_merge_size": 2,
                "add_pre_mm_projector_layer_norm": True,
            },
        },
        processor={},
    ),
)


def read(reader: ConfigReader) -> Family:
    """Reads ``vision_encoder`` and the language model's width, ``dim``; neither has defaults that could be guessed."""
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
        tensors=_tensors(config),
        preprocessors=preprocessors(size.longest_edge, without_file=processor),
        reference=None,
        layout="mistral",
        prompt=_prompt(vision, config),
        settle=_settle,
    )


def _prompt(vision: ConfigReader, config: TowerConfig) -> PromptLayout:
    """As transformers has it, but the configuration knows every token."""
    return PromptLayout(
        placeholder=token(vision, "image", 10),
        merge=config.merge,
        row_break=token(vision, "image_break", 12),
        row_end=token(vision, "image_end", 13),
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
    # Where nothing is merged, files leave this out or empty.
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


def _tensors(config: TowerConfig) -> Mapping[str, WeightMap]:
    tensors = block_tensors(config, output="attention.wo", gate="w1", up="w3", down="w2")
    for block in range(config.depth):
        attention = f"tower.transformer.layers.{block}.attention"
        rotated = [InterleavedRotary(f"{attention}.{part}.weight", config.heads) for part in ("wq", "wk")]
        tensors[f"blocks.{block}.qkv.weight"] = Stacked((*rotated, Stored(f"{attention}.wv.weight")))
    merging = ChannelMajor("projector.patch_merger.merging_layer.weight", config.rows_per_token)
    return {
        **tensors,
        **projector_tensors("w_in", "w_out"),
        "projector.norm.weight": Stored("projector.norm.weight"),
        "projector.merging.weight": merging,
    }


def _settle(family: Family, names: Collection[str]) -> Family:
    """The linears have biases where the checkpoint has: published files that leave ``adapter_bias`` out are of both kinds."""
    projector = family.config.projector
    if projector is None:
        return family
    biased = replace(projector, bias=any(name in names for name in BIASES))
    return replace(family, config=replace(family.config, projector=biased))
