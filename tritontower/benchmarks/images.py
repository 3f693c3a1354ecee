"""Inputs of the benchmarks: batches of noise by patch count, image size or name, and random checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tritontower import VisionTower
from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.demo.random_checkpoint import write_random_checkpoint
from tritontower.errors import UsageError
from tritontower.models.common.family import FamilySummary, write_config
from tritontower.models.common.registry import list_summaries

BATCHES: Mapping[str, Sequence[tuple[int, int]]] = {
    "448": [(448, 448)],
    "1024": [(1024, 1024)],
    "small": [(224, 224)] * 16,
    "64small": [(112, 112)] * 64,
    "mixed": [(448, 448), (224, 160), (640, 480), (112, 112), (300, 700), (900, 120)],
}
"""Name → width and height of the images of one batch."""

DEPTH_KEYS = ("depth", "num_hidden_layers")


def list_families() -> dict[str, FamilySummary]:
    """Title → summary of every family whose checkpoints transformers reads as well, in the order of their titles."""
    return dict(sorted((each.title, each) for each in list_summaries() if "model_type" in each.example))


def truncate_depth(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """``config`` with at most ``depth`` vision blocks (0: all) and no references to removed blocks."""
    vision: dict[str, Any] = dict(config.get("vision_config") or config)
    key = next((key for key in DEPTH_KEYS if key in vision), DEPTH_KEYS[-1])
    if depth:
        vision[key] = min(depth, vision.get(key, depth))
        if "deepstack_visual_indexes" in vision:
            levels = vision["deepstack_visual_indexes"]
            vision["deepstack_visual_indexes"] = [level for level in levels if level < depth]
    return {**config, "vision_config": vision} if "vision_config" in config else vision


@contextmanager
def family_checkpoint(title: str, *, depth: int = 0, dtype: torch.dtype | None = None) -> Iterator[Path]:
    """A temporary checkpoint of a family at its published width, with random weights of ``dtype``, or without weights."""
    known = list_families()
    if title not in known:
        raise UsageError(f"family must be one of {', '.join(known)}, got {title!r}")
    summary, config = known[title], truncate_depth(known[title].example, depth)
    with TemporaryDirectory() as name:
        if dtype is None:
            yield write_config(Path(name), summary, config)
        else:
            yield write_random_checkpoint(Path(name), config, summary.processor, dtype=dtype)


def noise_images(sizes: Sequence[tuple[int, int]]) -> list[np.ndarray[Any, Any]]:
    """Images of noise of these widths and heights, the same in every run."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes]


def noise_batch(tower: VisionTower, sizes: Sequence[tuple[int, int]]) -> PackedBatch:
    """A batch of noise images, from the tower's own preprocessing."""
    return tower.preprocess(noise_images(sizes))


def square_batch(tower: VisionTower, patches: int) -> PackedBatch:
    """About ``patches`` patches of noise: one square image, or several where the size is fixed."""
    config = tower.config
    if config.num_patches is None:
        count, side = 1, config.merge * max(1, round(patches**0.5 / config.merge))
    else:
        side = round(config.num_patches**0.5)
        count = max(1, round(patches / side**2))
    layout = ImageLayout.of_one_tile((1, side, side), config.patch.size)
    generator = torch.Generator().manual_seed(patches)
    pixels = torch.randn(count * side * side, config.patch.still_inner, generator=generator)
    try:
        return PackedBatch.pack(
            config,
            pixels,
            [layout] * count,
            original_sizes=[layout.processed_size] * count,
            content_hashes=[f"noise-{patches}-{number}" for number in range(count)],
        )
    except ValueError as error:
        raise UsageError(
            f"patches must be a square that this tower takes, got {patches:,} ({error}); name image sizes instead"
        ) from error
