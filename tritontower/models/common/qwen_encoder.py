"""Qwen-VL towers: tensor names, configuration fields, and the reference.

Their blocks differ in the MLP.  Every merger is a norm, a join of neighboring patches, and two linears with a gelu between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import WeightMap
from tritontower.config import Normalization, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig

from .config_fields import positive, rotary_theta, whole_heads
from .hf_reference import ModuleValue, ReferenceModel, flat_patches, module_values
from .weights import BOTH, map_parameters, prefix_parts

PREFIXES = {"visual.": ""}
"""Prefixes of tensor names."""

IGNORED = ("rotary_pos_emb.inv_freq",)
"""Stored names that no tower needs: the rotary frequencies follow from the configuration."""

NORMS = {"norm1": "norm1", "norm2": "norm2"}
ATTENTION = {"qkv": "attn.qkv", "attention_output": "attn.proj"}
"""Modules of a block, ours → theirs."""

QWEN2_MERGER = {"norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"}
"""Modules of the merger of Qwen2-VL and Qwen2.5-VL, ours → theirs."""

Values = Mapping[str, tuple[str, str]]
"""Value of the layer graph → module of the reference and side of it."""


def block_tensors(config: TowerConfig, parts: Mapping[str, str], kinds: Sequence[str] = BOTH) -> dict[str, WeightMap]:
    """Maps the parameters of modules, ours → theirs, of every block."""
    tensors: dict[str, WeightMap] = {}
    for block in range(config.depth):
        tensors |= map_parameters(prefix_parts(f"blocks.{block}", f"blocks.{block}", parts), kinds)
    return tensors


def merger_tensors(
    ours: str, theirs: str, parts: Mapping[str, str], norm_kinds: Sequence[str] = BOTH
) -> dict[str, WeightMap]:
    """Maps the parameters of one merger, whose norm has the parameters ``norm_kinds``."""
    names = prefix_parts(ours, theirs, parts)
    norm = f"{ours}.norm"
    linears = {name: stored for name, stored in names.items() if name != norm}
    return map_parameters({norm: names[norm]}, norm_kinds) | map_parameters(linears)


def block_values(*, down: str, up: str | None = None) -> dict[str, tuple[str, str]]:
    """Returns the values of one block.

    Args:
        down: the second linear of the MLP.
        up: the first; ``None`` if the checkpoint stores two, which the layer graph joins.
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
    """Returns the values of one merger."""
    return {
        f"{ours}.normed": (f"{theirs}.{parts['norm']}", "output"),
        f"{ours}.hidden": (f"{theirs}.{parts['linear_2']}", "input"),
    }


def read_patch(vision: ConfigReader, size: int, *, bias: bool) -> PatchEmbedding:
    """Reads the patch embedding, with a default side of ``size`` pixels."""
    return PatchEmbedding(
        channels=positive(vision, "in_channels", 3),
        size=positive(vision, "patch_size", size),
        temporal=positive(vision, "temporal_patch_size", 2),
        bias=bias,
    )


def read_merger(vision: ConfigReader, norm: Normalization, width: int, output_key: str) -> Projector:
    """Reads the merger after a tower of ``width``; ``output_key``, the language model's width, is required."""
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
    """Reads the common part of a tower: biases, a rotary embedding, attention within one temporal patch.

    Args:
        vision: ``vision_config``.
        width: of the rows.
        depth: number of blocks; the features are taken after the last.
        **own: the other fields of the tower.
    """
    # transformers accepts both names.
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
        block_values: values of one block.
        other_values: values outside the blocks.
    """

    block_values: Values
    other_values: Values

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pixels of all the frames that a patch spans, and the grids."""
        return flat_patches(batch, config), torch.tensor(batch.images.tile_grids, device=batch.pixels.device)

    def outputs(
        self, model: Any, inputs: tuple[torch.Tensor, torch.Tensor], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """Returns the merged rows (``last_hidden_state`` is before the merger), and the deepstack rows."""
        output = model.visual(*inputs)
        deepstack = getattr(output, "deepstack_features", None) or []
        return {"embeddings": output.pooler_output} | {
            f"deepstack.{level}": rows for level, rows in enumerate(deepstack)
        }

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns every value with a module boundary on both sides."""
        values = module_values(self.other_values, "visual")
        for block in range(config.depth):
            values |= module_values(self.block_values, f"visual.blocks.{block}", f"blocks.{block}.")
        return values
