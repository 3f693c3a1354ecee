"""Settings files: class defaults, precedence of files, and every form of a size."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.preprocessing import write_settings

from tritontower.errors import ConfigError
from tritontower.preprocessing.processor_config import CLASS_DEFAULTS, IMAGE_FILES, Settings


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_class_defaults_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("ImageProcessor")).lower()
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    # Imported again: transformers 5.17 writes the sizes of any instance into the defaults of its class.
    monkeypatch.delitem(sys.modules, path, raising=False)
    kind = getattr(import_module(path), f"{name}Pil")
    ours = CLASS_DEFAULTS[name]
    deciding = ("size", "crop_size", "do_center_crop", "patch_size", "image_grid_pinpoints", "do_pan_and_scan")
    for key in deciding:
        if key == "patch_size" and name == "Qwen2VLImageProcessor":
            continue  # the loaded processor's own attribute is compared with the tower
        assert ours.get(key) == getattr(kind, key, None), key
    assert ours.get("do_pad", False) == (name == "LlavaImageProcessor" and kind.do_pad)


def test_the_nested_section_wins_unless_it_is_empty(tmp_path: Path) -> None:
    write_settings(tmp_path, {"size": 1}, "preprocessor_config.json")
    nested = {"image_processor": {"size": 2}, "video_processor": {"size": 3}}
    write_settings(tmp_path, nested, "processor_config.json")
    assert Settings.from_files(tmp_path, IMAGE_FILES, "image_processor").values == {"size": 2}
    write_settings(tmp_path, {"processor_class": "AProcessor"}, "processor_config.json")
    assert Settings.from_files(tmp_path, IMAGE_FILES, "image_processor").values == {"size": 1}
    write_settings(tmp_path, {"image_processor": [1]}, "processor_config.json")
    with pytest.raises(ConfigError, match=r"processor_config\.json: image_processor"):
        Settings.from_files(tmp_path, IMAGE_FILES, "image_processor")


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_every_variant_of_a_class_has_its_defaults(name: str) -> None:
    settings = Settings.with_defaults({"image_processor_type": name, "crop_size": None}, "file")
    assert settings.values["crop_size"] == {"height": 224, "width": 224}
    assert settings.kind == "CLIPImageProcessor"
    assert Settings.with_defaults({"feature_extractor_type": "CLIPFeatureExtractor"}, "file").kind == settings.kind


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, {"side": 5}),
        ([4, 6], {"height": 4, "width": 6}),
        ({"width": 6, "height": 4, "longest_edge": None}, {"height": 4, "width": 6}),
        ({"longest_edge": 7}, {"longest_edge": 7}),
        (None, None),
    ],
)
def test_forms_of_a_size(value: Any, expected: Any) -> None:
    settings = Settings({"size": value}, "file")
    assert settings.read_size("size", (("height", "width"), ("longest_edge",), ("side",))) == expected


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "224", [1, 2, 3], {"height": 4}, {"height": 4, "width": 0}, {}])
def test_meaningless_sizes_are_rejected(value: Any) -> None:
    settings = Settings({"size": value}, "preprocessor_config.json")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: size"):
        settings.read_size("size", (("height", "width"), ("side",)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", [0, 0, 0]),
        ("image_std", 1e-320),
        ("image_std", [0.5, -0.5, 0.5]),
        ("image_mean", [0.5, float("nan"), 0.5]),
        ("image_mean", "half"),
        ("rescale_factor", 1e300),
        ("rescale_factor", 10**400),
        ("rescale_factor", 0),
    ],
)
def test_arithmetic_that_destroys_pixels_is_rejected(key, value):
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {key} must be numbers from") as caught:
        Settings.with_defaults({key: value}, "preprocessor_config.json")
    assert caught.value.key == key
    for usual in (1 / 255, 1, [0.5, 0.5, 0.5], (0.48145466, 0.4578275, 0.40821073)):
        Settings.with_defaults({key: usual}, "preprocessor_config.json")
