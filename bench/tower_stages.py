"""What a campaign measures of whole towers, and of the way from images to patches; see :mod:`bench.campaign`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.benchmarks.images import (
    PACKS,
    family_checkpoint,
    family_configuration,
    family_titles,
    images_of,
    noise_images,
    square,
    summaries,
)
from tritontower.benchmarks.kernels import OURS
from tritontower.benchmarks.measuring import interleaved
from tritontower.benchmarks.preprocessing import DEFAULT_SIZES, compare_preprocessing
from tritontower.benchmarks.towers import Pass, compare_times, load_towers, reference_of
from tritontower.demo.random_checkpoint import write_random_checkpoint

from .runner import Item, Row, Setting

__all__ = [
    "TINY_FAMILY",
    "family_items",
    "gpu_preprocessing_items",
    "gpu_tower_items",
    "packs",
    "preprocessing_items",
    "squares",
    "tiny_checkpoint",
    "tower_items",
]

TINY_FAMILY = "Qwen2-VL"
"""Whose tower, shrunk to two narrow blocks, a dry run takes."""

TOWER_PATCHES = (1024, 4096, 256, 2304, 15376, 8836, 35344)
"""The first ones are worth the most, should time run out."""

SHORT_SECONDS = 1.5
"""What the first run of a pass may take if later ones are to take less than a second."""
SHORT_REPEATS = 7
"""Runs of a pass that takes less than a second: the shorter, the more a single one says of the machine's other work."""


class _Loaded:
    """The tower that was asked for last, and transformers' implementation of it; one at a time."""

    def __init__(self, setting: Setting, dtype: str, depth: int = 0) -> None:
        self.setting, self.dtype, self.depth = setting, dtype, depth
        self.title: str | None = None
        self._stack = ExitStack()

    def get(self, title: str) -> Any:
        """The tower, the same without graphs, transformers, and why it is missing."""
        if self.title != title:
            self.held: Any = None
            self._stack.close()
            if self.setting.device.type == "cuda":
                torch.cuda.empty_cache()
            folder = self._folder(title)
            tower, eager = load_towers(folder, device=self.setting.device, dtype=self.dtype)
            self.held = (tower, eager, *reference_of(tower))
            self.title = title
        return self.held

    def _folder(self, title: str) -> Path:
        if self.setting.dry:
            return tiny_checkpoint(Path(mkdtemp()))
        context = family_checkpoint(title, dtype=getattr(torch, self.dtype), depth=self.depth)
        return self._stack.enter_context(context)


def tiny_checkpoint(folder: Path) -> Path:
    """A tower of two narrow blocks."""
    summary = summaries()[TINY_FAMILY]
    narrow = {**summary.example["vision_config"], "depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 96}
    config = {**summary.example, "vision_config": narrow}
    return write_random_checkpoint(folder / "tiny", config, summary.processor, dtype=torch.bfloat16)


def tower_items(
    setting: Setting,
    plan: Sequence[tuple[str, Sequence[Pass]]],
    *,
    rivals: Sequence[str],
    repeats: int,
    dtype: str = "bfloat16",
    depth: int = 0,
) -> Iterator[Item]:
    """An item for every pass of every tower of ``plan`` (title, passes).

    Args:
        setting: where.
        plan: what runs.
        rivals: of transformers' candidates.
        repeats: how often each candidate runs; short passes at least :data:`SHORT_REPEATS` times.
        dtype: of weights and activations.
        depth: blocks of each tower; 0 for the published number.
    """
    loaded = _Loaded(setting, dtype, depth)

    def run(title: str, name: str, make: Callable[[VisionTower], Any]) -> Row:
        tower, eager, reference, missing = loaded.get(title)
        batch = make(tower)
        row = compare_times(
            tower,
            reference,
            batch,
            repeats=1 if setting.dry else _repeats(tower, batch, repeats),
            rivals=rivals,
            eager=eager,
            family=title,
            pack=name,
        )
        row["notes"] = {**row["notes"], **missing}
        return row

    for title, passes in plan:
        for name, make in passes:
            yield f"{title}: {name}", partial(run, title, name, make)


def _repeats(tower: VisionTower, batch: PackedBatch, least: int) -> int:
    """``least``, or what a short pass is worth if that is more."""
    if least >= SHORT_REPEATS:
        return least
    batch = batch.to(tower.device)
    start = time.perf_counter()
    tower.forward(batch).cpu()  # which waits for a device
    return SHORT_REPEATS if time.perf_counter() - start < SHORT_SECONDS else least


def squares(*counts: int) -> list[Pass]:
    """CudaGraphCache over one square image each, or as many views of a fixed size."""
    return [(f"{count} patches", partial(square, patches=count)) for count in counts]


def packs(*names: str) -> list[Pass]:
    """CudaGraphCache over named packs."""
    return [(name, partial(images_of, sizes=PACKS[name])) for name in names]


def gpu_tower_items(setting: Setting) -> Iterator[Item]:
    """Whole towers at full depth, then some of them against a compiled transformers as well."""
    plan: Sequence[tuple[str, Sequence[Pass]]] = [
        ("Qwen2-VL", [*squares(*TOWER_PATCHES), *packs("mixed", "small")]),
        ("Qwen2.5-VL", [*squares(4096, 16384, 1024), *packs("mixed")]),
        ("Qwen3-VL", [*squares(1024, 4096, 16384), *packs("mixed")]),
        ("Gemma 3", squares(8 * 4096)),
        ("Pixtral", [*squares(4096), *packs("mixed")]),
        ("Mistral Small 3", squares(12100)),
        ("CLIP", squares(16 * 576)),
    ]
    if setting.dry:
        plan = [(TINY_FAMILY, squares(16, 64))]
    yield from tower_items(setting, plan, rivals=("sdpa",), repeats=15)
    if setting.dry:
        return
    # Compiling takes minutes, and comes last for that.
    compiled: Sequence[tuple[str, Sequence[Pass]]] = [
        ("Qwen2-VL", squares(1024, 4096, 256, 16384)),
        ("Qwen2.5-VL", squares(4096)),
        ("Gemma 3", squares(8 * 4096)),
    ]
    for key, make in tower_items(setting, compiled, rivals=("sdpa", "compile"), repeats=15):
        yield f"{key}, with torch.compile", make


def family_items(setting: Setting) -> Iterator[Item]:
    """Every family at full depth."""
    titles = [TINY_FAMILY] if setting.dry else family_titles()
    passes = squares(16) if setting.dry else packs("448", "mixed")
    yield from tower_items(setting, [(title, passes) for title in titles], rivals=("sdpa",), repeats=9)


def preprocessing_items(setting: Setting, titles: Sequence[str]) -> Iterator[Item]:
    """Images to patches, for towers of several rules of resizing."""
    sizes: Mapping[str, Sequence[tuple[int, int]]] = {"56 × 56": [(56, 56)]} if setting.dry else DEFAULT_SIZES

    def run(title: str, label: str) -> Row:
        with family_configuration(title) as folder:
            tower = VisionTower.from_pretrained(folder, device="cpu", delay_load=True)
            row = compare_preprocessing(tower, label, sizes[label], repeats=2 if setting.dry else 15)
        return {**row, "label": f"{title}: {label}"}

    for title in titles[:1] if setting.dry else titles:
        for label in sizes:
            yield f"{title}: {label}", partial(run, title, label)


def gpu_preprocessing_items(setting: Setting) -> Iterator[Item]:
    """Making patches, and bringing them to the device as numbers and as bytes."""
    yield from preprocessing_items(setting, ("Qwen2-VL", "Gemma 3", "Pixtral"))

    def encode(label: str) -> Row:
        with ExitStack() as stack:
            folder = (
                tiny_checkpoint(Path(mkdtemp()))
                if setting.dry
                else stack.enter_context(family_checkpoint(TINY_FAMILY, dtype=torch.bfloat16))
            )
            tower = VisionTower.from_pretrained(folder, device=setting.device)
            images = noise_images([(56, 56)] if setting.dry else DEFAULT_SIZES[label])
            times = interleaved({"encode": lambda: tower.encode(images)}, repeats=2, device=setting.device)
        return {"status": "ok", "label": f"encode, {label}", "seconds": {OURS: list(times["encode"].seconds)}}

    for label in ("448 × 448",) if setting.dry else DEFAULT_SIZES:
        yield f"encode, {label}", partial(encode, label)
