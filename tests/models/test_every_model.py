"""What every tower is held to, on small random checkpoints made by transformers: the same promises for all families.

What a family has of its own (a window that does not divide, tiles, a native format) is tested in a file of its own.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.checkpoints import noise, rename_all, shard
from support.towers import TowerCase, all_cases

from tritontower import VisionTower, cli
from tritontower.checkpoint.files import strip_prefix
from tritontower.embedding import ImageEmbedding
from tritontower.engine.executor import Executor
from tritontower.errors import CheckpointIncompleteError, UsageError
from tritontower.graph.builder import build
from tritontower.graph.fusion import (
    DEFAULT_PASSES,
    KERNEL_PASSES,
    chunk_mlp,
    fold_still_images,
    fuse,
    fuse_activations,
    fuse_residual_into_norm,
)
from tritontower.kernels.runtime import dispatch
from tritontower.parity.parity import Reference, compare, compare_nodes, relative_error

CASES = all_cases()
OTHERS = [(case, name) for case in CASES for name in case.others]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

Saved = Callable[[TowerCase], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small fp32 checkpoint of a case, made once."""
    folders: dict[str, Path] = {}

    def save(case: TowerCase) -> Path:
        if case.name not in folders:
            folders[case.name] = case.save(tmp_path_factory.mktemp("towers") / case.name)
        return folders[case.name]

    return save


def images_of(case: TowerCase, count: int | None = None) -> list[np.ndarray]:
    return [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:count])]


def load(folder: Path, **options: object) -> VisionTower:
    return VisionTower.from_pretrained(folder, device="cpu", **options)


def assert_agree(ours: list[ImageEmbedding], theirs: list[torch.Tensor]) -> None:
    assert [embedding.num_tokens for embedding in ours] == [len(rows) for rows in theirs]
    for index, (embedding, rows) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(embedding.embeddings, rows) <= 1e-5, index


@each_case
def test_mixed_sizes_agree_with_transformers_from_pixels_on(case: TowerCase, saved: Saved) -> None:
    images = images_of(case)
    assert_agree(load(saved(case)).encode(images), case.reference(saved(case), images, torch.float32))


@pytest.mark.parametrize(("case", "name"), OTHERS, ids=[f"{case.name}-{name}" for case, name in OTHERS])
def test_configurations_that_nobody_published_agree_too(case: TowerCase, name: str, tmp_path: Path) -> None:
    folder = case.save(tmp_path / "model", **case.others[name])
    images = images_of(case, 3)
    tower = load(folder)
    assert_agree(tower.encode(images), case.reference(folder, images, torch.float32))
    assert compare(tower, tower.preprocess(images)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_case
def test_half_precision_errs_no_more_than_transformers(case: TowerCase, dtype: torch.dtype, tmp_path: Path) -> None:
    tower = load(case.save(tmp_path / "model", dtype=dtype, depth=6))
    assert tower.dtype == dtype
    parity = compare(tower, tower.preprocess(images_of(case)))
    for name, output in parity.outputs.items():
        assert output.reference_error is not None
        assert output.reference_error > 1e-5, name
        assert output.passed, (name, output)


@each_case
def test_every_node_agrees_with_its_module(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    batch = tower.preprocess(images_of(case, 2))
    parity = compare(tower, batch)
    assert parity.passed, parity
    assert set(parity.outputs) == set(tower.graph.outputs)
    found = compare_nodes(tower, batch)
    last = tower.config.blocks_needed - 1
    blocks = {"norm1_rows", "mixed", "attended", "mlp_hidden", "block_rows"}
    assert {line.value for line in found} >= {f"blocks.{block}.{value}" for block in (0, last) for value in blocks}
    assert [line for line in found if not line.error <= 1e-5] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_passes_leave_the_numbers_where_they_were(case: TowerCase, dtype: torch.dtype, saved: Saved) -> None:
    tower = load(saved(case), dtype=dtype)
    batch = tower.preprocess(images_of(case, 3))
    weights = tower.read_weights()
    plain = fold_still_images(build(tower.config))
    exact = Reference(tower, torch.float32).run(batch)
    expected = Executor(plain, weights).run(batch)
    every = (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)
    for passes in (DEFAULT_PASSES, every, (fuse_activations, fuse_residual_into_norm), *((one,) for one in every)):
        actual = Executor(fuse(plain, passes), weights).run(batch)
        for name, rows in expected.items():
            if dtype == torch.float32:
                assert relative_error(actual[name], rows) <= 2e-6, (name, passes)
            else:
                # Fewer roundings may move the numbers, but only towards the truth, or by next to nothing.
                limit = 1.1 * relative_error(rows, exact[name])
                assert relative_error(actual[name], exact[name]) <= limit, (name, passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_an_mlp_in_runs_of_rows_has_the_bits_of_one_at_once(case: TowerCase, dtype: torch.dtype, saved: Saved) -> None:
    tower = load(saved(case), dtype=dtype)
    batch = tower.preprocess(images_of(case, 2))
    weights = tower.read_weights()
    fused = fuse(fold_still_images(build(tower.config)))
    expected = Executor(fused, weights).run(batch)
    for rows in (1, 7, batch.workload.patches - 1):
        chunked = chunk_mlp(fused, rows)
        assert {value.most_rows for value in chunked.values.values()} == {None, rows}
        actual = Executor(chunked, weights).run(batch)
        assert all(torch.equal(actual[name], output) for name, output in expected.items()), rows


HEADS_OF_72 = [(case, changes) for case in CASES for name, changes in case.others.items() if name == "heads of 72"]


@pytest.mark.parametrize(("case", "changes"), HEADS_OF_72, ids=[case.name for case, _ in HEADS_OF_72])
def test_padded_heads_leave_the_numbers_where_they_were(
    case: TowerCase, changes: Mapping[str, Any], tmp_path: Path, kernel_device: torch.device
) -> None:
    folder = case.save(tmp_path / "model", **changes)
    tower = VisionTower.from_pretrained(folder, device=kernel_device)
    attention = next(node for node in tower.graph.nodes if node.kind == "attention")
    # Without a bias nothing can write the ones, and the heads stay as they are.
    assert ("padded_head_dim" in attention.attributes) == tower.config.qkv_bias
    batch = tower.preprocess(images_of(case, 2))
    with dispatch.use("reference"):
        plain = VisionTower.from_pretrained(folder, device=kernel_device)
        expected, on_reference = plain.run(batch), tower.run(batch)
    assert "padded_head_dim" not in next(node.attributes for node in plain.graph.nodes if node.kind == "attention")
    by_kernels = tower.run(batch)
    for name, rows in expected.items():
        assert relative_error(on_reference[name], rows) <= 1e-5, name
        assert relative_error(by_kernels[name], rows) <= 1e-5, name
    alone = tower.forward(tower.preprocess(images_of(case, 1)))
    assert torch.equal(alone, by_kernels["embeddings"][: len(alone)])
    # What kernels have arranged has no module's value to stand beside; everything else has.
    found = {line.value: line.error for line in compare_nodes(tower, batch)}
    assert {f"blocks.0.{value}" for value in ("norm1_rows", "mixed", "attended", "mlp_hidden", "block_rows")} <= set(
        found
    )
    assert "blocks.0.qkv_rows" not in found
    assert max(found.values()) <= 1e-5


@each_case
def test_kernels_in_half_precision_err_no_more_than_the_plain_graph(
    case: TowerCase, saved: Saved, kernel_device: torch.device
) -> None:
    tower = VisionTower.from_pretrained(saved(case), device=kernel_device, dtype="bfloat16")
    batch = tower.preprocess(images_of(case, 2))
    actual = tower.run(batch)
    with dispatch.use("reference"):
        exact = VisionTower.from_pretrained(saved(case), device=kernel_device, dtype="float32").run(batch)
        half = VisionTower.from_pretrained(saved(case), device=kernel_device, dtype="bfloat16")
        plain = fold_still_images(build(tower.config))
        expected = Executor(plain, half.read_weights()).run(batch)
    for name, rows in exact.items():
        assert relative_error(actual[name], rows) <= 1.1 * relative_error(expected[name], rows), name


@each_case
def test_an_image_alone_and_in_a_pack_is_bitwise_the_same(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    pack = [*images_of(case), noise(64, 48, 99)]
    packed = tower.encode(pack)
    for position in (0, len(pack) // 2, len(pack) - 1):
        (alone,) = tower.encode(pack[position])
        assert torch.equal(alone.embeddings, packed[position].embeddings), position
        assert all(map(torch.equal, alone.deepstack, packed[position].deepstack)), position
        assert alone.pooled is None or torch.equal(alone.pooled, packed[position].pooled), position
    again = tower.encode(pack[::-1])[::-1]
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(packed, again, strict=True))


@each_case
def test_tokens_are_counted_without_image_or_weights(case: TowerCase, saved: Saved) -> None:
    counting = load(saved(case), delay_load=True)
    generator = random.Random(0)
    side = case.random_size
    sizes = [(generator.randint(1, side), generator.randint(1, side)) for _ in range(40)]
    sizes = [(width, height) for width, height in sizes if max(width, height) <= 50 * min(width, height)]
    batch = counting.preprocess([np.zeros((height, width, 3), np.uint8) for width, height in sizes])
    assert list(batch.images.token_counts) == [counting.count_tokens(width, height) for width, height in sizes]
    assert batch.workload == counting.workload(sizes)
    assert not counting.is_loaded
    few = sizes[:3]
    counting.load()
    embeddings = counting.encode([noise(width, height, 5) for width, height in few])
    assert [embedding.num_tokens for embedding in embeddings] == [counting.count_tokens(*size) for size in few]
    assert {embedding.embeddings.shape[1] for embedding in embeddings} == {counting.hidden_size}


@each_case
def test_every_kernel_runs_in_the_interpreter_and_agrees(
    case: TowerCase, saved: Saved, kernel_device: torch.device
) -> None:
    tower = VisionTower.from_pretrained(saved(case), device=kernel_device)
    batch = tower.preprocess(images_of(case, 2))
    with dispatch.use("reference"):
        expected = tower.run(batch)
    actual = tower.run(batch)
    for name, rows in expected.items():
        assert relative_error(actual[name], rows) <= 1e-5, name
        assert not torch.equal(actual[name], rows), f"{name}: the kernels ran the reference"
    alone = tower.forward(tower.preprocess(images_of(case, 1)))
    assert torch.equal(alone, actual["embeddings"][: len(alone)])


@each_case
def test_every_generation_of_names_loads_the_same(case: TowerCase, saved: Saved, tmp_path: Path) -> None:
    images = images_of(case, 2)
    expected = load(saved(case)).encode(images)
    folders = [rename_all(saved(case), tmp_path / f"names-{i}", pairs) for i, pairs in enumerate(case.prefixes)]
    folders.append(shard(saved(case), tmp_path / "shards"))
    for folder in folders:
        again = load(folder).encode(images)
        assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(again, expected, strict=True)), folder.name


@each_case
def test_the_memory_plan_is_that_of_the_pass(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    batch = tower.preprocess(images_of(case))
    plan = tower.memory_plan(tower.workload(case.sizes))
    assert plan.workload == batch.workload
    tower.forward(batch)
    assert tower.executor_for(batch).arena_bytes == plan.arena_bytes
    description = tower.describe(batch.workload).to_json()
    assert sum(node["flops"] for node in description["nodes"]) == description["flops"] > 0


@each_case
def test_weights_want_no_gradients_and_results_are_ordinary(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    (embedding,) = tower.encode(images_of(case, 1))
    assert not embedding.embeddings.requires_grad
    assert not embedding.embeddings.is_inference()
    assert embedding.to("cpu").embeddings.device.type == "cpu"
    assert tower.dummy_feature.shape == (1, tower.hidden_size)
    assert tower.dummy_feature.dtype == tower.dtype


@each_case
def test_a_missing_tensor_is_named(case: TowerCase, saved: Saved, tmp_path: Path) -> None:
    prefixes = load(saved(case), delay_load=True).family.prefixes
    with safe_open(saved(case) / "model.safetensors", "pt") as file:
        stripped = {name: strip_prefix(name, prefixes) or "" for name in file.keys()}  # noqa: SIM118  (a handle, no mapping)
    name = next(name for name, inner in stripped.items() if "0." in inner and "norm" in inner)
    broken = rename_all(saved(case), tmp_path / "broken", [(name, "elsewhere")])
    with pytest.raises(CheckpointIncompleteError, match="norm"):
        load(broken)


@pytest.mark.parametrize("case", [case for case in CASES if case.video], ids=lambda case: case.name)
def test_videos_agree_with_transformers(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    for frames in case.video_frames:
        video = [noise(120, 80, seed) for seed in range(frames)]
        batch = tower.preprocess_video(video)
        assert batch.images.grids[0][0] == -(-frames // tower.config.patch.temporal)
        assert compare(tower, batch).passed
        assert torch.equal(tower.encode_video(video).embeddings, tower.forward(batch))


@pytest.mark.parametrize("case", [case for case in CASES if not case.video], ids=lambda case: case.name)
def test_towers_without_video_say_so(case: TowerCase, saved: Saved) -> None:
    with pytest.raises(UsageError, match="no video"):
        load(saved(case), delay_load=True).encode_video(images_of(case, 1))


@each_case
def test_the_whole_description_is_json(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case), delay_load=True)
    assert json.loads(json.dumps(tower.config.to_json()))["family"] == tower.config.family
    assert tower.describe(tower.workload([(64, 64)])).to_dot().startswith("digraph")


@each_case
def test_the_demonstration_runs_on_it(
    case: TowerCase, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for index, image in enumerate(images_of(case, 2)):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image).save(paths[-1])
    assert cli.main(["demo", *paths, "--model", str(saved(case)), "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "features.png").is_file()
