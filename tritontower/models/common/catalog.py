"""The table of supported models, from the summaries and published examples of the model files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tritontower.checkpoint.dequantize import SUPPORTED_SCHEMES
from tritontower.preprocessing import Preprocessor, ProcessorSource

from .family import MISTRAL_FORMAT, FamilyFile, FamilySummary, read_summary, write_config
from .registry import list_family_files, read_family

COUNTED_SIDES: Final = (448, 1024)
"""Sides of the square images for which tokens are counted, pixels."""

COLUMNS: Final = (
    "Family", "Checkpoints", "Format", "`model_type`", "Images", "Video", "Tokens an image",
    *(f"{side}²" for side in COUNTED_SIDES),
)  # fmt: skip


@dataclass(frozen=True)
class CatalogEntry:
    """One row of the table: a :class:`FamilySummary` with what follows from its example."""

    title: str
    checkpoints: str
    format: str
    """Whose configuration and tensor names the checkpoints have."""
    model_types: tuple[str, ...]
    images: str
    video: bool
    tokens: str
    counted: Mapping[int, int]
    """Side of a square image, pixels → its tokens in the published example."""


def catalog() -> list[CatalogEntry]:
    """Returns every family, in the order of the model files' names."""
    return [
        _make_entry(summary, model_types)
        for file in dict.fromkeys(list_family_files().values())
        for summary, model_types in _assign_model_types(file)
    ]


def families_table() -> str:
    """Returns the catalog as a Markdown table, followed by :func:`weight_formats`."""
    rows = [
        (
            entry.title,
            entry.checkpoints,
            entry.format,
            ", ".join(f"`{model_type}`" for model_type in entry.model_types),
            entry.images,
            "yes" if entry.video else "–",
            entry.tokens,
            *(f"{count:,}" for count in entry.counted.values()),
        )
        for entry in catalog()
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows))
    return f"{table}\n\n{weight_formats()}"


def weight_formats() -> str:
    """Returns a sentence with the storage formats that every family supports."""
    *others, last = SUPPORTED_SCHEMES
    return (
        f"A tower's weights may be stored in fp32, fp16 or bf16, or quantized: {', '.join(others)} and {last} are "
        "dequantized as they are read."
    )


def _make_entry(summary: FamilySummary, model_types: tuple[str, ...]) -> CatalogEntry:
    family = read_family(summary.reader)
    with TemporaryDirectory() as name:
        folder = write_config(Path(name), summary)
        preprocessor = Preprocessor(ProcessorSource(family.config, folder), family.resize_rules["hf"])
        counted = {side: preprocessor.layout(side, side).tokens(family.config) for side in COUNTED_SIDES}
    words = {name: getattr(summary, name) for name in ("title", "checkpoints", "images", "video", "tokens")}
    layout = "Mistral" if family.layout == "mistral" else "transformers"
    return CatalogEntry(format=layout, model_types=model_types, counted=counted, **words)


def _assign_model_types(file: FamilyFile) -> list[tuple[FamilySummary, tuple[str, ...]]]:
    """Pairs each summary of a file with its model types.

    A type belongs to the summary whose example's ``model_type`` is its prefix: ``qwen3_5_moe`` to ``qwen3_5``.  Summaries
    whose examples have the same type share it.
    """
    summaries = [read_summary(name) for name in file.PUBLISHED]
    own = [str(summary.example.get("model_type", MISTRAL_FORMAT)) for summary in summaries]
    owners = {
        model_type: max((name for name in own if model_type.startswith(name)), key=len, default=own[0])
        for model_type in file.MODEL_TYPES
    }
    return [
        (summary, tuple(model_type for model_type in file.MODEL_TYPES if owners[model_type] == name))
        for summary, name in zip(summaries, own, strict=True)
    ]
