"""The features an engine may ask for (layers, class token), and the interface of engines that bring their own pixels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.towers.clip import save_clip, save_clip_vision
from support.towers.llava import save_llava
from support.towers.llava_next import save_llava_next
from support.towers.siglip import save_siglip, save_siglip_vision

from tritontower import VisionTower
from tritontower.checkpoint import checkpoint, files
from tritontower.errors import CheckpointNotFoundError, TowerNotLoadedError, UsageError
from tritontower.parity.parity import compare, relative_error

SAVES: dict[str, Callable[..., Path]] = {
    "clip": save_clip,
    "clip_vision_model": save_clip_vision,
    "siglip": save_siglip,
    "siglip_vision_model": save_siglip_vision,
    "llava": save_llava,
    "llava_next": save_llava_next,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS: list[int | list[int]] = [-1, -2, 0, 1, 3, -4, [-2], [0, -1], [2, 1, -4]]
ENCODERS = ["clip", "clip_vision_model", "siglip", "siglip_vision_model"]
each_encoder = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of three blocks of each kind."""
    root = tmp_path_factory.mktemp("features")
    return {name: save(root / name, depth=3) for name, save in SAVES.items()}


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


def pixels_for(tower: VisionTower, count: int = 2) -> torch.Tensor:
    """Preprocessed images of the size that the checkpoint's configuration names, a multiple of a patch or not."""
    side = {"clip": 56, "llava": 56, "llava_next": 56, "siglip": 60}[tower.config.family]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def hidden_states(folder: Path, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
    """What transformers' encoder has between its blocks, the input of the first one at the front."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    encoder = getattr(model, "vision_model", None) or getattr(model, "vision_tower", None) or model
    with torch.inference_mode():
        found: Sequence[torch.Tensor] = encoder(pixels, output_hidden_states=True).hidden_states
    return found


def selected(states: Sequence[torch.Tensor], layer: int | list[int], select: str, *, class_token: bool) -> torch.Tensor:
    """As LLaVA's own code selects features."""
    several = layer if isinstance(layer, list) else [layer]
    drop = 1 if class_token and select == "patch" else 0
    return torch.cat([states[index][:, drop:] for index in several], dim=-1)


# -- other features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["clip", "clip_vision_model"])
def test_layers_of_clip_are_the_hidden_states_of_transformers(
    name: str, layer: int | list[int], select: str, folders: dict[str, Path]
) -> None:
    tower = load(folders[name], feature_layer=layer, feature_select=select)
    pixels = pixels_for(tower)
    expected = selected(hidden_states(folders[name], pixels), layer, select, class_token=True)
    actual = tower(pixels)
    assert actual.shape == expected.shape == (2, 16 + (select == "cls_patch"), tower.hidden_size)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["siglip", "siglip_vision_model"])
def test_layers_of_siglip_are_the_hidden_states_of_transformers(
    name: str, layer: int | list[int], folders: dict[str, Path]
) -> None:
    tower = load(folders[name], feature_layer=layer, feature_select="patch")
    pixels = pixels_for(tower)
    expected = selected(hidden_states(folders[name], pixels), layer, "patch", class_token=False)
    actual = tower(pixels)
    assert actual.shape == expected.shape == (2, 16, tower.hidden_size)
    assert relative_error(actual, expected) <= 1e-5


@each_encoder
def test_without_a_choice_there_are_the_last_hidden_state_and_the_pooled_row(
    name: str, folders: dict[str, Path]
) -> None:
    from transformers import AutoModel

    tower = load(folders[name])
    model = AutoModel.from_pretrained(folders[name], attn_implementation="sdpa").eval()
    pixels = pixels_for(tower)
    with torch.inference_mode():
        expected = getattr(model, "vision_model", model)(pixels)
    assert relative_error(tower(pixels), expected.last_hidden_state) <= 1e-5
    images = [noise(70, 40, 1), noise(30, 90, 2)]
    batch = tower.preprocess(images)
    assert compare(tower, batch).outputs.keys() == {"embeddings", "pooled"}
    for embedding, pooled in zip(tower.encode(images), tower.run(batch)["pooled"], strict=True):
        assert embedding.pooled is not None
        assert torch.equal(embedding.pooled.flatten(), pooled)


@each_encoder
def test_another_layer_has_no_pooled_row(name: str, folders: dict[str, Path]) -> None:
    assert load(folders[name]).encode(noise(50, 50))[0].pooled is not None
    assert load(folders[name], feature_layer=-1).encode(noise(50, 50))[0].pooled is None


@pytest.mark.parametrize(("name", "layer"), [("llava", -1), ("llava", 0), ("llava_next", -1), ("llava_next", 1)])
def test_layers_of_a_language_model_s_tower_go_through_its_projector(
    name: str, layer: int, folders: dict[str, Path]
) -> None:
    tower = load(folders[name], feature_layer=layer)
    assert tower.config.features == (layer % 4,)
    images = [noise(70, 40, 1), noise(30, 190, 2)]
    assert compare(tower, tower.preprocess(images)).passed
    usual = load(folders[name]).forward(tower.preprocess(images))
    assert relative_error(tower.forward(tower.preprocess(images)), usual) > 0.01


def test_class_token_of_llava_can_be_kept(folders: dict[str, Path]) -> None:
    kept, usual = load(folders["llava"], feature_select="cls_patch"), load(folders["llava"])
    batch = kept.preprocess([noise(70, 40, 1), noise(40, 70, 2)])
    assert kept.count_tokens(70, 40) == usual.count_tokens(70, 40) + 1 == 17
    assert compare(kept, batch).passed
    with_it, without = kept.forward(batch), usual.forward(usual.preprocess([noise(70, 40, 1), noise(40, 70, 2)]))
    assert torch.equal(with_it.view(2, 17, -1)[:, 1:], without.view(2, 16, -1))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("clip", {"feature_layer": 4}, "range from -4 to 3 for 3 blocks, got 4"),
    ("clip", {"feature_layer": -5}, "got -5"),
    ("clip", {"feature_layer": [1, 9]}, "got 9"),
    ("clip", {"feature_layer": []}, "empty"),
    ("clip", {"feature_layer": True}, "got True"),
    ("clip", {"feature_layer": 1.0}, "got 1.0"),
    ("clip", {"feature_layer": "-2"}, "got '-2'"),
    ("clip", {"feature_select": "cls"}, "'patch', 'cls_patch', got 'cls'"),
    ("siglip", {"feature_select": "cls_patch"}, "no class token"),
    ("llava", {"feature_layer": [1, 2]}, r"projector takes \(1\), got 2"),
    ("llava_next", {"feature_select": "cls_patch"}, "tiles"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{n} {o}" for n, o, _ in REFUSED])
def test_features_that_do_not_exist_are_refused(
    name: str, options: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        load(folders[name], delay_load=True, **options)


# -- only what is needed is built and read ----------------------------------------------------------------------------


class RecordingHandle:
    """A safetensors handle that remembers which tensors were read through it."""

    def __init__(self, handle: Any, read: list[str]) -> None:
        self._handle, self._read = handle, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self._read.append(name)
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stored names of the tensors that are read in this test."""
    names: list[str] = []
    original = files.open_safetensors
    monkeypatch.setattr(checkpoint, "open_safetensors", lambda path: RecordingHandle(original(path), names))
    return names


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


UNNEEDED: list[tuple[str, int | None, tuple[str, ...]]] = [
    ("llava", None, ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")),
    ("llava", -1, ("vision_tower.post_layernorm.",)),
    ("llava", 0, ("vision_tower.encoder.", "vision_tower.post_layernorm.")),
    ("llava_next", None, ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")),
    ("clip", None, ("visual_projection.", "text_projection.", "text_model.", "logit_scale")),
    ("clip_vision_model", None, ()),
    ("clip_vision_model", -2, ("encoder.layers.2.", "post_layernorm.")),
    ("siglip", None, ("text_model.", "logit_")),
    ("siglip_vision_model", None, ()),
    ("siglip_vision_model", -1, ("post_layernorm.", "head.")),
    ("siglip_vision_model", 1, ("encoder.layers.1.", "encoder.layers.2.", "post_layernorm.", "head.")),
]


@pytest.mark.parametrize(("name", "layer", "unneeded"), UNNEEDED)
def test_only_the_needed_tensors_are_read_and_only_the_needed_blocks_built(
    name: str, layer: int | None, unneeded: tuple[str, ...], folders: dict[str, Path], read: list[str]
) -> None:
    tower = load(folders[name], feature_layer=layer)
    stored = {found for found in stored_names(folders[name]) if not found.startswith(("language_model.", "lm_head."))}
    assert sorted(read) == sorted(found for found in stored if not found.startswith(unneeded))
    assert {node.block for node in tower.graph.nodes} - {None} == set(range(tower.config.blocks_needed))
    assert all(any(found.startswith(prefix) for found in stored) for prefix in unneeded)


def test_blocks_behind_the_last_needed_one_may_be_damaged_or_missing(tmp_path: Path, folders: dict[str, Path]) -> None:
    tensors = load_file(folders["llava"] / "model.safetensors")
    batch = load(folders["llava"], delay_load=True).preprocess(noise(60, 60))
    expected = load(folders["llava"]).forward(batch)
    last = [name for name in tensors if ".layers.2." in name]
    assert last
    for kind in ("missing", "damaged"):
        folder = tmp_path / kind
        folder.mkdir()
        for file in folders["llava"].glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        kept = {name: tensor for name, tensor in tensors.items() if name not in last}
        if kind == "damaged":
            kept |= {name: torch.full((3,), 7, dtype=torch.int8) for name in last}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(load(folder).forward(batch), expected), kind


# -- the interface of engines that bring their own pixels -------------------------------------------------------------


@pytest.fixture
def without_weights(tmp_path: Path, folders: dict[str, Path]) -> Callable[[str], Path]:
    """Copies of the checkpoints without their weight files."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in folders[name].glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy


FACTS = [
    ("clip", 64, 16, 64),
    ("clip_vision_model", 64, 16, 64),
    ("siglip", 64, 16, 64),
    ("siglip_vision_model", 64, 16, 64),
    ("llava", 48, 16, 64),
]


@pytest.mark.parametrize(("name", "hidden_size", "num_patches", "width"), FACTS)
def test_everything_about_a_tower_is_known_before_a_weight_file_is_opened(
    name: str,
    hidden_size: int,
    num_patches: int,
    width: int,
    without_weights: Callable[[str], Path],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Path] = []
    original = files.open_safetensors

    def watch(path: Path) -> Any:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(checkpoint, "open_safetensors", watch)
    bare = without_weights(name)
    for folder in (folders[name], bare):
        tower = load(folder, delay_load=True)
        assert not tower.is_loaded
        assert tower.config.width == width
        assert (tower.hidden_size, tower.num_patches) == (hidden_size, num_patches)
        assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
        dummy = tower.dummy_feature
        assert (dummy.shape, dummy.dtype, dummy.device) == ((1, hidden_size), torch.float32, torch.device("cpu"))
        assert not dummy.any()
        assert tower.count_tokens(300, 200) == num_patches + tower.config.keep_class_token
        with pytest.raises(TowerNotLoadedError, match=r"load\(\)"):
            tower(pixels_for(tower))
        assert opened == []
    with pytest.raises(CheckpointNotFoundError):
        load(bare, delay_load=True).load()
    tower = load(folders[name], delay_load=True).load()
    assert opened == [folders[name] / "model.safetensors"]
    assert tower(pixels_for(tower)).shape == (2, num_patches + tower.config.keep_class_token, hidden_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
def test_forward_takes_a_batch_or_a_list_and_answers_in_its_dtype(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    tower = load(folders[name])
    pixels = pixels_for(tower, 3).to(dtype)
    rows = tower(pixels)
    assert rows.dtype == dtype
    assert rows.shape[0] == 3
    listed = tower(list(pixels))
    assert isinstance(listed, list)
    assert [part.dtype for part in listed] == [dtype] * 3
    assert all(torch.equal(part, row) for part, row in zip(listed, rows, strict=True))
    # The tower computes in its own dtype, so what comes out is its fp32 result, rounded once.
    assert torch.equal(rows, tower(pixels.float()).to(dtype))
    assert relative_error(rows, tower(pixels.float())) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
def test_a_16_bit_tower_answers_fp32_pixels_in_fp32(name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    tower = load(folders[name], dtype=dtype)
    pixels = pixels_for(tower)
    rows = tower(pixels)
    assert rows.dtype == torch.float32
    assert tower.dummy_feature.dtype == tower.dtype == dtype
    exact = load(folders[name])(pixels)
    assert 0 < relative_error(rows, exact) <= 16 * torch.finfo(dtype).eps


def test_pixels_through_llava_are_those_of_its_own_selection(folders: dict[str, Path]) -> None:
    from transformers import LlavaForConditionalGeneration

    tower = load(folders["llava"])
    model = LlavaForConditionalGeneration.from_pretrained(folders["llava"], attn_implementation="sdpa").eval()
    pixels = pixels_for(tower)
    states = hidden_states(folders["llava"], pixels)
    with torch.inference_mode():
        expected = model.model.multi_modal_projector(states[-2][:, 1:])
    assert relative_error(tower(pixels), expected) <= 1e-5


def test_no_pixels_are_no_features(folders: dict[str, Path]) -> None:
    tower = load(folders["clip"])
    assert tower(torch.empty(0, 3, 56, 56)).shape == (0, 0, 64)
    assert tower([]) == []
