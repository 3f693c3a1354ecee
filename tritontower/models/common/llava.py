"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: an encoder, a choice of its hidden states, two linears."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored, WeightMap, map_parameters
from tritontower.config import TowerConfig
from tritontower.preprocessing import AnyResolution
from tritontower.prompt.layout import PromptLayout

from .clip_encoder import PREFIXES_IN_MODEL, TOWER_TYPES, encoder_family, encoder_pixels, encoder_values, read_encoder
from .config_fields import feature_layers, text_width, two_linears
from .family import Family
from .hf_reference import ModuleValue, ReferenceModel
from .prompts import token

CLIP_LARGE_336: Mapping[str, int] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The encoder of a LLaVA or LLaVA-NeXT without ``vision_config``."""

STRATEGY = "vision_feature_select_strategy"
LINEARS = {name: name for name in ("projector.linear_1", "projector.linear_2")}


@dataclass(frozen=True)
class ClassDefaults:
    """Defaults of transformers' configuration class for keys that a file leaves out."""

    tower: str
    """``vision_config.model_type``"""
    vision: Mapping[str, Any]
    """``vision_config`` if it is missing; if it is there, its own class completes it."""
    text: str
    """``text_config.model_type``"""
    layer: int
    strategy: str
    image_token: int


LLAVA_DEFAULTS = ClassDefaults(
    tower="clip_vision_model", vision=CLIP_LARGE_336, text="llama", layer=-2, strategy="default", image_token=32000
)
"""Of ``LlavaConfig`` and ``LlavaNextConfig``."""


def list_model_types(model_type: str) -> tuple[str, ...]:
    """Returns the model type with each of the encoders and without an encoder."""
    return (model_type, *(f"{model_type}/{tower}" for tower in TOWER_TYPES))


def read_llava(reader: ConfigReader, family: str, defaults: ClassDefaults) -> Family:
    """Reads encoder, features and projector of a model without tiles."""
    vision = reader.section("vision_config", optional=True)
    tower = vision.get(str, "model_type", default=defaults.tower, choices=tuple(TOWER_TYPES))
    usual = {} if reader.has("vision_config") else defaults.vision
    encoder = read_encoder(vision, TOWER_TYPES[tower], family=family, defaults=usual)
    config = replace(
        encoder,
        features=feature_layers(reader, "vision_feature_layer", encoder.depth, defaults.layer),
        keep_class_token=_keeps_class_token(reader, encoder, defaults.strategy),
        projector=two_linears(reader, text_width(reader, defaults.text)),
    )
    prompt = PromptLayout(placeholder=token(reader, "image", defaults.image_token))
    return encoder_family(config, LlavaReference(), map_parameters(LINEARS), prompt=prompt)


def read_tiled(
    reader: ConfigReader,
    family: str,
    defaults: ClassDefaults,
    pinpoints: tuple[tuple[int, int], ...],
    *,
    shrink_limit: int | None = None,
) -> Family:
    """Reads a model that cuts images into tiles, whose rows end with a learned newline embedding.

    ``pinpoints`` are the default canvases, ``(height, width)``; those above ``shrink_limit`` tiles' worth of tokens are shrunk.
    """
    model = read_llava(reader, family, defaults)
    if model.config.keep_class_token:
        raise reader.error(
            STRATEGY, "full", "'default' with a CLIP tower: class tokens have no place among the tokens of tiles"
        )
    # A token of a shrunk canvas is interpolated from four.
    config = replace(model.config, newline=True, assembly_taps=1 if shrink_limit is None else 4)
    canvases = reader.get_rows(int, "image_grid_pinpoints", pinpoints, length=2, minimum=1)
    tensors: dict[str, WeightMap] = {**model.tensors, "newline": Stored("image_newline")}
    prefixes = {**PREFIXES_IN_MODEL, "image_newline": "image_newline"}
    rules = {"hf": partial(AnyResolution, pinpoints=canvases, shrink_limit=shrink_limit)}
    return replace(model, config=config, prefixes=prefixes, tensors=tensors, resize_rules=rules)


def _keeps_class_token(reader: ConfigReader, encoder: TowerConfig, default: str) -> bool:
    strategy = reader.get(str, STRATEGY, default=default, choices=("default", "full"))
    if strategy == "default" and not encoder.class_token:
        raise reader.error(
            STRATEGY,
            strategy,
            "'full' with a SigLIP tower: 'default' drops the class token, which SigLIP does not have, so that transformers "
            "would drop the first patch",
        )
    return strategy == "full" and encoder.class_token


@dataclass(frozen=True)
class LlavaReference(ReferenceModel):
    """The image half of transformers' model, with its selection of hidden states and its assembly of tiles."""

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """Returns all tiles in one tensor, and for tiled images their original height and width."""
        inputs = {"pixel_values": encoder_pixels(model.vision_tower, batch, config)}
        if config.newline:
            inputs["image_sizes"] = torch.tensor([(height, width) for width, height in batch.images.original_sizes])
        return inputs

    def outputs(
        self, model: Any, inputs: Mapping[str, torch.Tensor], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """Returns the projected rows of each image, assembled by the model."""
        # Negative, because the model takes a 0 for "no hidden states".
        layers = [feature - config.depth - 1 for feature in config.features]
        drops = config.class_token and not config.keep_class_token
        found = model.get_image_features(
            **inputs,
            vision_feature_layer=layers[0] if len(layers) == 1 else layers,
            vision_feature_select_strategy="default" if drops else "full",
        )
        return {"embeddings": torch.cat(list(found.pooler_output))}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns the encoder's values, and the projector's if it projects the same rows.

        With tiles, transformers also projects the padding, and assembles the rows outside any module.
        """
        values = encoder_values(config, "vision_tower")
        if not config.newline:
            values["projector.hidden"] = ModuleValue.input("multi_modal_projector.linear_2")
            values["embeddings"] = ModuleValue.output("multi_modal_projector")
        return values
