"""CLIP and SigLIP alone: old configurations, file contents, and the pooled row."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, noise
from support.configs import read_config
from support.towers.encoders import save_clip_vision, save_siglip_vision

from tritontower.errors import UnexpectedTensorError
from tritontower.graph.builder import build
from tritontower.models.common.family import read_summary

EXAMPLES = {name: read_summary(name).example for name in ("clip", "siglip")}


SIZES: list[tuple[str, dict[str, Any]]] = [
    ("clip", {}),
    ("clip", {"patch_size": 16}),
    ("clip", {**EXAMPLES["clip"]["vision_config"], "image_size": 336}),
    ("siglip", {"image_size": 512}),
    ("siglip", {**EXAMPLES["siglip"]["vision_config"]}),
    ("siglip", {**EXAMPLES["siglip"]["vision_config"], "vision_use_head": False}),
]


@pytest.mark.parametrize(("kind", "size"), SIZES)
def test_parameters_are_as_many_as_transformers_counts(kind: str, size: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        expected = AutoModel.from_config(
            AutoConfig.for_model(**{**size, "model_type": f"{kind}_vision_model"})
        ).num_parameters()
    config = read_config({**size, "model_type": f"{kind}_vision_model"})
    # The class embedding is added to the first row of the position table.
    assert build(config).parameters == expected - (config.width if kind == "clip" else 0)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_whole_model_and_its_image_half_read_the_same(kind: str) -> None:
    values = EXAMPLES[kind]
    assert read_config({**values["vision_config"], "model_type": f"{kind}_vision_model"}) == read_config(dict(values))
    untyped = {key: value for key, value in values["vision_config"].items() if key != "model_type"}
    assert read_config({**values, "vision_config": untyped}) == read_config(dict(values))


def test_of_two_sections_the_one_of_transformers_is_used() -> None:
    from transformers import CLIPConfig

    values = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 768, "num_hidden_layers": 3, "patch_size": 16},
        "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16},
    }
    # transformers modifies its arguments.
    theirs = CLIPConfig(**{key: value for key, value in deepcopy(values).items() if key != "model_type"}).vision_config
    ours = read_config(values)
    assert (ours.width, ours.depth, ours.patch.size) == (1024, 12, 32)
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.patch_size) == (1024, 12, 32)
    assert read_config({**values, "vision_config_dict": None}).patch.size == 16


def test_stored_pooling_head_is_ignored_without_vision_use_head(tmp_path: Path) -> None:
    folder = save_siglip_vision(tmp_path / "model")
    (expected,) = load(folder).encode(noise(60, 40))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vision_use_head": False}))
    (without,) = load(folder).encode(noise(60, 40))
    assert expected.pooled is not None
    assert without.pooled is None
    assert torch.equal(without.embeddings, expected.embeddings)


CONTRASTIVE_TENSORS = {
    "visual_projection.weight": (24, 64),
    "text_projection.weight": (24, 32),
    "text_model.embeddings.token_embedding.weight": (99, 32),
    "logit_scale": (),
}


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_file_may_hold_the_rest_of_the_contrastive_model(tmp_path: Path, prefix: str) -> None:
    folder = save_clip_vision(tmp_path / "model")
    expected = load(folder).encode(noise(60, 40))[0].embeddings
    weights = load_file(folder / "model.safetensors")
    weights = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    weights |= {name: torch.randn(shape) for name, shape in CONTRASTIVE_TENSORS.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(folder).encode(noise(60, 40))[0].embeddings, expected)
    save_file({**weights, "adapter.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnexpectedTensorError, match=r"adapter\.weight"):
        load(folder)
