"""What the demonstration and the benchmarks run on where no real weights are: a full-size tower and photographs."""

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from PIL import Image

from tritontower.engine.tuned_tables import cache_folder
from tritontower.errors import UsageError
from tritontower.models.common.family import read_summary

from .random_checkpoint import write_random_checkpoint

__all__ = ["demonstration_checkpoint", "demonstration_images"]

CHECKPOINT_NAME = "random-qwen2-vl-2b-tower-v1"
PHOTOGRAPHS = {"astronaut": (512, 512), "chelsea": (451, 300), "coffee": (392, 261)}
"""Photographs that scikit-image carries in its wheel, and the size each is shown at: three shapes in one pack."""


def demonstration_checkpoint() -> Path:
    """A checkpoint with the tower of Qwen2-VL-2B at full size and random weights (1.3 GB), made once and kept.

    The numbers mean nothing and the shapes, names and costs are the published ones.  Processes that ask at the same
    time wait for each other; one that is killed while writing leaves nothing that the next would take for finished.

    Raises:
        UsageError: there is no home folder to keep it in.
    """
    cache = cache_folder()
    if cache is None:
        raise UsageError("there is no home folder to keep the demonstration's checkpoint in; set TRITONTOWER_CACHE")
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
    """Name → photograph, of different sizes.

    Raises:
        UsageError: scikit-image, which carries the photographs, is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise UsageError(
            "the demonstration's photographs come with scikit-image, which is not installed; install the `demo` extra "
            '(pip install "tritontower[demo]"), or name images of your own'
        ) from error
    return {name: Image.fromarray(getattr(data, name)()).resize(size) for name, size in PHOTOGRAPHS.items()}
