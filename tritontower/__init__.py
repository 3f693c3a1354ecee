"""tritontower: a Triton-kernel inference engine for the vision towers of vision-language models.

Images in, language-model-ready embeddings out::

    from tritontower import VisionTower

    tower = VisionTower.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
    embeddings = tower.encode([image, Path("photo.jpg")])

Importing the package is cheap: each public name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CaptureLimits": "engine.graph_cache",
    "EmbeddingCache": "cache",
    "ImageEmbedding": "embedding",
    "ItemError": "scheduler.outputs",
    "Limits": "errors",
    "PackedBatch": "batch.packed_batch",
    "TokenSpace": "prompt.token_ids",
    "TowerConfig": "config",
    "TowerError": "errors",
    "VisionTower": "tower",
    "encode_prompt": "prompt.encode",
    "has_vision": "tower",
    "load_embeddings": "embedding",
    "merge_embeddings": "prompt.merge",
    "mrope_positions": "prompt.mrope",
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
    from .batch.packed_batch import PackedBatch
    from .cache import EmbeddingCache
    from .config import TowerConfig
    from .embedding import ImageEmbedding, load_embeddings, save_embeddings
    from .engine.graph_cache import CaptureLimits
    from .errors import Limits, TowerError
    from .prompt.encode import encode_prompt
    from .prompt.merge import merge_embeddings
    from .prompt.mrope import mrope_positions
    from .prompt.token_ids import TokenSpace
    from .scheduler.outputs import ItemError
    from .tower import VisionTower, has_vision


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
