"""Promises of every resizing rule: transformers' pixels bit for bit, limits, options, threads, bytes and digests."""

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.checkpoints import noise
from support.preprocessing import (
    CLIP_FILE,
    MISTRAL,
    OTHER_FILES,
    RULES,
    SQUARE,
    RuleCase,
    blank,
    canonical,
    make_rule,
    patches_of,
    put_together,
    random_sizes,
    reference_processor,
    tower,
    write_settings,
)
from support.processes import run_python
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tritontower import errors
from tritontower.kernels.gemm.patch_projection import PIXEL_CENTER
from tritontower.preprocessing import FixedSize, LongestEdge, MistralResize, Preprocessor, SmartResize
from tritontower.preprocessing.images.image import CanonicalImage

each_rule = pytest.mark.parametrize("case", RULES.values(), ids=RULES)
FIRST_SIZES = ((1, 1), (1, 7), (9, 1), (31, 31), (56, 56), (90, 40))
ONE_OF_EACH = ("area", "edge, merged", "cropped", "tiles, cropped")


def make_each(folder: Path, limits: errors.Limits | None = None) -> list[Preprocessor]:
    """One preprocessor of every rule."""
    found = [
        make_rule(RULES[name].rule, RULES[name].config, write_settings(folder / name, RULES[name].content), limits or errors.Limits())
        for name in ONE_OF_EACH
    ]  # fmt: skip
    return [*found, make_rule(MistralResize, MISTRAL, folder, limits or errors.Limits(), longest_edge=280)]


def by_transformers(reference: Any, image: CanonicalImage, case: RuleCase) -> list[torch.Tensor]:
    """Tiles ``[channels, height, width]``; from a processor that cuts patches itself, its rows of one frame."""
    features = reference(images=[image.array], input_data_format="channels_last", return_tensors="pt", **case.call)
    pixels = features["pixel_values"]
    if "image_grid_thw" in features:
        frames = pixels.unflatten(1, (3, 2, -1))
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])
        return [frames[:, :, 0].flatten(1)]
    return list(pixels.flatten(0, -4))


@pytest.mark.parametrize("case", [*RULES.values(), *OTHER_FILES.values()], ids=[*RULES, *OTHER_FILES])
def test_pixels_and_layouts_are_those_of_transformers(tmp_path: Path, case: RuleCase) -> None:
    preprocessor = case.make(tmp_path)
    reference = reference_processor(tmp_path)
    patch, merge = case.config.patch.size, case.config.merge
    sizes = [size for size in random_sizes(16, largest=400, seed=len(case.content)) if max(size) < 50 * min(size)]
    images = [canonical(noise(*size, seed)) for seed, size in enumerate([*FIRST_SIZES, *sizes])]
    for image, rows in zip(images, patches_of(preprocessor, images), strict=True):
        tiles = by_transformers(reference, image, case)
        layout = preprocessor.layout(image.width, image.height)
        assert len(tiles) == len(layout.tiles)
        for tile, grid, part in zip(tiles, layout.tiles, rows.chunk(len(tiles)), strict=True):
            if tile.ndim == 2:
                assert torch.equal(part, tile)
            else:
                made = put_together(part, grid, patch, merge)
                assert torch.equal(made, tile[:, : made.shape[1], : made.shape[2]])
                assert max(tile.shape[1] - made.shape[1], tile.shape[2] - made.shape[2]) < patch


@each_rule
def test_every_arithmetic_of_the_pixels(tmp_path: Path, case: RuleCase) -> None:
    image = canonical(noise(87, 61))
    changes: list[dict[str, Any]] = [
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.4, "image_std": 0.2},
        {"image_mean": [0.0, 1.0, 0.123456], "image_std": [1.0, 2.0, 3.0]},
        {"resample": 0},
        {"resample": 1},
        {"resample": Image.Resampling.HAMMING},
    ]
    found = []
    for number, options in enumerate(changes):
        preprocessor = case.make(tmp_path / str(number), options)
        assert preprocessor.fast_path is not None, options
        (rows,) = patches_of(preprocessor, [image])
        plain = preprocessor.without_fast_path()
        assert plain.fast_path is None
        assert torch.equal(rows, patches_of(plain, [image])[0]), options
        found.append(rows)
    assert not any(torch.equal(rows, found[0]) for rows in found[1:])


def test_a_given_processor_replaces_the_file(tmp_path: Path) -> None:
    images = [canonical(noise(157, 93)), canonical(noise(60, 200, 1))]
    for name in ONE_OF_EACH:
        case = RULES[name]
        usual = case.make(tmp_path / name)
        explicit = make_rule(case.rule, case.config, tmp_path / "nothing", given=usual.processor)
        for ours, theirs in zip(patches_of(explicit, images), patches_of(usual, images), strict=True):
            assert torch.equal(ours, theirs)
        with pytest.raises(errors.ProcessorError, match="must be an image processor of transformers, got list"):
            make_rule(case.rule, case.config, tmp_path, given=[]).layout(100, 100)


@each_rule
def test_images_do_not_depend_on_each_other_or_on_threads(tmp_path: Path, case: RuleCase) -> None:
    preprocessor = case.make(tmp_path)
    images = [canonical(noise(*size, seed)) for seed, size in enumerate(random_sizes(10, largest=200, seed=3))]
    expected = [patches_of(preprocessor, [image])[0] for image in images]
    shared = case.make(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda _: shared.preprocess_images(images, each=pool_of_two_map), range(4)))
    for batch in batches:
        for rows, alone in zip(batch.pixels.split(list(map(len, expected))), expected, strict=True):
            assert torch.equal(rows, alone)
    layouts = [preprocessor.layout(image.width, image.height) for image in images]
    info = batches[0].images
    assert info.grids == tuple(layout.grid for layout in layouts)
    assert info.token_counts == tuple(layout.tokens(case.config) for layout in layouts)
    assert info.tile_counts == tuple(len(layout.tiles) for layout in layouts)
    assert info.original_sizes == tuple((image.width, image.height) for image in images)
    assert info.processed_sizes == tuple(layout.processed_size for layout in layouts)
    assert info.content_hashes == tuple(image.digest for image in images)
    assert len(preprocessor.preprocess_images([])) == 0


def pool_of_two_map(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, *arguments))


@pytest.mark.parametrize("name", ["area", "edge", "cropped", "pan and scan", "tiles"])
def test_a_single_large_image_is_spread_over_threads(tmp_path: Path, name: str, restore_threads: None) -> None:
    preprocessor = RULES[name].make(tmp_path)
    for seed, (width, height) in enumerate([(900, 400), (401, 801)]):
        image = canonical(noise(width, height, seed))
        torch.set_num_threads(1)
        (expected,) = patches_of(preprocessor, [image])
        torch.set_num_threads(5)
        assert torch.equal(patches_of(preprocessor, [image])[0], expected)


@each_rule
def test_uint8_pixels_normalize_to_the_fp32_pixels(tmp_path: Path, case: RuleCase) -> None:
    preprocessor = case.make(tmp_path)
    images = [canonical(noise(*size, seed)) for seed, size in enumerate([(80, 60), (33, 150), (1, 1)])]
    usual, raw = (preprocessor.preprocess_images(images, raw=raw) for raw in (False, True))
    assert (usual.pixels.dtype, raw.pixels.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(preprocessor.normalize(raw).pixels, usual.pixels)
    assert preprocessor.normalize(usual) is usual
    assert torch.equal(preprocessor.preprocess_images(images, raw=None).pixels, raw.pixels)
    assert raw.images.content_hashes == usual.images.content_hashes
    assert torch.equal(raw.attention.positions, usual.attention.positions)


def test_a_class_token_counts_as_zero(tmp_path: Path) -> None:
    config = tower(table_side=4, class_token=True)
    preprocessor = make_rule(FixedSize, config, write_settings(tmp_path, CLIP_FILE))
    raw = preprocessor.preprocess_images([canonical(noise(80, 60)), canonical(noise(60, 90))], raw=True)
    assert raw.tokens.class_rows.flatten().tolist() == [0, 17]
    assert (raw.pixels[[0, 17]] == PIXEL_CENTER).all()
    assert (preprocessor.normalize(raw).pixels[[0, 17]] == 0).all()


class Own(CLIPImageProcessorPil):
    """A processor of a class that the fast path does not list."""


def test_uint8_pixels_of_an_unknown_processor_are_rejected(tmp_path: Path) -> None:
    images = [canonical(noise(80, 70))]
    given = {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}
    mistral = make_rule(MistralResize, MISTRAL, tmp_path, longest_edge=280)
    for preprocessor in (make_rule(FixedSize, SQUARE, tmp_path, given=Own(**given)), mistral):
        assert preprocessor.fast_path is None
        with pytest.raises(errors.UsageError, match="cannot be packed as bytes"):
            preprocessor.preprocess_images(images, raw=True)
        assert preprocessor.preprocess_images(images, raw=None).pixels.dtype == torch.float32
    raw = make_rule(FixedSize, SQUARE, tmp_path, given=CLIPImageProcessorPil(**given)).preprocess_images(
        images, raw=True
    )
    with pytest.raises(errors.UsageError, match="cannot be packed as bytes"):
        make_rule(FixedSize, SQUARE, tmp_path, given=Own(**given)).normalize(raw)


@pytest.mark.parametrize("threads", [1, 3])
def test_images_much_larger_than_their_patches_are_not_kept(
    tmp_path: Path, threads: int, restore_threads: None
) -> None:
    preprocessor = RULES["squashed"].make(tmp_path)  # always 56 × 56
    torch.set_num_threads(threads)
    for sizes in ([(900, 700)], [(400, 300), (60, 60), (90, 800)], [(80, 70), (56, 56)]):
        images = [canonical(noise(*size)) for size in sizes]
        batch = preprocessor.preprocess_images(images, raw=True)
        computed = [size for size, image in zip(sizes, images, strict=True) if "digest" in vars(image)]
        assert computed == [size for size in sizes if size[0] * size[1] > 2 * 56 * 56]
        assert batch.images.content_hashes == tuple(canonical(noise(*size)).digest for size in sizes)


def test_sizes_are_checked_before_anything_else(tmp_path: Path) -> None:
    for preprocessor in make_each(tmp_path, errors.Limits(max_planned_pixels=3000)):
        with pytest.raises(errors.EmptyImageError):
            preprocessor.layout(0, 5)
        with pytest.raises(errors.UsageError, match=r"must be whole numbers, got width 5\.0, height 5"):
            preprocessor.layout(5.0, 5)  # type: ignore[arg-type]
        with pytest.raises(errors.AspectRatioError):
            preprocessor.layout(1, 10000)
        with pytest.raises(errors.ImageTooLargeError, match=r"limit is 3000 pixels.*Limits\(max_planned_pixels"):
            preprocessor.layout(500, 500)
        with pytest.raises(errors.ImageTooLargeError, match=r"image 0 \(black\): .* would be resized") as caught:
            preprocessor.preprocess_images([blank(500, 500)])
        assert caught.value.index == 0


def test_extreme_ratios_are_rejected_at_once_with_loose_limits(tmp_path: Path) -> None:
    for preprocessor in make_each(tmp_path, errors.Limits(max_aspect_ratio=1e9, max_planned_pixels=10**6)):
        preprocessor.layout(60, 60)
        for size in ((1, 100_000), (100_000, 1)):
            start = time.perf_counter()
            # If such an image has a size after all, it is a small one.
            with suppress(errors.AspectRatioError, errors.ImageTooLargeError):
                assert preprocessor.layout(*size).patches * 14 * 14 <= 10**6
            assert time.perf_counter() - start < 0.05


def test_bounds_that_a_rule_does_not_have_are_rejected(tmp_path: Path) -> None:
    unknown = {
        "longest_edge": "bounds may be min_pixels and max_pixels, got longest_edge",
        "max_pixels": "bounds may be longest_edge, got max_pixels",
        "min_pixels": "no bounds are allowed, got min_pixels",
    }
    names = ("longest_edge", "max_pixels", "min_pixels", "min_pixels", "max_pixels")
    for preprocessor, name in zip(make_each(tmp_path), names, strict=True):
        with pytest.raises(errors.UsageError, match=unknown[name]):
            preprocessor.layout(100, 100, **{name: 500})  # type: ignore[misc]
        with pytest.raises(errors.UsageError, match=unknown[name]):
            preprocessor.preprocess_images([], **{name: 500})  # type: ignore[misc]
        unbounded = preprocessor.layout(100, 100, **{name: None})  # type: ignore[misc]
        assert unbounded.tiles == preprocessor.layout(100, 100).tiles


def test_bounds_that_are_not_sizes_are_rejected(tmp_path: Path) -> None:
    smart, edge, *_, mistral = make_each(tmp_path)
    for preprocessor, name in ((smart, "max_pixels"), (edge, "longest_edge"), (mistral, "longest_edge")):
        for bound in (0, -5, 1.5, "many", True):
            with pytest.raises(errors.ProcessorError, match=name):
                preprocessor.layout(100, 100, **{name: bound})


def test_missing_files_and_unknown_options_are_rejected(tmp_path: Path) -> None:
    for name in ONE_OF_EACH:
        rule, config = RULES[name].rule, RULES[name].config
        with pytest.raises(errors.ProcessorError, match=r"preprocessor_config\.json.*`processor`"):
            make_rule(rule, config, tmp_path).layout(100, 100)
        with pytest.raises(errors.UsageError, match=r"must be among resample, .*, got do_magic"):
            make_rule(rule, config, tmp_path, options={"do_magic": True})
    with pytest.raises(errors.UsageError, match="must be among none, got do_magic"):
        make_rule(MistralResize, MISTRAL, tmp_path, options={"do_magic": True}, longest_edge=280)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, r"do_resize .* must be True .* got False"),
        ({"image_processor_type": "Nonsense"}, r"cannot load"),
        ({"options": {"image_mean": [0.5, 0.5]}}, r"refused an image of 50 × 40 pixels: .*mean"),
    ],
)
def test_a_processor_that_does_not_fit_is_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for name in ONE_OF_EACH:
        with pytest.raises(errors.ProcessorError, match=message):
            RULES[name].make(tmp_path / name, **change).preprocess_images([blank(50, 40)])


@pytest.mark.parametrize("rule", [SmartResize, LongestEdge, FixedSize])
def test_a_tower_of_other_channels_is_rejected(tmp_path: Path, rule: Any) -> None:
    case = next(case for case in RULES.values() if case.rule is rule)
    config = replace(case.config, patch=replace(case.config.patch, channels=1))
    preprocessor = make_rule(rule, config, write_settings(tmp_path, case.content))
    with pytest.raises(errors.ProcessorError, match="must make images of 1 channels for this tower, got 3"):
        preprocessor.preprocess_images([canonical(noise(56, 84))])


def test_only_rules_with_videos_take_them(tmp_path: Path) -> None:
    smart, *others = make_each(tmp_path)
    smart.check_takes_videos()
    for preprocessor in others:
        for call in (preprocessor.check_takes_videos, lambda p=preprocessor: p.preprocess_video([blank(50, 50)])):
            with pytest.raises(errors.UsageError, match="this tower takes no video: the tested family"):
                call()


LAYOUTS = """
import pickle, sys, time
from pathlib import Path
from tritontower.preprocessing import AnyResolution, Preprocessor, ProcessorSource

config = pickle.load(sys.stdin.buffer)
preprocessor = Preprocessor(ProcessorSource(config, Path(sys.argv[1])), lambda it: AnyResolution(it, shrink_limit=1))
start = time.perf_counter()
tokens = {preprocessor.layout(width, 300).tokens(config) for width in range(100, 1100)}
assert time.perf_counter() - start < 1.0
assert len(tokens) > 3
assert "transformers" not in sys.modules
"""


def test_layouts_need_no_transformers_and_little_time(tmp_path: Path) -> None:
    write_settings(tmp_path, RULES["tiles, cropped"].content)
    run_python("-c", LAYOUTS, tmp_path, check=True, input=pickle.dumps(SQUARE), text=False)
