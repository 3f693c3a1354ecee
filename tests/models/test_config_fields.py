"""What every family's reading of a configuration has in common."""

from typing import Any

import pytest

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.errors import ConfigError, NoVisionTowerError, UnsupportedArchitectureError
from tritontower.models.common.config_fields import TEXT_WIDTHS, text_width
from tritontower.models.common.family import FamilySummary
from tritontower.models.common.registry import has_tower, list_summaries, read_family

SUMMARIES = list_summaries()
each_summary = pytest.mark.parametrize("summary", SUMMARIES, ids=lambda summary: summary.title)


def with_heads(summary: FamilySummary, heads: int) -> tuple[ConfigReader, str]:
    """The example with another number of heads, and the key that says so."""
    section = "vision_config" if "vision_config" in summary.example else "vision_encoder"
    key = "num_attention_heads" if "num_attention_heads" in summary.example[section] else "num_heads"
    if summary.example[section].get("model_type") == "pixtral":
        # One of the published files leaves the number out.
        key = "num_attention_heads"
    vision = {name: value for name, value in summary.example[section].items() if name != "head_dim"}
    return ConfigReader({**summary.example, section: {**vision, key: heads}}, summary.config_file), f"{section}.{key}"


@each_summary
def test_heads_wider_than_the_attention_takes_are_refused(summary: FamilySummary) -> None:
    width = read_family(with_heads(summary, 16)[0]).config.width
    widest = next(heads for heads in range(1, width) if width % heads == 0 and width // heads <= 128)
    assert read_family(with_heads(summary, widest)[0]).config.heads == widest
    reader, key = with_heads(summary, widest // 2)
    with pytest.raises(ConfigError, match="at most 128") as caught:
        read_family(reader)
    assert (caught.value.key, caught.value.value) == (key, widest // 2)


@pytest.mark.parametrize(
    "summary", [summary for summary in SUMMARIES if "Qwen" in summary.title], ids=lambda s: s.title
)
def test_qwen_towers_take_the_other_name_of_their_heads(summary: FamilySummary) -> None:
    from transformers import CONFIG_MAPPING

    vision = {name: value for name, value in summary.example["vision_config"].items() if name != "num_heads"}
    values = {**summary.example, "vision_config": {**vision, "num_attention_heads": 32}}
    theirs = CONFIG_MAPPING[values["model_type"]](vision_config=values["vision_config"]).vision_config
    assert read_family(ConfigReader(values)).config.heads == theirs.num_heads == 32


@pytest.mark.parametrize("model_type", TEXT_WIDTHS)
def test_a_width_that_is_left_out_is_that_of_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    reader = ConfigReader({"text_config": {"model_type": model_type}})
    assert text_width(reader, "llama") == CONFIG_MAPPING[model_type]().hidden_size


def test_a_width_that_nobody_knows_has_to_be_there() -> None:
    reader = ConfigReader({"text_config": {"model_type": "mamba"}})
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size"):
        text_width(reader, "llama")


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
    ],
    ids=lambda values: values["model_type"],
)
def test_a_tower_of_another_kind_is_unsupported_not_missing(values: dict[str, Any]) -> None:
    reader = ConfigReader(values)
    with pytest.raises(UnsupportedArchitectureError, match=f"{values['model_type']}.*supported are .*qwen2_vl"):
        read_family(reader)
    assert not has_tower(reader)


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {"model_type": "mistral", "vision_config": None}, {}])
def test_a_model_without_a_tower_is_told_apart(values: dict[str, Any]) -> None:
    with pytest.raises(NoVisionTowerError, match="holds no vision tower"):
        read_family(ConfigReader(values))
