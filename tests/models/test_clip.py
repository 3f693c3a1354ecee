"""CLIP and SigLIP by themselves: generations of config.json, sparse files, names, sizes, and values that cannot be right."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.towers.clip import save_clip, save_clip_vision
from support.towers.siglip import save_siglip_vision

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, Pooling, TowerConfig
from tritontower.errors import ConfigError, UnexpectedTensorError
from tritontower.graph.builder import build
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import compare

CLIP, SIGLIP = (read_summary(name).example for name in ("clip", "siglip"))


def read(values: dict[str, Any]) -> TowerConfig:
    return read_family(ConfigReader(values)).config


def load(folder: Path) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu")


def test_published_clip_large() -> None:
    config = read(CLIP)
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1024, 24, 16, 64, 4096)
    assert (config.num_patches, config.patch.size, config.patch.bias) == (256, 14, False)
    assert (config.class_token, config.keep_class_token, config.features) == (True, True, (24,))
    assert config.norm == config.input_norm == config.output_norm == Normalization("layer_norm", 1e-5)
    assert (config.activation, config.pooling, config.features_normed) == ("quick_gelu", Pooling("class_token"), False)


def test_published_siglip_so400m() -> None:
    config = read(SIGLIP)
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1152, 27, 16, 72, 4304)
    # 384 pixels are no multiple of 14: the last six are not seen.
    assert (config.num_patches, config.patch.size, config.patch.bias) == (27 * 27, 14, True)
    assert (config.class_token, config.input_norm, config.features) == (False, None, (27,))
    assert config.norm == config.output_norm == Normalization("layer_norm", 1e-6)
    assert config.pooling == Pooling("attention", norm=config.norm)
    assert (config.activation, config.features_normed) == ("gelu_tanh", True)


CLIP_SIZES: dict[str, dict[str, Any]] = {
    "base, patches of 32": {},
    "base, patches of 16": {"patch_size": 16},
    "large": {**CLIP["vision_config"]},
    "large, 336 pixels": {**CLIP["vision_config"], "image_size": 336},
    "huge": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
SIGLIP_SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "base, 512 pixels": {"image_size": 512},
    "so400m": {**SIGLIP["vision_config"]},
    "so400m without pooling": {**SIGLIP["vision_config"], "vision_use_head": False},
}


@pytest.mark.parametrize("size", CLIP_SIZES)
def test_clip_has_as_many_parameters_as_transformers_counts(size: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        expected = CLIPVisionModel(CLIPVisionConfig(**CLIP_SIZES[size])).num_parameters()
    config = read({**CLIP_SIZES[size], "model_type": "clip_vision_model"})
    # The class embedding is a part of the position table's first row.
    assert build(config).parameters == expected - config.width


@pytest.mark.parametrize("size", SIGLIP_SIZES)
def test_siglip_has_as_many_parameters_as_transformers_counts(size: str) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.device("meta"):
        expected = SiglipVisionModel(SiglipVisionConfig(**SIGLIP_SIZES[size])).num_parameters()
    assert build(read({**SIGLIP_SIZES[size], "model_type": "siglip_vision_model"})).parameters == expected


def test_published_sizes_in_millions() -> None:
    large = {**CLIP, "vision_config": CLIP_SIZES["large, 336 pixels"]}
    assert round(build(read(large)).parameters / 1e6, 1) == 303.5
    assert round(build(read(SIGLIP)).parameters / 1e6, 1) == 428.2


@pytest.mark.parametrize(("values", "kind"), [(CLIP, "clip"), (SIGLIP, "siglip")])
def test_the_half_and_the_whole_read_the_same(values: dict[str, Any], kind: str) -> None:
    half = {**values["vision_config"], "model_type": f"{kind}_vision_model"}
    assert read(half) == read(values)
    without = {key: value for key, value in values["vision_config"].items() if key != "model_type"}
    assert read({**values, "vision_config": without}) == read(values)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_empty_file_is_the_base_model_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(f"{kind}_vision_model")
    for values in (
        {"model_type": kind},
        {"model_type": f"{kind}_vision_model"},
        {"model_type": kind, "vision_config": {}},
    ):
        config = read(values)
        assert config.width == theirs.hidden_size
        assert config.mlp_hidden == theirs.intermediate_size
        assert (config.depth, config.heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
        assert config.num_patches == (theirs.image_size // theirs.patch_size) ** 2
        assert config.norm.eps == theirs.layer_norm_eps
        assert theirs.hidden_act == {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]


def test_of_two_sections_the_one_counts_that_transformers_takes() -> None:
    from transformers import CLIPConfig

    values = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 768, "num_hidden_layers": 3, "patch_size": 16},
        "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16},
    }
    # transformers writes into what it is given.
    theirs = CLIPConfig(**{key: value for key, value in deepcopy(values).items() if key != "model_type"}).vision_config
    ours = read(values)
    assert (ours.width, ours.depth, ours.patch.size) == (1024, 12, 32)
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.patch_size) == (1024, 12, 32)
    assert read({**values, "vision_config_dict": None}).patch.size == 16


IMPOSSIBLE: list[tuple[str, object]] = [
    ("hidden_size", 0),
    ("hidden_size", "768"),
    ("hidden_size", True),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 2.5),
    ("num_attention_heads", 7),
    ("num_attention_heads", 0),
    ("num_attention_heads", 512),
    ("intermediate_size", None),
    ("patch_size", [14, 14]),
    ("image_size", 8),
    ("image_size", [224, 224]),
    ("num_channels", 0),
    ("layer_norm_eps", -1e-5),
    ("layer_norm_eps", "1e-5"),
    ("hidden_act", "mish"),
    ("model_type", "siglip2_vision_model"),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
@pytest.mark.parametrize("values", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_impossible_values_name_key_value_and_what_is_allowed(values: dict[str, Any], key: str, value: object) -> None:
    changed = {**values, "vision_config": {**values["vision_config"], key: value}}
    if value is None:
        assert read(changed).mlp_hidden == 3072  # the class's default
        return
    with pytest.raises(ConfigError) as caught:
        read(changed)
    assert f"vision_config.{key}" in str(caught.value)
    assert "must be" in str(caught.value)


def test_siglip_reads_whether_it_pools_strictly() -> None:
    with pytest.raises(ConfigError, match="vision_use_head"):
        read({**SIGLIP, "vision_config": {**SIGLIP["vision_config"], "vision_use_head": "no"}})


def test_a_pooling_head_that_the_configuration_denies_is_left_alone(tmp_path: Path) -> None:
    folder = save_siglip_vision(tmp_path / "model")
    expected = load(folder).encode(noise(60, 40))[0]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vision_use_head": False}))
    (without,) = load(folder).encode(noise(60, 40))
    assert expected.pooled is not None
    assert without.pooled is None
    assert torch.equal(without.embeddings, expected.embeddings)


BESIDE_A_LONE_ENCODER = {
    "visual_projection.weight": (24, 64),
    "text_projection.weight": (24, 32),
    "text_model.embeddings.token_embedding.weight": (99, 32),
    "logit_scale": (),
}


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_an_encoder_s_file_may_hold_the_rest_of_the_contrastive_model(tmp_path: Path, prefix: str) -> None:
    folder = save_clip_vision(tmp_path / "model")
    expected = load(folder).encode(noise(60, 40))[0].embeddings
    weights = load_file(folder / "model.safetensors")
    weights = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    weights |= {name: torch.randn(shape) for name, shape in BESIDE_A_LONE_ENCODER.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(folder).encode(noise(60, 40))[0].embeddings, expected)
    save_file({**weights, "adapter.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnexpectedTensorError, match=r"adapter\.weight"):
        load(folder)


def test_the_projected_kind_of_encoder_loads(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = save_clip_vision(tmp_path / "model")
    expected = load(folder).encode(noise(60, 40))[0]
    config = CLIPVisionConfig.from_pretrained(folder)
    model = CLIPVisionModelWithProjection(config)
    model.vision_model.load_state_dict(load_file(folder / "model.safetensors"))
    model.save_pretrained(folder)
    (projected,) = load(folder).encode(noise(60, 40))
    assert torch.equal(projected.embeddings, expected.embeddings)
    assert projected.pooled is not None
    assert expected.pooled is not None
    assert torch.equal(projected.pooled, expected.pooled)
    assert compare(load(folder), load(folder).preprocess(noise(60, 40))).passed


def test_the_pooled_row_is_the_class_token_s_alone_behind_the_post_norm(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "model")
    tower = load(folder)
    (embedding,) = tower.encode(noise(60, 40))
    weights = load_file(folder / "model.safetensors")
    weight, bias = (weights[f"vision_model.post_layernorm.{role}"] for role in ("weight", "bias"))
    expected = torch.nn.functional.layer_norm(embedding.embeddings[0], (64,), weight, bias, 1e-5)
    assert embedding.pooled is not None
    torch.testing.assert_close(embedding.pooled.flatten(), expected, rtol=1e-5, atol=1e-5)
