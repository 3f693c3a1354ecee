"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: features, class tokens, tiles."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import change_tensors, noise
from support.towers import all_cases
from support.towers.clip import save_clip_vision
from support.towers.llava_next import save_llava_next
from support.towers.llava_onevision import save_llava_onevision

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.errors import ProcessorError
from tritontower.models.common.family import read_summary, write_config
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import relative_error

EXAMPLES = {name: read_summary(name).example for name in ("llava", "llava_next", "llava_onevision")}
each_tiled = pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def folders(saved: Any) -> dict[str, Path]:
    """A small LLaVA with either encoder, and a OneVision."""
    names = {"clip": "llava", "siglip": "llava-siglip", "onevision": "llava_onevision"}
    return {kind: saved(case) for kind, name in names.items() for case in all_cases() if case.name == name}


# -- features ---------------------------------------------------------------------------------------------------------

FEATURES: list[tuple[object, tuple[int, ...]]] = [
    (-2, (23,)),
    (-1, (24,)),
    (0, (0,)),
    (24, (24,)),
    (-25, (0,)),
    ([-2], (23,)),
    ([-2, -5, 8], (23, 20, 8)),
]


@pytest.mark.parametrize(("layer", "features"), FEATURES, ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_feature_layers_count_from_either_end(name: str, layer: object, features: tuple[int, ...]) -> None:
    config = read_family(ConfigReader({**EXAMPLES[name], "vision_feature_layer": layer})).config
    assert config.features == features
    assert config.feature_width == 1024 * len(features)
    assert config.blocks_needed == max(features)


@pytest.mark.parametrize("kind", ["clip", "siglip", "onevision"])
def test_features_are_taken_without_the_post_norm(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tower = load(folders[kind])
    assert tower.config.features == (tower.config.depth - (0 if kind == "onevision" else 1),)
    assert not [name for name in tower.graph.sources if name.startswith("output_norm")]
    changed = change_tensors(
        folders[kind], tmp_path / "changed", lambda tensors: tensors["vision_tower.post_layernorm.weight"].mul_(2)
    )
    (expected,), (found,) = tower.encode(noise(60, 50)), load(changed).encode(noise(60, 50))
    assert torch.equal(found.embeddings, expected.embeddings)


def test_class_token_is_dropped_but_attended_to(folders: dict[str, Path], tmp_path: Path) -> None:
    tower = load(folders["clip"])
    batch = tower.preprocess([noise(60, 50), noise(50, 60)])
    assert batch.workload.patches == 2 * 17
    assert batch.images.token_counts == (16, 16)
    kept = load(folders["clip"], feature_select="cls_patch")
    rows = kept.forward(kept.preprocess([noise(60, 50), noise(50, 60)])).view(2, 17, -1)
    assert torch.equal(tower.forward(batch).view(2, 16, -1), rows[:, 1:])
    moved = change_tensors(
        folders["clip"],
        tmp_path / "moved",
        lambda tensors: tensors["vision_tower.embeddings.class_embedding"].neg_(),
    )
    assert relative_error(load(moved).forward(batch), tower.forward(batch)) > 1e-3


def test_first_patch_of_a_siglip_tower_is_kept(folders: dict[str, Path]) -> None:
    pixels = torch.zeros(2, 3, 60, 60)
    pixels[1, :, :14, :14] = 2.0
    first, second = load(folders["siglip"])(pixels)
    assert int((first - second).norm(dim=1).argmax()) == 0


def test_encoder_is_the_same_alone_and_inside(folders: dict[str, Path], tmp_path: Path) -> None:
    """LLaVA's tower with an identity projector is CLIP with the same features."""
    alone = save_clip_vision(tmp_path / "clip")

    def make_same(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"vision_tower.{name}": value for name, value in load_file(alone / "model.safetensors").items()}
        for linear in ("linear_1", "linear_2"):
            weight = tensors[f"multi_modal_projector.{linear}.weight"]
            tensors[f"multi_modal_projector.{linear}.weight"] = torch.eye(*weight.shape)
            tensors[f"multi_modal_projector.{linear}.bias"] = torch.zeros(weight.shape[0])

    tower = load(change_tensors(folders["clip"], tmp_path / "same", make_same))
    features = load(alone, feature_layer=-2, feature_select="patch").encode(noise(60, 40))[0].embeddings
    expected = torch.nn.functional.gelu(features[:, :48])
    torch.testing.assert_close(tower.encode(noise(60, 40))[0].embeddings, expected, rtol=1e-5, atol=1e-5)


# -- tiles ------------------------------------------------------------------------------------------------------------


@each_tiled
def test_default_canvases_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig

    values = {key: value for key, value in EXAMPLES[name].items() if key != "image_grid_pinpoints"}
    made: Any = read_family(ConfigReader(values)).resize_rules["hf"]
    theirs = AutoConfig.for_model(name).image_grid_pinpoints
    assert [list(pair) for pair in made.keywords["pinpoints"]] == theirs


@each_tiled
def test_class_tokens_among_tiles_are_rejected_with_a_reason(name: str) -> None:
    changed = {
        **EXAMPLES[name],
        "vision_config": EXAMPLES["llava"]["vision_config"],
        "vision_feature_select_strategy": "full",
    }
    with pytest.raises(ValueError, match=r"vision_feature_select_strategy .*tiles"):
        read_family(ConfigReader(changed))


def test_published_llava_has_one_token_count(tmp_path: Path) -> None:
    tower = load(write_config(tmp_path, read_summary("llava")), delay_load=True)
    assert {tower.count_tokens(*size) for size in ((448, 448), (1024, 1024), (1, 40), (3000, 200))} == {576}


@each_tiled
def test_published_token_counts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    tower = load(write_config(tmp_path, read_summary(name)), delay_load=True)
    processor = LlavaNextProcessor if name == "llava_next" else LlavaOnevisionProcessor
    stand_in = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=EXAMPLES[name]["image_grid_pinpoints"]),
        patch_size=14,
        num_additional_image_tokens=1,
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    stand_in._get_unpadded_features = processor._get_unpadded_features.__get__(stand_in)
    side = 336 if name == "llava_next" else 384
    # LLaVA-NeXT's processor counts the class token of the whole image, which the model drops.
    extra = 1 if name == "llava_next" else 0
    generator = random.Random(7)
    for width, height in [(generator.randint(20, 3000), generator.randint(20, 3000)) for _ in range(300)]:
        expected = processor._get_number_of_features(stand_in, height, width, side, side) - extra
        assert tower.count_tokens(width, height) == expected, (width, height)
    largest = {"llava_next": (672, 576 + 48 * 48 + 48), "llava_onevision": (2304, 729 + 81 * 82)}
    assert tower.count_tokens(largest[name][0], largest[name][0]) == largest[name][1]


def test_image_of_one_tile_has_newlines_too(tmp_path: Path) -> None:
    tower = load(save_llava_onevision(tmp_path / "model"))
    assert tower.count_tokens(60, 60) == 16 + 4 * 5
    newline = load_file(tmp_path / "model" / "model.safetensors")["image_newline"]
    rows = tower.encode(noise(60, 60))[0].embeddings
    ends = 16 + torch.arange(4) * 5 + 4
    assert torch.equal(rows[ends], newline.expand(4, -1))
    assert not (rows[[row for row in range(36) if row not in ends.tolist()]] == newline).all(1).any()


def test_canvases_of_the_two_files_must_agree(tmp_path: Path) -> None:
    folder = save_llava_next(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "image_grid_pinpoints": [[56, 112]]}))
    with pytest.raises(ProcessorError, match="image_grid_pinpoints"):
        load(folder, delay_load=True).count_tokens(60, 60)
