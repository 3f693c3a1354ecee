"""Towers, folders and images for the tests of preprocessing."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tritontower.config import Normalization, PatchEmbedding, PositionTable, Projector, TowerConfig
from tritontower.errors import Limits
from tritontower.preprocessing import MakeRule, Preprocessor, ProcessorSource
from tritontower.preprocessing.images.decode import decode_image
from tritontower.preprocessing.images.image import CanonicalImage

LIMITS = Limits()


def tower(
    patch: int = 14, merge: int = 1, temporal: int = 1, table_side: int | None = None, **changes: Any
) -> TowerConfig:
    """A tower of which only what preprocessing looks at means anything."""
    norm = Normalization("layer_norm", 1e-6)
    table = None if table_side is None else PositionTable(table_side, "exact")
    return TowerConfig(
        **{
            "family": "tested",
            "patch": PatchEmbedding(channels=3, size=patch, temporal=temporal, bias=False),
            "width": 64,
            "depth": 1,
            "heads": 4,
            "norm": norm,
            "qkv_bias": True,
            "attention_bias": True,
            "mlp_hidden": 64,
            "mlp_bias": True,
            "activation": "gelu",
            "features": (1,),
            "position_table": table,
            "projector": Projector(norm=norm, merge=merge, hidden=None, output=8, activation="gelu", bias=True),
            **changes,
        }
    )


def write_settings(folder: Path, values: Any, name: str = "preprocessor_config.json") -> Path:
    """``folder`` with one settings file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


def reference_processor(folder: Path) -> Any:
    """The processor of a folder as transformers itself loads it."""
    return AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)


def canonical(array: np.ndarray) -> CanonicalImage:
    """``array``, ``[height, width, 3]`` uint8, in canonical form."""
    return decode_image(array, input_data_format="channels_last")


def blank(width: int, height: int) -> CanonicalImage:
    """A black image."""
    return CanonicalImage(np.zeros((height, width, 3), np.uint8), "black")


def random_sizes(count: int, largest: int = 3000, seed: int = 0) -> list[tuple[int, int]]:
    """Widths and heights, small ones as likely as large ones, none flatter than 1 : 200."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.uniform(0.0, np.log(largest), (2 * count, 2))).astype(int).clip(1)
    kept = [(int(w), int(h)) for w, h in sizes if max(w, h) <= 200 * min(w, h)][:count]
    assert len(kept) == count
    return kept


def put_together(rows: torch.Tensor, grid: tuple[int, int, int], patch: int, merge: int) -> torch.Tensor:
    """``[channels, height, width]`` of one tile from its rows: one patch after the other, in plain Python."""
    _, height, width = grid
    image = torch.empty(3, height * patch, width * patch)
    number = 0
    for block_row in range(0, height, merge):
        for block_column in range(0, width, merge):
            for row in range(block_row, block_row + merge):
                for column in range(block_column, block_column + merge):
                    top, left = row * patch, column * patch
                    image[:, top : top + patch, left : left + patch] = rows[number].view(3, patch, patch)
                    number += 1
    assert number == len(rows)
    return image


def make_rule(
    rule: MakeRule,
    config: TowerConfig,
    folder: Path,
    limits: Limits = LIMITS,
    given: Any = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Preprocessor:
    """A preprocessor of one resizing rule."""
    source = ProcessorSource(config, folder, limits, given, options or {})
    return Preprocessor(source, partial(rule, **arguments))


def patches_of(preprocessor: Preprocessor, images: list[CanonicalImage], **bounds: Any) -> list[torch.Tensor]:
    """The rows of patches of every image."""
    counts = [preprocessor.layout(image.width, image.height, **bounds).patches for image in images]
    pixels = preprocessor.preprocess_images(images, **bounds).pixels
    assert pixels.dtype == torch.float32
    return list(pixels.split(counts))
