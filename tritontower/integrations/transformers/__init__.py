"""Towers inside transformers: in the place of a loaded model's vision part, or handing it finished embeddings.

* :func:`accelerate_vision` puts a tower in the place of the vision part of a loaded model, :func:`restore` undoes it;
* :func:`load_vlm` loads a model whose vision part is a tower from the start, its language model quantized or not;
* :func:`encoder_outputs` and :func:`inputs_embeds` hand embeddings to a model that stays as it is;
* :func:`register_attention` and :func:`vision_attention` lend it only the attention kernel.

transformers is imported when a function is called, not before.
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
