"""What Gemma 3 and PaliGemma have in common: a SigLIP encoder with its output norm, and how transformers runs the two."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Projector, TowerConfig
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel

from .clip_encoder import encoder_pixels, encoder_values, read_encoder

__all__ = ["GemmaReference", "read_siglip", "with_projector"]


def read_siglip(reader: ConfigReader, *, family: str) -> TowerConfig:
    """The encoder of ``vision_config``, which has to be there: transformers' own defaults for it fit no checkpoint.

    Raises:
        ConfigError: there is none, it is no SigLIP, or a value cannot be right.
    """
    vision = reader.section("vision_config")
    vision.get(str, "model_type", default="siglip_vision_model", choices=("siglip_vision_model",))
    return read_encoder(vision, "siglip", family=family)


def with_projector(encoder: TowerConfig, projector: Projector) -> TowerConfig:
    """The tower: all blocks, the norm behind them, and ``projector``."""
    return replace(encoder, features_normed=True, projector=projector)


@dataclass(frozen=True)
class GemmaReference(ReferenceModel):
    """The ``vision_tower`` and ``multi_modal_projector`` of transformers' model.

    Attributes:
        projector_values: value of the layer graph → module of the projector and side of it.
        auto_class: which of transformers' automatic classes makes the model.
        inner: path of what holds the two inside the model; ``""``: the model itself.
    """

    projector_values: Mapping[str, tuple[str, str]]
    auto_class: str = "AutoModel"
    inner: str = ""

    # A token of Gemma 3 stands for several patches, which the encoder has row by row all the same.
    row_order = "raster"

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
        """All tiles in one tensor."""
        return encoder_pixels(model.get_submodule(self.inner).vision_tower, batch, config)

    def outputs(self, model: Any, inputs: torch.Tensor, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """The projected rows of all tiles, one tile after the other."""
        features = model.get_submodule(self.inner).get_image_features(inputs)
        return {"embeddings": features.pooler_output.flatten(0, 1)}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Every value that has a module's boundary on both sides."""
        inside = f"{self.inner}." if self.inner else ""
        values = encoder_values(config, f"{inside}vision_tower")
        for name, (module, side) in self.projector_values.items():
            values[name] = ModuleValue.at(f"{inside}multi_modal_projector.{module}", side)
        return values
