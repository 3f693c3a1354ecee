"""The description of one checkpoint's tower, and the interface of a model file."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import tritontower.models
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.weight_map import WeightMap
from tritontower.config import TowerConfig
from tritontower.preprocessing import MakeRule
from tritontower.prompt.layout import PromptLayout
from tritontower.prompt.mrope import MropeRule

from .hf_reference import ReferenceModel

MISTRAL_FORMAT = "params.json"
"""Mistral's own configuration file; it also stands for the ``model_type``, which that file does not have."""


@dataclass(frozen=True)
class Family:
    """One checkpoint's tower, as its model file reads it.

    Attributes:
        config: the tower.
        prefixes: prefix of the stored names that belong to the tower → replacement
            (:func:`tritontower.checkpoint.files.strip_prefix`).
        tensors: weight of the layer graph → how it is stored, under names stripped by ``prefixes``.  Weights that the graph
            does not need (blocks after the last one, pooling heads) are listed too; the checkpoint may lack them.
        ignored: :mod:`fnmatch` patterns of stripped names that the tower does not need.
        resize_rules: resizing rules by the name of the preprocessing; ``"hf"`` is that of transformers.
        reference: transformers' implementation; ``None`` if transformers cannot read the checkpoint.
        layout: whose tensor names the files have.
        mrope: position rule of the language model for images and videos; ``None`` if they are numbered like text.
        prompt: layout of images in the language model's prompt; ``None`` for a tower without a language model.
        bidirectional_tiles: the language model lets the rows of a tile attend to each other in both directions.
        settle: called with the stripped names in the checkpoint, if they decide what the configuration leaves open.
        model_type: entry of :func:`~tritontower.models.common.registry.model_types`; set by ``read_family``.
    """

    config: TowerConfig
    prefixes: Mapping[str, str]
    tensors: Mapping[str, WeightMap]
    resize_rules: Mapping[str, MakeRule]
    reference: ReferenceModel | None
    ignored: Sequence[str] = ()
    layout: Literal["hf", "mistral"] = "hf"
    mrope: MropeRule | None = None
    prompt: PromptLayout | None = None
    bidirectional_tiles: bool = False
    settle: Callable[["Family", Collection[str]], "Family"] | None = field(default=None)
    model_type: str = ""


@dataclass(frozen=True)
class FamilySummary:
    """One row of the table of supported models, with a published example.

    Attributes:
        title: the usual name of the family.
        checkpoints: names of the models.
        images: sizes to which images are resized, in words.
        video: the tower takes videos.
        tokens: tokens per image, in words or as a formula.
        source: repository of the example on the Hugging Face hub.
        example: the vision part of its ``config.json`` (or ``params.json``).
        processor: its processor file; empty if there is none.
    """

    title: str
    checkpoints: str
    images: str
    video: bool
    tokens: str
    source: str
    example: Mapping[str, Any]
    processor: Mapping[str, Any]

    @property
    def config_file(self) -> str:
        """Name of the file that holds ``example``."""
        return "config.json" if "model_type" in self.example else MISTRAL_FORMAT

    @property
    def reader(self) -> ConfigReader:
        """Reader of ``example``."""
        return ConfigReader(self.example, self.config_file)


class FamilyFile(Protocol):
    """Interface of a model file."""

    MODEL_TYPES: tuple[str, ...]
    """``model_type`` in ``config.json``, or ``model_type/vision_config.model_type`` if the tower decides."""
    PUBLISHED: tuple[str, ...]
    """Names of the files in ``models/published/`` with its summaries and published configurations."""

    def read(self, reader: ConfigReader) -> Family:
        """Reads a configuration; raises :class:`~tritontower.errors.ConfigError` for a value that it does not support."""
        ...


@lru_cache
def read_summary(name: str) -> FamilySummary:
    """Reads ``models/published/<name>.json``."""
    paths = [Path(folder) / "published" / f"{name}.json" for folder in tritontower.models.__path__]
    values = json.loads(next(path for path in paths if path.is_file()).read_text(encoding="utf-8"))
    return FamilySummary(**{entry.name: values[entry.name] for entry in fields(FamilySummary)})


def write_config(folder: Path, summary: FamilySummary, example: Mapping[str, Any] | None = None) -> Path:
    """Writes the published configuration (or ``example`` instead) and processor file, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / summary.config_file).write_text(json.dumps(example or summary.example), encoding="utf-8")
    if summary.processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(summary.processor), encoding="utf-8")
    return folder
