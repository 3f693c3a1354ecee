"""Qwen2.5-VL: windows, the padded MLP, the order of merged rows, and the rounding of norms."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import load, noise
from support.probing import find_row, list_affected_tokens, record_values
from support.towers.qwen import TINY_VISION, save_qwen2_5_vl

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.graph.builder import build
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family


def read(vision: dict, **others: object) -> TowerConfig:
    return read_family(ConfigReader({"model_type": "qwen2_5_vl", "vision_config": vision, **others})).config


def test_full_blocks_out_of_range_are_ignored() -> None:
    windows = read({**TINY_VISION["Qwen2_5_VL"], "fullatt_block_indexes": [31, 2, 0, 2]}).windows
    assert windows is not None
    assert windows.full_blocks == (0, 2)


def test_mlp_width_is_padded_with_zeros(tmp_path: Path) -> None:
    published = build(read_family(read_summary("qwen2_5_vl").reader).config).held_shapes
    assert published["blocks.31.mlp_down.weight"] == (1280, 3456)
    assert published["blocks.31.mlp_gate_up.weight"] == (2 * 3456, 1280)
    folder = save_qwen2_5_vl(tmp_path / "model")
    stored, weights = load_file(folder / "model.safetensors"), load(folder).read_weights()
    for kind in ("weight", "bias"):
        gate, up = weights[f"blocks.2.mlp_gate_up.{kind}"].split(128)
        for half, name in ((gate, "gate_proj"), (up, "up_proj")):
            assert torch.equal(half[:84], stored[f"visual.blocks.2.mlp.{name}.{kind}"])
            assert not half[84:].any()
    assert torch.equal(weights["blocks.2.mlp_down.weight"][:, :84], stored["visual.blocks.2.mlp.down_proj.weight"])
    assert not weights["blocks.2.mlp_down.weight"][:, 84:].any()


GRID = (5, 7)
"""Rows and columns of tokens of an image that windows of 2 × 2 tokens do not divide."""


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VisionTower]:
    """Saves and loads a small tower with these changes."""

    def make(**changes: object) -> VisionTower:
        return load(save_qwen2_5_vl(tmp_path_factory.mktemp("model") / "model", **changes))

    return make


@pytest.mark.parametrize("place", [(0, 0), (4, 9), (9, 13)], ids=str)
def test_attention_stays_within_the_window(place: tuple[int, int], towers: Callable[..., VisionTower]) -> None:
    tower = towers(fullatt_block_indexes=[])
    batch = tower.preprocess(noise(GRID[1] * 28, GRID[0] * 28))
    assert batch.images.tile_grids == ((1, 2 * GRID[0], 2 * GRID[1]),)
    window = (place[0] // 4, place[1] // 4)
    together = {
        row * GRID[1] + column
        for row in range(GRID[0])
        for column in range(GRID[1])
        if (row // 2, column // 2) == window
    }
    assert list_affected_tokens(tower.forward, batch, find_row(batch, place)) == together


def test_one_full_block_attends_to_the_whole_image(towers: Callable[..., VisionTower]) -> None:
    tower = towers(fullatt_block_indexes=[2])
    batch = tower.preprocess(noise(GRID[1] * 28, GRID[0] * 28))
    assert list_affected_tokens(tower.forward, batch, find_row(batch, (9, 13))) == set(range(GRID[0] * GRID[1]))


def test_windows_of_a_video_stay_within_a_frame(towers: Callable[..., VisionTower]) -> None:
    tower = towers(fullatt_block_indexes=[])
    batch = tower.preprocess_video([noise(140, 84, seed) for seed in range(4)], min_pixels=784)
    assert batch.attention.windows is not None
    _, height, width = batch.images.grids[0]
    frame = [
        4 * min(2, height // 2 - row) * min(2, width // 2 - column)
        for row in range(0, height // 2, 2)
        for column in range(0, width // 2, 2)
    ]
    assert list(batch.attention.windows.lengths) == frame * 2
    assert list(batch.attention.segments.lengths) == [height * width] * 2


def test_norms_round_before_they_multiply_by_the_weight(towers: Callable[..., VisionTower]) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    tower = towers(dtype=torch.bfloat16)
    rows, normed = record_values(tower, tower.preprocess(noise(200, 200)), "patch_rows", "blocks.0.norm1_rows")
    reference = Qwen2_5_VLRMSNorm(64, eps=1e-6)
    weight = load_file(tower.folder / "model.safetensors")["visual.blocks.0.norm1.weight"]
    reference.weight.data = weight
    assert (normed == reference(rows)).float().mean() > 0.999
    exact = rows.float() * torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert (normed == (exact * weight.float()).bfloat16()).float().mean() < 0.9
