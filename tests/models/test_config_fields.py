"""Reading of ``config.json``: published files in all generations, defaults of transformers, and unsupported models."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support.configs import read_config

from tritontower.checkpoint.config_reader import LARGEST_INTEGERS, ConfigReader
from tritontower.config import Normalization, Pooling, RotaryEmbedding, TowerConfig
from tritontower.errors import ConfigError, NoVisionTowerError, UnsupportedArchitectureError
from tritontower.models.common.config_fields import TEXT_WIDTHS, text_width
from tritontower.models.common.family import FamilySummary, read_summary
from tritontower.models.common.registry import has_vision, list_summaries, read_family

SUMMARIES = list_summaries()
HF_SUMMARIES = [summary for summary in SUMMARIES if summary.config_file == "config.json"]
each_summary = pytest.mark.parametrize("summary", SUMMARIES, ids=lambda summary: summary.title)
each_hf_summary = pytest.mark.parametrize("summary", HF_SUMMARIES, ids=lambda summary: summary.title)

LAYER_NORM_5, LAYER_NORM_6 = Normalization("layer_norm", 1e-5), Normalization("layer_norm", 1e-6)
RMS_NORM = Normalization("rms_norm", 1e-5, "before_weight")
CLIP_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16, "mlp_hidden": 4096, "class_token": True}
SO400M: dict[str, Any] = {"width": 1152, "heads": 16, "head_dim": 72, "mlp_hidden": 4304, "class_token": False}
LLAVA = {
    **CLIP_LARGE,
    "num_patches": 576,
    "norm": LAYER_NORM_5,
    "activation": "quick_gelu",
    # The last block and the norm after it are not needed.
    "features": (23,),
    "blocks_needed": 23,
    "features_normed": False,
    "pooling": None,
    "keep_class_token": False,
    # Not in the file: llama's default is the checkpoint's width.
    "hidden_size": 4096,
    "assembly_taps": 1,
}
GEMMA = {**SO400M, "depth": 27, "num_patches": 64 * 64, "merge": 4, "norm": LAYER_NORM_6, "output_norm": LAYER_NORM_6}
GEMMA |= {"activation": "gelu_tanh", "features_normed": True, "hidden_size": 2560}
PIXTRAL = {"width": 1024, "depth": 24, "heads": 16, "head_dim": 64, "mlp_hidden": 4096, "hidden_size": 5120}
PIXTRAL |= {"norm": RMS_NORM, "input_norm": RMS_NORM, "features": (24,), "activation": "silu", "gated": True}
QWEN3: dict[str, Any] = {"width": 1152, "depth": 27, "heads": 16, "head_dim": 72, "mlp_hidden": 4304, "merge": 2}

EXPECTED: dict[str, dict[str, Any]] = {
    "clip": {
        **CLIP_LARGE,
        "num_patches": 256,
        "keep_class_token": True,
        "features": (24,),
        "norm": LAYER_NORM_5,
        "input_norm": LAYER_NORM_5,
        "output_norm": LAYER_NORM_5,
        "activation": "quick_gelu",
        "pooling": Pooling("class_token"),
        "features_normed": False,
    },
    "siglip": {
        **SO400M,
        "depth": 27,
        # 384 pixels are no multiple of 14: the last six are dropped.
        "num_patches": 27 * 27,
        "input_norm": None,
        "norm": LAYER_NORM_6,
        "pooling": Pooling("attention", norm=LAYER_NORM_6),
        "activation": "gelu_tanh",
        "features_normed": True,
    },
    "llava": {**LLAVA, "newline": False},
    "llava_next": {**LLAVA, "newline": True},
    "llava_onevision": {
        **SO400M,
        "depth": 26,
        "num_patches": 27 * 27,
        "features": (26,),
        "features_normed": False,
        "pooling": None,
        "newline": True,
        "assembly_taps": 4,
        "activation": "gelu_tanh",
        "hidden_size": 3584,
    },
    "gemma3": GEMMA,
    "shieldgemma2": GEMMA,
    "paligemma": {**SO400M, "depth": 27, "num_patches": 256, "merge": 1, "hidden_size": 2048, "features_normed": True},
    "pixtral": {**PIXTRAL, "merge": 1},
    "pixtral_mistral_format": {**PIXTRAL, "merge": 1},
    "mistral3": {**PIXTRAL, "merge": 2},
    "mistral3_mistral_format": {**PIXTRAL, "merge": 2},
    "qwen2_vl": {"width": 1280, "depth": 32, "heads": 16, "head_dim": 80, "mlp_hidden": 5120, "norm": LAYER_NORM_6},
    "qwen2_5_vl": {
        "width": 1280,
        "depth": 32,
        "head_dim": 80,
        "mlp_hidden": 3420,
        "norm": Normalization("rms_norm", 1e-6, "before_weight"),
    },
    "qwen3_vl": {**QWEN3, "deepstack": (8, 16, 24), "hidden_size": 4096},
    "qwen3_5": {**QWEN3, "deepstack": (), "deepstack_projector": None, "hidden_size": 5120},
}
"""Name of a published example → fields of its tower."""


@pytest.mark.parametrize("name", EXPECTED)
def test_published_towers(name: str) -> None:
    config = read_family(read_summary(name).reader).config
    assert {field: getattr(config, field) for field in EXPECTED[name]} == EXPECTED[name]


def test_every_published_example_has_expected_fields() -> None:
    assert [read_summary(name) for name in EXPECTED if read_summary(name) not in SUMMARIES] == []
    assert len(EXPECTED) == len(SUMMARIES)


def fill(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as transformers completes and saves it."""
    from transformers import CONFIG_MAPPING

    arguments = deepcopy({key: value for key, value in values.items() if key != "model_type"})
    return {**CONFIG_MAPPING[values["model_type"]](**arguments).to_dict(), "model_type": values["model_type"]}


@each_hf_summary
def test_saving_by_transformers_keeps_the_tower(summary: FamilySummary) -> None:
    assert read_config(fill(dict(summary.example))) == read_config(dict(summary.example))


SPARSE: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip_vision_model": {},
    "siglip": {},
    "siglip_vision_model": {},
    "llava": {},
    "llava_next": {},
    "llava_onevision": {},
    "llava with a section": {"vision_config": {"model_type": "clip_vision_model"}},
    "llava_next with a section": {"vision_config": {"model_type": "clip_vision_model"}},
    "llava_onevision with a section": {"vision_config": {"model_type": "siglip_vision_model"}},
    "gemma3": {"mm_tokens_per_image": 49, "vision_config": {}, "text_config": {}},
    "mistral3": {"vision_config": {"model_type": "pixtral", "hidden_act": "silu"}, "text_config": {"hidden_size": 48}},
    "qwen2_vl": {"vision_config": {"hidden_size": 1536}},
    "qwen2_5_vl": {"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}},
    "qwen3_vl": {"vision_config": {"out_hidden_size": 2048}},
    "qwen3_vl_moe": {"vision_config": {"out_hidden_size": 2048}},
    "qwen3_5": {"vision_config": {"out_hidden_size": 2048}},
    "qwen3_5_moe": {"vision_config": {"out_hidden_size": 2048}},
}
"""Model type (and a remark) → the keys that are required, or that transformers' own defaults would get wrong."""


@pytest.mark.parametrize("name", SPARSE)
def test_missing_keys_have_the_defaults_of_transformers(name: str) -> None:
    values = {"model_type": name.partition(" ")[0], **SPARSE[name]}
    assert read_config(fill(values)) == read_config(values)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_default_canvases_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    values = {key: value for key, value in read_summary(name).example.items() if key != "image_grid_pinpoints"}
    made: Any = read_family(ConfigReader(values)).resize_rules["hf"]
    assert [list(pair) for pair in made.keywords["pinpoints"]] == AutoConfig.for_model(name).image_grid_pinpoints


def test_old_and_new_spelling_of_pixtral_read_the_same() -> None:
    pixtral, mistral3 = (dict(read_summary(name).example) for name in ("pixtral", "mistral3"))

    def with_vision(values: dict[str, Any], **changes: Any) -> TowerConfig:
        return read_config({**values, "vision_config": {**values["vision_config"], **changes}})

    text = {**pixtral["text_config"], "sliding_window": None, "vocab_size": 131072}
    assert read_config({**pixtral, "is_composition": True, "text_config": text}) == read_config(pixtral)
    for values, kind in ((pixtral, "axial"), (mistral3, "default")):
        new = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": kind}}
        assert with_vision(values, **new) == with_vision(values, model_type=None if kind == "default" else "pixtral")
        assert with_vision(values, **new) == read_config(values)
    assert read_config({**pixtral, "text_config": None}).hidden_size == 4096
    assert read_config(pixtral).rotary == RotaryEmbedding(theta=1e4, layout="alternating", rotation="activation")


@pytest.mark.parametrize(("kind", "eps"), [("mistral", 1e-6), ("ministral3", 1e-5), ("mistral4", 1e-6), (None, 1e-6)])
def test_epsilon_of_mistral3s_projector_is_the_language_models(kind: str | None, eps: float) -> None:
    values, text = read_summary("mistral3").example, {"model_type": kind, "hidden_size": 64}
    for said, expected in ((None, eps), (3e-4, 3e-4)):
        projector = read_config({**values, "text_config": {**text, "rms_norm_eps": said}}).projector
        assert projector is not None
        assert projector.norm == Normalization("rms_norm", expected, "before_weight")
    with pytest.raises(ConfigError, match=r"text_config\.rms_norm_eps"):
        read_config({**values, "text_config": {"model_type": "qwen2", "hidden_size": 64}})


def test_width_of_paligemma_is_that_of_the_top_level() -> None:
    """As in transformers, which overwrites the key in ``vision_config``."""
    values = read_summary("paligemma").example
    vision = {**values["vision_config"], "projection_dim": 7}
    assert read_config({**values, "projection_dim": 2304, "vision_config": vision}).hidden_size == 2304


QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize("model_type", QWENS)
def test_qwen_vision_model_type_may_be_old_new_or_absent(model_type: str) -> None:
    required = {"hidden_size": 1280, "out_hidden_size": 2048}
    towers = [
        read_config({"model_type": model_type, "vision_config": {**required, "model_type": name}})
        for name in (model_type, f"{model_type}_vision", None)
    ]
    assert towers[0] == towers[1] == towers[2]
    # Flat files have the language model's keys at the top level.
    flat = {"model_type": model_type, "hidden_size": 99, "vision_config": required}
    assert read_config(flat) == towers[0]


@pytest.mark.parametrize("summary", [s for s in SUMMARIES if "Qwen" in s.title], ids=lambda s: s.title)
def test_qwen_heads_have_two_names(summary: FamilySummary) -> None:
    vision = {name: value for name, value in summary.example["vision_config"].items() if name != "num_heads"}
    values = {**summary.example, "vision_config": {**vision, "num_attention_heads": 32}}
    assert read_config(values).heads == fill(values)["vision_config"]["num_heads"] == 32


def with_heads(summary: FamilySummary, heads: int) -> tuple[ConfigReader, str]:
    """Returns the example with another number of heads, and its key."""
    section = "vision_config" if "vision_config" in summary.example else "vision_encoder"
    key = "num_heads" if "num_heads" in summary.example[section] else "num_attention_heads"
    vision = {name: value for name, value in summary.example[section].items() if name != "head_dim"}
    return ConfigReader({**summary.example, section: {**vision, key: heads}}, summary.config_file), f"{section}.{key}"


@each_summary
def test_heads_wider_than_the_kernels_support_are_rejected(summary: FamilySummary) -> None:
    width = read_family(with_heads(summary, 16)[0]).config.width
    widest = next(heads for heads in range(1, width) if width % heads == 0 and width // heads <= 128)
    assert read_family(with_heads(summary, widest)[0]).config.heads == widest
    reader, key = with_heads(summary, widest // 2)
    with pytest.raises(ConfigError, match="at most 128") as caught:
        read_family(reader)
    assert (caught.value.key, caught.value.value) == (key, widest // 2)


@each_summary
def test_absurd_integers_are_rejected_before_anything_is_built(summary: FamilySummary) -> None:
    """Integers above their bound, in lists too, are refused by their key, or belong to no tower and change nothing."""
    example, source = summary.example, summary.config_file

    def change(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from ((key, {**values, name: inner}) for key, inner in change(value, f"{path}{name}."))
            elif type(value) is int or (isinstance(value, list) and value and type(value[0]) is int):
                absurd = LARGEST_INTEGERS.get(name, 10**12) + 1
                yield path + name, {**values, name: absurd if type(value) is int else [absurd]}

    changed = dict(change(example))
    expected = read_family(ConfigReader(example, source)).config
    refused: dict[str, str] = {}
    for key, values in changed.items():
        try:
            found = read_family(ConfigReader(values, source)).config
        except ConfigError as error:
            refused[key] = error.key
        else:
            assert found == expected
    assert {key: named for key, named in refused.items() if not named.startswith(key)} == {}
    assert refused


@pytest.mark.parametrize("model_type", TEXT_WIDTHS)
def test_missing_text_width_is_that_of_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    reader = ConfigReader({"text_config": {"model_type": model_type}})
    assert text_width(reader, "llama") == CONFIG_MAPPING[model_type]().hidden_size


def test_text_width_of_an_unknown_class_is_required() -> None:
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size"):
        text_width(ConfigReader({"text_config": {"model_type": "mamba"}}), "llama")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "colpali", "vlm_config": {"model_type": "paligemma"}},
        {"model_type": "qwen2_5_omni", "thinker_config": {"vision_config": {}}},
        {"model_type": "dinov2", "image_size": 518, "patch_size": 14},
        {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256},
        {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        {"model_type": "internvl", "vision_config": {"model_type": "internvl_vision"}},
        {"model_type": "moondream", "vision_config": {}},
        *(
            {"model_type": name, "vision_config": {"model_type": "dinov2"}}
            for name in ("llava", "llava_next", "mistral3")
        ),
    ],
    ids=lambda values: values["model_type"],
)
def test_unsupported_tower_is_not_reported_as_missing(values: dict[str, Any], tmp_path: Path) -> None:
    reader = ConfigReader(values)
    with pytest.raises(UnsupportedArchitectureError, match=f"{values['model_type']}.*supported are .*qwen2_vl"):
        read_family(reader)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert not has_vision(tmp_path)


@pytest.mark.parametrize(
    "values",
    [{"model_type": "llama"}, {"model_type": "gemma3_text"}, {"model_type": "mistral", "vision_config": None}, {}],
)
def test_model_without_a_tower_is_reported_as_such(values: dict[str, Any]) -> None:
    with pytest.raises(NoVisionTowerError, match="holds no vision tower"):
        read_family(ConfigReader(values))
