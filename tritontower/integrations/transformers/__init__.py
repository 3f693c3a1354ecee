"""Towers in transformers: in place of a loaded model's vision modules, or as a source of embeddings for it.

:func:`accelerate_vision` gives a loaded model a tower, :func:`load_vlm` loads a model with one. :func:`encoder_outputs`
and :func:`inputs_embeds` pass embeddings to an unchanged model. :func:`vision_attention` gives it only the attention
kernel. transformers is imported when a function is called.
"""

from .attention import ATTENTION, VARLEN_ATTENTION, register_attention, vision_attention
from .loading import load_vlm
from .model_inputs import added_deepstack, encoder_outputs, inputs_embeds
from .processor import ImageTextProcessor
from .swap import AcceleratedVision, accelerate_vision, accelerated, restore

__all__ = [
    "ATTENTION",
    "VARLEN_ATTENTION",
    "AcceleratedVision",
    "ImageTextProcessor",
    "accelerate_vision",
    "accelerated",
    "added_deepstack",
    "encoder_outputs",
    "inputs_embeds",
    "load_vlm",
    "register_attention",
    "restore",
    "vision_attention",
]
