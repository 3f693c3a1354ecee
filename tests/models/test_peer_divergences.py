"""Where other engines part from transformers today, and which test holds this one to it.

Most of these tests stand with the family that they are about; the table says where, so that none of them goes missing.
What no family's file holds is here.
"""

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.checkpoints import noise
from support.probing import (
    assert_frames_do_not_see_each_other,
    row_of,
    values_of,
)
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import Activation
from tritontower.engine.executor import Executor
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.parity.parity import Reference, relative_error

HERE = Path(__file__).parents[1]
THIS = "models/test_peer_divergences.py"

DIVERGENCES: dict[str, tuple[str, ...]] = {
    "three GELUs are told apart": (
        f"{THIS}::test_three_gelus_are_told_apart_in_the_blocks_of_every_tower",
        f"{THIS}::test_three_gelus_are_told_apart_in_the_projector_of_every_tower",
        "models/test_llava.py::test_three_gelus_are_told_apart_at_their_nodes",
        "models/test_pixtral.py::test_gelu_in_the_projector_and_silu_in_the_blocks",
    ),
    "images of a Pixtral tower do not attend to each other": (
        "models/test_pixtral.py::test_images_do_not_attend_to_each_other",
        "models/test_every_model.py::test_an_image_alone_and_in_a_pack_is_bitwise_the_same",
    ),
    "frames of a video are segments of their own": (
        f"{THIS}::test_frames_of_a_qwen2_vl_video_do_not_see_each_other",
        "models/test_qwen2_5_vl.py::test_frames_of_a_video_do_not_see_each_other",
        "models/test_qwen2_5_vl.py::test_windows_of_a_video_lie_within_a_frame",
        "models/test_qwen3_vl.py::test_frames_of_a_video_do_not_see_each_other",
    ),
    "angles of the rotary embedding are fp32": (
        f"{THIS}::test_angles_are_fp32_in_a_bf16_qwen2_vl",
        "models/test_qwen2_5_vl.py::test_angles_are_fp32_in_a_bf16_tower",
        "models/test_qwen3_vl.py::test_angles_are_fp32_in_a_bf16_tower",
        "models/test_pixtral.py::test_angles_are_fp32_in_a_bf16_tower",
    ),
    "the position table is stretched from corner to corner": (
        "models/test_qwen3_vl.py::test_the_table_is_stretched_from_corner_to_corner",
        "models/test_qwen3_vl.py::test_weights_of_the_table_are_not_rounded_to_bf16",
        "kernels/rowwise/test_positions.py::test_tables_are_stretched_from_corner_to_corner",
    ),
    "mergers take their patches in the checkpoint's layout": (
        f"{THIS}::test_a_token_of_qwen2_vl_is_made_of_its_own_four_patches",
        f"{THIS}::test_patches_joined_in_another_order_show",
        "models/test_qwen2_5_vl.py::test_a_token_is_made_of_its_own_four_patches",
        "models/test_qwen2_5_vl.py::test_merged_rows_are_put_back_into_the_images_order",
        "models/test_qwen3_vl.py::test_deepstack_mergers_normalize_whole_tokens",
        "models/test_pixtral.py::test_mistral3_merges_channel_by_channel",
        "models/test_gemma3.py::test_neighbors_in_a_square_are_averaged",
        "kernels/gemm/test_projector.py::test_is_qwen2_vls_patch_merger",
    ),
    "windows of a grid that they do not divide are smaller at the edges": (
        "models/test_qwen2_5_vl.py::test_window_blocks_see_no_further_than_their_window",
        "kernels/rowwise/test_positions.py::test_windows_are_those_of_transformers",
        "kernels/rowwise/test_positions.py::test_windows_at_the_edges_are_smaller",
    ),
    "the last row of a Pixtral image ends with one marker": (
        "integrations/test_hosts.py::test_pixtrals_rows_end_as_in_transformers_not_as_in_exllama",
    ),
    "rows of ready embeddings are counted before they are handed over": (
        "integrations/test_hosts.py::test_embeddings_that_cannot_be_the_towers_are_refused",
    ),
}
"""What is done otherwise elsewhere → the tests that would see it done so here."""

GELUS: tuple[Activation, ...] = ("quick_gelu", "gelu", "gelu_tanh")
"""x · σ(1.702 x); x · Φ(x); and the approximation of that by tanh.  They differ by up to 0.02, 0.02 and 0.0005."""


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test")}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_has_its_named_tests(divergence: str) -> None:
    for name in DIVERGENCES[divergence]:
        file, _, test = name.partition("::")
        assert test in names_in(file), f"{name} is gone, and nothing says what holds instead: {divergence}"


Load = Callable[[TowerCase], VisionTower]
CASES = all_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A small fp32 tower of a case, made once."""
    towers: dict[str, VisionTower] = {}

    def get(case: TowerCase) -> VisionTower:
        if case.name not in towers:
            folder = case.save(tmp_path_factory.mktemp("divergences") / case.name)
            towers[case.name] = VisionTower.from_pretrained(folder, device="cpu")
        return towers[case.name]

    return get


def errors_with(tower: VisionTower, batch: PackedBatch, **changes: object) -> dict[str, float]:
    """How far each output is from transformers' with these changes of the configuration, on the same weights."""
    graph = fold_still_images(fuse(build(replace(tower.config, **changes))))
    ours = Executor(graph, tower.read_weights()).run(batch)
    theirs = Reference(tower, torch.float32).run(batch)
    return {name: relative_error(rows, theirs[name]) for name, rows in ours.items()}


@each_case
def test_three_gelus_are_told_apart_in_the_blocks_of_every_tower(case: TowerCase, load: Load) -> None:
    tower = load(case)
    right = tower.config.activation
    batch = tower.preprocess([noise(90, 60, 1)])
    assert max(errors_with(tower, batch).values()) <= 1e-5
    if tower.config.gated:
        assert right == "silu"
        return
    assert right in GELUS
    for wrong in set(GELUS) - {right}:
        assert min(errors_with(tower, batch, activation=wrong).values()) > 2e-5, wrong


@each_case
def test_three_gelus_are_told_apart_in_the_projector_of_every_tower(case: TowerCase, load: Load) -> None:
    tower = load(case)
    projector = tower.config.projector
    if projector is None or projector.hidden is None:
        assert not [name for name in tower.graph.sources if "linear_2" in name]
        return
    # Exact GELU everywhere, also where the blocks have another one.
    assert projector.activation == "gelu"
    batch = tower.preprocess([noise(90, 60, 1)])
    for wrong in ("quick_gelu", "gelu_tanh"):
        changed = replace(projector, activation=wrong)
        assert errors_with(tower, batch, projector=changed)["embeddings"] > 1e-5, wrong


@pytest.fixture(scope="module")
def qwen2_vl() -> TowerCase:
    (case,) = (case for case in CASES if case.name == "qwen2_vl")
    return case


def test_frames_of_a_qwen2_vl_video_do_not_see_each_other(qwen2_vl: TowerCase, load: Load) -> None:
    tower = load(qwen2_vl)
    batch = tower.preprocess_video([noise(140, 84, seed) for seed in range(6)], min_pixels=784)
    assert batch.images.grids[0][0] == 3
    assert_frames_do_not_see_each_other(tower, batch)


def test_angles_are_fp32_in_a_bf16_qwen2_vl(qwen2_vl: TowerCase, tmp_path: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl.save(tmp_path / "model", dtype=torch.bfloat16), device="cpu")
    assert tower.dtype == torch.bfloat16
    batch = tower.preprocess(noise(28, 4200))
    assert batch.attention.side == 300
    quarter = tower.config.head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter).double() / quarter)
    angles = (batch.attention.positions[..., None].double() * frequencies).flatten(1)
    cosines, sines = values_of(tower, batch, "cosines", "sines")
    assert cosines.dtype == sines.dtype == torch.float32
    assert (cosines - angles.cos()).abs().max() < 5e-5
    assert (sines - angles.sin()).abs().max() < 5e-5
    rounded = (batch.attention.positions[..., None].bfloat16() * frequencies.bfloat16()).double().flatten(1)
    assert (rounded.cos() - angles.cos()).abs().max() > 0.1


def test_a_token_of_qwen2_vl_is_made_of_its_own_four_patches(qwen2_vl: TowerCase, load: Load) -> None:
    tower = load(qwen2_vl)
    # Nobody hears of another patch but in the attention.
    deaf = {
        name: torch.zeros_like(weight) if name.endswith("attention_output.weight") else weight
        for name, weight in tower.read_weights().items()
    }
    batch = tower.preprocess(noise(7 * 28, 5 * 28))
    assert batch.images.tile_grids == ((1, 10, 14),)
    executor = Executor(tower.graph, deaf)
    for place in ((0, 0), (1, 1), (2, 5), (9, 12), (6, 13)):
        pixels = batch.pixels.clone()
        pixels[row_of(batch, place)] += 1.0
        before, after = (executor.run(each)["embeddings"] for each in (batch, replace(batch, pixels=pixels)))
        moved = (before != after).any(1).nonzero().flatten().tolist()
        assert moved == [place[0] // 2 * 7 + place[1] // 2]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_patches_joined_in_another_order_show(name: str, load: Load) -> None:
    (case,) = (case for case in CASES if case.name == name)
    tower = load(case)
    weights = tower.read_weights()
    batch = tower.preprocess([noise(90, 60, 1)])
    exact = Reference(tower, torch.float32).run(batch)["embeddings"]
    joining = "projector.merging.weight" if "projector.merging.weight" in weights else "projector.linear_1.weight"
    rows, columns = weights[joining].shape
    patches = tower.config.rows_per_token
    by_patch = weights[joining].view(rows, patches, columns // patches)
    orders = {
        "channel by channel": by_patch.transpose(1, 2),
        "column by column": by_patch[:, [0, 2, 1, 3]],
    }
    assert relative_error(Executor(tower.graph, weights).run(batch)["embeddings"], exact) <= 1e-5
    for order, joined in orders.items():
        changed = {**weights, joining: joined.reshape(rows, columns).contiguous()}
        assert relative_error(Executor(tower.graph, changed).run(batch)["embeddings"], exact) > 0.1, order
