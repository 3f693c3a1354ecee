"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: what is their own beside what every tower is held to."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.towers.clip import save_clip_vision
from support.towers.llava import save_llava
from support.towers.llava_next import save_llava_next
from support.towers.llava_onevision import save_llava_onevision

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Activation, Normalization, TowerConfig
from tritontower.errors import ConfigError, ProcessorError, UnsupportedArchitectureError
from tritontower.graph.builder import build
from tritontower.models.common.assembly import TowerCheckpoint
from tritontower.models.common.family import FamilySummary, read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import compare_nodes, relative_error

SUMMARIES = {name: read_summary(name) for name in ("llava", "llava_next", "llava_onevision")}
LLAVA, NEXT, ONEVISION = (dict(summary.example) for summary in SUMMARIES.values())
SIGLIP_TOWER = {**ONEVISION["vision_config"], "num_hidden_layers": 27}
each_family = pytest.mark.parametrize("values", [LLAVA, NEXT, ONEVISION], ids=list(SUMMARIES))


def read(values: dict[str, Any]) -> TowerConfig:
    return read_family(ConfigReader(values)).config


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small LLaVA with either encoder."""
    root = tmp_path_factory.mktemp("llava")
    return {kind: save_llava(root / kind, kind) for kind in ("clip", "siglip")}


# -- configurations ---------------------------------------------------------------------------------------------------


def test_published_llava() -> None:
    config = read(LLAVA)
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1024, 24, 16, 64, 4096)
    assert config.num_patches == 576
    # The last block and the norm behind it are not needed.
    assert (config.features, config.blocks_needed, config.features_normed, config.pooling) == ((23,), 23, False, None)
    assert (config.class_token, config.keep_class_token, config.newline) == (True, False, False)
    assert config.norm == Normalization("layer_norm", 1e-5)
    assert config.projector is not None
    # text_config says nothing about its width, and llama's default is what the checkpoint has.
    assert (config.projector.hidden, config.projector.output, config.projector.bias) == (4096, 4096, True)
    assert (config.activation, config.projector.activation) == ("quick_gelu", "gelu")


def test_published_llava_next() -> None:
    config = read(NEXT)
    assert replace(config, family="llava", newline=False) == read(LLAVA)
    assert (config.newline, config.assembly_taps) == (True, 1)


def test_published_onevision() -> None:
    config = read(ONEVISION)
    assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (1152, 26, 16, 72, 4304)
    assert config.num_patches == 27 * 27
    assert (config.features, config.features_normed, config.pooling) == ((26,), False, None)
    assert (config.class_token, config.newline, config.assembly_taps) == (False, True, 4)
    assert (config.activation, config.hidden_size) == ("gelu_tanh", 3584)


def projector_parameters(config: TowerConfig) -> int:
    return sum(
        torch.Size(shape).numel() for name, shape in build(config).sources.items() if name.startswith("projector.")
    )


@pytest.mark.parametrize(("width", "millions"), [(4096, 21.0), (5120, 31.5)])
def test_parameters_of_llava(width: int, millions: float) -> None:
    config = read({**LLAVA, "text_config": {"model_type": "llama", "hidden_size": width}})
    projector = projector_parameters(config)
    assert round(projector / 1e6, 1) == millions
    built = build(config).parameters - projector
    whole = build(replace(config, features=(24,))).parameters - projector
    assert round(whole / 1e6, 1) == 303.5
    assert whole - built == 12 * 1024**2 + 13 * 1024  # one block, which is not needed


@pytest.mark.parametrize("width", [896, 3584, 8192])
def test_parameters_of_onevision(width: int) -> None:
    config = read({**ONEVISION, "text_config": {"model_type": "qwen2", "hidden_size": width}})
    newline = width
    assert round((build(config).parameters - projector_parameters(config) - newline) / 1e6, 1) == 397.7


@each_family
def test_a_file_that_says_nothing_is_the_default_of_transformers(values: dict[str, Any]) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(values["model_type"])
    ours = read({"model_type": values["model_type"]})
    vision = theirs.vision_config
    assert (ours.width, ours.depth, ours.heads) == (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
    )
    assert (ours.mlp_hidden, ours.num_patches) == (
        vision.intermediate_size,
        (vision.image_size // vision.patch_size) ** 2,
    )
    assert ours.hidden_size == theirs.text_config.hidden_size
    assert ours.features == (theirs.vision_feature_layer % (ours.depth + 1),)
    assert ours.keep_class_token == (theirs.vision_feature_select_strategy == "full" and ours.class_token)
    assert ours.projector is not None
    assert ours.projector.bias == theirs.multimodal_projector_bias
    assert ours.projector.activation == theirs.projector_hidden_act


@each_family
def test_a_section_that_says_nothing_is_the_encoder_s_own_default(values: dict[str, Any]) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(values["model_type"], vision_config={}).vision_config
    ours = read({**values, "vision_config": {}, "vision_feature_layer": -1})
    assert (ours.width, ours.depth, ours.patch.size) == (768, 12, theirs.patch_size)
    assert (theirs.hidden_size, theirs.num_hidden_layers) == (768, 12)


@pytest.mark.parametrize("values", [NEXT, ONEVISION], ids=["llava_next", "llava_onevision"])
def test_canvases_of_a_file_that_names_none_are_those_of_transformers(values: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(values["model_type"]).image_grid_pinpoints
    made = read_family(ConfigReader(without(values, "image_grid_pinpoints"))).preprocessors["hf"]
    assert [list(pair) for pair in made.keywords["pinpoints"]] == theirs  # type: ignore[attr-defined]


FEATURES: list[tuple[object, tuple[int, ...]]] = [
    (-2, (23,)),
    (-1, (24,)),
    (0, (0,)),
    (24, (24,)),
    (-25, (0,)),
    ([-2], (23,)),
    ([-2, -5, 8], (23, 20, 8)),
]


@pytest.mark.parametrize(("layer", "features"), FEATURES, ids=lambda value: str(value))
@pytest.mark.parametrize("values", [LLAVA, NEXT], ids=["llava", "llava_next"])
def test_feature_layers(values: dict[str, Any], layer: object, features: tuple[int, ...]) -> None:
    config = read({**values, "vision_feature_layer": layer})
    assert config.features == features
    assert config.feature_width == 1024 * len(features)
    assert config.blocks_needed == max(features)


IMPOSSIBLE: list[tuple[str, object]] = [
    ("vision_feature_layer", 27),
    ("vision_feature_layer", -28),
    ("vision_feature_layer", "-2"),
    ("vision_feature_layer", True),
    ("vision_feature_layer", []),
    ("vision_feature_layer", [1, 99]),
    ("vision_feature_layer", [1.5]),
    ("vision_feature_select_strategy", "cls_patch"),
    ("projector_hidden_act", "swish2"),
    ("multimodal_projector_bias", "yes"),
    ("vision_config", [1]),
    ("text_config", {"hidden_size": 0}),
    ("text_config", {"model_type": "rwkv"}),
]


@each_family
@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_impossible_values_name_the_key(values: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        read({**values, key: value})
    assert caught.value.key.startswith(key)
    assert "must be" in str(caught.value)


TILES: list[tuple[str, object]] = [
    ("image_grid_pinpoints", 336),
    ("image_grid_pinpoints", [[336]]),
    ("image_grid_pinpoints", [[336, 672], [336, 0]]),
    ("image_grid_pinpoints", [[336, "672"]]),
    ("image_grid_pinpoints", ["336x672"]),
]


@pytest.mark.parametrize(("key", "value"), TILES)
@pytest.mark.parametrize("values", [NEXT, ONEVISION], ids=["llava_next", "llava_onevision"])
def test_impossible_canvases_name_the_key(values: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        read({**values, key: value})


@pytest.mark.parametrize("aspect", ["anyres", "square", "pad", "anyres_max_", "anyres_max_0", "anyres_max_9x", 9])
def test_aspects_that_transformers_cannot_compute_are_refused(aspect: object) -> None:
    with pytest.raises(ConfigError, match="vision_aspect_ratio"):
        read({**ONEVISION, "vision_aspect_ratio": aspect})


@each_family
def test_dropping_the_class_token_of_a_siglip_tower_is_refused(values: dict[str, Any]) -> None:
    for changes in ({"vision_feature_select_strategy": "default"}, {"vision_feature_select_strategy": None}):
        changed = {**values, "vision_config": SIGLIP_TOWER, **changes}
        if values is ONEVISION and changes["vision_feature_select_strategy"] is None:
            assert not read(changed).keep_class_token  # its default is 'full'
            continue
        with pytest.raises(ConfigError, match=r"vision_feature_select_strategy .*first patch"):
            read(changed)
    assert read({**values, "vision_config": SIGLIP_TOWER, "vision_feature_select_strategy": "full"}).num_patches == 729


@pytest.mark.parametrize("values", [NEXT, ONEVISION], ids=["llava_next", "llava_onevision"])
def test_class_tokens_among_tiles_are_refused(values: dict[str, Any]) -> None:
    changed = {**values, "vision_config": LLAVA["vision_config"], "vision_feature_select_strategy": "full"}
    with pytest.raises(ConfigError, match=r"vision_feature_select_strategy .*tiles"):
        read(changed)


@each_family
def test_another_encoder_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'dinov2'"):
        read({**values, "vision_config": {"model_type": "dinov2"}})


# -- what other implementations get wrong -----------------------------------------------------------------------------


def with_activations(tower: VisionTower, blocks: Activation, projector: Activation) -> VisionTower:
    """The same weights with other activations."""
    config = tower.config
    assert config.projector is not None
    config = replace(config, activation=blocks, projector=replace(config.projector, activation=projector))
    changed = VisionTower(
        TowerCheckpoint(replace(tower.family, config=config), tower.folder),
        tower.preprocessor,
        device=tower.device,
        dtype=tower.dtype,
    )
    return changed.load()


def first_wrong_value(tower: VisionTower) -> str | None:
    lines = compare_nodes(tower, tower.preprocess([noise(80, 50, 3), noise(40, 60, 4)]))
    return next((line.value for line in lines if not line.error <= 1e-5), None)


@pytest.mark.parametrize(("kind", "right"), [("clip", "quick_gelu"), ("siglip", "gelu_tanh")])
def test_three_gelus_are_told_apart_at_their_nodes(kind: str, right: Activation, folders: dict[str, Path]) -> None:
    tower = load(folders[kind])
    assert tower.config.activation == right
    assert first_wrong_value(tower) is None
    gelus: tuple[Activation, ...] = ("quick_gelu", "gelu", "gelu_tanh")
    for wrong in gelus:
        if wrong != right:
            assert first_wrong_value(with_activations(tower, wrong, "gelu")) == "blocks.0.mlp_hidden", wrong
        if wrong != "gelu":
            assert first_wrong_value(with_activations(tower, right, wrong)) == "projector.hidden", wrong


def change(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_layer_before_the_last_has_no_post_norm(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tower = load(folders[kind])
    assert tower.config.features == (2,)
    assert not [name for name in tower.graph.sources if name.startswith("output_norm")]

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_tower.post_layernorm.weight"] *= 2

    expected = tower.encode(noise(60, 50))[0].embeddings
    changed = load(change(folders[kind], tmp_path / "changed", double))
    assert torch.equal(changed.encode(noise(60, 50))[0].embeddings, expected)


def test_onevision_takes_its_last_layer_without_the_post_norm(tmp_path: Path) -> None:
    tower = load(save_llava_onevision(tmp_path / "model"))
    assert tower.config.features == (tower.config.depth,)
    assert not [name for name in tower.graph.sources if name.startswith("output_norm")]


def test_the_class_token_is_dropped_and_still_attended_to(folders: dict[str, Path], tmp_path: Path) -> None:
    tower = load(folders["clip"])
    batch = tower.preprocess([noise(60, 50), noise(50, 60)])
    assert batch.workload.patches == 2 * 17
    assert batch.images.token_counts == (16, 16)
    kept = load(folders["clip"], feature_select="cls_patch")
    rows = kept.forward(kept.preprocess([noise(60, 50), noise(50, 60)])).view(2, 17, -1)
    assert torch.equal(tower.forward(batch).view(2, 16, -1), rows[:, 1:])

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_tower.embeddings.class_embedding"].neg_()

    moved = load(change(folders["clip"], tmp_path / "moved", move))
    assert relative_error(moved.forward(batch), tower.forward(batch)) > 1e-3


def test_every_patch_of_a_siglip_tower_becomes_a_token(folders: dict[str, Path]) -> None:
    tower = load(folders["siglip"])
    pixels = torch.zeros(2, 3, 60, 60)
    pixels[1, :, :14, :14] = 2.0
    first, second = tower(pixels)
    # The very first patch shows most in the very first token.
    assert int((first - second).norm(dim=1).argmax()) == 0


# -- tiles ------------------------------------------------------------------------------------------------------------


def described(folder: Path, summary: FamilySummary) -> VisionTower:
    """A published tower without its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(summary.example)))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(summary.processor)))
    return load(folder, delay_load=True)


def test_tokens_of_published_llava(tmp_path: Path) -> None:
    tower = described(tmp_path / "model", SUMMARIES["llava"])
    assert {tower.count_tokens(*size) for size in ((448, 448), (1024, 1024), (1, 40), (3000, 200))} == {576}


SIZES = [
    (generator.randint(20, 3000), generator.randint(20, 3000)) for generator in [random.Random(7)] for _ in range(300)
]


def test_tokens_of_published_llava_next_are_as_many_as_the_prompt_of_transformers_has(tmp_path: Path) -> None:
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    tower = described(tmp_path / "model", SUMMARIES["llava_next"])
    prompt = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=NEXT["image_grid_pinpoints"]),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    prompt._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(prompt)
    for width, height in SIZES:
        # One less: the processor counts the class token of the whole image, which the model drops.
        expected = LlavaNextProcessor._get_number_of_features(prompt, height, width, 336, 336) - 1
        assert tower.count_tokens(width, height) == expected, (width, height)
    assert tower.count_tokens(672, 672) == 576 + 48 * 48 + 48


def test_tokens_of_published_onevision_are_as_many_as_the_prompt_of_transformers_has(tmp_path: Path) -> None:
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    tower = described(tmp_path / "model", SUMMARIES["llava_onevision"])
    prompt = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=ONEVISION["image_grid_pinpoints"]),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    prompt._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(prompt)
    for width, height in SIZES:
        expected = LlavaOnevisionProcessor._get_number_of_features(prompt, height, width, 384, 384)
        assert tower.count_tokens(width, height) == expected, (width, height)
    assert tower.count_tokens(2304, 2304) == 729 + 81 * 82


def test_an_image_of_one_tile_has_newlines_too(tmp_path: Path) -> None:
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


def test_the_encoder_inside_is_the_encoder_alone(tmp_path: Path) -> None:
    """LLaVA's tower with its projector taken away is CLIP with the same features."""
    alone = save_clip_vision(tmp_path / "clip")
    inside = save_llava(tmp_path / "llava")

    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"vision_tower.{name}": value for name, value in load_file(alone / "model.safetensors").items()}
        for linear in ("linear_1", "linear_2"):
            weight = tensors[f"multi_modal_projector.{linear}.weight"]
            tensors[f"multi_modal_projector.{linear}.weight"] = torch.eye(*weight.shape)
            tensors[f"multi_modal_projector.{linear}.bias"] = torch.zeros(weight.shape[0])

    tower = load(change(inside, tmp_path / "same", same))
    features = load(alone, feature_layer=-2, feature_select="patch").encode(noise(60, 40))[0].embeddings
    expected = torch.nn.functional.gelu(features[:, :48])
    torch.testing.assert_close(tower.encode(noise(60, 40))[0].embeddings, expected, rtol=1e-5, atol=1e-5)
