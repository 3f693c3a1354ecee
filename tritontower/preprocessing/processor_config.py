"""Reads the settings of a checkpoint's image processor from any of the published files and forms.

New checkpoints have one ``processor_config.json`` with a section per processor.  Old ones have a flat
``preprocessor_config.json``.  The section takes precedence.  Missing settings are the defaults of the processor's class
in transformers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, cast

from tritontower.checkpoint.config_reader import ConfigReader, read_json
from tritontower.config import TowerConfig
from tritontower.errors import ConfigError, Limits, ProcessorError

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
VIDEO_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")

PIXEL_OPTIONS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Settings that change pixels and no size; they are passed to the processor unchanged."""

_CROP_224 = {"height": 224, "width": 224}
_SHORT_224 = {"size": {"shortest_edge": 224}, "crop_size": _CROP_224, "do_center_crop": True}
_TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]

CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _SHORT_224,
    "LlavaImageProcessor": {**_SHORT_224, "do_pad": False},
    "LlavaNextImageProcessor": {
        **_SHORT_224,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevisionImageProcessor": {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": _TILES},
    "SiglipImageProcessor": {"size": _CROP_224},
    "Gemma3ImageProcessor": {"size": _CROP_224},
    "PixtralImageProcessor": {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}},
    "Qwen2VLImageProcessor": {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
}
"""Class of transformers → its default settings; only those that decide about sizes."""


_ARITHMETIC = {"rescale_factor": (1e-6, 1e3), "image_mean": (-1e3, 1e3), "image_std": (1e-6, 1e3)}
"""Setting → its least and greatest value; others make pixels infinite or all the same."""


@dataclass(frozen=True)
class Settings:
    """Settings of an image processor, including the defaults of its class; ``source`` names the file in messages.

    ``kind`` is the class of transformers, without the suffixes of its variants; ``""`` if the file names none.
    """

    values: Mapping[str, Any]
    source: str
    kind: str = ""

    def __post_init__(self) -> None:
        for key, (least, greatest) in _ARITHMETIC.items():
            value = self.values.get(key)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and not all(
                isinstance(each, Real) and least <= cast("float", each) <= greatest for each in numbers
            ):
                raise ConfigError(key, value, f"numbers from {least:g} to {greatest:g}", source=self.source)

    @classmethod
    def from_files(cls, folder: Path, files: Sequence[str], section: str) -> "Settings":
        """Reads the first of ``files`` that has settings; in ``processor_config.json`` only ``section`` counts."""
        for name in files:
            if not (folder / name).is_file():
                continue
            values: Any = read_json(folder / name)
            if name == "processor_config.json":
                values = values.get(section) or {}
            if values:
                # The reader rejects a section that is not an object.
                ConfigReader(values, name, path=section if name == "processor_config.json" else "")
                return cls.with_defaults(values, name)
        raise ProcessorError(
            f"{folder} must hold the settings of an image processor in {' or '.join(files)}; copy the file from the "
            "published checkpoint, or pass an image processor of transformers as `processor`"
        )

    @classmethod
    def from_processor(cls, processor: Any) -> "Settings":
        """Reads the settings of an image processor of transformers."""
        if not callable(getattr(processor, "to_dict", None)):
            raise ProcessorError(
                f"processor must be an image processor of transformers, got {type(processor).__name__}"
            )
        return cls.with_defaults(processor.to_dict(), type(processor).__name__)

    @classmethod
    def with_defaults(cls, values: Mapping[str, Any], source: str) -> "Settings":
        """Completes ``values`` by the defaults of the class that they name."""
        name = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        given = {key: value for key, value in values.items() if value is not None}
        return cls({**CLASS_DEFAULTS.get(name, {}), **given}, source, name)

    def override(self, options: Mapping[str, Any]) -> "Settings":
        """Returns the settings with ``options`` in place of those in the file."""
        return replace(self, values={**self.values, **options}) if options else self

    @cached_property
    def reader(self) -> ConfigReader:
        """Typed access to the values."""
        return ConfigReader(self.values, self.source)

    def read_size(self, key: str, forms: Sequence[Collection[str]]) -> Mapping[str, int] | None:
        """Reads a size in pixels; ``None`` if it is missing.

        ``forms`` are the allowed sets of names in an object.  A number is read as ``{"side": number}`` and a pair as
        ``{"height": …, "width": …}``.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and len(value) == 2:
            value = dict(zip(("height", "width"), value, strict=True))
        elif not isinstance(value, Mapping):
            value = {"side": self.reader.get(int, key, minimum=1)}
        names = {name for name, number in value.items() if number is not None}
        if not any(names == set(form) for form in forms):
            known = [" and ".join(form) for form in forms if "side" not in form]
            raise self.reader.error(key, self.values[key], "an object with " + ", or with ".join(known))
        reader = ConfigReader({key: value}, self.source)
        return {name: reader.get(int, f"{key}.{name}", minimum=1) for name in sorted(names)}


@dataclass(frozen=True)
class ProcessorSource:
    """The tower, and the origin of its image processor.

    Attributes:
        given: an image processor of transformers to use instead of the checkpoint's.
        options: settings that override those in the checkpoint's file.
    """

    config: TowerConfig
    folder: Path
    limits: Limits = field(default_factory=Limits)
    given: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def settings(self) -> Settings:
        """Settings of the given processor or of the checkpoint's file, overridden by the options."""
        if self.given is not None:
            return Settings.from_processor(self.given).override(self.options)
        return Settings.from_files(self.folder, IMAGE_FILES, "image_processor").override(self.options)
