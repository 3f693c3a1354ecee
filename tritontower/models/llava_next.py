"""LLaVA-NeXT, also called LLaVA 1.6 (Liu et al. 2024): LLaVA on tiles.

The encoder sees an image as a whole, and in tiles on the best-fitting canvas of ``image_grid_pinpoints``.  The tokens of the
tiles are assembled, the canvas's padding is dropped, and a learned newline embedding ends every row.  The reference is
``LlavaNextModel``.
"""

from tritontower.checkpoint.config_reader import ConfigReader

from .common.family import Family
from .common.llava import LLAVA_DEFAULTS, list_model_types, read_tiled

MODEL_TYPES = list_model_types("llava_next")
PUBLISHED = ("llava_next",)

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Default canvases of ``LlavaNextConfig``."""


def read(reader: ConfigReader) -> Family:
    """Reads encoder, features, projector and canvases; missing keys have the defaults of ``LlavaNextConfig``."""
    return read_tiled(reader, "llava_next", LLAVA_DEFAULTS, PINPOINTS)
