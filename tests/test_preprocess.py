"""Preprocessing: the pixels of transformers, whatever way the checkpoint spells its settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tritontower import VisionTower
from tritontower.errors import ConfigError, ProcessorError, TowerError

PICTURES = [noise(157, 243, 0), noise(60, 200, 1)]
OWN_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def with_files(source: Path, target: Path, files: dict[str, Any]) -> VisionTower:
    """The tower of a copy of ``source`` whose processor files are exactly ``files``."""
    shutil.copytree(source, target)
    for name in OWN_FILES:
        (target / name).unlink(missing_ok=True)
    for name, content in files.items():
        (target / name).write_text(json.dumps(content))
    return VisionTower.from_pretrained(target, device="cpu", delay_load=True)


def settings(**changes: Any) -> dict[str, Any]:
    return {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, **changes}


def test_pixels_are_those_of_transformers(qwen2_vl: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    processor = AutoImageProcessor.from_pretrained(qwen2_vl, backend="pil", trust_remote_code=False)
    expected = processor(images=PICTURES, return_tensors="pt")
    batch = tower.preprocess(PICTURES)
    frames = expected["pixel_values"].unflatten(1, (3, 2, 196))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert torch.equal(batch.pixels, frames[:, :, 0].flatten(1))
    assert torch.equal(torch.tensor(batch.grids), expected["image_grid_thw"])


def test_a_clip_interleaves_its_frames_and_repeats_the_last(qwen2_vl: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    frames = [noise(120, 80, seed) for seed in range(3)]
    bounds = {"min_pixels": 3136, "max_pixels": 12845056}
    clip = tower.preprocess_video(frames, **bounds)
    stills = tower.preprocess(frames, **bounds)
    per_frame = stills.pixels.unflatten(0, (3, -1)).unflatten(2, (3, 196))
    assert clip.grids == ((2, *stills.grids[0][1:]),)
    pixels = clip.pixels.unflatten(0, (2, -1)).unflatten(2, (3, 2, 196))
    for slot, frame in enumerate((0, 1, 2, 2)):
        assert torch.equal(pixels[slot // 2, :, :, slot % 2], per_frame[frame])


@pytest.mark.parametrize(
    ("files", "area"),
    [
        ({"preprocessor_config.json": settings(min_pixels=5000, max_pixels=60000)}, (5000, 60000)),
        (
            {"preprocessor_config.json": settings(size={"shortest_edge": 5000, "longest_edge": 60000})},
            (5000, 60000),
        ),
        ({"preprocessor_config.json": settings(size={"min_pixels": 5000, "max_pixels": 60000})}, (5000, 60000)),
        ({"processor_config.json": {"image_processor": settings(min_pixels=5000, max_pixels=60000)}}, (5000, 60000)),
        (
            {
                "processor_config.json": {"image_processor": settings(min_pixels=5000, max_pixels=60000)},
                "preprocessor_config.json": settings(min_pixels=4000, max_pixels=50000),
            },
            (5000, 60000),
        ),
        (
            {
                "processor_config.json": {"processor_class": "Qwen2VLProcessor"},
                "preprocessor_config.json": settings(min_pixels=4000, max_pixels=50000),
            },
            (4000, 50000),
        ),
        ({"preprocessor_config.json": settings()}, (3136, 1003520)),
    ],
)
def test_every_spelling_of_the_allowed_area(
    qwen2_vl: Path, tmp_path: Path, files: dict[str, Any], area: tuple[int, int]
) -> None:
    tower = with_files(qwen2_vl, tmp_path / "model", files)
    assert tower.preprocessor.picture_area == area
    batch = tower.preprocess([noise(400, 300, 0), noise(20, 20, 1)])
    resized = [width * height for width, height in batch.processed_sizes]
    assert resized[0] <= area[1]
    assert resized[1] >= area[0]
    assert batch.token_counts == (tower.count_tokens(400, 300), tower.count_tokens(20, 20))


def test_clips_have_their_own_area(qwen2_vl: Path, tmp_path: Path) -> None:
    nested = {"image_processor": settings(), "video_processor": {"size": {"shortest_edge": 4000, "longest_edge": 9000}}}
    for name, files, area in (
        ("nested", {"processor_config.json": nested}, (4000, 9000)),
        (
            "own",
            {
                "preprocessor_config.json": settings(),
                "video_preprocessor_config.json": {"min_pixels": 4000, "max_pixels": 9000},
            },
            (4000, 9000),
        ),
        ("old", {"preprocessor_config.json": settings(min_pixels=4000, max_pixels=9000)}, (4000, 9000)),
        ("default", {"preprocessor_config.json": settings()}, (100352, 602112)),
    ):
        tower = with_files(qwen2_vl, tmp_path / name, files)
        assert tower.preprocessor.frame_area == area, name


def test_no_processor_file_says_what_is_missing_and_takes_an_explicit_one(qwen2_vl: Path, tmp_path: Path) -> None:
    tower = with_files(qwen2_vl, tmp_path / "model", {})
    with pytest.raises(ProcessorError, match=r"preprocessor_config\.json.*`processor`"):
        tower.count_tokens(100, 100)
    processor = AutoImageProcessor.from_pretrained(qwen2_vl, backend="pil", trust_remote_code=False)
    explicit = VisionTower.from_pretrained(tower.folder, device="cpu", delay_load=True, processor=processor)
    usual = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    assert torch.equal(explicit.preprocess(PICTURES).pixels, usual.preprocess(PICTURES).pixels)
    assert explicit.preprocess_video(PICTURES[:1]).grids[0][0] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patch_size": 16}, ProcessorError, r"patch_size = 16, but the tower needs 14"),
        ({"merge_size": 4}, ProcessorError, r"merge_size = 4"),
        ({"do_resize": False}, ProcessorError, r"do_resize = False"),
        ({"image_processor_type": "Nonsense"}, ProcessorError, r"cannot load the image processor"),
        ({"min_pixels": "many"}, ConfigError, r"min_pixels is 'many'"),
        ({"min_pixels": 9000, "max_pixels": 8000}, ConfigError, r"allowed: a least area"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(
    qwen2_vl: Path, tmp_path: Path, change: dict[str, Any], error: type[TowerError], message: str
) -> None:
    tower = with_files(qwen2_vl, tmp_path / "model", {"preprocessor_config.json": settings(**change)})
    with pytest.raises(error, match=message):
        tower.preprocess(PICTURES)
