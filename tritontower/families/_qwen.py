"""What the Qwen-VL towers have in common: names of their parts, and how transformers' implementation is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.recipes import Recipe, Stored
from tritontower.reference import ModuleValue, ReferenceModel, flat_patches

__all__ = ["ROOTS", "QwenReference", "of_every_block", "stored_blocks"]

ROOTS = {"visual.": ""}


def of_every_block(config: TowerConfig, names: Mapping[str, str]) -> dict[str, str]:
    """``names`` of one block, ours → theirs, for every block."""
    return {
        f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}"
        for block in range(config.depth)
        for ours, theirs in names.items()
    }


def stored_blocks(config: TowerConfig, block: Mapping[str, str], others: Mapping[str, str]) -> dict[str, Recipe]:
    """Recipes of tensors that are stored as the layer graph has them."""
    return {ours: Stored(theirs) for ours, theirs in {**others, **of_every_block(config, block)}.items()}


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
        return flat_patches(batch, config), torch.tensor(batch.view_grids, device=batch.pixels.device)

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
