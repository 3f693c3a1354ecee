"""Qwen3-VL and Qwen3.5: the weights of the position table, and files that list mergers which the model lacks."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import noise
from support.probing import record_values
from support.towers.qwen import save_qwen3

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.kernels.rowwise.positions import bilinear_taps, merge_block_positions
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("indices", [[], [8, 16, 24], [99], None])
def test_deepstack_of_a_qwen3_5_file_is_ignored(model_type: str, indices: list[int] | None) -> None:
    example = read_summary("qwen3_5").example
    vision = {**example["vision_config"], "deepstack_visual_indexes": indices}
    config = read_family(ConfigReader({"model_type": model_type, "vision_config": vision})).config
    assert config == read_family(ConfigReader(example)).config
    assert config.deepstack == ()
    assert config.deepstack_projector is None


def test_interpolation_weights_stay_fp32(tmp_path: Path) -> None:
    folder = save_qwen3("qwen3_vl", tmp_path / "model", num_position_embeddings=2304)
    tower = VisionTower.from_pretrained(folder, device="cpu")
    batch = tower.preprocess(noise(352, 416))
    _, weights = bilinear_taps(merge_block_positions(batch.images.tile_grids, 2), batch.images.tile_grids, 48)
    assert batch.attention.position_weights is not None
    assert torch.equal(batch.attention.position_weights, weights)
    assert (weights - weights.bfloat16().float()).abs().max() > 1e-4
    in_bf16 = VisionTower.from_pretrained(folder, device="cpu", dtype="bfloat16")
    bare, placed = record_values(in_bf16, batch, "patch_rows", "placed_rows")
    index, table = batch.attention.position_index, in_bf16.read_weights()["position_table.weight"].float()
    assert index is not None
    learned = (table[index.long()] * weights[..., None]).sum(1)
    assert (placed == (bare.float() + learned).bfloat16()).float().mean() > 0.999
