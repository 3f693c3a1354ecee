"""What a campaign measures on a CPU: the tables of the README; see :mod:`bench.campaign`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from tritontower.benchmarks.images import family_titles
from tritontower.benchmarks.loading import benchmark_loading
from tritontower.benchmarks.memory import benchmark_memory
from tritontower.demo.checkpoint import demonstration_checkpoint

from .runner import Item, Setting, Stage
from .tower_stages import TINY_FAMILY, packs, preprocessing_items, squares, tiny_checkpoint, tower_items

__all__ = ["CPU_STAGES"]

DEPTH = 8
"""Blocks of a family's tower: they repeat, and a ratio hardly changes with their number."""


def _towers(setting: Setting) -> Iterator[Item]:
    passes = squares(64) if setting.dry else squares(1024, 4096)
    yield from tower_items(setting, [(TINY_FAMILY, passes)], rivals=("sdpa",), repeats=3)


def _towers_float32(setting: Setting) -> Iterator[Item]:
    passes = squares(64) if setting.dry else squares(1024)
    yield from tower_items(setting, [(TINY_FAMILY, passes)], rivals=("sdpa",), repeats=3, dtype="float32")


def _families(setting: Setting) -> Iterator[Item]:
    titles = [TINY_FAMILY] if setting.dry else [title for title in family_titles() if title != "ShieldGemma 2"]
    passes = squares(16) if setting.dry else packs("448")
    plan = [(title, passes) for title in titles]
    yield from tower_items(setting, plan, rivals=("sdpa",), repeats=3, depth=DEPTH)


def _packs(setting: Setting) -> Iterator[Item]:
    """Where transformers loops in Python or builds a mask over the whole pack."""
    if setting.dry:
        plan = [(TINY_FAMILY, squares(16))]
    else:
        plan = [
            ("Qwen2-VL", packs("1024", "64small", "mixed")),
            ("Qwen2.5-VL", packs("1024", "64small", "mixed")),
            ("Pixtral", packs("1024", "64small", "mixed")),
            ("Qwen3-VL", packs("64small", "mixed")),
        ]
    yield from tower_items(setting, plan, rivals=("sdpa",), repeats=3, depth=DEPTH)


def _preprocessing(setting: Setting) -> Iterator[Item]:
    yield from preprocessing_items(setting, ("Qwen2-VL", "Gemma 3", "Pixtral"))


def _folder(setting: Setting) -> Path:
    return tiny_checkpoint(Path(mkdtemp())) if setting.dry else demonstration_checkpoint()


def _loading(setting: Setting) -> Iterator[Item]:
    def load() -> Mapping[str, Any]:
        found = benchmark_loading(
            _folder(setting),
            device=setting.device,
            dtype=torch.bfloat16,
            repeats=1 if setting.dry else 3,
            transformers=not setting.dry,
        )
        return {"status": "ok", "loads": found["rows"]}

    yield "Qwen2-VL-2B", load


def _memory(setting: Setting) -> Iterator[Item]:
    for patches in (64,) if setting.dry else (1024, 4096):

        def measure(patches: int = patches) -> Mapping[str, Any]:
            found = benchmark_memory(_folder(setting), device=setting.device, dtype=torch.bfloat16, patches=[patches])
            return {"status": "ok", **found["rows"][0]}

        yield f"{patches} patches", measure


CPU_STAGES: tuple[Stage, ...] = (
    Stage("towers", "the tower of Qwen2-VL-2B against transformers, bfloat16", _towers),
    Stage("towers-float32", "the same in float32", _towers_float32),
    Stage("families", f"every family at its published width, {DEPTH} blocks, one image of 448 × 448", _families),
    Stage("packs", f"large images, many small ones and mixed sizes in one pass, {DEPTH} blocks", _packs),
    Stage("preprocessing", "images to patches against transformers' image processors", _preprocessing),
    Stage("memory", "peak memory beside the plan", _memory),
    Stage("loading", "seconds and memory to load the tower of Qwen2-VL-2B", _loading),
)
