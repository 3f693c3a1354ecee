"""Gemma 3, ShieldGemma 2 and PaliGemma: what is their own beside what every tower is held to."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import noise
from support.towers.gemma3 import PAN_AND_SCAN, save_gemma3
from support.towers.paligemma import save_paligemma

from tritontower import VisionTower, has_vision
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Normalization, TowerConfig
from tritontower.errors import ConfigError, NoVisionTowerError, UsageError
from tritontower.graph.builder import build
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import compare, compare_nodes, relative_error

GEMMA, SHIELD, PALIGEMMA = (read_summary(name).example for name in ("gemma3", "shieldgemma2", "paligemma"))


def read(values: dict[str, Any]) -> TowerConfig:
    return read_family(ConfigReader(values)).config


def changed(values: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``values`` with the one at the dotted ``key`` replaced; the key is dropped where the new one is ``...``."""
    head, _, rest = key.partition(".")
    if rest:
        return {**values, head: changed(values[head], rest, value)}
    return {name: v for name, v in {**values, head: value}.items() if v is not ...}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma3(tmp_path_factory.mktemp("gemma") / "model", processor={"do_convert_rgb": None})


class TestReading:
    def test_the_published_tower(self) -> None:
        config = read(GEMMA)
        assert (config.width, config.depth, config.heads, config.head_dim, config.mlp_hidden) == (
            1152,
            27,
            16,
            72,
            4304,
        )
        assert config.num_patches == 64 * 64
        assert config.merge == 4
        assert config.activation == "gelu_tanh"
        assert config.norm == config.output_norm == Normalization("layer_norm", 1e-6)
        assert config.projector is not None
        assert config.projector.norm == Normalization("gemma_rms_norm", 1e-6)
        assert config.features_normed

    def test_shieldgemma_is_the_4b_model(self) -> None:
        assert read(SHIELD) == read(GEMMA)

    @pytest.mark.parametrize(
        ("width", "parameters"),
        # The encoder with its output norm, a norm of 1152 and a matrix of 1152 by the language model's width.
        [(2560, 416_866_032 + 2_950_272), (3840, 416_866_032 + 4_424_832), (5376, 416_866_032 + 6_194_304)],
        ids=["4B", "12B", "27B"],
    )
    def test_parameters_of_all_published_sizes(self, width: int, parameters: int) -> None:
        assert build(read(changed(GEMMA, "text_config.hidden_size", width))).parameters == parameters

    @pytest.mark.parametrize(("image", "patches"), [(224, 256), (448, 1024), (896, 4096)])
    def test_paligemma_for_every_published_image_size(self, image: int, patches: int) -> None:
        config = read(changed(PALIGEMMA, "vision_config.image_size", image))
        assert config.num_patches == patches
        assert (config.merge, config.hidden_size, config.features_normed) == (1, 2048, True)
        without_table = build(config).parameters - patches * 1152
        assert without_table == 416_866_032 - 4096 * 1152 + 1152 * 2048 + 2048

    def test_what_a_sparse_file_leaves_out_is_what_transformers_assumes(self) -> None:
        from transformers import Gemma3Config, PaliGemmaConfig

        for values, kind in ((GEMMA, Gemma3Config), (PALIGEMMA, PaliGemmaConfig)):
            filled = kind(**values).to_dict()
            assert read(filled) == read(values)
        sparse = {"model_type": "gemma3", "mm_tokens_per_image": 49, "vision_config": {}, "text_config": {}}
        filled = {**Gemma3Config(**sparse).to_dict(), "model_type": "gemma3"}
        assert filled["vision_config"]["num_hidden_layers"] == read(sparse).depth == 12
        assert read(filled) == read(sparse)

    def test_the_projection_of_paligemma_is_as_wide_as_the_top_level_says(self) -> None:
        """As in transformers, which writes that number over the one in ``vision_config``."""
        assert read(changed(PALIGEMMA, "projection_dim", 2304)).hidden_size == 2304
        assert read(changed(PALIGEMMA, "vision_config.projection_dim", 7)).hidden_size == 2048

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("vision_config", ...),
            ("vision_config.model_type", "clip_vision_model"),
            ("vision_config.num_attention_heads", 7),
            ("vision_config.patch_size", 0),
            ("vision_config.patch_size", [14, 14]),
            ("vision_config.image_size", 13),
            ("vision_config.hidden_act", "gelu_fast"),
            ("vision_config.layer_norm_eps", -1e-6),
            ("vision_config.num_hidden_layers", 2.5),
            ("mm_tokens_per_image", 0),
            ("mm_tokens_per_image", 200),
            ("mm_tokens_per_image", 225),
            ("mm_tokens_per_image", 4097),
            ("text_config.hidden_size", "2560"),
            ("text_config", {"model_type": "mamba"}),
        ],
    )
    def test_impossible_values_name_key_and_what_is_allowed(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError) as caught:
            read(changed(GEMMA, key, value))
        assert key in str(caught.value)
        assert "must be" in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("vision_config", ...), ("projection_dim", 0), ("projection_dim", True), ("vision_config.image_size", -224)],
    )
    def test_impossible_values_of_paligemma(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            read(changed(PALIGEMMA, key, value))

    def test_relatives_without_such_a_tower_are_told_apart(self, tmp_path: Path) -> None:
        with pytest.raises(NoVisionTowerError):
            read({"model_type": "gemma3_text", "hidden_size": 1152})
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "colpali", "vlm_config": PALIGEMMA}))
        assert not has_vision(tmp_path)


class TestPanAndScan:
    @pytest.mark.parametrize(("size", "crops"), [((300, 64), 3), ((64, 300), 3), ((157, 243), 2), ((90, 90), 0)])
    def test_crops_stand_behind_the_whole_image(self, size: tuple[int, int], crops: int, gemma: Path) -> None:
        """The tokens of all tiles one after the other: each is what that tile alone would give."""
        image = noise(*size, seed=3)
        tower = VisionTower.from_pretrained(gemma, device="cpu", processor_options=PAN_AND_SCAN)
        (seen,) = tower.encode([image])
        assert seen.num_tokens == 16 * (1 + crops) == tower.count_tokens(*size)
        plain = VisionTower.from_pretrained(gemma, device="cpu")
        tiles = [image, *cut(image, crops)]
        expected = torch.cat([embedding.embeddings for embedding in plain.encode(tiles)])
        assert relative_error(seen.embeddings, expected) <= 1e-6

    def test_the_option_gives_what_transformers_gives_when_asked(self, gemma: Path) -> None:
        from transformers import Gemma3ForConditionalGeneration
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        images = [noise(300, 64, 1), noise(90, 90, 2), noise(60, 200, 3)]
        processor = AutoImageProcessor.from_pretrained(gemma, backend="pil", trust_remote_code=False)
        model = Gemma3ForConditionalGeneration.from_pretrained(gemma, attn_implementation="sdpa").eval()
        decoded = [[Image.fromarray(image)] for image in images]
        inputs = processor(images=decoded, do_convert_rgb=False, return_tensors="pt", **PAN_AND_SCAN)
        tiles = inputs["pixel_values"].flatten(0, -4)
        with torch.inference_mode():
            rows = model.model.get_image_features(tiles).pooler_output
        counts = [1 + int(crops) for crops in inputs["num_crops"]]
        assert counts == [4, 1, 4]
        tower = VisionTower.from_pretrained(gemma, device="cpu", processor_options=PAN_AND_SCAN)
        for ours, theirs in zip(tower.encode(images), rows.split(counts), strict=True):
            assert relative_error(ours.embeddings, theirs.flatten(0, 1)) <= 1e-5

    def test_paligemma_knows_no_such_option(self, tmp_path: Path) -> None:
        folder = save_paligemma(tmp_path / "model")
        with pytest.raises(UsageError, match="do_pan_and_scan"):
            VisionTower.from_pretrained(folder, delay_load=True, processor_options={"do_pan_and_scan": True})


def cut(image: np.ndarray, crops: int) -> list[np.ndarray]:
    """Equal parts of the longer side, the last of them what is left."""
    if not crops:
        return []
    axis = int(image.shape[1] > image.shape[0])
    side = -(-image.shape[axis] // crops)
    return [np.ascontiguousarray(part) for part in np.split(image, range(side, image.shape[axis], side), axis)]


class TestNumbers:
    def test_features_are_those_behind_the_output_norm(self, gemma: Path) -> None:
        tower = VisionTower.from_pretrained(gemma, device="cpu")
        image = [noise(100, 60)]
        before = VisionTower.from_pretrained(gemma, device="cpu", feature_layer=-1)
        assert "output_norm" in {node.name for node in tower.graph.nodes}
        assert "output_norm" not in {node.name for node in before.graph.nodes}
        with_norm, without = tower.encode(image)[0], before.encode(image)[0]
        assert relative_error(without.embeddings, with_norm.embeddings) > 0.01

    def test_neighbors_in_a_square_are_averaged(self, gemma: Path) -> None:
        """Sixteen patches of a tile are one token: those of its 4 × 4 square in the image, and no others."""
        tower = VisionTower.from_pretrained(gemma, device="cpu")
        batch = tower.preprocess([noise(100, 60)])
        found = {line.value: line for line in compare_nodes(tower, batch)}
        assert found["projector.pooled"].error <= 1e-5
        assert found["projector.norm_rows"].error <= 1e-5
        rows: dict[str, torch.Tensor] = {}
        tower.executor_for(batch).run(
            batch, lambda node, values: rows.update({n: values[n].clone() for n in node.outputs})
        )
        grid = torch.empty(8, 8, 64)
        grid[batch.attention.positions[:, 0].long(), batch.attention.positions[:, 1].long()] = rows["output_norm_rows"]
        squares = torch.stack(
            [grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for i in range(4) for j in range(4)]
        )
        assert relative_error(rows["projector.pooled"], squares) <= 1e-6

    def test_the_norm_weight_counts_from_one(self, gemma: Path, tmp_path: Path) -> None:
        """A weight of zeros leaves the normalized rows as they are, where another norm would make zeros of them."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(gemma / "model.safetensors")
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"].zero_()
        for file in gemma.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        tower = VisionTower.from_pretrained(tmp_path, device="cpu")
        assert compare(tower, tower.preprocess([noise(100, 60)])).passed
        assert float(tower.encode([noise(100, 60)])[0].embeddings.norm()) > 1.0

    def test_paligemma_embeddings_are_not_scaled(self, tmp_path: Path) -> None:
        """They are the linear's rows: not divided by the root of their width, as old releases of transformers did."""
        tower = VisionTower.from_pretrained(save_paligemma(tmp_path / "model"), device="cpu")
        batch = tower.preprocess([noise(50, 50)])
        rows: dict[str, torch.Tensor] = {}
        tower.executor_for(batch).run(
            batch, lambda node, values: rows.update({n: values[n].clone() for n in node.outputs})
        )
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / "model" / "model.safetensors")
        weight, bias = (tensors[f"multi_modal_projector.linear.{role}"] for role in ("weight", "bias"))
        expected = rows["output_norm_rows"] @ weight.T + bias
        assert relative_error(rows["embeddings"], expected) <= 1e-5
