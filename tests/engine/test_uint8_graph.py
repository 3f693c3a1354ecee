"""uint8 pixels give the same embeddings, by weights that include the normalization."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.towers import TowerCase, all_cases
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tritontower import VisionTower
from tritontower.engine.uint8_graph import fold_pixel_weights, make_uint8_graph
from tritontower.errors import UsageError
from tritontower.graph.builder import build
from tritontower.parity.parity import compare, relative_error

CASES = {case.name: case for case in all_cases()}

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small checkpoint of a case, made once."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def save(case: TowerCase, dtype: torch.dtype = torch.float32) -> Path:
        key = case.name, dtype
        if key not in folders:
            folders[key] = case.save(tmp_path_factory.mktemp("folding") / case.name, dtype=dtype)
        return folders[key]

    return save


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


def images_of(case: TowerCase) -> list[np.ndarray]:
    """Noise; and smooth and one-colored images like photographs, where errors of weights add up."""
    column, row = np.arange(120), np.arange(100)[:, None]
    ramp = np.broadcast_to(((column + row) * 255 // 218)[..., None], (100, 120, 3)).astype(np.uint8)
    noisy = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:2])]
    return [*noisy, ramp, np.full((90, 90, 3), 255, np.uint8), np.zeros((64, 80, 3), np.uint8)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(CASES, (torch.float32, torch.bfloat16)), ("qwen2_vl", torch.float16)],
    ids=str,
)
def test_uint8_pixels_err_no_more_than_transformers(name: str, dtype: torch.dtype, saved: Saved) -> None:
    tower = load(saved(CASES[name], dtype))
    images = images_of(CASES[name])
    batch = tower.preprocess(images, raw=True)
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(tower.preprocessor.normalize(batch).pixels, tower.preprocess(images).pixels)
    parity = compare(tower, batch)
    assert parity.dtype == dtype
    assert parity.passed, parity.outputs


@pytest.mark.parametrize("name", ["clip", "qwen2_vl", "siglip"])
def test_kernels_take_uint8_pixels(name: str, saved: Saved, kernel_device: torch.device) -> None:
    tower = VisionTower.from_pretrained(saved(CASES[name]), device=kernel_device)
    images = [noise(28, 56), np.full((28, 28, 3), 200, np.uint8)]
    batch = tower.preprocess(images, raw=True)
    assert compare(tower, batch).passed
    usual = tower.forward(tower.preprocess(images, raw=False))
    assert relative_error(tower.forward(batch), usual) <= 1e-5


@pytest.mark.parametrize("name", ["clip", "llava_next"])
def test_the_class_tokens_row_keeps_its_bits(name: str, saved: Saved) -> None:
    tower = load(saved(CASES[name]))
    assert tower.config.class_token
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for raw in (False, True):
        batch = tower.preprocess(images_of(CASES[name]), raw=raw)

        def keep(node: Any, tensors: dict[str, torch.Tensor], batch: Any = batch) -> None:
            if node.kind == "patch_projection":
                rows = tensors[node.outputs[0]].clone()
                found.append((rows, rows[batch.tokens.class_rows.flatten().long()]))

        tower.executor_for(batch).run(batch, keep)
    (usual, usual_class), (rows, class_rows) = found
    assert torch.equal(class_rows, usual_class)
    assert 0 < relative_error(rows, usual) <= 1e-5


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.video])
def test_videos_of_uint8_pixels(name: str, saved: Saved) -> None:
    tower = load(saved(CASES[name]))
    video = [noise(90, 60, seed) for seed in range(5)]
    raw, usual = (tower.preprocess_video(video, raw=raw) for raw in (True, False))
    assert raw.pixels.dtype == torch.uint8
    assert raw.pixels.shape == usual.pixels.shape
    assert torch.equal(tower.preprocessor.normalize(raw).pixels, usual.pixels)
    assert relative_error(tower.forward(raw), tower.forward(usual)) <= 1e-5
    assert compare(tower, raw).passed


def test_a_cpu_gets_float_pixels_and_a_gpu_uint8(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen2_vl"]
    images = images_of(case)
    plain = load(saved(case))
    assert plain.preprocess(images).pixels.dtype == torch.float32
    expected = plain.encode(images)

    tower = load(saved(case))
    monkeypatch.setattr("tritontower.models.common.tower_model.backend_on", lambda _: "triton")
    assert tower.preprocess(images).pixels.dtype == torch.uint8
    assert tower.preprocess(images, raw=False).pixels.dtype == torch.float32
    assert tower.preprocess_video(images[2:3] * 2).pixels.dtype == torch.uint8
    seen = []
    run = tower.runner.run
    tower.runner.run = lambda batch: seen.append(batch.pixels.dtype) or run(batch)  # type: ignore[method-assign, func-returns-value]
    for mine, theirs in zip(tower.encode(images, max_patches=1), expected, strict=True):
        assert relative_error(mine.embeddings, theirs.embeddings) <= 1e-5
    assert set(seen) == {torch.uint8}


class Own(Qwen2VLImageProcessorPil):
    """An image processor whose normalization is unknown."""


def test_an_unknown_processor_keeps_float_pixels_on_a_gpu(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen2_vl"]
    tower = load(saved(case), processor=Own(min_pixels=3136, max_pixels=20000))
    monkeypatch.setattr("tritontower.models.common.tower_model.backend_on", lambda _: "triton")
    assert tower.preprocess(images_of(case)).pixels.dtype == torch.float32
    with pytest.raises(UsageError, match="cannot be packed as bytes"):
        tower.preprocess(images_of(case), raw=True)
    raw = load(saved(case)).preprocess(images_of(case), raw=True)
    with pytest.raises(UsageError, match="float pixels, got uint8"):
        tower.forward(raw)


def test_a_class_token_needs_positions_in_the_same_node(saved: Saved) -> None:
    graph = build(load(saved(CASES["clip"]), delay_load=True).config)
    with pytest.raises(ValueError, match="must add positions if there is a class token"):
        make_uint8_graph(graph, class_token=True)


@pytest.mark.parametrize("name", ["clip", "qwen2_vl", "siglip"])
def test_folded_weights_are_rounded_once(name: str, saved: Saved) -> None:
    tower = load(saved(CASES[name], torch.bfloat16))
    normalization, class_token = tower.preprocessor.normalization, tower.config.class_token
    assert normalization is not None
    rounded = tower.read_weights()
    sources = {key: rounded[key] for key in rounded if key.startswith("patch_projection") or "position" in key}
    exact = {key: tensor.float() for key, tensor in sources.items()}
    made, expected = (
        fold_pixel_weights(tower.graph, each, normalization, class_token=class_token) for each in (sources, exact)
    )
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], tensor.bfloat16()) for key, tensor in expected.items())
