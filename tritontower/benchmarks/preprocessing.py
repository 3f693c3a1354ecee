"""Pictures to patches, against transformers' own image processor, on the same decoded pictures.

transformers' processor gets what its users give it, a list of PIL pictures, and returns its tensors.  The tower's own way
makes a packed batch, once with the normalised pixels in fp32, which is the like of what transformers returns, and once
with bytes, which is what goes to a device where the weights take them.  Both copy the picture and take a digest of its
pixels first, which transformers does not; a third time starts behind that, with the pixels in hand.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tritontower import VisionTower
from tritontower.drawing import text_table
from tritontower.images import canonical_rgb
from tritontower.measuring import interleaved

from .documents import Document, document, machine, seconds_of
from .pictures import noise_pictures

__all__ = [
    "BYTES",
    "DEFAULT_SIZES",
    "OURS",
    "PIXELS",
    "THEIRS",
    "benchmark_preprocessing",
    "compare_preprocessing",
    "preprocessing_table",
]

OURS = "tritontower"
BYTES = "tritontower, bytes"
PIXELS = "tritontower, pixels alone"
THEIRS = "transformers"
CPU = torch.device("cpu")

LIMIT = 2e-6
"""Largest distance of a pixel from transformers' own, of values around one."""

Sizes = Sequence[tuple[int, int]]
DEFAULT_SIZES: Mapping[str, Sizes] = {
    "448 × 448": [(448, 448)],
    "1024 × 1024": [(1024, 1024)],
    "2048 × 2048": [(2048, 2048)],
    "16 of 224 × 224": [(224, 224)] * 16,
}
"""Label → width and height of the pictures of one call."""


def compare_preprocessing(tower: VisionTower, label: str, sizes: Sizes, *, repeats: int = 5) -> dict[str, Any]:
    """The row of one call.

    Args:
        tower: whose pictures they are; its weights are not needed.
        label: what to call the pictures.
        sizes: their widths and heights.
        repeats: how often each candidate runs, beside a first time that does not count.
    """
    pictures = [Image.fromarray(array) for array in noise_pictures(sizes)]

    preprocessor = tower.preprocessor

    def by_transformers() -> object:
        return preprocessor.processor(images=pictures, return_tensors="pt")

    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: tower.preprocess(pictures, raw=False),
        THEIRS: by_transformers,
    }
    images = [canonical_rgb(picture, index=index) for index, picture in enumerate(pictures)]
    calls[PIXELS] = lambda: preprocessor.pictures(images, raw=False)
    if preprocessor.rescaling is not None:
        calls[BYTES] = lambda: tower.preprocess(pictures, raw=True)
    # The same preprocessor, made to leave every pixel to transformers.
    plain = copy(preprocessor)
    plain.__dict__["shortcut"] = None
    expected = plain.pictures(images).pixels
    distance = float((tower.preprocess(pictures, raw=False).pixels - expected).abs().max())
    row = {"label": label, "sizes": [list(size) for size in sizes], "distance": distance, "limit": LIMIT}
    if not distance <= LIMIT:
        return {**row, "status": "failed", "reason": f"pixels differ by {distance:.1e} (limit {LIMIT:.0e})"}
    times = interleaved(calls, repeats=repeats, device=CPU)
    return {**row, "status": "ok", "seconds": {name: list(timing.seconds) for name, timing in times.items()}}


def benchmark_preprocessing(
    folder: Path, *, sizes: Mapping[str, Sizes] = DEFAULT_SIZES, repeats: int = 5, **placement: Any
) -> Document:
    """One row for each entry of ``sizes``; ``placement`` does not matter, it all happens on the CPU."""
    del placement
    tower = VisionTower.from_pretrained(folder, device=CPU, delay_load=True)
    rows = [compare_preprocessing(tower, label, each, repeats=repeats) for label, each in sizes.items()]
    return document("preprocessing", rows, device=CPU)


def preprocessing_table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table: milliseconds, medians."""
    rows: list[tuple[object, ...]] = []
    for row in found["rows"]:
        if row["status"] != "ok":
            rows.append((row["label"], None, None, None, None, None, "FAILED"))
            continue
        seconds = seconds_of(row)
        rows.append(
            (
                row["label"],
                _milliseconds(seconds[OURS]),
                _milliseconds(seconds[PIXELS]),
                _milliseconds(seconds[BYTES]) if BYTES in seconds else None,
                _milliseconds(seconds[THEIRS]),
                f"{seconds[THEIRS] / seconds[OURS]:.1f}",
                f"{row['distance']:.1e}",
            )
        )
    columns = (
        "pictures",
        "tritontower, ms",
        "pixels alone, ms",
        "in bytes, ms",
        "transformers, ms",
        "ratio",
        "distance",
    )
    lines = [text_table(f"Preprocessing, {machine(found)}", columns, rows)]
    return "\n".join(
        [*lines, *(f"failed: {row['label']}: {row['reason']}" for row in found["rows"] if "reason" in row)]
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"
