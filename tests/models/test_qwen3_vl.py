"""Qwen3-VL and Qwen3.5: the position table, deepstack, and the budget of a video."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import noise
from support.probing import record_values
from support.qwen import by_transformers
from support.towers.qwen3_vl import save_qwen3

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.kernels.rowwise.positions import bilinear_taps, merge_block_positions
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import Reference, relative_error

QWEN3_VL, QWEN3_5 = map(read_summary, ("qwen3_vl", "qwen3_5"))


def read(vision: dict[str, Any], model_type: str = "qwen3_vl") -> TowerConfig:
    return read_family(ConfigReader({"model_type": model_type, "vision_config": vision})).config


def load(folder: Path, **options: object) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VisionTower]:
    """Saves and loads a small tower with these changes."""

    def make(model_type: str = "qwen3_vl", **changes: Any) -> VisionTower:
        return load(save_qwen3(model_type, tmp_path_factory.mktemp("model") / "model", **changes))

    return make


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("indices", [[], [8, 16, 24], [99], None])
def test_deepstack_of_a_qwen3_5_file_is_ignored(model_type: str, indices: list[int] | None) -> None:
    vision = {**QWEN3_5.example["vision_config"], "deepstack_visual_indexes": indices}
    config = read(vision, model_type)
    assert config == read_family(ConfigReader(QWEN3_5.example)).config
    assert config.deepstack == ()
    assert config.deepstack_projector is None


def test_position_table_is_interpolated_with_aligned_corners(towers: Callable[..., VisionTower]) -> None:
    tower = towers(num_position_embeddings=36)
    batch = tower.preprocess([noise(160, 224), noise(96, 96)])
    assert batch.images.tile_grids == ((1, 14, 10), (1, 6, 6))
    bare, placed = record_values(tower, batch, "patch_rows", "placed_rows")
    table = tower.read_weights()["position_table.weight"]
    square = table.T.view(1, -1, 6, 6)
    expected = []
    for grid in batch.images.tile_grids:
        stretched = torch.nn.functional.interpolate(square, grid[1:], mode="bilinear", align_corners=True)[0]
        row, column = merge_block_positions([grid], 2).long().unbind(1)
        expected.append(stretched[:, row, column].T)
    assert relative_error(placed - bare, torch.cat(expected)) <= 1e-5
    # The grid of the second image is the table's: every patch has one row of it.
    row, column = merge_block_positions([(1, 6, 6)], 2).long().unbind(1)
    assert torch.equal(placed[140:], bare[140:] + table[row * 6 + column])


def test_interpolation_weights_stay_fp32(towers: Callable[..., VisionTower]) -> None:
    tower = towers(num_position_embeddings=2304)
    batch = tower.preprocess(noise(352, 416))
    _, weights = bilinear_taps(merge_block_positions(batch.images.tile_grids, 2), batch.images.tile_grids, 48)
    assert batch.attention.position_weights is not None
    assert torch.equal(batch.attention.position_weights, weights)
    assert (weights - weights.bfloat16().float()).abs().max() > 1e-4
    in_bf16 = load(tower.folder, dtype="bfloat16")
    bare, placed = record_values(in_bf16, batch, "patch_rows", "placed_rows")
    index, table = batch.attention.position_index, in_bf16.read_weights()["position_table.weight"].float()
    assert index is not None
    learned = (table[index.long()] * weights[..., None]).sum(1)
    assert (placed == (bare.float() + learned).bfloat16()).float().mean() > 0.999


def test_deepstack_mergers_normalize_whole_tokens(towers: Callable[..., VisionTower]) -> None:
    tower = towers(deepstack_visual_indexes=[0, 2])
    shapes = tower.graph.sources
    assert shapes["projector.norm.weight"] == (64,)
    assert shapes["deepstack.0.norm.weight"] == shapes["deepstack.1.norm.bias"] == (256,)
    batch = tower.preprocess([noise(157, 243), noise(300, 64)])
    ours, theirs = tower.run(batch), Reference(tower, torch.float32).run(batch)
    assert list(ours) == list(theirs) == ["embeddings", "deepstack.0", "deepstack.1"]
    for name, rows in ours.items():
        assert relative_error(rows, theirs[name]) <= 1e-5
    # After the last block both read the same rows, but they have other weights and normalize something else.
    assert relative_error(ours["deepstack.1"], ours["embeddings"]) > 0.5


def test_deepstack_rows_are_in_the_order_of_their_blocks(towers: Callable[..., VisionTower]) -> None:
    tower = towers(depth=4, deepstack_visual_indexes=[0, 1, 3])
    batch = tower.preprocess(noise(157, 243))
    seen: list[torch.Tensor] = []
    reference = Reference(tower, torch.float32)
    for merger in reference.model.visual.deepstack_merger_list:
        merger.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reference.run(batch)
    (embedding,) = tower.encode(noise(157, 243))
    assert len(embedding.deepstack) == 3
    for level, rows in enumerate(embedding.deepstack):
        errors = [relative_error(rows, other) for other in seen]
        assert [error <= 1e-5 for error in errors] == [level == other for other in range(3)]


def test_qwen3_5_loads_with_deepstack_indices_in_its_file(tmp_path: Path) -> None:
    folder, images = save_qwen3("qwen3_5", tmp_path / "model"), [noise(157, 243), noise(90, 90)]
    expected = load(folder).encode(images)
    config = json.loads((folder / "config.json").read_text())
    assert "deepstack_visual_indexes" not in config["vision_config"]
    config["vision_config"]["deepstack_visual_indexes"] = [0, 2]
    (folder / "config.json").write_text(json.dumps(config))
    tower = load(folder)
    for embedding, before, rows in zip(
        tower.encode(images), expected, by_transformers(folder, images, torch.float32), strict=True
    ):
        assert embedding.deepstack == ()
        assert torch.equal(embedding.embeddings, before.embeddings)
        assert relative_error(embedding.embeddings, rows) <= 1e-5


def test_frames_of_a_video_share_one_budget(towers: Callable[..., VisionTower]) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    tower = towers()
    area = {"min_pixels": 32 * 32, "max_pixels": 400_000}
    grids = []
    for frames in (2, 7, 16):
        batch = tower.preprocess_video([noise(320, 240, seed) for seed in range(frames)], **area)
        height, width = smart_resize(frames, 240, 320, 2, 32, *area.values())
        assert batch.images.grids == ((-(-frames // 2), height // 16, width // 16),)
        grids.append(batch.images.grids[0])
    assert grids[0][1:] > grids[1][1:] > grids[2][1:]
    still = tower.preprocess(noise(320, 240), **area).images.grids[0]
    assert still[1:] == grids[0][1:]
