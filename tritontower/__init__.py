"""tritontower: a Triton-kernel inference engine for the vision towers of vision-language models.

Pictures in, language-model-ready embeddings out::

    from tritontower import VisionTower

    tower = VisionTower.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
    embeddings = tower.encode([picture, Path("photo.jpg")])

Importing the package is cheap: each public name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CaptureLimits": "capture",
    "EmbeddingCache": "cache",
    "ImageEmbedding": "embedding",
    "ItemError": "encoding",
    "Limits": "errors",
    "PackedBatch": "batch",
    "TokenSpace": "token_space",
    "TowerConfig": "config",
    "TowerError": "errors",
    "VisionTower": "tower",
    "encode_prompt": "prompt",
    "has_vision": "tower",
    "load_embeddings": "embedding",
    "merge_embeddings": "merging",
    "mrope_positions": "mrope",
    "save_embeddings": "embedding",
}

__all__ = [
    "CaptureLimits",
    "EmbeddingCache",
    "ImageEmbedding",
    "ItemError",
    "Limits",
    "PackedBatch",
    "TokenSpace",
    "TowerConfig",
    "TowerError",
    "VisionTower",
    "__version__",
    "encode_prompt",
    "has_vision",
    "load_embeddings",
    "merge_embeddings",
    "mrope_positions",
    "save_embeddings",
]

if TYPE_CHECKING:
    from .batch import PackedBatch
    from .cache import EmbeddingCache
    from .capture import CaptureLimits
    from .config import TowerConfig
    from .embedding import ImageEmbedding, load_embeddings, save_embeddings
    from .encoding import ItemError
    from .errors import Limits, TowerError
    from .merging import merge_embeddings
    from .mrope import mrope_positions
    from .prompt import encode_prompt
    from .token_space import TokenSpace
    from .tower import VisionTower, has_vision


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
