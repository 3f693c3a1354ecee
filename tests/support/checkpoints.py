"""Loading and changed copies of checkpoints, and images of noise."""

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tritontower import VisionTower


class Opened:
    """Replaces ``safe_open``; records opened files, tensors that are read, and handles that still exist."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.read: list[str] = []
        self.handles: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def __call__(self, path: str, *, backend: str, **options: Any) -> Any:
        assert backend == "pread"
        handle = _Handle(safe_open(path, backend=backend, **options), self.read)
        self.files.append(Path(path))
        self.handles[Path(path).name] = handle
        return handle


class _Handle:
    def __init__(self, handle: Any, read: list[str]) -> None:
        self.handle, self.names = handle, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.names.append(name)
        tensor: torch.Tensor = self.handle.get_tensor(name)
        return tensor


def load(folder: Path, **options: Any) -> VisionTower:
    """Loads the tower onto the CPU, unless ``options`` have another device."""
    return VisionTower.from_pretrained(folder, **{"device": "cpu", **options})


def change_tensors(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copies a single-file checkpoint; ``change`` modifies its tensors."""
    _copy_settings(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rename_tensors(source: Path, target: Path, old: str, new: str) -> Path:
    """Copies a single-file checkpoint, with the prefix ``old`` of tensor names replaced by ``new``."""
    return rename_all(source, target, [(old, new)])


def rename_all(source: Path, target: Path, prefixes: Sequence[tuple[str, str]]) -> Path:
    """Copies a single-file checkpoint, with prefixes of tensor names replaced; the first match applies."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {_rename(name, prefixes): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    return change_tensors(source, target, rename)


def _rename(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _copy_settings(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())


def shard(source: Path, target: Path, shards: int = 3) -> Path:
    """Copies a single-file checkpoint into several files with an index."""
    _copy_settings(source, target)
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, target / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Returns an image ``[height, width, 3]`` uint8 of smooth colors and noise, different for every seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7.0 + k) + seed) * np.cos(y / (11.0 - k)) for k in range(3)]
    image = 127.5 + 90.0 * np.stack(waves, -1) + generator.normal(0.0, 20.0, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)
