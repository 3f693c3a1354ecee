"""Qwen2-VL: both generations of its config.json, sparse files, and values that cannot be right."""

import json
from pathlib import Path

import pytest
from support.checkpoints import TINY_VISION

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.errors import ConfigError
from tritontower.graph.builder import build
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family

PUBLISHED = read_summary("qwen2_vl")


def read(values: dict) -> TowerConfig:
    return read_family(ConfigReader(values)).config


def test_flat_and_nested_generations_read_the_same(qwen2_vl: Path) -> None:
    nested = json.loads((qwen2_vl / "config.json").read_text())
    assert "text_config" in nested
    flat = {**nested["text_config"], "model_type": "qwen2_vl", "vision_config": dict(TINY_VISION)}
    assert "text_config" not in flat
    assert read(flat) == read(nested)
    assert read(flat).hidden_size == 48


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_vl_vision", None])
def test_vision_model_type_may_be_old_new_or_absent(model_type: str | None) -> None:
    values = {"model_type": "qwen2_vl", "vision_config": {**TINY_VISION, "model_type": model_type}}
    assert read(values).width == 64


def test_published_2b_has_its_published_size() -> None:
    config = read(dict(PUBLISHED.example))
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1280, 32, 16, 80, 5120)
    assert build(config).parameters == 665_271_296


@pytest.mark.parametrize(("output", "millions"), [(1536, 665.3), (3584, 675.8), (8192, 699.4)])
def test_parameters_of_all_published_sizes(output: int, millions: float) -> None:
    values = {**PUBLISHED.example, "vision_config": {**PUBLISHED.example["vision_config"], "hidden_size": output}}
    assert round(build(read(values)).parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "1536"),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("depth", -3),
        ("depth", 2.5),
        ("num_heads", 0),
        ("num_heads", 7),
        ("num_heads", 32),
        ("patch_size", 0),
        ("patch_size", [14, 14]),
        ("hidden_act", "mish"),
        ("spatial_merge_size", "2"),
        ("model_type", "siglip_vision_model"),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_theta": 0.0}),
    ],
)
def test_impossible_values_name_key_value_and_what_is_allowed(key: str, value: object) -> None:
    vision = {**TINY_VISION, key: value}
    with pytest.raises(ConfigError) as caught:
        read({"model_type": "qwen2_vl", "vision_config": vision})
    assert f"vision_config.{key}" in str(caught.value)
    assert "must be" in str(caught.value)
