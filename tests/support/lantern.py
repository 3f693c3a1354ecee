"""The imaginary model of ``docs/adding-a-model.md``, as transformers would implement it."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

__all__ = ["LanternConfig", "LanternModel", "register"]


class LanternConfig(PreTrainedConfig):
    """An encoder's configuration, and the projector's."""

    model_type = "lantern"
    vision_config: Any = None
    wick: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class Wick(torch.nn.Module):
    """Norm, join squares of patches, two linears with a GELU between."""

    def __init__(self, width: int, join: int, output: int) -> None:
        super().__init__()
        self.join = join
        self.norm = torch.nn.LayerNorm(width, eps=1e-5)
        self.first = torch.nn.Linear(width * join * join, width * join * join)
        self.second = torch.nn.Linear(width * join * join, output)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        tiles, patches, width = rows.shape
        side, join = round(patches**0.5), self.join
        squares = self.norm(rows).view(tiles, side // join, join, side // join, join, width)
        joined = squares.transpose(2, 3).reshape(tiles, (side // join) ** 2, join * join * width)
        return self.second(torch.nn.functional.gelu(self.first(joined)))


class LanternModel(PreTrainedModel):
    """``lens``, an encoder, and ``wick``, a projector."""

    config_class = LanternConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: LanternConfig) -> None:
        super().__init__(config)
        self.lens = SiglipVisionModel(config.vision_config)
        self.wick = Wick(config.vision_config.hidden_size, **config.wick)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.wick(self.lens(pixel_values, output_hidden_states=True).hidden_states[-1])


def register() -> None:
    """Registers the model with ``AutoConfig`` and ``AutoModel``."""
    AutoConfig.register("lantern", LanternConfig, exist_ok=True)
    AutoModel.register(LanternConfig, LanternModel, exist_ok=True)
