"""Pictures → :class:`~tritontower.batch.PackedBatch`: one file per resizing rule, named after the rule.

transformers' PIL image processors are the definition of the pixels.  A rule works out, from the checkpoint's settings
files alone, what a picture of a given size becomes (a :class:`~tritontower.layout.PictureLayout`).  Where it knows what the
processor does, it does the same without it (:mod:`.shortcut`); else it has the processor make the pixels, checks that they
are what was planned, and cuts them into rows of patches.
"""

from .any_resolution import AnyResolution
from .base import Bounds, Preprocessor, cut_into_patches
from .fixed_size import FixedSize
from .longest_edge import LongestEdge
from .mistral_resize import MistralResize
from .smart_resize import SmartResize
from .views import pack_views

__all__ = [
    "AnyResolution",
    "Bounds",
    "FixedSize",
    "LongestEdge",
    "MistralResize",
    "Preprocessor",
    "SmartResize",
    "cut_into_patches",
    "pack_views",
]
