"""Compares preprocessing with transformers' image processor, on the same decoded images.

transformers' processor gets a list of PIL images and returns tensors; the tower makes a packed batch of the same images:

* :data:`OURS`: normalized fp32 pixels, as transformers returns them, except that the frame of a still image is not
  repeated over the frames of a patch, since the weights are folded instead;
* :data:`BYTES`: uint8 pixels, as they go to a GPU;
* :data:`DIGESTS`: as :data:`OURS`, with the content digests that a cache needs;
* :data:`PIXELS`: as :data:`OURS`, from canonical images, so that nothing is checked or copied.

Candidates take turns with two calls each.  The first call finds caches and allocator as another candidate left them; the
second is like one of many images in a row, and counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tritontower import VisionTower
from tritontower.preprocessing.images.decode import decode_image
from tritontower.text_table import text_table

from .documents import Document, Report, describe_machine, list_failures, median_seconds, milliseconds
from .images import noise_images
from .measuring import interleaved

OURS = "tritontower"
BYTES = "tritontower, bytes"
DIGESTS = "tritontower, with digests"
PIXELS = "tritontower, pixels alone"
THEIRS = "transformers"
CPU = torch.device("cpu")

LIMIT = 2e-6
"""Largest absolute difference of a normalized pixel from transformers'."""

Sizes = Sequence[tuple[int, int]]
DEFAULT_SIZES: Mapping[str, Sizes] = {
    "448 × 448": [(448, 448)],
    "1024 × 1024": [(1024, 1024)],
    "2048 × 2048": [(2048, 2048)],
    "16 of 224 × 224": [(224, 224)] * 16,
}
"""Label → width and height of the images of one call."""


def compare_preprocessing(tower: VisionTower, label: str, sizes: Sizes, *, repeats: int = 5) -> dict[str, Any]:
    """Compares the pixels, then times every candidate; returns the row.  The tower needs no weights."""
    images = [Image.fromarray(array) for array in noise_images(sizes)]
    preprocessor = tower.preprocessor
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: tower.preprocess(images, raw=False),
        THEIRS: lambda: preprocessor.processor(images=images, return_tensors="pt"),
        DIGESTS: lambda: tuple(tower.preprocess(images, raw=False).images.content_hashes),
    }
    decoded = [decode_image(image, index=index) for index, image in enumerate(images)]
    calls[PIXELS] = lambda: preprocessor.preprocess_images(decoded, raw=False)
    if preprocessor.normalization is not None:
        calls[BYTES] = lambda: tower.preprocess(images, raw=True)
    expected = preprocessor.without_fast_path().preprocess_images(decoded).pixels
    distance = float((tower.preprocess(images, raw=False).pixels - expected).abs().max())
    row = {"label": label, "sizes": [list(size) for size in sizes], "distance": distance, "limit": LIMIT}
    if not distance <= LIMIT:
        return {**row, "status": "failed", "reason": f"pixels differ by {distance:.1e} (limit {LIMIT:.0e})"}
    turns = ("in_turn", "seconds")
    times = interleaved(
        {f"{name}: {turn}": call for name, call in calls.items() for turn in turns}, repeats=repeats, device=CPU
    )
    found = {turn: {name: list(times[f"{name}: {turn}"].seconds) for name in calls} for turn in turns}
    return {**row, "status": "ok", **found}


def benchmark_preprocessing(
    towers: Iterable[tuple[str | None, VisionTower]],
    *,
    sizes: Mapping[str, Sizes] = DEFAULT_SIZES,
    repeats: int = 5,
    path: Path | None = None,
) -> Document:
    """Measures one row for each of ``towers`` (title and tower) and entry of ``sizes``, on the CPU."""
    report = Report("preprocessing", device=CPU, path=path)
    for title, tower in towers:
        for label, each in sizes.items():
            full = f"{title}: {label}" if title else label
            report.add({"family": title, **compare_preprocessing(tower, full, each, repeats=repeats)})
    return report.finish()


def table(found: Mapping[str, Any]) -> str:
    """A document of this benchmark as a table: milliseconds, medians."""
    rows: list[tuple[object, ...]] = []
    for row in found["rows"]:
        if row["status"] != "ok":
            rows.append((row["label"], *[None] * 7, "FAILED"))
            continue
        seconds, in_turn = median_seconds(row), median_seconds(row, "in_turn")
        cells = [milliseconds(seconds.get(name)) for name in (OURS, DIGESTS, PIXELS, BYTES, THEIRS)]
        ratios = [f"{times[THEIRS] / times[OURS]:.1f}" for times in (seconds, in_turn)]
        rows.append((row["label"], *cells, *ratios, f"{row['distance']:.1e}"))
    columns = (
        "images", "tritontower, ms", "with digests, ms", "pixels alone, ms", "in bytes, ms", "transformers, ms",
        "ratio", "first calls", "distance",
    )  # fmt: skip
    table = text_table(f"Preprocessing, {describe_machine(found)}", columns, rows)
    return "\n".join([table, *list_failures(found, ("label",))])
