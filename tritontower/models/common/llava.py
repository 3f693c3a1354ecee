"""What LLaVA, LLaVA-NeXT and LLaVA-OneVision have in common: an encoder, a choice of its hidden states, two linears.

The references are ``LlavaModel``, ``LlavaNextModel`` and ``LlavaOnevisionModel`` of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import Stored, WeightMap
from tritontower.config import Projector, TowerConfig
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel

from .clip_encoder import TOWER_TYPES, encoder_pixels, encoder_tensors, encoder_values, read_encoder
from .config_fields import activation, feature_layers, text_width

__all__ = [
    "CLIP_LARGE_336_EXAMPLE",
    "CLIP_LARGE_336_PROCESSOR",
    "LLAVA_DEFAULTS",
    "ClassDefaults",
    "LlavaReference",
    "claimed",
    "llava_tensors",
    "read_llava",
    "refuse_class_token",
]

CLIP_LARGE_336: Mapping[str, int] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The encoder of a LLaVA or LLaVA-NeXT whose file says nothing at all about it."""

CLIP_LARGE_336_EXAMPLE = {
    **CLIP_LARGE_336,
    "model_type": "clip_vision_model",
    "projection_dim": 768,
    "vocab_size": 32000,
}
"""The same encoder, as published files of the two have it in their ``vision_config``."""

CLIP_LARGE_336_PROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
"""What their processor files have in common."""

STRATEGY = "vision_feature_select_strategy"


@dataclass(frozen=True)
class ClassDefaults:
    """What a key that a file leaves out means, by transformers' class for it.

    Attributes:
        tower: ``vision_config.model_type``.
        vision: ``vision_config``, if there is none; where there is one, its own class fills it up.
        text: ``text_config.model_type``.
        layer: ``vision_feature_layer``.
        strategy: ``vision_feature_select_strategy``.
    """

    tower: str
    vision: Mapping[str, Any]
    text: str
    layer: int
    strategy: str


LLAVA_DEFAULTS = ClassDefaults(
    tower="clip_vision_model", vision=CLIP_LARGE_336, text="llama", layer=-2, strategy="default"
)
"""Of ``LlavaConfig`` and ``LlavaNextConfig``."""


def claimed(model_type: str) -> tuple[str, ...]:
    """Names under which a family file claims the models of one type, with each of the encoders and without saying which."""
    return (model_type, *(f"{model_type}/{tower}" for tower in TOWER_TYPES))


def read_llava(reader: ConfigReader, family: str, defaults: ClassDefaults) -> TowerConfig:
    """Encoder, features and projector, all that the three have in common.

    Raises:
        ConfigError: a value cannot be right, or asks for what no such model can mean.
    """
    vision = reader.section("vision_config", optional=True)
    tower = vision.get(str, "model_type", default=defaults.tower, choices=tuple(TOWER_TYPES))
    usual = {} if reader.has("vision_config") else defaults.vision
    encoder = read_encoder(vision, TOWER_TYPES[tower], family=family, defaults=usual)
    width = text_width(reader, defaults.text)
    return replace(
        encoder,
        features=feature_layers(reader, "vision_feature_layer", encoder.depth, defaults.layer),
        keep_class_token=_keeps_class_token(reader, encoder, defaults.strategy),
        projector=Projector(
            norm=None,
            merge=1,
            hidden=width,
            output=width,
            activation=activation(reader, "projector_hidden_act", "gelu"),
            bias=reader.get(bool, "multimodal_projector_bias", default=True),
        ),
    )


def _keeps_class_token(reader: ConfigReader, encoder: TowerConfig, default: str) -> bool:
    strategy = reader.get(str, STRATEGY, default=default, choices=("default", "full"))
    if strategy == "default" and not encoder.class_token:
        raise reader.error(
            STRATEGY,
            strategy,
            "'full' with a SigLIP tower: 'default' leaves out the class token, which such a tower has not, and transformers "
            "would leave out the first patch instead",
        )
    return strategy == "full" and encoder.class_token


def refuse_class_token(reader: ConfigReader, config: TowerConfig) -> None:
    """Raises :class:`~tritontower.errors.ConfigError` where class tokens would stand among the tokens of tiles."""
    if config.keep_class_token:
        raise reader.error(
            STRATEGY,
            "full",
            "'default' with a CLIP tower: among the tokens of tiles there is no place for class tokens",
        )


def llava_tensors(config: TowerConfig) -> dict[str, WeightMap]:
    """How encoder and projector are stored, and the newline embedding of a tower with tiles."""
    projector: dict[str, WeightMap] = {
        f"projector.{linear}.{role}": Stored(f"projector.{linear}.{role}")
        for linear in ("linear_1", "linear_2")
        for role in ("weight", "bias")
    }
    newline: dict[str, WeightMap] = {"newline": Stored("image_newline")} if config.newline else {}
    return {**encoder_tensors(config), **projector, **newline}


@dataclass(frozen=True)
class LlavaReference(ReferenceModel):
    """The image half of transformers' model, its selection of hidden states and its packing of tiles included."""

    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """All tiles in one tensor, and of tiled images the height and width that they came with."""
        pixels = {"pixel_values": encoder_pixels(model.vision_tower, batch, config)}
        if not config.newline:
            return pixels
        return {
            **pixels,
            "image_sizes": torch.tensor([(height, width) for width, height in batch.images.original_sizes]),
        }

    def outputs(
        self, model: Any, inputs: Mapping[str, torch.Tensor], config: TowerConfig
    ) -> Mapping[str, torch.Tensor]:
        """The projected rows of each image, put together as the model does."""
        # Counted from the end, because a 0 passes for "no hidden states" there.
        layers = [feature - config.depth - 1 for feature in config.features]
        drops = config.class_token and not config.keep_class_token
        found = model.get_image_features(
            **inputs,
            vision_feature_layer=layers[0] if len(layers) == 1 else layers,
            vision_feature_select_strategy="default" if drops else "full",
        )
        return {"embeddings": torch.cat(list(found.pooler_output))}

    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Those of the encoder, and those of the projector where it projects the same rows.

        Of tiles, transformers projects the padding as well, and puts them together outside any module.
        """
        values = encoder_values(config, "vision_tower")
        if not config.newline:
            values["projector.hidden"] = ModuleValue.input("multi_modal_projector.linear_2")
            values["embeddings"] = ModuleValue.output("multi_modal_projector")
        return values
