"""Gemma 3, ShieldGemma 2 and PaliGemma: pan-and-scan, the pooled projector, and PaliGemma's width."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.checkpoints import change_tensors, noise
from support.probing import record_values
from support.towers import all_cases
from support.towers.gemma3 import PAN_AND_SCAN, save_gemma3

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.errors import UsageError
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import compare, relative_error

GEMMA, SHIELD, PALIGEMMA = (read_summary(name).example for name in ("gemma3", "shieldgemma2", "paligemma"))


def read(values: Any) -> TowerConfig:
    return read_family(ConfigReader(dict(values))).config


def load(folder: Path, **options: Any) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma3(tmp_path_factory.mktemp("gemma") / "model", processor={"do_convert_rgb": None})


@pytest.fixture(scope="module")
def paligemma(saved: Any) -> Path:
    folder: Path = saved(next(case for case in all_cases() if case.name == "paligemma"))
    return folder


class TestReading:
    def test_shieldgemma_is_the_4b_model(self) -> None:
        assert read(SHIELD) == read(GEMMA)

    @pytest.mark.parametrize(("image", "patches"), [(224, 256), (448, 1024), (896, 4096)])
    def test_paligemma_for_every_published_image_size(self, image: int, patches: int) -> None:
        config = read({**PALIGEMMA, "vision_config": {**PALIGEMMA["vision_config"], "image_size": image}})
        assert config.num_patches == patches

    def test_width_of_paligemma_is_that_of_the_top_level(self) -> None:
        """As in transformers, which overwrites the key in ``vision_config``."""
        vision = {**PALIGEMMA["vision_config"], "projection_dim": 7}
        assert read({**PALIGEMMA, "projection_dim": 2304, "vision_config": vision}).hidden_size == 2304


class TestPanAndScan:
    @pytest.mark.parametrize(("size", "crops"), [((300, 64), 3), ((64, 300), 3), ((157, 243), 2), ((90, 90), 0)])
    def test_crops_follow_the_whole_image(self, size: tuple[int, int], crops: int, gemma: Path) -> None:
        """Each tile has the tokens that it would have as an image of its own."""
        image = noise(*size, seed=3)
        tower = load(gemma, processor_options=PAN_AND_SCAN)
        (seen,) = tower.encode([image])
        assert seen.num_tokens == 16 * (1 + crops) == tower.count_tokens(*size)
        expected = torch.cat([embedding.embeddings for embedding in load(gemma).encode([image, *cut(image, crops)])])
        assert relative_error(seen.embeddings, expected) <= 1e-6

    def test_option_agrees_with_that_of_transformers(self, gemma: Path) -> None:
        from transformers import Gemma3ForConditionalGeneration
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        images = [noise(300, 64, 1), noise(90, 90, 2), noise(60, 200, 3)]
        processor = AutoImageProcessor.from_pretrained(gemma, backend="pil", trust_remote_code=False)
        model = Gemma3ForConditionalGeneration.from_pretrained(gemma, attn_implementation="sdpa").eval()
        decoded = [[Image.fromarray(image)] for image in images]
        inputs = processor(images=decoded, do_convert_rgb=False, return_tensors="pt", **PAN_AND_SCAN)
        with torch.inference_mode():
            rows = model.model.get_image_features(inputs["pixel_values"].flatten(0, -4)).pooler_output
        counts = [1 + int(crops) for crops in inputs["num_crops"]]
        assert counts == [4, 1, 4]
        tower = load(gemma, processor_options=PAN_AND_SCAN)
        for ours, theirs in zip(tower.encode(images), rows.split(counts), strict=True):
            assert relative_error(ours.embeddings, theirs.flatten(0, 1)) <= 1e-5

    def test_paligemma_has_no_such_option(self, paligemma: Path) -> None:
        with pytest.raises(UsageError, match="do_pan_and_scan"):
            load(paligemma, delay_load=True, processor_options={"do_pan_and_scan": True})


def cut(image: np.ndarray, crops: int) -> list[np.ndarray]:
    """Cuts the longer side into equal parts; the last is the rest."""
    if not crops:
        return []
    axis = int(image.shape[1] > image.shape[0])
    side = -(-image.shape[axis] // crops)
    return [np.ascontiguousarray(part) for part in np.split(image, range(side, image.shape[axis], side), axis)]


class TestProjector:
    def test_features_are_those_after_the_output_norm(self, gemma: Path) -> None:
        towers = load(gemma), load(gemma, feature_layer=-1)
        assert ["output_norm" in {node.name for node in tower.graph.nodes} for tower in towers] == [True, False]
        with_norm, without = (tower.encode([noise(100, 60)])[0].embeddings for tower in towers)
        assert relative_error(without, with_norm) > 0.01

    def test_squares_of_patches_are_averaged(self, gemma: Path) -> None:
        tower = load(gemma)
        batch = tower.preprocess([noise(100, 60)])
        normed, pooled = record_values(tower, batch, "output_norm_rows", "projector.pooled")
        grid = torch.empty(8, 8, 64)
        grid[batch.attention.positions[:, 0].long(), batch.attention.positions[:, 1].long()] = normed
        squares = grid.unflatten(0, (4, 2)).unflatten(2, (4, 2)).mean((1, 3)).flatten(0, 1)
        assert relative_error(pooled, squares) <= 1e-6

    def test_norm_multiplies_by_one_plus_its_weight(self, gemma: Path, tmp_path: Path) -> None:
        """A weight of zeros keeps the normalized rows, which another norm would set to zero."""
        name = "multi_modal_projector.mm_soft_emb_norm.weight"
        tower = load(change_tensors(gemma, tmp_path / "zeros", lambda tensors: tensors[name].zero_()))
        batch = tower.preprocess([noise(100, 60)])
        assert compare(tower, batch).passed
        assert float(tower.forward(batch).norm()) > 1.0

    def test_paligemma_embeddings_are_not_scaled(self, paligemma: Path) -> None:
        """Old releases of transformers divided them by the root of their width."""
        tower = load(paligemma)
        normed, embeddings = record_values(tower, tower.preprocess([noise(50, 50)]), "output_norm_rows", "embeddings")
        tensors = load_file(paligemma / "model.safetensors")
        weight, bias = (tensors[f"multi_modal_projector.linear.{role}"] for role in ("weight", "bias"))
        assert relative_error(embeddings, normed @ weight.T + bias) <= 1e-5
