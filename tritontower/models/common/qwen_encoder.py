"""What the Qwen-VL towers have in common: names of their parts, fields of their configurations, and the reference.

The blocks are spelled alike but for their MLPs; every merger is a norm, a join of neighboring patches, and two linears with a
gelu between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored, WeightMap
from tritontower.config import Normalization, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel, flat_patches

from .config_fields import positive, rotary_theta, whole_heads

__all__ = [
    "ATTENTION",
    "IGNORED",
    "NORMS",
    "PREFIXES",
    "QWEN2_MERGER",
    "QWEN2_PROCESSOR",
    "QwenReference",
    "block_values",
    "merger_tensors",
    "merger_values",
    "parameters",
    "read_merger",
    "read_patch",
    "read_tower",
    "stored_blocks",
]

PREFIXES = {"visual.": ""}
"""Beginnings of the names of tensors."""

IGNORED = ("rotary_pos_emb.inv_freq",)
"""Stored names that hold nothing: the rotary frequencies, which follow from the configuration."""

NORMS = {"norm1": "norm1", "norm2": "norm2"}
ATTENTION = {"qkv": "attn.qkv", "attention_output": "attn.proj"}
"""Parts of a block, ours → theirs."""

QWEN2_MERGER = {"norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"}
"""Parts of the merger of Qwen2-VL and Qwen2.5-VL, ours → theirs."""

QWEN2_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
"""The processor file published with Qwen2-VL and Qwen2.5-VL."""


def parameters(parts: Mapping[str, str], kinds: Sequence[str] = ("weight", "bias")) -> dict[str, str]:
    """Names of tensors, ours → theirs, from names of the parts that have them."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items() for kind in kinds}


def stored_blocks(config: TowerConfig, block: Mapping[str, str], others: Mapping[str, str]) -> dict[str, WeightMap]:
    """Weight maps of tensors that are stored as the layer graph has them.

    Args:
        config: says how many blocks there are.
        block: names of one block's tensors, ours → theirs.
        others: names of those outside the blocks.
    """
    names = dict(others)
    for number in range(config.depth):
        names |= {f"blocks.{number}.{ours}": f"blocks.{number}.{theirs}" for ours, theirs in block.items()}
    return {ours: Stored(theirs) for ours, theirs in names.items()}


def merger_tensors(
    ours: str, theirs: str, parts: Mapping[str, str], norm_kinds: Sequence[str] = ("weight", "bias")
) -> dict[str, str]:
    """Names of one merger's tensors, ours → theirs; ``norm_kinds`` are what its norm has."""
    linears = {part: stored for part, stored in parts.items() if part != "norm"}
    names = parameters({"norm": parts["norm"]}, norm_kinds) | parameters(linears)
    return {f"{ours}.{name}": f"{theirs}.{stored}" for name, stored in names.items()}


def block_values(*, down: str, up: str | None = None) -> dict[str, tuple[str, str]]:
    """Value of one block of the layer graph → module of the reference's block and side of it.

    Args:
        down: the second linear of the MLP.
        up: the first; none where two are stored that the layer graph has as one.
    """
    values = {
        "norm1_rows": ("norm1", "output"),
        "qkv_rows": ("attn.qkv", "output"),
        "mixed": ("attn.proj", "input"),
        "attention_output_rows": ("attn.proj", "output"),
        "attended": ("norm2", "input"),
        "norm2_rows": ("norm2", "output"),
        "mlp_hidden": (down, "input"),
        "mlp_down_rows": (down, "output"),
        "block_rows": ("", "output"),
    }
    return values if up is None else values | {"mlp_up_rows": (up, "output")}


def merger_values(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Value of one projector of the layer graph → module of the reference and side of it."""
    return {
        f"{ours}.normed": (f"{theirs}.{parts['norm']}", "output"),
        f"{ours}.hidden": (f"{theirs}.{parts['linear_2']}", "input"),
    }


def read_patch(vision: ConfigReader, size: int, *, bias: bool) -> PatchEmbedding:
    """The patch embedding, of ``size`` pixels a side where a file says nothing."""
    return PatchEmbedding(
        channels=positive(vision, "in_channels", 3),
        size=positive(vision, "patch_size", size),
        temporal=positive(vision, "temporal_patch_size", 2),
        bias=bias,
    )


def read_merger(vision: ConfigReader, norm: Normalization, width: int, output_key: str) -> Projector:
    """The merger behind a tower of ``width``, to the language model's width under ``output_key``, which has to be there."""
    merge = positive(vision, "spatial_merge_size", 2)
    return Projector(
        norm=norm,
        merge=merge,
        hidden=width * merge * merge,
        output=positive(vision, output_key),
        activation="gelu",
        bias=True,
    )


def read_tower(vision: ConfigReader, width: int, depth: int, **own: Any) -> TowerConfig:
    """A tower with what all of them have in common: biases, a rotary embedding, frames that do not see each other.

    Args:
        vision: ``vision_config``.
        width: of the rows.
        depth: blocks; the features are taken behind the last.
        **own: the other fields of the configuration.
    """
    # transformers knows the number under either name.
    heads = "num_attention_heads" if vision.has("num_attention_heads") else "num_heads"
    return TowerConfig(
        width=width,
        depth=depth,
        heads=whole_heads(vision, heads, width, 16),
        qkv_bias=True,
        attention_bias=True,
        mlp_bias=True,
        rotary=RotaryEmbedding(theta=rotary_theta(vision), layout="halves"),
        segments="frame",
        features=(depth,),
        **own,
    )


@dataclass(frozen=True)
class QwenReference(ReferenceModel):
    """The ``visual`` module of transformers' model.

    Attributes:
        block_values: value of one block of the graph → module of the block and side of it.
        other_values: the same outside the blocks.
    """

    block_values: Mapping[str, tuple[str, str]]
    other_values: Mapping[str, tuple[str, str]]

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of all the frames that a patch spans, and the grids."""
        return flat_patches(batch, config), torch.tensor(batch.images.tile_grids, device=batch.pixels.device)

    def outputs(
        self, model: Any, inputs: tuple[torch.Tensor, torch.Tensor], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """The merged rows (``last_hidden_state`` holds those before the merger), and the deepstack rows."""
        output = model.visual(*inputs)
        deepstack = getattr(output, "deepstack_features", None) or []
        return {"embeddings": output.pooler_output} | {
            f"deepstack.{level}": rows for level, rows in enumerate(deepstack)
        }

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Every value that has a module's boundary on both sides."""
        paths = {name: (f"visual.{path}", side) for name, (path, side) in self.other_values.items()}
        for block in range(config.depth):
            for name, (path, side) in self.block_values.items():
                paths[f"blocks.{block}.{name}"] = (f"visual.blocks.{block}.{path}", side)
        return {name: ModuleValue.at(path, side) for name, (path, side) in paths.items()}
