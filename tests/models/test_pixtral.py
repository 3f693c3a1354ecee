"""Pixtral and Mistral 3 in transformers' format: their configurations, and the places where implementations go wrong."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.checkpoints import noise
from support.towers.pixtral import save

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, TowerConfig
from tritontower.engine.executor import Executor
from tritontower.engine.weight_loader import stored_shapes
from tritontower.errors import AspectRatioError, ConfigError, UnsupportedArchitectureError
from tritontower.graph.builder import build
from tritontower.graph.fusion import fuse
from tritontower.kernels.runtime.segments import Segments
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import Reference, compare, relative_error

PIXTRAL, MISTRAL3 = (read_summary(name).example for name in ("pixtral", "mistral3"))

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small fp32 checkpoint of a kind, made once."""
    folders: dict[str, Path] = {}

    def made(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = save(kind, tmp_path_factory.mktemp("checkpoints") / kind)
        return folders[kind]

    return made


def read(values: Mapping[str, Any], **changes: Any) -> TowerConfig:
    return read_family(ConfigReader({**values, **changes})).config


def with_vision(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, "vision_config": {**values["vision_config"], **changes}}


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


def embeddings_of(tower: VisionTower, batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
    """What the tower's weights make of a batch in a tower of another description."""
    return Executor(fuse(build(config)), tower.read_weights()).run(batch)["embeddings"]


def error_of(tower: VisionTower, batch: PackedBatch, **changes: Any) -> float:
    """How far a tower with a changed description is from transformers."""
    exact = Reference(tower, torch.float32).forward(batch)
    return relative_error(embeddings_of(tower, batch, replace(tower.config, **changes)), exact)


# -- configurations ---------------------------------------------------------------------------------------------------


def test_the_published_pixtral_in_old_and_new_spelling() -> None:
    old = with_vision(PIXTRAL, is_composition=True, tie_word_embeddings=False)
    old["text_config"] = {**PIXTRAL["text_config"], "sliding_window": None, "vocab_size": 131072}
    new = with_vision(
        PIXTRAL,
        rope_theta=None,
        attention_dropout=0.0,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_channels=3,
        num_hidden_layers=24,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "axial"},
    )
    config = read(PIXTRAL)
    assert read(old) == read(new) == config
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1024, 24, 16, 64, 4096)
    assert (config.patch.size, config.merge, config.hidden_size, config.features) == (16, 1, 5120, (24,))
    assert config.norm == config.input_norm == Normalization("rms_norm", 1e-5, "before_weight")
    assert config.rotary is not None
    assert (config.rotary.layout, config.rotary.rotation, config.rotary.theta) == ("alternating", "activation", 1e4)


def test_the_published_mistral_small_in_old_and_new_spelling() -> None:
    new = with_vision(MISTRAL3, rope_theta=None, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    untyped = with_vision(MISTRAL3, model_type=None)
    config = read(MISTRAL3)
    assert read(new) == read(untyped) == config
    assert (config.width, config.patch.size, config.merge, config.hidden_size) == (1024, 14, 2, 5120)
    assert config.projector is not None
    assert config.projector.merging_linear
    assert not config.projector.bias


WIDE = {
    **with_vision(MISTRAL3, hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, head_dim=104),
    "text_config": {"hidden_size": 12288, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize(
    ("values", "tower", "projector"),
    [(PIXTRAL, 403.5, 31.5), (MISTRAL3, 403.3, 35.7), (WIDE, 2495.7, 182.5)],
    ids=["Pixtral-12B", "Mistral-Small-3.1", "1664 wide"],
)
def test_parameters_of_published_sizes(values: Mapping[str, Any], tower: float, projector: float) -> None:
    config = read(values)
    graph = build(config)
    behind = sum(prod(shape) for name, shape in graph.sources.items() if name.startswith("projector."))
    assert round((graph.parameters - behind) / 1e6, 1) == tower
    assert round(behind / 1e6, 1) == projector


def test_the_language_models_width_where_the_file_leaves_it_out() -> None:
    assert read(PIXTRAL, text_config={"model_type": "mistral"}).hidden_size == 4096
    assert read(PIXTRAL, text_config=None).hidden_size == 4096
    with pytest.raises(ConfigError, match=r"text_config\.hidden_size"):
        read(PIXTRAL, text_config={"model_type": "opt"})
    with pytest.raises(ConfigError, match="text_config"):
        read(MISTRAL3, text_config=None)


@pytest.mark.parametrize(("kind", "eps"), [("mistral", 1e-6), ("ministral3", 1e-5), ("mistral4", 1e-6), (None, 1e-6)])
def test_the_projectors_epsilon_is_the_language_models(kind: str | None, eps: float) -> None:
    text = {"model_type": kind, "hidden_size": 64}
    for said, expected in ((None, eps), (3e-4, 3e-4)):
        projector = read(MISTRAL3, text_config={**text, "rms_norm_eps": said}).projector
        assert projector is not None
        assert projector.norm == Normalization("rms_norm", expected, "before_weight")
    with pytest.raises(ConfigError, match=r"text_config\.rms_norm_eps"):
        read(MISTRAL3, text_config={"model_type": "qwen2", "hidden_size": 64})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", None),
        ("hidden_act", "gelu"),
        ("hidden_size", 0),
        ("hidden_size", "1024"),
        ("hidden_size", 1000),
        ("num_attention_heads", 7),
        ("head_dim", 80),
        ("num_hidden_layers", 0),
        ("intermediate_size", 4096.5),
        ("patch_size", [16, 16]),
        ("num_channels", True),
        ("image_size", -1),
        ("rope_theta", 0.5),
        ("rope_parameters", {"rope_type": "yarn"}),
    ],
)
@pytest.mark.parametrize("values", [PIXTRAL, MISTRAL3], ids=["pixtral", "mistral3"])
def test_impossible_values_name_key_and_what_is_allowed(values: Mapping[str, Any], key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        read(with_vision(values, **{key: value}))
    key = "num_attention_heads" if value == 1000 else key
    assert f"vision_config.{key}" in str(caught.value)
    assert "must be" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (PIXTRAL, "vision_feature_select_strategy", "default"),
        (PIXTRAL, "vision_feature_select_strategy", None),
        (PIXTRAL, "vision_feature_layer", 25),
        (PIXTRAL, "vision_feature_layer", "last"),
        (PIXTRAL, "vision_feature_layer", []),
        (PIXTRAL, "vision_feature_layer", [-1, -26]),
        (PIXTRAL, "projector_hidden_act", "mish"),
        (PIXTRAL, "multimodal_projector_bias", "yes"),
        (MISTRAL3, "vision_feature_layer", [-1, -2]),
        (MISTRAL3, "spatial_merge_size", 0),
    ],
)
def test_impossible_values_at_the_top_are_named(values: Mapping[str, Any], key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        read(values, **{key: value})
    assert str(caught.value).startswith(f"config.json: {key}")
    assert "must be" in str(caught.value)


def test_the_tower_decides_what_a_llava_is() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"tower 'dinov2'.*llava/pixtral"):
        read(with_vision(PIXTRAL, model_type="dinov2"))
    with pytest.raises(UnsupportedArchitectureError, match="tower 'siglip_vision_model'"):
        read(with_vision(MISTRAL3, model_type="siglip_vision_model"))


# -- where implementations part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "mistral3"])
def test_images_do_not_attend_to_each_other(kind: str, saved: Saved) -> None:
    tower = load(saved(kind))
    first, second, other = noise(90, 120, 1), noise(150, 60, 2), noise(150, 60, 3)
    with_second = tower.encode([first, second])
    with_other = tower.encode([first, other])
    assert torch.equal(with_second[0].embeddings, with_other[0].embeddings)
    assert relative_error(with_second[1].embeddings, with_other[1].embeddings) > 0.1
    # One segment over all patches, as an implementation without a mask would have it.
    batch = tower.preprocess([first, second])
    segments = Segments.from_lengths([batch.attention.segments.total])
    joined = replace(batch, attention=replace(batch.attention, segments=segments))
    assert relative_error(tower.forward(joined), tower.forward(batch)) > 1e-2
    assert compare(tower, batch).passed


def test_angles_are_fp32_in_a_bf16_tower(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "model", dtype=torch.bfloat16, longest_edge=2048)
    tower = load(folder)
    batch = tower.preprocess(noise(32, 2048, 1))
    found: dict[str, torch.Tensor] = {}

    def observe(_node: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        found.update({name: tensors[name].clone() for name in ("cosines", "sines") if name in tensors})

    tower.executor_for(batch).run(batch, observe)
    rows = batch.attention.positions[:, 0].double()
    assert rows.max() == 127
    # 64 / 4 heads: eight angles, of which the vertical axis has the even ones.
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    angles = torch.outer(rows, frequencies[::2])
    assert found["cosines"].dtype == torch.float32
    assert (found["cosines"][:, :4] - angles.cos()).abs().max() < 2e-5
    assert (found["sines"][:, :4] - angles.sin()).abs().max() < 2e-5
    # transformers, when a loaded model is converted, rounds the frequencies themselves.
    rotary = Reference(tower, torch.float32).model.to(torch.bfloat16).vision_tower.patch_positional_embedding
    theirs, _ = rotary(torch.zeros(1), batch.attention.positions)
    assert (theirs[:, :4].double() - angles.cos()).abs().max() > 5e-3


def test_axes_take_the_frequencies_in_turn(saved: Saved) -> None:
    tower = load(saved("llava"))
    batch = tower.preprocess([noise(160, 160, 1)])
    rotary = tower.config.rotary
    assert rotary is not None
    assert error_of(tower, batch) <= 1e-5
    # The series that Qwen-VL towers take for both axes.
    assert error_of(tower, batch, rotary=replace(rotary, layout="halves")) > 1e-3
    # Rows and columns swapped: the two axes have different frequencies.
    swapped = replace(
        batch, attention=replace(batch.attention, positions=batch.attention.positions.flip(1).contiguous())
    )
    assert relative_error(tower.forward(swapped), tower.forward(batch)) > 1e-3


def test_gelu_in_the_projector_and_silu_in_the_blocks(saved: Saved) -> None:
    for kind in ("llava", "mistral3"):
        tower = load(saved(kind))
        projector = tower.config.projector
        assert projector is not None
        assert (tower.config.activation, tower.config.gated, projector.activation) == ("silu", True, "gelu")
        batch = tower.preprocess([noise(80, 64, 1)])
        assert error_of(tower, batch) <= 1e-5
        for other in ("silu", "gelu_tanh", "quick_gelu"):
            assert error_of(tower, batch, projector=replace(projector, activation=other)) > 1e-5, other


def test_every_epsilon_is_its_own(tmp_path: Path) -> None:
    folder = save("mistral3", tmp_path / "model", text_rms_norm_eps=0.5)
    tower = load(folder)
    config, batch = tower.config, tower.preprocess([noise(80, 64, 1)])
    assert config.projector is not None
    assert config.projector.norm is not None
    assert (config.norm.eps, config.projector.norm.eps) == (1e-5, 0.5)
    assert error_of(tower, batch) <= 1e-5
    assert error_of(tower, batch, norm=config.projector.norm) > 1e-2
    assert error_of(tower, batch, projector=replace(config.projector, norm=config.norm)) > 1e-2


def test_mistral3_merges_channel_by_channel(saved: Saved) -> None:
    tower = load(saved("mistral3"))
    name = "projector.patch_merger.merging_layer.weight"
    weights = tower.read_weights()
    with tower._checkpoint() as checkpoint:
        checkpoint.expect(stored_shapes(tower.graph, tower.family.tensors), ignored=["*"])
        as_stored = dict(checkpoint.iterate(torch.float32, "cpu", names=[name]))[name]
    merging = weights["projector.merging.weight"]
    for patch in range(4):
        for channel in (0, 1, 63):
            assert torch.equal(merging[:, patch * 64 + channel], as_stored[:, channel * 4 + patch])
    batch = tower.preprocess([noise(80, 64, 1)])
    exact = Reference(tower, torch.float32).forward(batch)
    # Patch by patch, as the Qwen-VL towers store theirs.
    naive = {**weights, "projector.merging.weight": as_stored}
    assert relative_error(Executor(tower.graph, weights).run(batch)["embeddings"], exact) <= 1e-5
    assert relative_error(Executor(tower.graph, naive).run(batch)["embeddings"], exact) > 0.1


def test_mistral3_resizes_to_whole_tokens(saved: Saved) -> None:
    tower = load(saved("mistral3"))
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


def test_an_odd_row_of_patches_is_kept_where_the_image_processor_alone_loses_it(saved: Saved) -> None:
    tower = load(saved("mistral3"))
    assert tower.count_tokens(70, 42) == 3 * 2
    (embedding,) = tower.encode(noise(70, 42, 1))
    assert embedding.embeddings.shape == (6, 48)
    # The file says the side of a patch: five columns and three rows of them, of which the merger takes even numbers.
    image = Image.fromarray(noise(70, 42, 1))
    inputs = tower.preprocessor.processor(images=[image], patch_size={"height": 14, "width": 14}, return_tensors="pt")
    model = Reference(tower, torch.float32).model
    with torch.inference_mode():
        lost = model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], vision_feature_layer=-1
        )
    assert inputs["image_sizes"].tolist() == [[42, 70]]
    assert [len(rows) for rows in lost.pooler_output] == [2]


def test_an_image_of_one_token_on_which_transformers_fails(saved: Saved) -> None:
    tower = load(saved("mistral3"))
    batch = tower.preprocess(noise(28, 28, 1))
    assert batch.images.token_counts == (1,)
    assert compare(tower, batch).passed
    model = Reference(tower, torch.float32).model
    with torch.inference_mode(), pytest.raises(RuntimeError, match="split"):
        model.get_image_features(
            pixel_values=torch.zeros(1, 3, 28, 28), image_sizes=[(28, 28)], vision_feature_layer=-1
        )


def test_leaving_the_first_patch_out_is_refused_because_transformers_fails_on_it(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "model", vision_feature_select_strategy="default")
    with pytest.raises(ConfigError, match=r"vision_feature_select_strategy must be one of 'full', got 'default'"):
        load(folder)
    changed = json.loads((folder / "config.json").read_text()) | {"vision_feature_select_strategy": "full"}
    (folder / "config.json").write_text(json.dumps(changed))
    model = Reference(load(folder), torch.float32).model
    arguments: dict[str, Any] = {"pixel_values": torch.zeros(1, 3, 32, 32), "image_sizes": [(32, 32)]}
    with torch.inference_mode():
        assert len(model.get_image_features(**arguments).pooler_output[0]) == 4
        with pytest.raises(RuntimeError, match="split"):
            model.get_image_features(**arguments, vision_feature_select_strategy="default")


def test_an_image_too_flat_for_its_longest_edge_is_refused(saved: Saved) -> None:
    tower = load(saved("llava"), delay_load=True)
    assert tower.count_tokens(199, 2) == 10
    with pytest.raises(AspectRatioError, match="less than one pixel"):
        tower.count_tokens(199, 1)


@pytest.mark.parametrize("kind", ["llava", "mistral3"])
def test_mistrals_own_preprocessing_is_another_one(kind: str, saved: Saved) -> None:
    image = noise(301, 200, 1)
    theirs, own = load(saved(kind)), load(saved(kind), preprocessing="mistral")
    assert own.preprocessor.layout(301, 200).grid == theirs.preprocessor.layout(301, 200).grid
    (first,), (second,) = theirs.encode(image), own.encode(image)
    assert 0.01 < relative_error(second.embeddings, first.embeddings) < 1.0
    # Small images are not resized, but for their odd sides.
    side = 32 if kind == "llava" else 28
    small = [tower.preprocess(noise(side, side, 2)).pixels for tower in (theirs, own)]
    assert (small[0] - small[1]).abs().max() < 1e-5
