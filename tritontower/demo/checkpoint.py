"""Inputs of the demonstration and the benchmarks: a full-size random checkpoint and photographs."""

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from PIL import Image

from tritontower.engine.tuned_tables import cache_folder
from tritontower.errors import UsageError
from tritontower.models.common.family import read_summary

from .random_checkpoint import write_random_checkpoint

CHECKPOINT_NAME = "random-qwen2-vl-2b-tower-v1"
PHOTOGRAPHS = {"astronaut": (512, 512), "chelsea": (451, 300), "coffee": (392, 261)}
"""Photographs in scikit-image's wheel, and the size to which each is resized."""


def demonstration_checkpoint() -> Path:
    """Returns a full-size Qwen2-VL-2B checkpoint with random weights (1.3 GB), made once and kept.

    Shapes, names and costs are the published ones.  Concurrent processes wait for each other, and a killed one leaves no
    unfinished checkpoint in place.

    Raises:
        UsageError: no home folder.
    """
    cache = cache_folder()
    if cache is None:
        raise UsageError(
            "the demonstration's checkpoint needs a folder, and there is no home folder; set TRITONTOWER_CACHE"
        )
    folder = cache / CHECKPOINT_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{CHECKPOINT_NAME}-", dir=folder.parent))
            summary = read_summary("qwen2_vl")
            try:
                write_random_checkpoint(unfinished, summary.example, summary.processor).rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def demonstration_images() -> dict[str, Image.Image]:
    """Photographs of different sizes, by name.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise UsageError(
            "the demonstration's photographs need scikit-image, which is not installed; run "
            'pip install "tritontower[demo]", or name your own images'
        ) from error
    return {name: Image.fromarray(getattr(data, name)()).resize(size) for name, size in PHOTOGRAPHS.items()}
