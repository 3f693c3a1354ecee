"""Images of one size: transformers' CLIP, SigLIP, LLaVA and Gemma 3 processors, and pan-and-scan."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.preprocessing import (
    GEMMA_FILE,
    LIMITS,
    SQUARE,
    canonical,
    make_rule,
    patches_of,
    random_sizes,
    tower,
    write_settings,
)
from support.preprocessing import SIGLIP_FILE as SIGLIP
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from tritontower.errors import ConfigError, ImageTooLargeError, Limits, ProcessorError, TowerError, UsageError
from tritontower.preprocessing import FixedSize, Preprocessor
from tritontower.preprocessing.resize.fixed_size import PanAndScan, scale_shorter_side

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56}


def rule(folder: Path, content: dict[str, Any], config: Any = SQUARE, **arguments: Any) -> Preprocessor:
    return make_rule(FixedSize, config, write_settings(folder, content), LIMITS, **arguments)


def test_the_size_before_the_crop_is_that_of_transformers() -> None:
    for width, height in random_sizes(1000):
        image: Any = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = get_resize_output_image_size(image, 336, default_to_square=False, input_data_format="channels_first")
        assert scale_shorter_side(width, height, 336) == expected[::-1]


def test_options_override_the_file(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, {**CLIP, "size": 224, "crop_size": 224}, options={"size": 56, "crop_size": 56})
    assert preprocessor.layout(300, 200).processed_size == (56, 56)
    image = canonical(noise(90, 60))
    options = {"size": {"height": 56, "width": 56}, "do_center_crop": False}
    (expected,) = patches_of(rule(tmp_path / "squashed", {**CLIP, **options}), [image])
    assert torch.equal(patches_of(rule(tmp_path, CLIP, options=options), [image])[0], expected)


def test_an_image_stretched_before_the_crop_is_refused_at_once(tmp_path: Path) -> None:
    content = {**CLIP, "size": {"shortest_edge": 336}, "crop_size": 56}
    write_settings(tmp_path, content)
    preprocessor = make_rule(FixedSize, SQUARE, tmp_path, Limits(max_aspect_ratio=1e6))
    assert preprocessor.layout(1, 594).processed_size == (56, 56)
    start = time.perf_counter()
    with pytest.raises(ImageTooLargeError, match=r"1 × 10000 pixels would be resized to 336 × 3360000"):
        preprocessor.layout(1, 10000)
    assert time.perf_counter() - start < 0.05
    write_settings(tmp_path / "padded", {**content, "image_processor_type": "LlavaImageProcessor", "do_pad": True})
    padded = make_rule(FixedSize, SQUARE, tmp_path / "padded", Limits(max_aspect_ratio=1e6))
    with pytest.raises(ImageTooLargeError, match=r"resized to 10000 × 10000"):
        padded.layout(1, 10000)
    assert padded.layout(8000, 10).processed_size == (56, 56)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            {**CLIP, "size": 100, "crop_size": 100},
            ProcessorError,
            r"must make 16 patches in a square, got 7 × 7 patches",
        ),
        ({**SIGLIP, "size": {"height": 28, "width": 112}}, ProcessorError, r"got 2 × 8 patches from 112 × 28"),
        ({**CLIP, "do_center_crop": False}, ProcessorError, r"scales the shorter side to 56 pixels and crops nothing"),
        ({**SIGLIP, "size": {"longest_edge": 56}}, ConfigError, r"must be an object with height and width"),
        ({**SIGLIP, "size": "large"}, ConfigError, r"size must be .*got 'large'"),
        ({"image_processor_type": "OtherImageProcessor"}, ConfigError, r"size must be .*got None"),
        ({"size": 56, "do_center_crop": True}, ConfigError, r"crop_size must be .*got None"),
        ({**CLIP, "crop_size": {"shortest_edge": 56}}, ConfigError, r"crop_size must be .*got a dict"),
        ({**CLIP, "do_center_crop": "yes"}, ConfigError, r"do_center_crop must be .*got 'yes'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, content: dict[str, Any], error: type[TowerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        rule(tmp_path, content).layout(100, 100)


def test_a_tower_that_takes_any_grid_still_wants_whole_tokens(tmp_path: Path) -> None:
    loose = tower(patch=14, merge=3)
    assert rule(tmp_path, {**SIGLIP, "size": [84, 126]}, loose).layout(9, 9).grid == (1, 6, 9)
    with pytest.raises(ProcessorError, match=r"must make multiples of 3, got 5 × 6"):
        rule(tmp_path, {**SIGLIP, "size": [70, 84]}, loose).layout(9, 9)


@pytest.mark.parametrize("settings", [(256, 4, 1.2), (100, 6, 1.0), (32, 1, 1.5), (1000, 4, 1.2)])
def test_crops_are_those_of_transformers(settings: tuple[int, int, float]) -> None:
    processor = Gemma3ImageProcessorPil()
    counts = set()
    for width, height in random_sizes(1000, largest=4000):
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = len(processor.pan_and_scan(image, *settings))
        assert PanAndScan(*settings).count_crops(width, height) == expected
        counts.add(expected)
    assert len(counts) > 1


def test_pan_and_scan_shows_the_whole_image_first(tmp_path: Path) -> None:
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 30}
    preprocessor = rule(tmp_path, GEMMA_FILE, pan_and_scan=True, options=options)
    plain = rule(tmp_path, GEMMA_FILE, pan_and_scan=True)
    for size, tiles in [((300, 90), 4), ((90, 170), 3), ((100, 100), 1), ((29, 300), 1), ((500, 60), 5), ((1, 1), 1)]:
        layout, image = preprocessor.layout(*size), canonical(noise(*size))
        assert layout.tiles == ((1, 4, 4),) * tiles
        assert layout.tokens(SQUARE) == 16 * tiles
        assert layout.assembly is None
        assert torch.equal(patches_of(preprocessor, [image])[0][:16], patches_of(plain, [image])[0])


def test_pan_and_scan_must_be_supported_and_enabled(tmp_path: Path) -> None:
    asked = {**GEMMA_FILE, "do_pan_and_scan": True}
    assert len(rule(tmp_path, asked, pan_and_scan=True).layout(1000, 300).tiles) == 4
    assert len(rule(tmp_path, asked).layout(1000, 300).tiles) == 1
    assert len(rule(tmp_path, GEMMA_FILE, pan_and_scan=True).layout(1000, 300).tiles) == 1
    with pytest.raises(UsageError, match="got do_pan_and_scan"):
        rule(tmp_path, CLIP, options={"do_pan_and_scan": True})


def test_crops_count_towards_the_limit(tmp_path: Path) -> None:
    write_settings(tmp_path, {**GEMMA_FILE, "do_pan_and_scan": True})
    preprocessor = make_rule(FixedSize, SQUARE, tmp_path, Limits(max_planned_pixels=3 * 56 * 56), pan_and_scan=True)
    assert len(preprocessor.layout(600, 300).tiles) == 3
    with pytest.raises(ImageTooLargeError, match=r"would be resized to 4 times 56 × 56"):
        preprocessor.layout(1000, 300)


def test_crops_that_would_be_empty_are_refused() -> None:
    with pytest.raises(ProcessorError, match=r"cut 10 pixels into 7 crops of 2, the last of them empty"):
        PanAndScan(least_crop=1, most_crops=7).count_crops(10, 1)
    with pytest.raises(ProcessorError, match="empty"):
        PanAndScan(least_crop=1, most_crops=7).count_crops(1, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_pan_and_scan", "yes"),
        ("pan_and_scan_min_crop_size", 0),
        ("pan_and_scan_max_num_crops", 1.5),
        ("pan_and_scan_min_ratio_to_activate", "wide"),
    ],
)
def test_settings_of_pan_and_scan_are_checked(tmp_path: Path, name: str, value: Any) -> None:
    options = {"do_pan_and_scan": True, name: value}
    with pytest.raises(ConfigError, match=name):
        rule(tmp_path, GEMMA_FILE, pan_and_scan=True, options=options).layout(100, 100)
