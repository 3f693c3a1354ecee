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
    "ImageEmbedding": "embedding",
    "Limits": "errors",
    "PackedBatch": "batch",
    "TowerConfig": "config",
    "TowerError": "errors",
    "VisionTower": "tower",
    "has_vision": "tower",
}

__all__ = [
    "ImageEmbedding",
    "Limits",
    "PackedBatch",
    "TowerConfig",
    "TowerError",
    "VisionTower",
    "__version__",
    "has_vision",
]

if TYPE_CHECKING:
    from .batch import PackedBatch
    from .config import TowerConfig
    from .embedding import ImageEmbedding
    from .errors import Limits, TowerError
    from .tower import VisionTower, has_vision


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
