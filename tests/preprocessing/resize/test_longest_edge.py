"""The longest-edge rules: transformers' Pixtral processor, and Mistral's own pixels."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.preprocessing import (
    LIMITS,
    MISTRAL,
    PIXTRAL,
    blank,
    canonical,
    make_rule,
    patches_of,
    put_together,
    random_sizes,
    write_settings,
)
from transformers.models.pixtral.image_processing_pil_pixtral import (
    get_resize_output_image_size as reference_size,
)

from tritontower.errors import AspectRatioError, ConfigError, Limits, ProcessorError, TowerError, UsageError
from tritontower.preprocessing import LongestEdge, MistralResize, Preprocessor
from tritontower.preprocessing.resize.longest_edge import shrink_to_fit
from tritontower.preprocessing.resize.mistral import cubic_taps, round_to_fit


def settings(**changes: Any) -> dict[str, Any]:
    return {"image_processor_type": "PixtralImageProcessor", "patch_size": 14, **changes}


def rule(folder: Path, content: dict[str, Any], config: Any = MISTRAL, **arguments: Any) -> Preprocessor:
    return make_rule(LongestEdge, config, write_settings(folder, content), LIMITS, **arguments)


@pytest.mark.parametrize(("edge", "factor"), [(1024, 16), (1540, 28), (1000, 28), (64, 16)])
def test_sizes_are_those_of_transformers(edge: int, factor: int) -> None:
    for width, height in random_sizes(1500, largest=6000):
        image: Any = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = reference_size(image, edge, factor, "channels_first")
        if 0 in expected:
            with pytest.raises(AspectRatioError, match="less than one pixel"):
                shrink_to_fit(width, height, (edge, edge), factor)
        else:
            assert shrink_to_fit(width, height, (edge, edge), factor) == expected[::-1]


def test_the_callers_longest_edge_counts_for_layout_and_pixels(tmp_path: Path) -> None:
    image = canonical(noise(400, 300))
    preprocessor = rule(tmp_path / "large", settings(size={"longest_edge": 1540}))
    assert preprocessor.layout(400, 300, longest_edge=140).processed_size == (140, 112)
    (expected,) = patches_of(rule(tmp_path / "small", settings(size={"longest_edge": 140})), [image])
    assert torch.equal(patches_of(preprocessor, [image], longest_edge=140)[0], expected)
    assert torch.equal(patches_of(preprocessor.without_fast_path(), [image], longest_edge=140)[0], expected)


def test_settings_without_a_file_stand_for_one_that_is_missing(tmp_path: Path) -> None:
    content = settings(size={"longest_edge": 154})
    image = canonical(noise(300, 200))
    filed = rule(tmp_path / "filed", content)
    missing = make_rule(LongestEdge, MISTRAL, tmp_path / "missing", LIMITS, without_file=content)
    assert torch.equal(patches_of(missing, [image])[0], patches_of(filed, [image])[0])
    other = rule(tmp_path / "filed", content, without_file=settings(size={"longest_edge": 56}))
    assert other.layout(300, 200).processed_size == filed.layout(300, 200).processed_size
    with pytest.raises(ProcessorError, match="must hold the settings"):
        make_rule(LongestEdge, MISTRAL, tmp_path / "missing", LIMITS).layout(300, 200)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patch_size": 16}, ProcessorError, r"patch_size .* must be 14 for this tower, got \[16\]"),
        ({"patch_size": {"height": 14, "width": 28}}, ProcessorError, r"got \[14, 28\]"),
        ({"size": {"shortest_edge": 100}}, ConfigError, r"size must be an object with longest_edge.*, got a dict of 1"),
        ({"size": {"longest_edge": "long"}}, ConfigError, r"size\.longest_edge must be .*got 'long'"),
        ({"size": {"longest_edge": 20}}, ProcessorError, r"longest_edge must be at least 28, .* one token, got 20"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[TowerError], message: str
) -> None:
    preprocessor = rule(tmp_path, settings(**change))
    with pytest.raises(error, match=message):
        preprocessor.layout(100, 100)


def test_a_crop_that_the_file_asks_for_is_noticed(tmp_path: Path) -> None:
    content = settings(size={"longest_edge": 154}, do_center_crop=True, crop_size=28)
    with pytest.raises(ProcessorError, match=r"must make grids \[\[1, 12, 12\]\], got \[\[1, 2, 2\]\]"):
        patches_of(rule(tmp_path, content), [blank(400, 400)])


def mistral(config: Any = MISTRAL, edge: int = 1540, limits: Limits = LIMITS) -> Preprocessor:
    return make_rule(MistralResize, config, Path("nowhere"), limits, longest_edge=edge)


def test_mistrals_sizes_are_rounded_to_the_nearest() -> None:
    differing = 0
    for width, height in random_sizes(3000, largest=6000):
        found = round_to_fit(width, height, 1540, 28)
        longer = max(width, height, 1540)
        exact = [Fraction(side * 1540, longer) for side in (width, height)]
        if all(side.denominator != 2 for side in exact):
            assert found == tuple(-(-max(round(side), 1) // 28) * 28 for side in exact)
        differing += found != shrink_to_fit(width, height, (1540, 1540), 28)
    assert 5 < differing < 300
    assert round_to_fit(1, 100_000, 1540, 28) == (28, 1540)
    # Halves go to the even pixel: 910.5 to 910, 911.5 to 912.
    assert round_to_fit(3080, 1821, 1540, 1) == (1540, 910)
    assert round_to_fit(3080, 1823, 1540, 1) == (1540, 912)


@pytest.mark.parametrize(("source", "target"), [(1, 28), (5, 28), (28, 28), (400, 140), (4000, 1540), (157, 112)])
def test_cubic_taps_are_those_of_an_exact_convolution(source: int, target: int) -> None:
    index, weights = cubic_taps(source, target)
    signal = torch.randn(1, 1, 1, source, dtype=torch.float64)
    found = (signal[0, 0, 0][index] * weights).sum(0)
    expected = torch.nn.functional.interpolate(signal, (1, target), mode="bicubic", align_corners=False)
    assert torch.allclose(found, expected[0, 0, 0], atol=1e-6)
    assert torch.allclose(weights.sum(0), torch.ones(target), atol=1e-6)


@pytest.mark.parametrize("size", [(400, 300), (90, 30), (1, 1), (37, 5), (2000, 1500)])
def test_mistrals_pixels_are_an_unfiltered_cubic_convolution(size: tuple[int, int]) -> None:
    preprocessor = mistral(edge=280)
    image = canonical(noise(*size))
    (rows,) = patches_of(preprocessor, [image])
    layout = preprocessor.layout(*size)
    width, height = layout.processed_size
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(image.array.copy()).double().permute(2, 0, 1)[None], (height, width), mode="bicubic"
    )[0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    expected = (exact / 255 - mean) / deviation
    found = put_together(rows, layout.grid, 14, 2)
    # A ten-thousandth of a level of 255; nothing is clipped or rounded to whole levels.
    assert (found - expected).abs().max() * 255 * 0.26 <= 2e-4
    if size == (2000, 1500):
        assert found.min() < ((0 - mean) / deviation).min()


def test_mistrals_images_need_no_file_and_take_no_processor() -> None:
    preprocessor = mistral(PIXTRAL, 1024)
    batch = preprocessor.preprocess_images([canonical(noise(300, 40))])
    assert batch.images.grids == ((1, 3, 19),)
    assert preprocessor.layout(3000, 400, longest_edge=320).processed_size == (320, 48)
    with pytest.raises(ProcessorError, match="longest_edge must be at least 16"):
        preprocessor.layout(100, 100, longest_edge=8)
    with pytest.raises(UsageError, match="done without a processor"):
        make_rule(MistralResize, PIXTRAL, Path("nowhere"), LIMITS, object(), longest_edge=1024)
    with pytest.raises(UsageError, match="has no image processor"):
        _ = preprocessor.processor
