"""Choice of feature layers and of the class token, and the interface for engines with their own pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import Opened, change_tensors, load, noise
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.errors import CheckpointNotFoundError, TowerNotLoadedError, UsageError
from tritontower.parity.parity import compare, relative_error

ENCODERS = ["clip", "clip_vision_model", "siglip", "siglip_vision_model"]
NAMES = [*ENCODERS, "llava", "llava_next"]
each_encoder = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture
def folders(saved: Any) -> dict[str, Path]:
    """A small checkpoint of three blocks of each kind."""
    return {case.name: saved(case) for case in all_cases() if case.name in NAMES}


def make_pixels(tower: VisionTower, count: int = 2) -> torch.Tensor:
    """Returns preprocessed images of the checkpoint's size, which is a multiple of a patch or not."""
    side = 60 if tower.config.family == "siglip" else 56
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def hidden_states(folder: Path, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns the hidden states of transformers' encoder, the input of the first block first."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    encoder = getattr(model, "vision_model", None) or getattr(model, "vision_tower", None) or model
    with torch.inference_mode():
        found: Sequence[torch.Tensor] = encoder(pixels, output_hidden_states=True).hidden_states
    return found


# With either choice of the class token, from either end, several side by side.
CHOICES: list[tuple[int | list[int], str]] = [
    (-1, "patch"),
    (-2, "cls_patch"),
    (0, "cls_patch"),
    (1, "patch"),
    (3, "patch"),
    (-4, "patch"),
    ([-2], "patch"),
    ([2, 1, -4], "cls_patch"),
]


@each_encoder
def test_layers_are_the_hidden_states_of_transformers(name: str, folders: dict[str, Path]) -> None:
    states = None
    for layer, select in CHOICES:
        is_clip = name.startswith("clip")
        tower = load(folders[name], feature_layer=layer, feature_select=select if is_clip else "patch")
        pixels = make_pixels(tower)
        states = states or hidden_states(folders[name], pixels)
        first = 1 if is_clip and select == "patch" else 0
        several = layer if isinstance(layer, list) else [layer]
        expected = torch.cat([states[index][:, first:] for index in several], dim=-1)
        assert tower(pixels).shape == expected.shape == (2, 16 + (is_clip and not first), tower.hidden_size)
        assert relative_error(tower(pixels), expected) <= 1e-5, (layer, select)
        assert tower.encode(noise(50, 50))[0].pooled is None


@pytest.mark.parametrize(("name", "layer"), [("llava", 0), ("llava_next", -1), ("llava_next", 1)])
def test_other_layers_go_through_the_projector(name: str, layer: int, folders: dict[str, Path]) -> None:
    tower = load(folders[name], feature_layer=layer)
    assert tower.config.features == (layer % 4,)
    batch = tower.preprocess([noise(70, 40, 1), noise(30, 190, 2)])
    assert compare(tower, batch).passed
    assert relative_error(tower.forward(batch), load(folders[name]).forward(batch)) > 0.01


def test_class_token_of_llava_can_be_kept(folders: dict[str, Path]) -> None:
    kept, usual = load(folders["llava"], feature_select="cls_patch"), load(folders["llava"])
    images = [noise(70, 40, 1), noise(40, 70, 2)]
    batch = kept.preprocess(images)
    assert kept.count_tokens(70, 40) == usual.count_tokens(70, 40) + 1 == 17
    assert compare(kept, batch).passed
    rows = usual.forward(usual.preprocess(images)).view(2, 16, -1)
    assert torch.equal(kept.forward(batch).view(2, 17, -1)[:, 1:], rows)


REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("clip", {"feature_layer": 4}, "range from -4 to 3 for 3 blocks, got 4"),
    ("clip", {"feature_layer": [1, 9]}, "got 9"),
    ("clip", {"feature_layer": []}, "empty"),
    ("clip", {"feature_layer": True}, "got True"),
    ("clip", {"feature_layer": "-2"}, "got '-2'"),
    ("clip", {"feature_select": "cls"}, "'patch', 'cls_patch', got 'cls'"),
    ("siglip", {"feature_select": "cls_patch"}, "no class token"),
    ("llava", {"feature_layer": [1, 2]}, r"projector takes \(1\), got 2"),
    ("llava_next", {"feature_select": "cls_patch"}, "tiles"),
]


@pytest.mark.parametrize(("name", "options", "message"), REJECTED, ids=[f"{n} {o}" for n, o, _ in REJECTED])
def test_impossible_features_are_rejected(
    name: str, options: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        load(folders[name], delay_load=True, **options)


UNNEEDED: list[tuple[str, int | None, tuple[str, ...]]] = [
    ("llava", None, ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")),
    ("llava", 0, ("vision_tower.encoder.", "vision_tower.post_layernorm.")),
    ("llava_next", None, ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")),
    ("clip", None, ("visual_projection.", "text_projection.", "text_model.", "logit_scale")),
    ("clip_vision_model", -2, ("encoder.layers.2.", "post_layernorm.")),
    ("siglip", None, ("text_model.", "logit_")),
    ("siglip_vision_model", None, ()),
    ("siglip_vision_model", 1, ("encoder.layers.1.", "encoder.layers.2.", "post_layernorm.", "head.")),
]


@pytest.mark.parametrize(("name", "layer", "unneeded"), UNNEEDED)
def test_only_needed_tensors_are_read_and_built(
    name: str,
    layer: int | None,
    unneeded: tuple[str, ...],
    folders: dict[str, Path],
    opened: Opened,
) -> None:
    tower = load(folders[name], feature_layer=layer)
    with safe_open(folders[name] / "model.safetensors", "pt") as file:
        stored = {found for found in file.keys() if not found.startswith(("language_model.", "lm_head."))}  # noqa: SIM118
    assert sorted(opened.read) == sorted(found for found in stored if not found.startswith(unneeded))
    assert {node.block for node in tower.graph.nodes} - {None} == set(range(tower.config.blocks_needed))
    assert all(any(found.startswith(prefix) for found in stored) for prefix in unneeded)


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_unneeded_blocks_may_be_missing_or_damaged(kind: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    tower = load(folders["llava"])
    batch = tower.preprocess(noise(60, 60))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        last = [name for name in tensors if ".layers.2." in name]
        assert last
        for name in last:
            tensors.pop(name)
        if kind == "damaged":
            tensors |= {name: torch.full((3,), 7, dtype=torch.int8) for name in last}

    changed = load(change_tensors(folders["llava"], tmp_path / kind, change))
    assert torch.equal(changed.forward(batch), tower.forward(batch))


@pytest.mark.parametrize("name", ["clip", "siglip_vision_model", "llava"])
def test_properties_are_known_before_a_weight_file_is_opened(
    name: str, tmp_path: Path, folders: dict[str, Path], opened: Opened
) -> None:
    bare = tmp_path / name
    bare.mkdir()
    for file in folders[name].glob("*.json"):
        (bare / file.name).write_bytes(file.read_bytes())
    hidden_size = 48 if name == "llava" else 64
    for folder in (folders[name], bare):
        tower = load(folder, delay_load=True)
        tokens = 16 + tower.config.keep_class_token
        assert not tower.is_loaded
        assert tower.config.width == 64
        assert (tower.hidden_size, tower.num_patches) == (hidden_size, 16)
        assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
        dummy = tower.dummy_feature
        assert (dummy.shape, dummy.dtype, dummy.device) == ((1, hidden_size), torch.float32, torch.device("cpu"))
        assert not dummy.any()
        assert tower.count_tokens(300, 200) == tokens
        with pytest.raises(TowerNotLoadedError, match=r"load\(\)"):
            tower(make_pixels(tower))
        assert opened.files == []
    with pytest.raises(CheckpointNotFoundError):
        load(bare, delay_load=True).load()
    tower = load(folders[name], delay_load=True).load()
    assert opened.files == [folders[name] / "model.safetensors"]
    assert tower(make_pixels(tower)).shape == (2, tokens, hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["siglip", "llava"])
def test_rows_have_the_dtype_of_the_pixels(name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    tower = load(folders[name])
    exact_pixels = make_pixels(tower, 3)
    pixels = exact_pixels.to(dtype)
    rows, listed = tower(pixels), tower(list(pixels))
    assert rows.dtype == dtype
    assert rows.shape[0] == 3
    assert isinstance(listed, list)
    assert [part.dtype for part in listed] == [dtype] * 3
    assert all(torch.equal(part, row) for part, row in zip(listed, rows, strict=True))
    # The tower computes in its own dtype; its result is rounded once.
    assert torch.equal(rows, tower(pixels.float()).to(dtype))
    # A tower of this dtype returns fp32 rows for fp32 pixels.
    half = load(folders[name], dtype=dtype)
    assert half.dummy_feature.dtype == half.dtype == dtype
    assert half(exact_pixels).dtype == torch.float32
    assert relative_error(half(exact_pixels), tower(exact_pixels)) <= 16 * torch.finfo(dtype).eps


def test_no_pixels_are_no_features(folders: dict[str, Path]) -> None:
    tower = load(folders["clip"])
    assert tower(torch.empty(0, 3, 56, 56)).shape == (0, 0, 64)
    assert tower([]) == []
