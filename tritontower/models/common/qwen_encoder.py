"""Qwen-VL towers: tensor names, configuration fields, and the reference.

Their blocks differ in the MLP.  Every merger is a norm, a join of neighboring patches, and two linears with a gelu between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import BOTH, WeightMap, map_parameters
from tritontower.config import Normalization, PatchEmbedding, Projector, RotaryEmbedding, TowerConfig
from tritontower.preprocessing import SmartResize
from tritontower.prompt.layout import PromptLayout
from tritontower.prompt.mrope import MropeRule

from .config_fields import positive, rotary_theta, whole_heads
from .family import Family
from .hf_reference import ModuleValue, ReferenceModel, block_values, flat_patches, module_values

IGNORED = ("rotary_pos_emb.inv_freq",)
"""Stored names that no tower needs: the rotary frequencies follow from the configuration."""

NORMS = {"norm1": "norm1", "norm2": "norm2"}
ATTENTION = {"qkv": "attn.qkv", "attention_output": "attn.proj"}
"""Modules of a block, ours → theirs."""

QWEN2_MERGER = {"norm": "ln_q", "linear_1": "mlp.0", "linear_2": "mlp.2"}
"""Modules of the merger of Qwen2-VL and Qwen2.5-VL, ours → theirs."""

Values = Mapping[str, tuple[str, str]]
"""Value of the layer graph → module of the reference and side of it."""


def qwen_family(
    config: TowerConfig,
    mlp: Mapping[str, str],
    merger: Mapping[str, str],
    *,
    prompt: PromptLayout,
    mrope: MropeRule,
    frame_budget: Literal["per_frame", "per_video"] = "per_frame",
    norm_kinds: Sequence[str] = BOTH,
    tensors: Mapping[str, WeightMap] | None = None,
    values: Values | None = None,
) -> Family:
    """Returns the family of a tower.

    ``mlp`` and ``merger`` are modules, ours → theirs; the norms have the parameters ``norm_kinds``.  ``tensors`` and ``values``
    are those that only this tower has.
    """
    kinds = BOTH if config.patch.bias else ("weight",)
    maps = map_parameters({"patch_projection": "patch_embed.proj"}, kinds) | dict(tensors or {})
    for block in (f"blocks.{number}" for number in range(config.depth)):
        maps |= map_parameters(NORMS, norm_kinds, block, block)
        maps |= map_parameters({**ATTENTION, **mlp}, BOTH, block, block)
    places = {"patch_rows": ("patch_embed", "output"), "embeddings": ("merger", "output"), **(values or {})}
    mergers = {f"deepstack.{level}": f"deepstack_merger_list.{level}" for level in range(len(config.deepstack))}
    places |= {ours: (theirs, "output") for ours, theirs in mergers.items()}
    linears = {ours: theirs for ours, theirs in merger.items() if ours != "norm"}
    for ours, theirs in {"projector": "merger", **mergers}.items():
        maps |= map_parameters({"norm": merger["norm"]}, norm_kinds, ours, theirs)
        maps |= map_parameters(linears, BOTH, ours, theirs)
        places[f"{ours}.normed"] = (f"{theirs}.{merger['norm']}", "output")
        places[f"{ours}.hidden"] = (f"{theirs}.{merger['linear_2']}", "input")
    return Family(
        config=config,
        prefixes={"visual.": ""},
        tensors=maps,
        ignored=IGNORED,
        resize_rules={"hf": partial(SmartResize, frame_budget=frame_budget)},
        reference=QwenReference(mlp, places),
        prompt=prompt,
        mrope=mrope,
    )


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
    """Reads the common part of a tower: biases, a rotary embedding, attention within one temporal patch."""
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
        mlp: modules of a block's MLP, ours → theirs.
        other_values: values outside the blocks.
    """

    mlp: Mapping[str, str]
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
        return module_values(self.other_values, "visual") | block_values(
            config.depth,
            "visual.blocks",
            qkv=["attn.qkv"],
            output="attn.proj",
            down=self.mlp["mlp_down"],
            up=self.mlp.get("mlp_up"),
        )
