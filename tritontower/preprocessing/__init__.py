"""Preprocessing: decoded images → :class:`~tritontower.batch.packed_batch.PackedBatch`.

transformers' PIL image processors define the pixels.  A resizing rule (:mod:`.resize`) computes from the checkpoint's
settings files alone the :class:`~tritontower.batch.layout.ImageLayout` of an image of a given size.  The pixels come from
the fast path (:mod:`.fast_path`) where it reproduces the processor, else from the processor itself (:mod:`.hf_processor`).
"""

from .bounds import Bounds
from .from_tensors import pack_tiles
from .preprocessor import MakeRule, Preprocessor
from .processor_config import ProcessorSource
from .resize.anyres import AnyResolution
from .resize.fixed_size import FixedSize
from .resize.longest_edge import LongestEdge
from .resize.mistral import MistralResize
from .resize.rule import ResizeRule
from .resize.smart_resize import SmartResize

__all__ = [
    "AnyResolution",
    "Bounds",
    "FixedSize",
    "LongestEdge",
    "MakeRule",
    "MistralResize",
    "Preprocessor",
    "ProcessorSource",
    "ResizeRule",
    "SmartResize",
    "pack_tiles",
]
