"""The settings of a checkpoint's image processor, in whichever file and spelling they were published.

New checkpoints have one ``processor_config.json`` with a section per processor; old ones a flat
``preprocessor_config.json``.  Where both say something, the section counts.  What neither says is the default of the
processor's class in transformers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tritontower.checkpoint.config_reader import ConfigReader, read_json
from tritontower.errors import ProcessorError

__all__ = ["CLASS_DEFAULTS", "IMAGE_FILES", "VIDEO_FILES", "Settings"]

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
VIDEO_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")

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
"""Class of transformers → what a file that leaves a setting out means; only settings that decide about sizes."""


@dataclass(frozen=True)
class Settings:
    """What a processor's file says, class defaults filled in.

    Attributes:
        values: the settings; ``None`` nowhere at the top level.
        source: the file's name, for messages.
        kind: the class of transformers that they are for, without the suffixes of its variants; ``""`` if unsaid.
    """

    values: Mapping[str, Any]
    source: str
    kind: str = ""

    @classmethod
    def of_files(cls, folder: Path, files: Sequence[str], section: str) -> "Settings":
        """The first of ``files`` that says anything; of ``processor_config.json`` only its own ``section`` counts.

        Raises:
            ProcessorError: none does.
            ConfigError: a file that is not a JSON object.
        """
        for name in files:
            if not (folder / name).is_file():
                continue
            values: Any = read_json(folder / name)
            if name == "processor_config.json":
                values = values.get(section) or {}
            if values:
                # The reader refuses a section that is not an object.
                ConfigReader(values, name, path=section if name == "processor_config.json" else "")
                return cls.completed(values, name)
        raise ProcessorError(
            f"{folder} holds no image processor: neither {' nor '.join(files)} says how images are resized; "
            "copy the file from the published checkpoint, or pass an image processor of transformers as `processor`"
        )

    @classmethod
    def of_processor(cls, processor: Any) -> "Settings":
        """The settings of an image processor of transformers.

        Raises:
            ProcessorError: it is none.
        """
        if not callable(getattr(processor, "to_dict", None)):
            raise ProcessorError(f"a {type(processor).__name__} is not an image processor of transformers")
        return cls.completed(processor.to_dict(), type(processor).__name__)

    @classmethod
    def completed(cls, values: Mapping[str, Any], source: str) -> "Settings":
        """``values`` over the defaults of the class that they name."""
        name = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        said = {key: value for key, value in values.items() if value is not None}
        return cls({**CLASS_DEFAULTS.get(name, {}), **said}, source, name)

    def changed(self, options: Mapping[str, Any]) -> "Settings":
        """The settings with ``options`` in place of what the file says."""
        return replace(self, values={**self.values, **options}) if options else self

    @cached_property
    def reader(self) -> ConfigReader:
        """Typed access to the values."""
        return ConfigReader(self.values, self.source)

    def size(self, key: str, spellings: Sequence[Collection[str]]) -> Mapping[str, int] | None:
        """The size under ``key``, pixels; ``None`` where there is none.

        Args:
            key: such as ``"size"`` or ``"crop_size"``.
            spellings: sets of names that an object may consist of.  A number is read as ``{"side": number}`` and a
                pair as ``{"height": …, "width": …}``, where these are among the spellings.

        Raises:
            ConfigError: another spelling, or something else than positive integers.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and len(value) == 2:
            value = dict(zip(("height", "width"), value, strict=True))
        elif not isinstance(value, Mapping):
            value = {"side": self.reader.get(int, key, minimum=1)}
        names = {name for name, number in value.items() if number is not None}
        if not any(names == set(spelling) for spelling in spellings):
            known = [" and ".join(spelling) for spelling in spellings if "side" not in spelling]
            raise self.reader.error(key, self.values[key], "an object with " + ", or with ".join(known))
        reader = ConfigReader({key: value}, self.source)
        return {name: reader.get(int, f"{key}.{name}", minimum=1) for name in sorted(names)}
