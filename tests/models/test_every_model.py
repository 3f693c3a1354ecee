"""Promises of all models, on small random checkpoints made by transformers.

What only one model has (windows, tiles, its own format) is tested in its own file.
"""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.checkpoints import load, noise, rename_all, shard
from support.probing import errors_with, find_row, list_affected_tokens, list_frequencies, record_values
from support.towers import TowerCase, all_cases

from tritontower import cli
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.files import strip_prefix
from tritontower.config import Activation
from tritontower.embedding import ImageEmbedding
from tritontower.engine.executor import Executor
from tritontower.errors import CheckpointIncompleteError, ConfigError, UsageError
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
from tritontower.models.common.registry import read_family
from tritontower.parity.parity import Reference, compare, compare_nodes, relative_error

CASES = all_cases()
OTHERS = [(case, name) for case in CASES for name in ("", *case.others)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_tower = pytest.mark.parametrize("case", [case for case in CASES if not case.repeats], ids=lambda case: case.name)
each_video = pytest.mark.parametrize("case", [case for case in CASES if case.video], ids=lambda case: case.name)
each_exact_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

Saved = Callable[[TowerCase], Path]


def make_images(case: TowerCase, count: int | None = None) -> list[np.ndarray]:
    return [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:count])]


def make_small_images(case: TowerCase) -> list[np.ndarray]:
    """Returns two images for the interpreter, whose time grows with their area."""
    return [noise(*case.sizes[0]), noise(90, 60, 1)]


def find_case(name: str) -> TowerCase:
    return next(case for case in CASES if case.name == name)


def assert_agree(ours: list[ImageEmbedding], theirs: list[torch.Tensor]) -> None:
    assert [embedding.num_tokens for embedding in ours] == [len(rows) for rows in theirs]
    for index, (embedding, rows) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(embedding.embeddings, rows) <= 1e-5, index


@pytest.mark.parametrize(("case", "name"), OTHERS, ids=[f"{case.name}-{name}" for case, name in OTHERS])
def test_mixed_sizes_agree_with_transformers(case: TowerCase, name: str, saved: Saved, tmp_path: Path) -> None:
    """Also in configurations that are not published."""
    folder = case.save(tmp_path / "model", **case.others[name]) if name else saved(case)
    images = make_images(case, 3 if name else None)
    tower = load(folder)
    assert_agree(tower.encode(images), case.reference(folder, images, torch.float32))
    assert compare(tower, tower.preprocess(images)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_tower
def test_half_precision_error_is_within_the_limit(case: TowerCase, dtype: torch.dtype, tmp_path: Path) -> None:
    tower = load(case.save(tmp_path / "model", dtype=dtype, depth=6))
    assert tower.dtype == dtype
    parity = compare(tower, tower.preprocess(make_images(case)))
    for name, output in parity.outputs.items():
        assert output.reference_error is not None
        assert output.reference_error > 1e-5, name
        assert output.passed, (name, output)


@each_case
def test_every_node_agrees_with_its_module(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    batch = tower.preprocess(make_images(case, 2))
    parity = compare(tower, batch)
    assert parity.passed, parity
    assert set(parity.outputs) == set(tower.graph.outputs)
    found = compare_nodes(tower, batch)
    last = tower.config.blocks_needed - 1
    blocks = {"norm1_rows", "mixed", "attended", "mlp_hidden", "block_rows"}
    assert {line.value for line in found} >= {f"blocks.{block}.{value}" for block in (0, last) for value in blocks}
    assert [line for line in found if not line.error <= 1e-5] == []


def test_single_token_agrees_with_transformers(saved: Saved) -> None:
    """``get_image_features`` of transformers fails for it, so the reference does not call that."""
    tower = load(saved(find_case("mistral3")))
    batch = tower.preprocess(noise(28, 28, 1))
    assert batch.images.token_counts == (1,)
    assert compare(tower, batch).passed


@each_video
def test_videos_agree_with_transformers(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    for frames in case.video_frames:
        video = [noise(120, 80, seed) for seed in range(frames)]
        batch = tower.preprocess_video(video)
        assert batch.images.grids[0][0] == -(-frames // tower.config.patch.temporal)
        assert compare(tower, batch).passed
        assert torch.equal(tower.encode_video(video).embeddings, tower.forward(batch))


@each_case
def test_towers_without_video_reject_it(case: TowerCase, saved: Saved) -> None:
    if not case.video:
        with pytest.raises(UsageError, match="no video"):
            load(saved(case), delay_load=True).encode_video(make_images(case, 1))


GELUS: tuple[Activation, ...] = ("quick_gelu", "gelu", "gelu_tanh")
"""x · σ(1.702 x); x · Φ(x); and its approximation by tanh.  They differ by up to 0.02, 0.02 and 0.0005."""


@each_tower
def test_three_gelus_are_told_apart(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    config, projector = tower.config, tower.config.projector
    batch = tower.preprocess([noise(90, 60, 1)])
    assert max(errors_with(tower, batch).values()) <= 1e-5
    if config.gated:
        assert config.activation == "silu"
    else:
        assert config.activation in GELUS
        for wrong in set(GELUS) - {config.activation}:
            assert min(errors_with(tower, batch, activation=wrong).values()) > 2e-5, wrong
    if projector is None or projector.hidden is None:
        assert not [name for name in tower.graph.sources if "linear_2" in name]
        return
    # Exact GELU in the projector, even if the blocks have another one.
    assert projector.activation == "gelu"
    for wrong in ("quick_gelu", "gelu_tanh"):
        changed = replace(projector, activation=wrong)
        assert errors_with(tower, batch, projector=changed)["embeddings"] > 1e-5, wrong


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral"])
def test_rotary_angles_are_fp32_in_a_bf16_tower(name: str, tmp_path: Path) -> None:
    case = find_case(name)
    changes = {"longest_edge": 2048} if name == "pixtral" else {}
    tower = load(case.save(tmp_path / "model", dtype=torch.bfloat16, **changes))
    batch = tower.preprocess(noise(tower.config.patch.size * tower.config.merge, 2048))
    positions, rotary = batch.attention.positions, tower.config.rotary
    assert positions.max() > 120
    assert rotary is not None
    frequencies = list_frequencies(rotary, tower.config.head_dim)
    angles = torch.cat([torch.outer(positions[:, axis].double(), frequencies[axis]) for axis in (0, 1)], dim=1)
    cosines, sines = record_values(tower, batch, "cosines", "sines")
    assert cosines.dtype == sines.dtype == torch.float32
    assert (cosines - angles.cos()).abs().max() < 5e-5
    assert (sines - angles.sin()).abs().max() < 5e-5
    # With bf16 frequencies, as after `model.to(bfloat16)`, the angles would be far off.
    rounded = torch.outer(positions[:, 0].double(), frequencies[0].bfloat16().double())
    assert (rounded.cos() - angles[:, : len(frequencies[0])].cos()).abs().max() > 5e-3


@each_video
def test_frames_do_not_attend_to_each_other(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    side = tower.config.patch.size * tower.config.merge
    batch = tower.preprocess_video([noise(5 * side, 3 * side, seed) for seed in range(6)], min_pixels=side * side)
    ((frames, height, width),) = batch.images.grids
    assert frames == 3
    patches, tokens = height * width, height * width // tower.config.rows_per_token
    attended = set()
    for frame in range(frames):
        affected = list_affected_tokens(tower.forward, batch, frame * patches + 1)
        assert affected <= set(range(frame * tokens, (frame + 1) * tokens))
        attended |= affected
    # Every block of these has full attention within a frame.
    if tower.config.windows is None:
        assert attended == set(range(frames * tokens))


JOINING = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3"]


@pytest.mark.parametrize("name", JOINING)
def test_token_consists_of_its_own_square_of_patches(name: str, saved: Saved) -> None:
    tower = load(saved(find_case(name)))
    # Without attention, a patch affects no token but its own.
    weights = tower.read_weights()
    weights |= {key: torch.zeros_like(value) for key, value in weights.items() if "attention_output." in key}
    executor = Executor(tower.graph, weights)
    merge, patch = tower.config.merge, tower.config.patch.size
    batch = tower.preprocess(noise(4 * merge * patch, 3 * merge * patch))
    ((_, height, width),) = batch.images.tile_grids
    for row, column in ((0, 0), (1, 1), (2, 5), (height - 1, 0), (height - 3, width - 1)):
        affected = list_affected_tokens(lambda b: executor.run(b)["embeddings"], batch, find_row(batch, (row, column)))
        assert affected == {row // merge * (width // merge) + column // merge}


@each_exact_dtype
@each_tower
def test_passes_keep_the_numbers(case: TowerCase, dtype: torch.dtype, saved: Saved) -> None:
    tower = load(saved(case), dtype=dtype)
    batch = tower.preprocess(make_images(case, 3))
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
                # Fewer roundings change the numbers, but must not increase the error noticeably; a few rows vary more.
                limit = (1.2 if name == "pooled" else 1.1) * relative_error(rows, exact[name])
                assert relative_error(actual[name], exact[name]) <= limit, (name, passes)


@each_exact_dtype
@each_tower
def test_chunked_mlp_is_bitwise_equal(case: TowerCase, dtype: torch.dtype, saved: Saved) -> None:
    tower = load(saved(case), dtype=dtype)
    batch = tower.preprocess(make_images(case, 2))
    weights = tower.read_weights()
    fused = fuse(fold_still_images(build(tower.config)))
    expected = Executor(fused, weights).run(batch)
    for rows in (1, 7, batch.workload.patches - 1):
        chunked = chunk_mlp(fused, rows)
        assert {value.most_rows for value in chunked.values.values()} == {None, rows}
        actual = Executor(chunked, weights).run(batch)
        assert all(torch.equal(actual[name], output) for name, output in expected.items()), rows


@pytest.mark.parametrize("name", ["qwen3_vl", "siglip_vision_model", "pixtral"])
def test_padded_heads_keep_the_numbers(name: str, tmp_path: Path, kernel_device: torch.device) -> None:
    """With heads of 72 that have biases, without a position table and with one, and heads without biases."""
    case = find_case(name)
    folder = case.save(tmp_path / "model", **case.others["heads of 72"])
    tower = load(folder, device=kernel_device)
    attention = next(node for node in tower.graph.nodes if node.kind == "attention")
    # The padding holds ones, which only a bias can write; without biases heads are not padded.
    assert ("padded_head_dim" in attention.attributes) == tower.config.qkv_bias
    batch = tower.preprocess(make_small_images(case))
    with dispatch.use("reference"):
        plain = load(folder, device=kernel_device)
        expected, on_reference = plain.run(batch), tower.run(batch)
    assert "padded_head_dim" not in next(node.attributes for node in plain.graph.nodes if node.kind == "attention")
    by_kernels = tower.run(batch)
    for name, rows in expected.items():
        assert relative_error(on_reference[name], rows) <= 1e-5, name
        assert relative_error(by_kernels[name], rows) <= 1e-5, name
    found = {line.value: line.error for line in compare_nodes(tower, batch)}
    # Values in the layout of a kernel have no counterpart in transformers.
    assert "blocks.0.qkv_rows" not in found
    assert {f"blocks.0.{value}" for value in ("norm1_rows", "mixed", "attended", "mlp_hidden")} <= set(found)
    assert max(found.values()) <= 1e-5


@each_tower
def test_kernels_in_the_interpreter_agree(case: TowerCase, saved: Saved, kernel_device: torch.device) -> None:
    tower = load(saved(case), device=kernel_device)
    batch = tower.preprocess(make_small_images(case))
    with dispatch.use("reference"):
        expected = tower.run(batch)
    actual = tower.run(batch)
    for name, rows in expected.items():
        assert relative_error(actual[name], rows) <= 1e-5, name
        assert not torch.equal(actual[name], rows), f"{name}: the kernels ran the reference"
    alone = tower.forward(tower.preprocess(make_small_images(case)[:1]))
    assert torch.equal(alone, actual["embeddings"][: len(alone)])


@each_tower
def test_bf16_kernels_err_no_more_than_the_plain_graph(
    case: TowerCase, saved: Saved, kernel_device: torch.device
) -> None:
    tower = load(saved(case), device=kernel_device, dtype="bfloat16")
    batch = tower.preprocess(make_small_images(case))
    actual = tower.run(batch)
    with dispatch.use("reference"):
        exact = load(saved(case), device=kernel_device, dtype="float32").run(batch)
        weights = load(saved(case), device=kernel_device, dtype="bfloat16").read_weights()
        expected = Executor(fold_still_images(build(tower.config)), weights).run(batch)
    for name, rows in exact.items():
        assert relative_error(actual[name], rows) <= 1.1 * relative_error(expected[name], rows), name


@each_case
def test_image_alone_and_in_a_batch_is_bitwise_equal(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    images = [*make_images(case), noise(64, 48, 99)]
    together = tower.encode(images)
    for position in (0, len(images) // 2, len(images) - 1):
        (alone,) = tower.encode(images[position])
        assert torch.equal(alone.embeddings, together[position].embeddings), position
        assert all(map(torch.equal, alone.deepstack, together[position].deepstack)), position
        assert alone.pooled is None or torch.equal(alone.pooled, together[position].pooled), position
    outputs = tower.run(tower.preprocess(images))
    for name, rows in outputs.items():
        if name == "pooled":
            found = [embedding.pooled for embedding in together]
        else:
            level = name.removeprefix("deepstack.")
            found = [one.deepstack[int(level)] if level.isdigit() else one.embeddings for one in together]
        assert torch.equal(torch.cat(found), rows), name
    again = tower.encode(images[::-1])[::-1]
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(together, again, strict=True))


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
    embeddings = counting.load().encode([noise(width, height, 5) for width, height in few])
    assert [embedding.num_tokens for embedding in embeddings] == [counting.count_tokens(*size) for size in few]
    assert {embedding.embeddings.shape[1] for embedding in embeddings} == {counting.hidden_size}


@each_case
def test_memory_plan_matches_the_allocated_arena(case: TowerCase, saved: Saved) -> None:
    tower = load(saved(case))
    batch = tower.preprocess(make_images(case))
    plan = tower.memory_plan(tower.workload(case.sizes))
    assert plan.workload == batch.workload
    tower.forward(batch)
    assert tower.executor_for(batch).arena_bytes == plan.arena_bytes
    summary = tower.describe(batch.workload).to_json()
    assert sum(node["flops"] for node in summary["nodes"]) == summary["flops"] > 0
    assert json.loads(json.dumps(tower.config.to_json()))["family"] == tower.config.family


@each_tower
def test_demo_command_runs(case: TowerCase, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for index, image in enumerate(make_images(case, 2)):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image).save(paths[-1])
    assert cli.main(["demo", *paths, "--model", str(saved(case)), "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert (tmp_path / "features.png").is_file()


@each_case
def test_every_generation_of_names_loads_the_same(case: TowerCase, saved: Saved, tmp_path: Path) -> None:
    images = make_images(case, 2)
    expected = load(saved(case)).encode(images)
    folders = [rename_all(saved(case), tmp_path / f"names-{i}", pairs) for i, pairs in enumerate(case.prefixes)]
    folders.append(shard(saved(case), tmp_path / "shards"))
    for folder in folders:
        again = load(folder).encode(images)
        assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(again, expected, strict=True)), folder.name


@each_case
def test_missing_tensor_is_named(case: TowerCase, saved: Saved, tmp_path: Path) -> None:
    prefixes = load(saved(case), delay_load=True).family.prefixes
    with safe_open(saved(case) / "model.safetensors", "pt") as file:
        stripped = {name: strip_prefix(name, prefixes) or "" for name in file.keys()}  # noqa: SIM118  (a handle, no mapping)
    name = next(name for name, inner in stripped.items() if "0." in inner and "norm" in inner)
    broken = rename_all(saved(case), tmp_path / "broken", [(name, "elsewhere")])
    with pytest.raises(CheckpointIncompleteError, match="norm"):
        load(broken)


def change(values: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """Returns a copy of a configuration with another value at the dotted ``key``; ``None`` removes the key."""
    changed = deepcopy(values)
    *sections, last = key.split(".")
    holder = changed
    for section in sections:
        holder = holder[section]
    holder.pop(last, None)
    return changed if value is None else (holder.update({last: value}) or changed)


@each_case
def test_wrong_config_value_is_rejected_by_its_key(case: TowerCase, saved: Saved) -> None:
    values = json.loads((saved(case) / "config.json").read_text())
    read_family(ConfigReader(values))
    for key, value in ((key, value) for key, wrong in case.wrong.items() for value in wrong):
        with pytest.raises(ConfigError) as caught:
            read_family(ConfigReader(change(values, key, value)))
        assert caught.value.key.startswith(key), (key, value)
        assert f"{caught.value.key} must be " in str(caught.value)
