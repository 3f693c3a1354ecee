"""tritontower: a Triton-kernel inference engine for the vision towers of vision-language models.

Images in, language-model-ready embeddings out::

    from tritontower import VisionTower

    tower = VisionTower.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
    embeddings = tower.encode([image, Path("photo.jpg")])

Importing the package is cheap: each public name is imported on first use.
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

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  (all keys are strings)

if TYPE_CHECKING:
    from .batch.packed_batch import PackedBatch as PackedBatch
    from .cache import EmbeddingCache as EmbeddingCache
    from .config import TowerConfig as TowerConfig
    from .embedding import ImageEmbedding as ImageEmbedding
    from .embedding import load_embeddings as load_embeddings
    from .embedding import save_embeddings as save_embeddings
    from .engine.graph_cache import CaptureLimits as CaptureLimits
    from .errors import Limits as Limits
    from .errors import TowerError as TowerError
    from .prompt.encode import encode_prompt as encode_prompt
    from .prompt.merge import merge_embeddings as merge_embeddings
    from .prompt.mrope import mrope_positions as mrope_positions
    from .prompt.token_ids import TokenSpace as TokenSpace
    from .scheduler.outputs import ItemError as ItemError
    from .tower import VisionTower as VisionTower
    from .tower import has_vision as has_vision


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
