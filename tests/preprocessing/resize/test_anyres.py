"""Tiles on a canvas: transformers' LLaVA-NeXT and LLaVA-OneVision, from the pixels to the order of the tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from support.preprocessing import (
    LIMITS,
    canonical,
    make_rule,
    patches_of,
    random_sizes,
    tower,
    write_settings,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from tritontower.batch.layout import Assembly
from tritontower.errors import ConfigError, ImageTooLargeError, Limits, ProcessorError, TowerError, UsageError
from tritontower.preprocessing import AnyResolution, Preprocessor
from tritontower.preprocessing.processor_config import CLASS_DEFAULTS
from tritontower.preprocessing.resize.anyres import select_canvas

NEXT_CANVASES = CLASS_DEFAULTS["LlavaNextImageProcessor"]["image_grid_pinpoints"]
ONEVISION_CANVASES = CLASS_DEFAULTS["LlavaOnevisionImageProcessor"]["image_grid_pinpoints"]
PUBLISHED_NEXT = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_grid_pinpoints": NEXT_CANVASES,
}
PUBLISHED_ONEVISION = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 384, "width": 384}}
SMALL = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SMALL_NEXT = {**PUBLISHED_NEXT, "size": {"shortest_edge": 28}, "crop_size": 28, "image_grid_pinpoints": SMALL}
SMALL_ONEVISION = {**PUBLISHED_ONEVISION, "size": {"height": 31, "width": 31}}
SMALL_ONEVISION["image_grid_pinpoints"] = [[31 * rows, 31 * columns] for rows in range(1, 5) for columns in range(1, 5)]


def rule(folder: Path, content: dict[str, Any], side: int, **arguments: Any) -> Preprocessor:
    config = arguments.pop("config", tower(patch=14, table_side=side))
    return make_rule(AnyResolution, config, write_settings(folder, content), LIMITS, **arguments)


def stub(side: int, canvases: Any) -> Any:
    """A model with the configuration that ``pack_image_features`` reads."""
    vision = SimpleNamespace(image_size=side, patch_size=14)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=canvases))


def assembled(assembly: Assembly, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """The tokens: sums of rows of all tiles, with the newline embedding at −1."""
    rows = torch.cat((features.flatten(0, 1), newline[None]))  # index −1 is the last
    picked = rows[assembly.index.long()]
    return picked[:, 0] if assembly.weights is None else (picked * assembly.weights[..., None]).sum(1)


def packed_by_next(model: Any, features: torch.Tensor, size: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    return LlavaNextModel.pack_image_features(model, [features], size[None], "default", newline)[0][0]


def packed_by_onevision(model: Any, features: torch.Tensor, size: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    return LlavaOnevisionModel.pack_image_features(model, [features], size[None], newline, "anyres_max_9")[0][0]


@pytest.mark.parametrize("canvases", [NEXT_CANVASES, ONEVISION_CANVASES, NEXT_CANVASES[::-1], ONEVISION_CANVASES[::-1]])
def test_canvases_are_those_of_transformers(canvases: Any) -> None:
    # Canvases of the same area tie for square images, and the first of them is meant; of those that keep every pixel,
    # the smallest, wherever it stands.
    for width, height in [(100, 100), (336, 336), (672, 672), (5000, 5000), *random_sizes(1500, largest=5000)]:
        assert tuple(select_canvas(width, height, canvases)) == select_best_resolution((height, width), canvases)


@pytest.mark.parametrize(
    ("content", "image_side", "canvases", "shrink_limit", "pack"),
    [
        (PUBLISHED_NEXT, 336, NEXT_CANVASES, None, packed_by_next),
        (PUBLISHED_ONEVISION, 384, ONEVISION_CANVASES, 9, packed_by_onevision),
    ],
)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, content: dict[str, Any], image_side: int, canvases: Any, shrink_limit: int | None, pack: Any
) -> None:
    side = image_side // 14
    preprocessor = rule(tmp_path, content, side, shrink_limit=shrink_limit)
    generator = torch.Generator().manual_seed(0)
    newline = torch.randn(2, generator=generator)
    shrunk = 0
    large = [(1900 + 37 * number % 800, 1700 + 91 * number % 1100) for number in range(40)]
    for width, height in [(1, 200), (200, 1), (1, 1), (336, 336), *large, *random_sizes(350, largest=3000)]:
        layout = preprocessor.layout(width, height)
        features = torch.randn(len(layout.tiles), side * side, 2, generator=generator)
        expected = pack(stub(image_side, canvases), features, torch.tensor([height, width]), newline)
        assert layout.assembly is not None
        assert layout.tokens(preprocessor.config) == len(expected)
        found = assembled(layout.assembly, features, newline)
        assert layout.assembly.index.dtype == torch.int32
        if layout.assembly.weights is None:
            assert torch.equal(found, expected)
        else:
            shrunk += 1
            assert layout.assembly.weights.dtype == torch.float32
            # Within 1e-6 where torch's processor has fused instructions; elsewhere its coordinates are rounded twice.
            assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert (shrunk > 20) == (shrink_limit is not None)


@pytest.mark.parametrize("content", [SMALL_NEXT, SMALL_ONEVISION], ids=["next", "onevision"])
def test_layouts_have_the_canvas_of_transformers(tmp_path: Path, content: dict[str, Any]) -> None:
    preprocessor = rule(tmp_path, content, 2)
    side = 28 if content is SMALL_NEXT else 31
    for width, height in random_sizes(30, largest=200):
        layout = preprocessor.layout(width, height)
        canvas = select_best_resolution((height, width), content["image_grid_pinpoints"])
        rows, columns = canvas[0] // side, canvas[1] // side
        assert layout.processed_size == canvas[::-1]
        assert layout.grid == (1, rows * 2, columns * 2)
        assert layout.tiles == ((1, 2, 2),) * (1 + rows * columns)


@pytest.mark.parametrize(("content", "side"), [(PUBLISHED_NEXT, 24), (PUBLISHED_ONEVISION, 27)])
def test_pixels_of_published_sizes_are_those_of_transformers(
    tmp_path: Path, content: dict[str, Any], side: int
) -> None:
    preprocessor = rule(tmp_path, content, side, shrink_limit=9)
    image = canonical(noise(500, 300))
    (rows,) = patches_of(preprocessor, [image])
    assert preprocessor.fast_path is not None
    assert torch.equal(rows, patches_of(preprocessor.without_fast_path(), [image])[0])


def test_without_a_newline_rows_follow_each_other(tmp_path: Path) -> None:
    for limit in (None, 1):
        with_newline = rule(tmp_path, SMALL_NEXT, 2, shrink_limit=limit).layout(56, 56).assembly
        without = rule(tmp_path, SMALL_NEXT, 2, shrink_limit=limit, newline=False).layout(56, 56).assembly
        assert with_newline is not None
        assert without is not None
        kept = with_newline.index[:, 0] >= 0
        assert 0 < (~kept).sum() < len(kept)
        assert torch.equal(without.index, with_newline.index[kept])
        assert (without.weights is None) == (limit is None)


def test_images_of_many_sizes_share_assemblies(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, PUBLISHED_ONEVISION, 27, shrink_limit=9)
    first, second = preprocessor.layout(1000, 700), preprocessor.layout(2000, 1400)
    assert preprocessor.layout(1001, 700).assembly is first.assembly
    assert first.assembly is not second.assembly


def test_config_json_must_have_the_same_canvases(tmp_path: Path) -> None:
    assert rule(tmp_path, SMALL_NEXT, 2, pinpoints=SMALL).layout(50, 50).grid == (1, 4, 4)
    for others in (SMALL[:-1], SMALL[::-1], [*SMALL[:-1], [56, 84]]):
        with pytest.raises(
            ProcessorError, match=r"image_grid_pinpoints in preprocessor_config\.json and in config\.json"
        ):
            rule(tmp_path, SMALL_NEXT, 2, pinpoints=others).layout(50, 50)
    with pytest.raises(ConfigError, match=r"^config\.json: image_grid_pinpoints"):
        rule(tmp_path, SMALL_NEXT, 2, pinpoints=[[1, 2]]).layout(50, 50)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_grid_pinpoints": []}, ConfigError, r"image_grid_pinpoints must be .*got a list of 0"),
        ({"image_grid_pinpoints": "anyres"}, ConfigError, r"image_grid_pinpoints must be .*got 'anyres'"),
        ({"image_grid_pinpoints": [[28, 56], [30, 28]]}, ConfigError, r"multiple of a tile's 28 pixels"),
        ({"image_grid_pinpoints": [[28, 56, 84]]}, ConfigError, r"pairs of height and width"),
        ({"image_grid_pinpoints": [[28, True]]}, ConfigError, r"pairs of height and width"),
        ({"crop_size": 56}, ProcessorError, r"size and crop_size .* sides of \[28, 56\]"),
        ({"size": {"height": 28, "width": 56}}, ProcessorError, r"sides of \[28, 56\] pixels"),
        ({"size": {"longest_edge": 28}}, ConfigError, r"size must be .*got a dict of 1"),
        ({"size": 42, "crop_size": 42}, ProcessorError, r"must make 4 patches in a square, got 3 × 3"),
        ({"image_processor_type": "Other", "size": None}, ConfigError, r"size must be .*got None"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[TowerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        rule(tmp_path, {**SMALL_NEXT, **change}, 2).layout(50, 50)


def test_a_canvas_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    write_settings(tmp_path, SMALL_NEXT)
    preprocessor = make_rule(AnyResolution, tower(table_side=2), tmp_path, Limits(max_planned_pixels=28 * 56))
    assert preprocessor.layout(50, 25).processed_size == (56, 28)
    with pytest.raises(ImageTooLargeError, match=r"resized to 56 × 56.*image_grid_pinpoints"):
        preprocessor.layout(56, 56)


def test_towers_and_limits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for class tokens"):
        rule(tmp_path, SMALL_NEXT, 2, config=tower(table_side=2, class_token=True, keep_class_token=True))
    with pytest.raises(UsageError, match="shrink_limit must be at least 1"):
        rule(tmp_path, SMALL_NEXT, 2, shrink_limit=0)
