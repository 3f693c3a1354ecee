"""Images → :class:`~tritontower.batch.packed_batch.PackedBatch`: one file per resizing rule, named after the rule.

transformers' PIL image processors are the definition of the pixels.  A rule works out, from the checkpoint's settings
files alone, what an image of a given size becomes (a :class:`~tritontower.batch.layout.ImageLayout`).  Where it knows what the
processor does, it does the same without it (:mod:`.fast_path`); else it has the processor make the pixels, checks that they
are what was planned, and cuts them into rows of patches.
"""

from .base import Bounds, Preprocessor, cut_into_patches
from .from_tensors import pack_tiles
from .resize.anyres import AnyResolution
from .resize.fixed_size import FixedSize
from .resize.longest_edge import LongestEdge
from .resize.mistral import MistralResize
from .resize.smart_resize import SmartResize

__all__ = [
    "AnyResolution",
    "Bounds",
    "FixedSize",
    "LongestEdge",
    "MistralResize",
    "Preprocessor",
    "SmartResize",
    "cut_into_patches",
    "pack_tiles",
]
