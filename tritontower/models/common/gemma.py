"""Gemma 3 and PaliGemma: a SigLIP encoder with its output norm, and a projector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig

from .clip_encoder import encoder_pixels, encoder_values, read_encoder
from .hf_reference import ModuleValue, ReferenceModel, module_values


def read_siglip(reader: ConfigReader, *, family: str) -> TowerConfig:
    """Reads the encoder of ``vision_config``, which is required: transformers' defaults for it match no checkpoint."""
    vision = reader.section("vision_config")
    vision.get(str, "model_type", default="siglip_vision_model", choices=("siglip_vision_model",))
    return read_encoder(vision, "siglip", family=family)


@dataclass(frozen=True)
class GemmaReference(ReferenceModel):
    """``vision_tower`` and ``multi_modal_projector`` of transformers' model.

    Attributes:
        projector_values: value of the layer graph → module of the projector and side of it.
        auto_class: the auto class of transformers that creates the model.
        inner: path of the module that holds the two; ``""`` if it is the model itself.
    """

    projector_values: Mapping[str, tuple[str, str]]
    auto_class: str = "AutoModel"
    inner: str = ""

    # The encoder has its patches in raster order, although a token of Gemma 3 covers several of them.
    row_order = "raster"

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
        """Returns all tiles in one tensor."""
        return encoder_pixels(model.get_submodule(self.inner).vision_tower, batch, config)

    def outputs(self, model: Any, inputs: torch.Tensor, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """Returns the projected rows of all tiles, tile after tile."""
        features = model.get_submodule(self.inner).get_image_features(inputs)
        return {"embeddings": features.pooler_output.flatten(0, 1)}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns every value with a module boundary on both sides."""
        inside = f"{self.inner}." if self.inner else ""
        projector = module_values(self.projector_values, f"{inside}multi_modal_projector")
        return {**encoder_values(config, f"{inside}vision_tower"), **projector}
