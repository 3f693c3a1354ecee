"""The area rule: sizes, settings, pixels and videos against transformers' Qwen-VL processors."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import noise
from support.preprocessing import (
    LIMITS,
    QWEN2,
    QWEN3,
    blank,
    canonical,
    make_rule,
    patches_of,
    random_sizes,
    write_settings,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from tritontower.errors import (
    AspectRatioError,
    ConfigError,
    ImageTooLargeError,
    Limits,
    ProcessorError,
    TowerError,
    UsageError,
)
from tritontower.preprocessing import Preprocessor, SmartResize
from tritontower.preprocessing.resize.smart_resize import STILL_AREA, VIDEO_AREAS, smart_resize

IMAGES = [canonical(noise(157, 243, 0)), canonical(noise(60, 200, 1)), canonical(noise(5, 3, 2))]


def settings(**changes: Any) -> dict[str, Any]:
    return {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, **changes}


def rule(folder: Path, files: dict[str, Any], **arguments: Any) -> Preprocessor:
    """A preprocessor of a folder whose settings files are exactly ``files``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_settings(folder, content, name)
    return make_rule(SmartResize, arguments.pop("config", QWEN2), folder, LIMITS, **arguments)


@pytest.mark.parametrize("area", [STILL_AREA, (3136, 12845056), (65536, 16777216), (100352, 100352)])
@pytest.mark.parametrize("factor", [28, 32])
def test_sizes_are_those_of_transformers(factor: int, area: tuple[int, int]) -> None:
    for width, height in random_sizes(1000, largest=8000):
        expected = reference_resize(height, width, factor, *area)
        assert smart_resize(width, height, factor, area) == expected[::-1]


def test_bounds_of_the_call_count_for_layout_and_pixels(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, {"preprocessor_config.json": settings()})
    bounds = {"min_pixels": 5000, "max_pixels": 20000}
    reference = Qwen2VLImageProcessorPil(**bounds)
    expected = reference(images=[IMAGES[0].array], input_data_format="channels_last")
    (rows,) = patches_of(preprocessor, IMAGES[:1], **bounds)
    assert torch.equal(rows, torch.from_numpy(expected["pixel_values"]).unflatten(1, (3, 2, -1))[:, :, 0].flatten(1))
    assert preprocessor.layout(157, 243, **bounds).patches == len(rows) < preprocessor.layout(157, 243).patches


IN_FILE, SMALLER = settings(min_pixels=5000, max_pixels=60000), settings(min_pixels=4000, max_pixels=50000)


@pytest.mark.parametrize(
    ("old", "new", "area"),
    [
        (IN_FILE, None, (5000, 60000)),
        (settings(size={"shortest_edge": 5000, "longest_edge": 60000}), None, (5000, 60000)),
        (settings(size={"min_pixels": 5000, "max_pixels": 60000}), None, (5000, 60000)),
        (SMALLER, {"image_processor": IN_FILE}, (5000, 60000)),
        (SMALLER, {"processor_class": "Qwen2VLProcessor"}, (4000, 50000)),
        (settings(max_pixels=50000), None, (3136, 50000)),
        (settings(), None, (3136, 1003520)),
    ],
)
def test_the_allowed_area_is_read_in_every_form(tmp_path: Path, old: Any, new: Any, area: tuple[int, int]) -> None:
    files = {"preprocessor_config.json": old, **({} if new is None else {"processor_config.json": new})}
    preprocessor = rule(tmp_path, files)
    assert preprocessor.rule.image_area == area
    images = [blank(400, 300), blank(20, 20)]
    reference = Qwen2VLImageProcessorPil(min_pixels=area[0], max_pixels=area[1])
    expected = reference(images=[image.array for image in images], input_data_format="channels_last")
    assert [list(preprocessor.layout(*size).grid) for size in ((400, 300), (20, 20))] == expected[
        "image_grid_thw"
    ].tolist()
    assert rule(tmp_path, files, options={"max_pixels": 30000}).rule.image_area == (area[0], 30000)


@pytest.mark.parametrize(
    ("change", "bounds", "error", "message"),
    [
        ({"patch_size": 16}, {}, ProcessorError, r"patch_size .* must be 14 for this tower, got 16"),
        ({"merge_size": 4}, {}, ProcessorError, r"merge_size .* must be 2 .* got 4"),
        ({"min_pixels": "many"}, {}, ConfigError, r"min_pixels must be .*got 'many'"),
        ({"size": 224}, {}, ConfigError, r"size must be an object.*, got 224"),
        ({"min_pixels": 9000, "max_pixels": 8000}, {}, ConfigError, r"must be a least area"),
        ({}, {"min_pixels": 9000, "max_pixels": 8000}, ProcessorError, r"in order, .* own are 3136 and 1003520"),
        ({}, {"max_pixels": 783, "min_pixels": 1}, ProcessorError, r"at least 784, one token of 28 × 28 .*, got 783"),
        ({}, {"min_pixels": 0}, ProcessorError, r"min_pixels = 0"),
    ],
)
def test_settings_and_bounds_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], bounds: dict[str, int], error: type[TowerError], message: str
) -> None:
    preprocessor = rule(tmp_path, {"preprocessor_config.json": settings(**change)})
    with pytest.raises(error, match=message):
        patches_of(preprocessor, IMAGES, **bounds)


def test_ratios_above_200_are_rejected_whatever_the_limits(tmp_path: Path) -> None:
    write_settings(tmp_path, settings())
    preprocessor = make_rule(SmartResize, QWEN2, tmp_path, Limits(max_aspect_ratio=1000))
    assert preprocessor.layout(2000, 10).processed_size == reference_resize(10, 2000)[::-1]
    with pytest.raises(AspectRatioError, match="aspect ratio must be at most 200"):
        preprocessor.layout(2001, 10)


def frames_of(rows: torch.Tensor, temporal_patches: int) -> torch.Tensor:
    """``[frames, patches, channels, pixels]`` of a video's rows."""
    rows = rows.unflatten(0, (temporal_patches, -1)).unflatten(2, (3, 2, -1))
    return rows.permute(0, 3, 1, 2, 4).flatten(0, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_video_interleaves_its_frames_and_repeats_the_last(tmp_path: Path, count: int) -> None:
    preprocessor = rule(tmp_path, {"preprocessor_config.json": settings()})
    frames = [canonical(noise(120, 80, seed)) for seed in range(count)]
    bounds = {"min_pixels": 3136, "max_pixels": 12845056}
    video = preprocessor.preprocess_video(frames, **bounds)
    stills = [rows.unflatten(1, (3, -1)) for rows in patches_of(preprocessor, frames, **bounds)]
    found = frames_of(video.pixels, -(-count // 2))
    assert len(found) == count + count % 2
    for slot, rows in enumerate(found):
        assert torch.equal(rows, stills[min(slot, count - 1)])
    assert video.images.grids == preprocessor.video_layout(count, 120, 80, **bounds).tiles
    assert video.images.original_sizes == ((120, 80),)


def test_a_videos_digest_is_of_all_its_frames_in_order(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, {"preprocessor_config.json": settings()})
    a, b, c = (canonical(noise(30, 30, seed)) for seed in range(3))
    hashes = [
        preprocessor.preprocess_video(frames).images.content_hashes[0]
        for frames in ([a, b], [a, c], [b, a], [a], [a, b])
    ]
    assert hashes[0] == hashes[4]
    assert len(set(hashes)) == 4


def test_videos_have_their_own_area(tmp_path: Path) -> None:
    area = {"min_pixels": 4000, "max_pixels": 9000}
    nested = {"image_processor": settings(), "video_processor": {"size": {"shortest_edge": 4000, "longest_edge": 9000}}}
    for name, files in {
        "nested": {"processor_config.json": nested},
        "own": {"preprocessor_config.json": settings(), "video_preprocessor_config.json": area},
        "old": {"preprocessor_config.json": settings(**area)},
    }.items():
        assert rule(tmp_path / name, files).rule.frame_area == (4000, 9000), name


@pytest.mark.parametrize("budget", ["per_frame", "per_video"])
def test_a_videos_default_area_is_that_of_transformers(budget: str) -> None:
    name = {"per_frame": "qwen2_vl", "per_video": "qwen3_vl"}[budget]
    # Read, not imported: the classes need torchvision.
    file = Path(transformers.__file__).parent / f"models/{name}/video_processing_{name}.py"
    (written,) = re.findall(r"^    size = (\{.*\})$", file.read_text(encoding="utf-8"), re.MULTILINE)
    size = {key: math.prod(map(int, product.split("*"))) for key, product in re.findall(r'"(\w+)": ([\d* ]+)', written)}
    assert (size["shortest_edge"], size["longest_edge"]) == VIDEO_AREAS[budget]


def test_videos_of_a_given_processor_have_the_default_area(tmp_path: Path) -> None:
    preprocessor = make_rule(SmartResize, QWEN2, tmp_path, LIMITS, Qwen2VLImageProcessorPil())
    assert preprocessor.rule.frame_area == VIDEO_AREAS["per_frame"]
    with pytest.raises(ProcessorError, match="must hold the settings"):
        _ = make_rule(SmartResize, QWEN2, tmp_path, LIMITS).rule.frame_area


@pytest.mark.parametrize("area", [(4096, 25165824), (131072, 786432), (4096, 40000)])
def test_sizes_of_whole_videos_are_those_of_transformers(area: tuple[int, int]) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as reference_video

    generator = np.random.default_rng(0)
    refused = 0
    for width, height in [(2010, 10), (10, 2010), (6401, 32), (6400, 32), *random_sizes(1000, largest=4000)]:
        frames = int(generator.integers(2, 200))
        try:
            expected = reference_video(frames, height, width, 2, 32, *area)
        except ValueError:
            refused += 1
            with pytest.raises(AspectRatioError):
                smart_resize(width, height, 32, area, frames, 2)
            continue
        assert smart_resize(width, height, 32, area, frames, 2) == expected[::-1]
    assert 3 <= refused < 100


def test_a_whole_videos_budget_is_shared_by_its_frames(tmp_path: Path) -> None:
    frames_at_size = {"size": {"shortest_edge": 4096, "longest_edge": 200_000}}
    files = {"preprocessor_config.json": settings(patch_size=16), "video_preprocessor_config.json": frames_at_size}
    preprocessor = rule(tmp_path, files, config=QWEN3, frame_budget="per_video")
    few, many = (preprocessor.video_layout(count, 640, 480) for count in (2, 16))
    assert max(few.patches, many.patches) * 256 * 2 <= 200_000
    assert few.processed_size > many.processed_size
    video = preprocessor.preprocess_video([canonical(noise(200, 150, seed)) for seed in range(5)])
    assert video.images.grids == preprocessor.video_layout(5, 200, 150).tiles


def test_videos_that_cannot_be_encoded_are_refused(tmp_path: Path) -> None:
    preprocessor = rule(tmp_path, {"preprocessor_config.json": settings()})
    with pytest.raises(ProcessorError, match="at least one frame"):
        preprocessor.preprocess_video([])
    with pytest.raises(ProcessorError, match=r"all frames one size, got sizes \[\(20, 20\), \(20, 30\)\]"):
        preprocessor.preprocess_video([blank(20, 20), blank(20, 30)])
    with pytest.raises(AspectRatioError):
        preprocessor.video_layout(4, 1, 300)
    files = {"preprocessor_config.json": settings(patch_size=16)}
    whole = rule(tmp_path / "whole", files, config=QWEN3, frame_budget="per_video")
    assert whole.video_layout(2, 100, 100, min_pixels=1, max_pixels=2048).grid == (1, 2, 2)
    with pytest.raises(ProcessorError, match=r"at least 2048, one token of 32 × 32 pixels in each of 2 frames"):
        whole.video_layout(2, 100, 100, min_pixels=1, max_pixels=2047)
    with pytest.raises(ProcessorError, match=r"at least 2 frames, got 1"):
        whole.preprocess_video([blank(100, 100)])


@pytest.mark.parametrize("budget", ["per_frame", "per_video"])
def test_the_limit_of_a_video_is_checked_before_any_work(tmp_path: Path, budget: Any) -> None:
    write_settings(tmp_path, settings(patch_size=16))

    def limit_video(pixels: int) -> Preprocessor:
        return make_rule(SmartResize, QWEN3, tmp_path, Limits(max_video_pixels=pixels), frame_budget=budget)

    for frames in (10**6, 10**18):
        with pytest.raises((ImageTooLargeError, ProcessorError), match=rf"{frames} frames|got {frames}"):
            limit_video(2**20).video_layout(frames, 1000, 1000)
    # The last frame of an odd number is repeated, and takes as much.
    area = {"min_pixels": 1, "max_pixels": 64 * 64 * (1 if budget == "per_frame" else 8)}
    limited = limit_video(8 * 64 * 64)
    assert limited.video_layout(7, 64, 64, **area).grid == (4, 4, 4)
    message = r"8 frames of 64 × 64 pixels would be resized to 64 × 64 each, 32768 pixels .* 32767; .*max_video_pixels="
    with pytest.raises(ImageTooLargeError, match=message):
        limit_video(8 * 64 * 64 - 1).video_layout(8, 64, 64, **area)
    with pytest.raises(ImageTooLargeError, match="a video of 7 frames"):
        limit_video(8 * 64 * 64 - 1).preprocess_video([blank(64, 64)] * 7, **area)


class Own(Qwen2VLImageProcessorPil):
    """A processor of a class that the fast path does not list."""


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_videos_are_those_of_the_processor(tmp_path: Path, frames: int) -> None:
    bounds = {"min_pixels": 3136, "max_pixels": 20000}
    usual, own = (
        make_rule(SmartResize, QWEN2, tmp_path, given=kind(**bounds)) for kind in (Qwen2VLImageProcessorPil, Own)
    )
    video = [canonical(noise(110, 75, seed)) for seed in range(frames)]
    expected = own.preprocess_video(video, **bounds)
    assert own.fast_path is None
    assert usual.fast_path is not None
    assert torch.equal(usual.preprocess_video(video, **bounds).pixels, expected.pixels)
    with ThreadPoolExecutor(3) as pool:
        raw = usual.preprocess_video(video, raw=True, each=pool.map, **bounds)
    assert raw.pixels.dtype == torch.uint8
    assert torch.equal(usual.normalize(raw).pixels, expected.pixels)
    with pytest.raises(UsageError, match="cannot be packed as bytes"):
        own.preprocess_video(video, raw=True, **bounds)
