"""Pixtral and Mistral 3 in Mistral's own format: the same embeddings as from transformers' format."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, noise
from support.mistral_format import by_definition, to_mistral_format
from support.towers.pixtral import save

from tritontower import VisionTower, errors, has_vision
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization
from tritontower.models.common.family import MISTRAL_FORMAT, Family, read_summary
from tritontower.models.common.hf_reference import tile_images
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import HALF_TOLERANCE, Reference, compare, relative_error

PIXTRAL, MISTRAL3 = (read_summary(f"{name}_mistral_format").example for name in ("pixtral", "mistral3"))
KINDS = ["llava", "mistral3"]
IMAGES = [noise(157, 243, 1), noise(300, 64, 2), noise(28, 28, 3)]

Saved = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small fp32 checkpoint of a kind in transformers' format and in Mistral's own."""
    folders: dict[str, tuple[Path, Path]] = {}

    def made(kind: str) -> tuple[Path, Path]:
        if kind not in folders:
            folder = tmp_path_factory.mktemp("checkpoints")
            theirs = save(kind, folder / "hf")
            folders[kind] = theirs, to_mistral_format(theirs, folder / "native")
        return folders[kind]

    return made


def read(values: Mapping[str, Any], **vision: Any) -> Family:
    changed = {**values, "vision_encoder": {**values["vision_encoder"], **vision}}
    return read_family(ConfigReader(changed, MISTRAL_FORMAT))


def same(first: VisionTower, second: VisionTower) -> bool:
    found, expected = first.encode(IMAGES), second.encode(IMAGES)
    return all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_agree_with_both_references(kind: str, saved: Saved) -> None:
    theirs, native = saved(kind)
    tower, converted = load(native), load(theirs).encode(IMAGES)
    batch = tower.preprocess(IMAGES)
    rows = tower.forward(batch).split(batch.images.token_counts)
    for ours, other, image in zip(rows, converted, tile_images(batch, tower.config), strict=True):
        assert relative_error(ours, by_definition(native, image)) <= 1e-5
        assert relative_error(ours, other.embeddings) <= 1e-5


@pytest.mark.parametrize(("kind", "dtype"), [("llava", torch.bfloat16), ("mistral3", torch.float16)])
def test_half_precision_error_is_within_the_limit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = save(kind, tmp_path / "hf", dtype=dtype, depth=6)
    reader, tower = load(theirs), load(to_mistral_format(theirs, tmp_path / "native"))
    assert tower.dtype == dtype
    batch = reader.preprocess(IMAGES)
    exact = Reference(reader, torch.float32).run(batch)["embeddings"]
    limit = HALF_TOLERANCE * relative_error(Reference(reader, dtype).run(batch)["embeddings"], exact)
    assert relative_error(tower.forward(tower.preprocess(IMAGES)), exact) <= limit


def test_rotation_is_fp32_unlike_in_transformers(tmp_path: Path) -> None:
    theirs = save("llava", tmp_path / "hf", dtype=torch.bfloat16)
    towers = load(theirs), load(to_mistral_format(theirs, tmp_path / "native"))
    rotations = [tower.config.rotary.rotation for tower in towers if tower.config.rotary is not None]
    assert rotations == ["activation", "float32"]
    first, second = (tower.encode(IMAGES[0])[0].embeddings for tower in towers)
    assert 0.0 < relative_error(first, second) < 0.05


@pytest.mark.parametrize(("kind", "files"), [("llava", "index"), ("mistral3", "numbered"), ("llava", "rank")])
def test_shards_load_with_and_without_an_index(kind: str, files: str, saved: Saved, tmp_path: Path) -> None:
    theirs, native = saved(kind)
    folder = to_mistral_format(theirs, tmp_path / "shards", files=files)
    assert len(list(folder.glob("consolidated*.safetensors"))) == 2
    assert (folder / "consolidated.safetensors.index.json").exists() == (files == "index")
    assert same(load(folder), load(native))


def test_folder_with_both_formats_is_read_like_transformers_does(saved: Saved, tmp_path: Path) -> None:
    theirs, native = saved("mistral3")
    shutil.copytree(theirs, tmp_path / "both")
    shutil.copytree(native, tmp_path / "both", dirs_exist_ok=True)
    tower = load(tmp_path / "both")
    assert (tower.family.layout, tower.config.family) == ("hf", "mistral3")
    (tmp_path / "both" / "config.json").unlink()
    again = load(tmp_path / "both")
    assert (again.family.layout, again.config.family) == ("mistral", "mistral_format")
    assert same(tower, again)


def test_parity_reports_that_transformers_cannot_read_it(saved: Saved) -> None:
    tower = load(saved("llava")[1])
    with pytest.raises(errors.ReferenceModelError, match="transformers cannot read the format of"):
        compare(tower, tower.preprocess(IMAGES))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_prepared_like_by_transformers_without_files(kind: str, saved: Saved, tmp_path: Path) -> None:
    theirs, native = saved(kind)
    assert not list(native.glob("*processor*"))
    expected, found = load(theirs).preprocess(IMAGES), load(native).preprocess(IMAGES)
    assert torch.equal(found.pixels, expected.pixels)
    expected_small, small = (load(folder).preprocess(IMAGES, longest_edge=84).pixels for folder in (theirs, native))
    assert torch.equal(small, expected_small)
    assert len(small) < len(found.pixels)
    # A processor file overrides the defaults.
    shutil.copytree(native, tmp_path / "with file")
    processor = json.loads((theirs / "preprocessor_config.json").read_text())
    processor["image_mean"] = [0.0, 0.0, 0.0]
    (tmp_path / "with file" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert not torch.equal(load(tmp_path / "with file").preprocess(IMAGES).pixels, expected.pixels)


def test_options_work_without_files(saved: Saved) -> None:
    _, native = saved("mistral3")
    smaller = load(native, delay_load=True, processor_options={"size": {"longest_edge": 84}})
    assert smaller.count_tokens(300, 300) == 9
    plain = load(native, delay_load=True, processor_options={"do_normalize": False}).preprocess(IMAGES)
    assert 0.0 <= plain.pixels.min() < plain.pixels.max() <= 1.0
    with pytest.raises(errors.UsageError, match=r"must be among .* got crop"):
        load(native, delay_load=True, processor_options={"crop": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_mistrals_own_preprocessing_needs_no_files(kind: str, saved: Saved) -> None:
    theirs, native = (load(folder, preprocessing="mistral") for folder in saved(kind))
    assert same(theirs, native)
    assert not torch.equal(native.preprocess(IMAGES).pixels, load(saved(kind)[1]).preprocess(IMAGES).pixels)


def test_max_image_size_overrides_image_size(saved: Saved, tmp_path: Path) -> None:
    theirs, _ = saved("llava")
    folder = to_mistral_format(theirs, tmp_path / "native", image_size=64, max_image_size=320)
    for preprocessing in ("hf", "mistral"):
        assert load(folder, delay_load=True, preprocessing=preprocessing).count_tokens(1000, 1000) == 400


@pytest.mark.parametrize(("bias", "said"), [(True, None), (False, None), (True, False), (False, True)])
def test_checkpoint_decides_whether_the_adapter_has_biases(bias: bool, said: bool | None, tmp_path: Path) -> None:
    theirs = save("llava", tmp_path / "hf", multimodal_projector_bias=bias)
    folder = to_mistral_format(theirs, tmp_path / "native", adapter_bias=said)
    waiting = load(folder, delay_load=True)
    assert waiting.count_tokens(64, 64) == 16
    assert waiting.config.projector is not None
    assert waiting.config.projector.bias == (said is not False)
    tower = waiting.load()
    assert tower.config.projector is not None
    assert tower.config.projector.bias == bias
    assert ("projector.linear_1.bias" in tower.graph.sources) == bias
    assert same(tower, load(theirs))


def test_one_bias_without_the_other_is_incomplete(saved: Saved, tmp_path: Path) -> None:
    _, native = saved("llava")
    for name in ("w_in", "w_out"):
        folder = tmp_path / name
        shutil.copytree(native, folder)
        tensors = load_file(native / "consolidated.safetensors")
        del tensors[f"vision_language_adapter.{name}.bias"]
        save_file(tensors, folder / "consolidated.safetensors")
        with pytest.raises(errors.CheckpointIncompleteError, match=rf"projector\.{name}\.bias"):
            load(folder)


def test_norm_and_merging_are_separate_options(saved: Saved, tmp_path: Path) -> None:
    empty = read(PIXTRAL, mm_projector_id="", spatial_merge_size=1, add_pre_mm_projector_layer_norm=False)
    assert empty.config == read(PIXTRAL).config
    theirs, _ = saved("mistral3")
    folder = to_mistral_format(theirs, tmp_path / "native", add_pre_mm_projector_layer_norm=False)
    tensors = load_file(folder / "consolidated.safetensors")
    del tensors["pre_mm_projector_norm.weight"]
    save_file(tensors, folder / "consolidated.safetensors")
    tower = load(folder)
    batch = tower.preprocess(IMAGES[0])
    (image,) = tile_images(batch, tower.config)
    assert relative_error(tower.forward(batch), by_definition(folder, image)) <= 1e-5
    alone = read(PIXTRAL, add_pre_mm_projector_layer_norm=True).config.projector
    assert alone is not None
    assert alone.norm == Normalization("rms_norm", 1e-5, "before_weight")
    assert not alone.merging_linear


WRONG: dict[str, list[object]] = {
    "vision_encoder.hidden_size": [None],
    "vision_encoder.num_hidden_layers": ["24"],
    "vision_encoder.num_attention_heads": [0, 7],
    "vision_encoder.intermediate_size": [None],
    "vision_encoder.patch_size": [16.0],
    "vision_encoder.image_size": [None],
    "vision_encoder.max_image_size": [0],
    "vision_encoder.rope_theta": [0.0],
    "vision_encoder.adapter_bias": [1],
    "vision_encoder.mm_projector_id": ["average"],
    "vision_encoder.spatial_merge_size": [2],
    "vision_encoder.add_pre_mm_projector_layer_norm": ["yes"],
    "dim": [None, "5120", 0],
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_value_is_rejected_by_file_and_key(key: str) -> None:
    section, _, name = key.rpartition(".")
    for value in WRONG[key]:
        with pytest.raises(errors.ConfigError, match=rf"^params\.json: {key} must be "):
            read(PIXTRAL, **{name: value}) if section else read({**PIXTRAL, name: value})


def test_missing_values_have_the_defaults_of_mistrals_library() -> None:
    config = read(PIXTRAL, num_channels=None, rope_theta=None, spatial_merge_size=None).config
    assert (config.patch.channels, config.merge) == (3, 1)
    assert config.rotary is not None
    assert config.rotary.theta == 1e4


def test_has_vision_needs_the_encoder(tmp_path: Path) -> None:
    for name, values, expected in (
        ("pixtral", PIXTRAL, True),
        ("typed", {**MISTRAL3, "model_type": "transformer"}, True),
        ("text", {"dim": 4096, "n_layers": 32, "vocab_size": 32768}, False),
        ("null", {"dim": 4096, "vision_encoder": None}, False),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(values))
        assert has_vision(folder) == expected, name
    with pytest.raises(errors.NoVisionTowerError, match=r"params\.json: there is no `vision_encoder`"):
        load(tmp_path / "text")
    # The key has no meaning in another file.
    (tmp_path / "text" / "config.json").write_text(json.dumps({"vision_encoder": {}}))
    assert not has_vision(tmp_path / "text")
