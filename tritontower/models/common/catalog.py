"""What can be loaded: every family's row of the documentation, from what the family files say of themselves.

Nothing is listed by hand.  Formats and token counts are those of each family's published example, read as a checkpoint
without weights is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tritontower.checkpoint.dequantize import SUPPORTED_SCHEMES
from tritontower.tower import VisionTower

from .registry import MISTRAL_FORMAT, FamilyFile, FamilySummary, family_files

__all__ = ["COUNTED_SIDES", "CatalogEntry", "catalog", "families_table", "weight_formats"]

COUNTED_SIDES: Final = (448, 1024)
"""Sides of the square images that tokens are counted for, pixels."""

FORMATS: Final = {"hf": "transformers", "mistral": "Mistral"}
"""A family's ``layout`` → whose names its files have."""

COLUMNS: Final = (
    "Family",
    "Checkpoints",
    "Format",
    "`model_type`",
    "Images",
    "Video",
    "Tokens an image",
    *(f"{side}²" for side in COUNTED_SIDES),
)


@dataclass(frozen=True)
class CatalogEntry:
    """One row of the table.

    Attributes:
        title: what people call the family.
        checkpoints: models that it loads, by name.
        format: whose configuration, file and tensor names the checkpoints have.
        model_types: by what a configuration is recognized: ``model_type``, ``model_type/vision_config.model_type``, or
            ``params.json``.
        images: to which sizes images are resized, in words.
        video: whether it takes videos.
        tokens: tokens of an image, in words or as a formula.
        counted: side of a square image, pixels → its tokens in the published example.
    """

    title: str
    checkpoints: str
    format: str
    model_types: tuple[str, ...]
    images: str
    video: bool
    tokens: str
    counted: Mapping[int, int]


def catalog() -> list[CatalogEntry]:
    """Every family, in the order of the family files' names."""
    return [
        _entry(summary, model_types)
        for file in dict.fromkeys(family_files().values())
        for summary, model_types in _model_types_of(file)
    ]


def families_table() -> str:
    """The catalog as a Markdown table, with a line beneath it on how weights may be stored."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, catalog())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{weight_formats()}"


def weight_formats() -> str:
    """How the weights of every family may be stored, in a sentence."""
    *others, last = SUPPORTED_SCHEMES
    return (
        f"A tower's weights may be stored in fp32, fp16 or bf16, or quantized: {', '.join(others)} and {last} are "
        "dequantized as they are read."
    )


def _cells(entry: CatalogEntry) -> Sequence[str]:
    return (
        entry.title,
        entry.checkpoints,
        entry.format,
        ", ".join(f"`{model_type}`" for model_type in entry.model_types),
        entry.images,
        "yes" if entry.video else "–",
        entry.tokens,
        *(f"{count:,}" for count in entry.counted.values()),
    )


def _entry(summary: FamilySummary, model_types: tuple[str, ...]) -> CatalogEntry:
    with TemporaryDirectory() as name:
        folder = Path(name)
        mistral = MISTRAL_FORMAT in model_types
        (folder / (MISTRAL_FORMAT if mistral else "config.json")).write_text(json.dumps(summary.example))
        if summary.processor:
            (folder / "preprocessor_config.json").write_text(json.dumps(summary.processor))
        tower = VisionTower.from_pretrained(folder, device="cpu", delay_load=True)
        return CatalogEntry(
            title=summary.title,
            checkpoints=summary.checkpoints,
            format=FORMATS[tower.family.layout],
            model_types=model_types,
            images=summary.images,
            video=summary.video,
            tokens=summary.tokens,
            counted={side: tower.count_tokens(side, side) for side in COUNTED_SIDES},
        )


def _model_types_of(file: FamilyFile) -> list[tuple[FamilySummary, tuple[str, ...]]]:
    """The summaries of a file, each with the model types that are its own.

    A type belongs to the summary whose example's ``model_type`` it begins with: ``qwen3_5_moe`` to ``qwen3_5``.  Summaries
    whose examples have the same type share it.
    """
    own = [str(summary.example.get("model_type", MISTRAL_FORMAT)) for summary in file.SUMMARIES]

    def nearest(model_type: str) -> str:
        return max((name for name in own if model_type.startswith(name)), key=len, default=own[0])

    return [
        (summary, tuple(model_type for model_type in file.MODEL_TYPES if nearest(model_type) == name))
        for summary, name in zip(file.SUMMARIES, own, strict=True)
    ]
