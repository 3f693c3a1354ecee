"""What all resizing rules share: the cut into patches, settings in every spelling, limits, and errors that help."""

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.preprocessing import LIMITS, blank, canonical, make_rule, patches_of, put_together, tower, write_settings
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tritontower.errors import (
    AspectRatioError,
    ConfigError,
    EmptyImageError,
    ImageTooLargeError,
    Limits,
    ProcessorError,
    UsageError,
)
from tritontower.preprocessing import (
    AnyResolution,
    FixedSize,
    LongestEdge,
    MistralResize,
    Preprocessor,
    SmartResize,
    cut_into_patches,
    pack_tiles,
)
from tritontower.preprocessing.processor_config import CLASS_DEFAULTS, IMAGE_FILES, Settings

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_size": 56,
    "do_center_crop": True,
}
TILES = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_size": 56,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
}
SMART = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 100352}
EDGE = {"image_processor_type": "PixtralImageProcessor", "patch_size": 14, "size": {"longest_edge": 280}}


def one_of_each(folder: Path, limits: Limits = LIMITS) -> list[Preprocessor]:
    """Every rule, over small settings."""
    square = tower(table_side=4)
    return [
        make_rule(SmartResize, tower(merge=2, temporal=2), write_settings(folder / "smart", SMART), limits),
        make_rule(LongestEdge, tower(merge=2), write_settings(folder / "edge", EDGE), limits),
        make_rule(MistralResize, tower(merge=2), folder, limits, longest_edge=280),
        make_rule(FixedSize, square, write_settings(folder / "fixed", CLIP), limits),
        make_rule(AnyResolution, square, write_settings(folder / "tiles", TILES), limits),
    ]


# -- the cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "merge", "size"), [(2, 1, (6, 10)), (3, 2, (12, 18)), (1, 4, (8, 4)), (5, 3, (15, 30))]
)
def test_the_cut_is_what_a_loop_over_blocks_gives(patch: int, merge: int, size: tuple[int, int]) -> None:
    tiles = torch.randn(2, 3, *size)
    rows = cut_into_patches(tiles, patch, merge)
    grid = (1, size[0] // patch, size[1] // patch)
    for tile, part in zip(tiles, rows.chunk(2), strict=True):
        assert torch.equal(put_together(part, grid, patch, merge), tile)


def test_the_cut_leaves_out_what_is_no_whole_patch() -> None:
    tiles = torch.randn(1, 3, 11, 14)
    weight = torch.randn(5, 3, 4, 4)
    convolved = torch.nn.functional.conv2d(tiles, weight, stride=4)
    rows = cut_into_patches(tiles, 4, 1)
    assert torch.allclose(rows @ weight.flatten(1).T, convolved[0].flatten(1).T, atol=1e-5)


def test_the_cut_writes_where_it_is_told_and_refuses_what_does_not_fit() -> None:
    tiles = torch.randint(0, 255, (1, 3, 4, 4), dtype=torch.uint8)
    out = torch.full((4, 12), -1.0)
    assert cut_into_patches(tiles, 2, 2, out) is out
    assert torch.equal(out, cut_into_patches(tiles, 2, 2).float())
    with pytest.raises(ValueError, match=r"must be multiples of merge 3, got 2 × 2"):
        cut_into_patches(tiles, 2, 3)
    with pytest.raises(ValueError, match=r"must have shape \[4, 12\], got \[3, 12\]"):
        cut_into_patches(tiles, 2, 1, torch.empty(3, 12))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        CLIPImageProcessorPil,
        LlavaImageProcessorPil,
        LlavaNextImageProcessorPil,
        LlavaOnevisionImageProcessorPil,
        SiglipImageProcessorPil,
        Gemma3ImageProcessorPil,
        PixtralImageProcessorPil,
        Qwen2VLImageProcessorPil,
    ],
)
def test_class_defaults_are_those_of_transformers(kind: Any) -> None:
    ours = CLASS_DEFAULTS[kind.__name__.removesuffix("Pil")]
    deciding = ("size", "crop_size", "do_center_crop", "patch_size", "image_grid_pinpoints", "do_pan_and_scan")
    for name in deciding:
        theirs = getattr(kind, name, None)
        if name == "patch_size" and kind is Qwen2VLImageProcessorPil:
            continue  # the loaded processor's own attribute is compared with the tower
        assert ours.get(name) == theirs, name
    assert ours.get("do_pad", False) == (kind is LlavaImageProcessorPil and kind.do_pad)


def test_the_nested_section_wins_and_an_empty_one_does_not_count(tmp_path: Path) -> None:
    write_settings(tmp_path, {"size": 1}, "preprocessor_config.json")
    nested = {"image_processor": {"size": 2}, "video_processor": {"size": 3}}
    write_settings(tmp_path, nested, "processor_config.json")
    assert Settings.from_files(tmp_path, IMAGE_FILES, "image_processor").values == {"size": 2}
    write_settings(tmp_path, {"processor_class": "AProcessor"}, "processor_config.json")
    assert Settings.from_files(tmp_path, IMAGE_FILES, "image_processor").values == {"size": 1}
    write_settings(tmp_path, {"image_processor": [1]}, "processor_config.json")
    with pytest.raises(ConfigError, match=r"processor_config\.json: image_processor must be .*got a list of 1"):
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
def test_spellings_of_a_size(value: Any, expected: Any) -> None:
    settings = Settings({"size": value}, "file")
    assert settings.read_size("size", (("height", "width"), ("longest_edge",), ("side",))) == expected


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "224", [1, 2, 3], {"height": 4}, {"height": 4, "width": 0}, {}])
def test_sizes_that_mean_nothing_are_refused(value: Any) -> None:
    settings = Settings({"size": value}, "preprocessor_config.json")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: size"):
        settings.read_size("size", (("height", "width"), ("side",)))


# -- every rule -------------------------------------------------------------------------------------------------------


def test_no_file_says_what_is_missing_and_that_a_processor_may_be_given(tmp_path: Path) -> None:
    for preprocessor in one_of_each(tmp_path):
        if isinstance(preprocessor.rule, MistralResize):
            continue
        for file in preprocessor.source.folder.iterdir():
            file.unlink()
        with pytest.raises(ProcessorError, match=r"preprocessor_config\.json.*`processor`"):
            preprocessor.layout(100, 100)


def test_a_given_processor_stands_for_the_file(tmp_path: Path) -> None:
    images = [canonical(noise(157, 93)), canonical(noise(60, 200, 1))]
    processors = [
        Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100352),
        PixtralImageProcessorPil(patch_size=14, size={"longest_edge": 280}),
        None,
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56),
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=56, image_grid_pinpoints=TILES["image_grid_pinpoints"]
        ),
    ]
    for usual, given in zip(one_of_each(tmp_path), processors, strict=True):
        if given is None:
            continue
        explicit = make_rule(type(usual.rule), usual.config, tmp_path / "nothing", LIMITS, given)
        for mine, theirs in zip(patches_of(explicit, images), patches_of(usual, images), strict=True):
            assert torch.equal(mine, theirs)
        with pytest.raises(ProcessorError, match="must be an image processor of transformers, got list"):
            make_rule(type(usual.rule), usual.config, tmp_path, LIMITS, []).layout(100, 100)


def test_sizes_are_checked_before_anything_else(tmp_path: Path) -> None:
    for preprocessor in one_of_each(tmp_path, Limits(max_planned_pixels=3000)):
        with pytest.raises(EmptyImageError):
            preprocessor.layout(0, 5)
        with pytest.raises(UsageError, match="whole numbers"):
            preprocessor.layout(5.0, 5)  # type: ignore[arg-type]
        with pytest.raises(AspectRatioError):
            preprocessor.layout(1, 10000)
        with pytest.raises(ImageTooLargeError, match=r"limit\s+is 3000 pixels.*Limits\(max_planned_pixels"):
            preprocessor.layout(500, 500)


def test_extreme_ratios_are_refused_at_once_even_with_loose_limits(tmp_path: Path) -> None:
    loose = Limits(max_aspect_ratio=1e9, max_planned_pixels=10**6)
    for preprocessor in one_of_each(tmp_path, loose):
        preprocessor.layout(60, 60)
        for size in ((1, 100_000), (100_000, 1)):
            start = time.perf_counter()
            # Where such an image has a size after all, it is a small one.
            with suppress(AspectRatioError, ImageTooLargeError):
                assert preprocessor.layout(*size).patches * 14 * 14 <= 10**6
            assert time.perf_counter() - start < 0.05


def test_images_of_one_pixel(tmp_path: Path) -> None:
    for preprocessor in one_of_each(tmp_path):
        (rows,) = patches_of(preprocessor, [canonical(np.full((1, 1, 3), 200, np.uint8))])
        assert rows.isfinite().all()
        # One color all over the whole image, which is the first tile: every patch is the same.
        tiles = preprocessor.layout(1, 1).tiles
        first = rows[: tiles[0][1] * tiles[0][2]]
        assert (first - first[:1]).abs().max() <= 1e-5


def test_errors_of_images_say_which(tmp_path: Path) -> None:
    preprocessor = one_of_each(tmp_path, Limits(max_planned_pixels=50_000))[0]
    with pytest.raises(ImageTooLargeError, match=r"image 1 \(black\): 1000 × 1000 pixels would be resized") as caught:
        preprocessor.preprocess_images([blank(100, 100), blank(1000, 1000)])
    assert caught.value.index == 1


def test_a_bound_that_a_rule_does_not_have_is_refused_with_the_reason(tmp_path: Path) -> None:
    smart, edge, mistral, fixed, tiles = one_of_each(tmp_path)
    for preprocessor, wrong, message in (
        (smart, {"longest_edge": 500}, "bounds may be min_pixels and max_pixels, got longest_edge; the rule"),
        (edge, {"max_pixels": 500}, "bounds may be longest_edge, got max_pixels; the rule"),
        (mistral, {"min_pixels": 500}, "bounds may be longest_edge, got min_pixels"),
        (fixed, {"max_pixels": 500}, "no bounds are allowed, got max_pixels; its images all have one size"),
        (tiles, {"longest_edge": 5}, r"got longest_edge; an image becomes as large as the canvas"),
    ):
        for call in (
            lambda preprocessor=preprocessor, wrong=wrong: preprocessor.layout(100, 100, **wrong),
            lambda preprocessor=preprocessor, wrong=wrong: preprocessor.preprocess_images([], **wrong),
        ):
            with pytest.raises(UsageError, match=message):
                call()
        empty = dict.fromkeys(wrong)
        assert preprocessor.layout(100, 100, **empty).tiles == preprocessor.layout(100, 100).tiles


@pytest.mark.parametrize("bound", [0, -5, 1.5, "many", True])
def test_bounds_that_are_no_sizes_are_refused(tmp_path: Path, bound: Any) -> None:
    smart, edge, mistral, *_ = one_of_each(tmp_path)
    for preprocessor, name in ((smart, "max_pixels"), (edge, "longest_edge"), (mistral, "longest_edge")):
        with pytest.raises(ProcessorError, match=name):
            preprocessor.layout(100, 100, **{name: bound})


def test_an_unknown_option_names_the_known_ones(tmp_path: Path) -> None:
    for preprocessor in one_of_each(tmp_path):
        arguments: dict[str, Any] = {"longest_edge": 280} if isinstance(preprocessor.rule, MistralResize) else {}
        known = "none" if arguments else "resample, .*"
        with pytest.raises(UsageError, match=rf"must be among {known}, got do_magic"):
            make_rule(
                type(preprocessor.rule), preprocessor.config, tmp_path, LIMITS, None, {"do_magic": True}, **arguments
            )


def test_pixel_options_reach_the_processor(tmp_path: Path) -> None:
    image = canonical(noise(157, 93))
    for usual in one_of_each(tmp_path):
        if isinstance(usual.rule, MistralResize):
            continue
        changed = make_rule(type(usual.rule), usual.config, usual.source.folder, LIMITS, None, {"do_normalize": False})
        (plain,) = patches_of(changed, [image])
        (rows,) = patches_of(usual, [image])
        assert 0 <= plain.min() < plain.max() <= 1
        deviations = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None]
        means = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None]
        assert torch.allclose((plain.unflatten(1, (3, -1)) - means) / deviations, rows.unflatten(1, (3, -1)), atol=1e-5)


def test_options_of_a_wrong_type_are_the_processors_refusal(tmp_path: Path) -> None:
    smart = one_of_each(tmp_path)[0]
    wrong = make_rule(SmartResize, smart.config, smart.source.folder, LIMITS, None, {"rescale_factor": "a lot"})
    with pytest.raises(ProcessorError, match=r"refused an image of 50 × 40 pixels: .*'rescale_factor'.*got str"):
        patches_of(wrong, [blank(50, 40)])


def test_only_the_rules_with_videos_take_them(tmp_path: Path) -> None:
    for preprocessor in one_of_each(tmp_path)[1:]:
        with pytest.raises(UsageError, match="this tower takes no video: the tested family"):
            preprocessor.preprocess_video([blank(50, 50)])


@pytest.mark.parametrize("open_question", [None, True, False])
def test_a_file_that_leaves_rgb_open_changes_nothing(tmp_path: Path, open_question: bool | None) -> None:
    image = canonical(noise(157, 93))
    for usual in one_of_each(tmp_path):
        (expected,) = patches_of(usual, [image])
        file = usual.source.folder / "preprocessor_config.json"
        if not file.exists():
            continue
        file.write_text(json.dumps({**json.loads(file.read_text()), "do_convert_rgb": open_question}))
        (found,) = patches_of(make_rule(type(usual.rule), usual.config, usual.source.folder, LIMITS), [image])
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, r"do_resize .* must be True .* got False"),
        ({"image_processor_type": "Nonsense"}, r"cannot load"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for preprocessor in one_of_each(tmp_path):
        file = preprocessor.source.folder / "preprocessor_config.json"
        if not file.exists():
            continue
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ProcessorError, match=message):
            patches_of(preprocessor, [blank(50, 40)])


def test_threads_share_a_preprocessor(tmp_path: Path) -> None:
    images = [canonical(noise(40 + 17 * n, 150 - 11 * n, n)) for n in range(8)]
    for preprocessor, fresh in zip(one_of_each(tmp_path), one_of_each(tmp_path), strict=True):
        expected = patches_of(fresh, images)
        found: dict[int, torch.Tensor] = {}

        def work(index: int, preprocessor: Preprocessor = preprocessor, found: dict[int, Any] = found) -> None:
            (found[index],) = patches_of(preprocessor, [images[index]])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], expected[index]) for index in range(8))


LAYOUTS = """
import sys, time
from pathlib import Path
from tritontower.config import Normalization, PatchEmbedding, PositionTable, TowerConfig
from tritontower.preprocessing import AnyResolution, Preprocessor, ProcessorSource

config = TowerConfig(
    family="tested", patch=PatchEmbedding(3, 14, 1, False), width=64, depth=1, heads=4,
    norm=Normalization("layer_norm", 1e-6), qkv_bias=True, attention_bias=True, mlp_hidden=64, mlp_bias=True,
    activation="gelu", features=(1,), position_table=PositionTable(4, "exact"),
)
preprocessor = Preprocessor(ProcessorSource(config, Path(sys.argv[1])), lambda source: AnyResolution(source, shrink_limit=1))
start = time.perf_counter()
tokens = {preprocessor.layout(width, 300).tokens(config) for width in range(100, 1100)}
assert time.perf_counter() - start < 1.0
assert len(tokens) > 3
assert "transformers" not in sys.modules
"""


def test_layouts_need_no_transformers_and_little_time(tmp_path: Path) -> None:
    write_settings(tmp_path, TILES)
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", LAYOUTS, str(tmp_path)], check=True, cwd=root)


# -- pixels that are ready --------------------------------------------------------------------------------------------


def test_tiles_that_are_ready_are_packed_as_they_are() -> None:
    config = tower(merge=2)
    tiles = [torch.randn(3, 56, 84, dtype=torch.float64), torch.randn(3, 28, 28, dtype=torch.bfloat16)]
    batch = pack_tiles(config, tiles)
    assert batch.images.grids == ((1, 4, 6), (1, 2, 2))
    assert batch.images.token_counts == (6, 1)
    assert batch.images.processed_sizes == ((84, 56), (28, 28))
    for tile, grid, rows in zip(tiles, batch.images.grids, batch.pixels.split([24, 4]), strict=True):
        assert torch.equal(put_together(rows, grid, 14, 2), tile.float())
    assert len(pack_tiles(config, [])) == 0


def test_tiles_may_be_part_of_a_graph_and_are_left_as_they_were() -> None:
    tile = torch.randn(3, 28, 28, requires_grad=True)
    before = tile.detach().clone()
    assert not pack_tiles(tower(), [tile]).pixels.requires_grad
    assert torch.equal(tile, before)


def test_tiles_of_a_fixed_grid_may_leave_a_margin() -> None:
    batch = pack_tiles(tower(table_side=4), [torch.ones(3, 62, 57)])
    assert batch.images.grids == ((1, 4, 4),)
    assert batch.images.processed_sizes == ((57, 62),)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (torch.ones(3, 56, 60), r"must be multiples of 28, got 60 × 56"),
        (torch.ones(3, 0, 28), r"28 × 0 pixels"),
        (torch.ones(1, 56, 56), r"\[3, height, width\].*\[1, 56, 56\]"),
        (torch.ones(1, 3, 56, 56), r"\[1, 3, 56, 56\]"),
        (torch.ones(3, 56, 56, dtype=torch.uint8), r"torch.uint8"),
        ("a tile", r"must be a tensor .* got 'a tile'"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tile: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack_tiles(tower(merge=2), [tile])


def test_a_tile_of_another_grid_than_the_towers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"must have 4 × 4 patches of 14 pixels, got 70 × 56"):
        pack_tiles(tower(table_side=4), [torch.ones(3, 56, 70)])
