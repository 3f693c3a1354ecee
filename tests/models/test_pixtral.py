"""Pixtral and Mistral 3 in transformers' format: old configurations, positions, merging, and image sizes."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.checkpoints import noise
from support.probing import errors_with
from support.towers import all_cases
from support.towers.pixtral import save

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, TowerConfig
from tritontower.errors import AspectRatioError, ConfigError, UnsupportedArchitectureError
from tritontower.kernels.runtime.segments import Segments
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import Reference, compare, relative_error

PIXTRAL, MISTRAL3 = (read_summary(name).example for name in ("pixtral", "mistral3"))
KINDS = ["pixtral", "mistral3"]

Load = Callable[..., VisionTower]


@pytest.fixture
def load(saved: Any) -> Load:
    """Loads the small checkpoint of a case."""

    def make(name: str, **options: Any) -> VisionTower:
        (case,) = (case for case in all_cases() if case.name == name)
        return VisionTower.from_pretrained(saved(case), device="cpu", **options)

    return make


def read(values: Mapping[str, Any], **changes: Any) -> TowerConfig:
    return read_family(ConfigReader({**values, **changes})).config


def with_vision(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, "vision_config": {**values["vision_config"], **changes}}


# -- configurations ---------------------------------------------------------------------------------------------------


def test_old_and_new_spelling_read_the_same() -> None:
    old = dict(PIXTRAL, is_composition=True, tie_word_embeddings=False)
    old["text_config"] = {**PIXTRAL["text_config"], "sliding_window": None, "vocab_size": 131072}
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}}
    assert read(old) == read(with_vision(PIXTRAL, **new)) == read(PIXTRAL)
    default = {**new, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert read(with_vision(MISTRAL3, **default)) == read(with_vision(MISTRAL3, model_type=None)) == read(MISTRAL3)
    rotary = read(PIXTRAL).rotary
    assert rotary is not None
    assert (rotary.layout, rotary.rotation, rotary.theta) == ("alternating", "activation", 1e4)


def test_missing_text_width_is_that_of_the_language_model() -> None:
    assert read(PIXTRAL, text_config={"model_type": "mistral"}).hidden_size == 4096
    assert read(PIXTRAL, text_config=None).hidden_size == 4096
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size"):
        read(PIXTRAL, text_config={"model_type": "opt"})


@pytest.mark.parametrize(("kind", "eps"), [("mistral", 1e-6), ("ministral3", 1e-5), ("mistral4", 1e-6), (None, 1e-6)])
def test_epsilon_of_the_projector_is_the_language_models(kind: str | None, eps: float) -> None:
    text = {"model_type": kind, "hidden_size": 64}
    for said, expected in ((None, eps), (3e-4, 3e-4)):
        projector = read(MISTRAL3, text_config={**text, "rms_norm_eps": said}).projector
        assert projector is not None
        assert projector.norm == Normalization("rms_norm", expected, "before_weight")
    with pytest.raises(ConfigError, match=r"text_config\.rms_norm_eps"):
        read(MISTRAL3, text_config={"model_type": "qwen2", "hidden_size": 64})


def test_tower_decides_which_llava_it_is() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"tower 'dinov2'.*llava/pixtral"):
        read(with_vision(PIXTRAL, model_type="dinov2"))
    with pytest.raises(UnsupportedArchitectureError, match="tower 'siglip_vision_model'"):
        read(with_vision(MISTRAL3, model_type="siglip_vision_model"))


# -- where implementations differ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_images_do_not_attend_to_each_other(name: str, load: Load) -> None:
    tower = load(name)
    first, second, other = noise(90, 120, 1), noise(150, 60, 2), noise(150, 60, 3)
    with_second, with_other = tower.encode([first, second]), tower.encode([first, other])
    assert torch.equal(with_second[0].embeddings, with_other[0].embeddings)
    assert relative_error(with_second[1].embeddings, with_other[1].embeddings) > 0.1
    # One segment over all patches, as in an implementation without a mask.
    batch = tower.preprocess([first, second])
    segments = Segments.from_lengths([batch.attention.segments.total])
    joined = replace(batch, attention=replace(batch.attention, segments=segments))
    assert relative_error(tower.forward(joined), tower.forward(batch)) > 1e-2


def test_frequencies_alternate_between_the_axes(load: Load) -> None:
    tower = load("pixtral")
    batch = tower.preprocess([noise(160, 160, 1)])
    rotary = tower.config.rotary
    assert rotary is not None
    # The frequencies of Qwen-VL towers, the same for both axes.
    assert errors_with(tower, batch, rotary=replace(rotary, layout="halves"))["embeddings"] > 1e-3
    # Rows and columns swapped.
    swapped = replace(batch.attention, positions=batch.attention.positions.flip(1).contiguous())
    assert relative_error(tower.forward(replace(batch, attention=swapped)), tower.forward(batch)) > 1e-3


def test_every_epsilon_is_its_own(tmp_path: Path) -> None:
    folder = save("mistral3", tmp_path / "model", text_rms_norm_eps=0.5)
    tower = VisionTower.from_pretrained(folder, device="cpu")
    config, batch = tower.config, tower.preprocess([noise(80, 64, 1)])
    assert config.projector is not None
    assert config.projector.norm is not None
    assert (config.norm.eps, config.projector.norm.eps) == (1e-5, 0.5)
    for changes, error in (
        ({}, (0.0, 1e-5)),
        ({"norm": config.projector.norm}, (1e-2, 10.0)),
        ({"projector": replace(config.projector, norm=config.norm)}, (1e-2, 10.0)),
    ):
        assert error[0] <= errors_with(tower, batch, **changes)["embeddings"] <= error[1], changes


# -- image sizes ------------------------------------------------------------------------------------------------------


def test_mistral3_resizes_to_whole_tokens(load: Load) -> None:
    tower = load("mistral3")
    processor = tower.preprocessor.processor
    generator = random.Random(0)
    sizes = [(1, 1), (27, 29), (41, 43), (169, 168), (335, 11)]
    sizes += [(generator.randint(20, 400), generator.randint(20, 400)) for _ in range(60)]
    for width, height in sizes:
        image = Image.new("RGB", (width, height))
        batch = tower.preprocess(image)
        (size,) = batch.images.processed_sizes
        assert size[0] % 28 == size[1] % 28 == 0
        assert size[0] * size[1] == batch.images.token_counts[0] * 28 * 28
        made = processor(images=[image], patch_size={"height": 28, "width": 28}, return_tensors="np")["image_sizes"]
        assert tuple(made[0])[::-1] == size


def test_odd_row_of_patches_is_kept(load: Load) -> None:
    tower = load("mistral3")
    assert tower.count_tokens(70, 42) == 3 * 2
    (embedding,) = tower.encode(noise(70, 42, 1))
    assert embedding.embeddings.shape == (6, 48)
    # With the file's patch size, the image processor alone makes three rows of five, of which the merger drops the odd ones.
    image = Image.fromarray(noise(70, 42, 1))
    inputs = tower.preprocessor.processor(images=[image], patch_size={"height": 14, "width": 14}, return_tensors="pt")
    model = Reference(tower, torch.float32).model
    with torch.inference_mode():
        lost = model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], vision_feature_layer=-1
        )
    assert inputs["image_sizes"].tolist() == [[42, 70]]
    assert [len(rows) for rows in lost.pooler_output] == [2]


def test_image_of_one_token_works_unlike_in_transformers(load: Load) -> None:
    tower = load("mistral3")
    batch = tower.preprocess(noise(28, 28, 1))
    assert batch.images.token_counts == (1,)
    assert compare(tower, batch).passed
    model = Reference(tower, torch.float32).model
    with torch.inference_mode(), pytest.raises(RuntimeError, match="split"):
        model.get_image_features(
            pixel_values=torch.zeros(1, 3, 28, 28), image_sizes=[(28, 28)], vision_feature_layer=-1
        )


def test_dropping_the_first_patch_is_rejected_as_it_fails(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "model", vision_feature_select_strategy="default")
    with pytest.raises(ConfigError, match=r"vision_feature_select_strategy must be one of 'full', got 'default'"):
        VisionTower.from_pretrained(folder, device="cpu")
    changed = json.loads((folder / "config.json").read_text()) | {"vision_feature_select_strategy": "full"}
    (folder / "config.json").write_text(json.dumps(changed))
    model = Reference(VisionTower.from_pretrained(folder, device="cpu"), torch.float32).model
    arguments: dict[str, Any] = {"pixel_values": torch.zeros(1, 3, 32, 32), "image_sizes": [(32, 32)]}
    with torch.inference_mode():
        assert len(model.get_image_features(**arguments).pooler_output[0]) == 4
        with pytest.raises(RuntimeError, match="split"):
            model.get_image_features(**arguments, vision_feature_select_strategy="default")


def test_image_too_flat_for_its_longest_edge_is_rejected(load: Load) -> None:
    tower = load("pixtral", delay_load=True)
    assert tower.count_tokens(199, 2) == 10
    with pytest.raises(AspectRatioError, match="less than one pixel"):
        tower.count_tokens(199, 1)


@pytest.mark.parametrize("name", KINDS)
def test_mistrals_own_preprocessing_differs(name: str, load: Load) -> None:
    image = noise(301, 200, 1)
    theirs, own = load(name), load(name, preprocessing="mistral")
    assert own.preprocessor.layout(301, 200).grid == theirs.preprocessor.layout(301, 200).grid
    (first,), (second,) = theirs.encode(image), own.encode(image)
    assert 0.01 < relative_error(second.embeddings, first.embeddings) < 1.0
    # Small images of whole tokens are not resized.
    side = 32 if name == "pixtral" else 28
    small = [tower.preprocess(noise(side, side, 2)).pixels for tower in (theirs, own)]
    assert (small[0] - small[1]).abs().max() < 1e-5
