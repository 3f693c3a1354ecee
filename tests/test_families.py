"""Reading config.json: both generations, sparse files, and values that cannot be right."""

import json
import random
from pathlib import Path

import pytest
from support.checkpoints import TINY_VISION
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tritontower.errors import ConfigError, NoVisionTowerError, UnsupportedArchitectureError
from tritontower.families import family_of, model_types, qwen2_vl
from tritontower.graph import build
from tritontower.random_checkpoint import QWEN2_VL_2B
from tritontower.reader import ConfigReader


def read(values: dict) -> object:
    reader = ConfigReader(values)
    return family_of(reader).read_config(reader)


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
    config = read(dict(QWEN2_VL_2B))
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1280, 32, 16, 80, 5120)
    assert build(config).parameters == 665_271_296


@pytest.mark.parametrize(("output", "millions"), [(1536, 665.3), (3584, 675.8), (8192, 699.4)])
def test_parameters_of_all_published_sizes(output: int, millions: float) -> None:
    values = {**QWEN2_VL_2B, "vision_config": {**QWEN2_VL_2B["vision_config"], "hidden_size": output}}
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
    assert "allowed" in str(caught.value)


def test_a_text_model_and_an_unknown_model_are_told_apart() -> None:
    with pytest.raises(NoVisionTowerError, match="holds no vision tower"):
        read({"model_type": "llama", "hidden_size": 64})
    with pytest.raises(UnsupportedArchitectureError, match=r"'moondream' is not supported; supported are .*qwen2_vl"):
        read({"model_type": "moondream", "vision_config": {}})
    assert "qwen2_vl" in model_types()


def test_resizing_rule_is_that_of_transformers() -> None:
    generator = random.Random(0)
    areas = [(3136, 12845056), (3136, 1003520), (100352, 602112), (3136, 3136), (28 * 28, 28 * 28)]
    for _ in range(5000):
        width, height = generator.randint(1, 4000), generator.randint(1, 4000)
        if max(width, height) > 200 * min(width, height):
            continue
        least, greatest = generator.choice(areas)
        expected = smart_resize(height, width, factor=28, min_pixels=least, max_pixels=greatest)
        assert qwen2_vl.resized(width, height, 28, (least, greatest)) == expected[::-1]
