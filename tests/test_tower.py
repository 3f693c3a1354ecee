"""The public tower: images → embeddings, on small random checkpoints."""

import gc
import json
import pickle
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import noise, rename_tensors, save_qwen2_vl
from support.layers import LEVEL
from support.towers import all_cases
from triton.runtime import interpreter

import tritontower
from tritontower import VisionTower, has_vision
from tritontower.errors import (
    AspectRatioError,
    BackendUnavailableError,
    CheckpointIncompleteError,
    EmptyImageError,
    ImageTooLargeError,
    ImageTypeError,
    ImageValueError,
    ProcessorError,
    ShapeMismatchError,
    TowerError,
    TowerNotLoadedError,
    UsageError,
)
from tritontower.models.common.hf_reference import flat_patches
from tritontower.parity.parity import compare, compare_nodes, relative_error

SIZES = [(157, 243), (28, 28), (300, 64), (14, 700), (90, 90)]
IMAGES = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tower(qwen2_vl: Path) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


def test_a_video_of_one_still_is_the_still(tower: VisionTower) -> None:
    # The size rules of videos and images differ; the same bounds make the same grid.
    bounds = {"min_pixels": 3136, "max_pixels": 100_000}
    still = tower.encode(IMAGES[0], **bounds)[0]
    video = tower.encode_video([IMAGES[0]], **bounds)
    assert video.grid_thw == still.grid_thw
    assert relative_error(video.embeddings, still.embeddings) <= 1e-5


def test_frames_of_a_video_do_not_attend_to_each_other(tower: VisionTower) -> None:
    video = [noise(120, 80, seed) for seed in range(6)]
    other = [*video[:4], noise(120, 80, 77), noise(120, 80, 78)]
    first, second = (tower.encode_video(frames).embeddings for frames in (video, other))
    third = len(first) // 3
    assert torch.equal(first[: 2 * third], second[: 2 * third])
    assert not torch.equal(first[2 * third :], second[2 * third :])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_image_alone_and_in_a_batch_is_bitwise_the_same(tower: VisionTower, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = [noise(50 + 37 * seed, 40 + 29 * seed, seed) for seed in range(9)]
        batch.insert(4, noise(28, 28, 99))
        # The smallest image becomes one token: a matmul of one row.
        packed = tower.encode(batch, min_pixels=28 * 28)
        assert packed[4].num_tokens == 1
        for position in (0, 4, 9):
            alone = tower.encode(batch[position], min_pixels=28 * 28)[0]
            assert torch.equal(alone.embeddings, packed[position].embeddings), position
        again = tower.encode(batch[::-1], min_pixels=28 * 28)[::-1]
        assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(packed, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_folding_the_frames_of_a_still_keeps_the_numbers(tower: VisionTower) -> None:
    batch = tower.preprocess(IMAGES)
    unfolded = replace(batch, pixels=flat_patches(batch, tower.config))
    assert unfolded.pixels.shape[1] == 2 * batch.pixels.shape[1]
    assert relative_error(tower.forward(unfolded), tower.forward(batch)) <= 2e-6


def test_a_wrong_weight_is_found_at_its_node(tower: VisionTower, qwen2_vl: Path) -> None:
    class Broken(VisionTower):
        def read_weights(self, progress: Any) -> dict[str, torch.Tensor]:
            weights = super().read_weights(progress)
            weights["blocks.1.mlp_up.bias"] += 0.1
            return weights

    broken = Broken.from_pretrained(qwen2_vl, device="cpu")
    found = compare_nodes(broken, broken.preprocess(IMAGES[:1]))
    wrong = next(line for line in found if line.error > 1e-4)
    assert (wrong.node, wrong.value) == ("blocks.1.mlp", "blocks.1.mlp_hidden")
    assert not compare(broken, broken.preprocess(IMAGES[:1])).passed


def test_count_tokens_is_what_encode_gives(tower: VisionTower) -> None:
    generator = random.Random(0)
    sizes = [(generator.randint(1, 1500), generator.randint(1, 1500)) for _ in range(2000)]
    sizes = [(w, h) if max(w, h) <= 200 * min(w, h) else (w + 200, h + 200) for w, h in sizes]
    processor = tower.preprocessor.processor
    for width, height in sizes:
        assert tower.count_tokens(width, height) == processor.get_number_of_image_patches(height, width) // 4
    for width, height in [(w, h) for w, h in sizes if w * h < 40_000][:25]:
        image = np.zeros((height, width, 3), np.uint8)
        assert tower.encode(image)[0].num_tokens == tower.count_tokens(width, height)
    bounds = {"min_pixels": 50_000, "max_pixels": 60_000}
    assert tower.encode(IMAGES[0], **bounds)[0].num_tokens == tower.count_tokens(*SIZES[0], **bounds)
    assert 50_000 <= tower.count_tokens(*SIZES[0], **bounds) * 28 * 28 <= 60_000


def test_kinds_of_images_agree(tower: VisionTower, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(path)
    tensor = torch.from_numpy(IMAGES[0])
    kinds = [IMAGES[0], Image.fromarray(IMAGES[0]), path, path.read_bytes(), tensor]
    embeddings = tower.encode(kinds)
    assert all(torch.equal(embedding.embeddings, embeddings[0].embeddings) for embedding in embeddings)
    assert len({embedding.content_hash for embedding in embeddings}) == 1
    assert embeddings[0].original_size == SIZES[0]
    assert embeddings[0].processed_size == (embeddings[0].grid_thw[2] * 14, embeddings[0].grid_thw[1] * 14)


def test_a_deleted_tower_frees_its_memory_at_once(qwen2_vl: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu")
    tower.encode(IMAGES[:2])
    batches = [tower.preprocess(IMAGES[0], raw=raw) for raw in (False, True)]
    runner = [weakref.ref(tower.executor_for(batch)) for batch in batches]
    gc.collect()
    gc.disable()
    try:
        del tower
        assert [executor() for executor in runner] == [None, None]
    finally:
        gc.enable()


def test_concurrent_loads_read_the_weights_once(qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    reads: list[int] = []
    original = VisionTower.read_weights
    together = threading.Barrier(4)

    def read(self: VisionTower, progress: Any) -> dict[str, torch.Tensor]:
        reads.append(1)
        time.sleep(0.05)
        return original(self, progress)

    def work() -> None:
        together.wait()
        tower.load()

    monkeypatch.setattr(VisionTower, "read_weights", read)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [1]
    assert tower.is_loaded


def test_an_interrupted_forward_pass_leaves_the_tower_usable(tower: VisionTower) -> None:
    batch = tower.preprocess(IMAGES[0])
    expected = tower.forward(batch)
    executor = tower.executor_for(batch)
    executor.release()
    for stop_at in (0, 7):  # after the first node, in a new arena, and later
        seen: list[object] = []

        def interrupt(*state: object, seen: list[object] = seen, stop_at: int = stop_at) -> None:
            seen.append(state)
            if len(seen) > stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            executor.run(batch, interrupt)
        assert torch.equal(tower.forward(batch), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="records the launches of Triton's interpreter")
def test_calls_go_down_to_a_launch_in_ten_frames(
    tmp_path: Path, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = VisionTower.from_pretrained(save_qwen2_vl(tmp_path, depth=1), device=kernel_device)
    root = Path(tritontower.__file__).resolve().parents[1]
    stacks: set[tuple[str, ...]] = set()

    def record(*arguments: object, **options: object) -> None:
        stack = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename).resolve()
            if path.is_relative_to(root / "tritontower") or path.is_relative_to(root / "kernels"):
                stack.append(path.relative_to(root).as_posix().removeprefix("tritontower/"))
            frame = frame.f_back
        stacks.add(tuple(reversed(stack)))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    tower.encode(noise(28, 28, 0))
    assert len(stacks) > 3
    for stack in stacks:
        packages = [path.split("/")[0].removesuffix(".py") for path in stack]
        runs = [package for package, _ in groupby(packages)]
        assert runs == ["tower", "scheduler", "engine", "kernels"], stack
        assert [LEVEL[package] for package in runs] == sorted((LEVEL[package] for package in runs), reverse=True)
        assert len(stack) <= 10, "\n".join(stack)


def test_embeddings_are_ordinary_tensors_of_their_own(tower: VisionTower) -> None:
    batch = tower.preprocess(IMAGES)
    assert not tower.forward(batch).is_inference()
    for embedding in tower.encode(IMAGES):
        rows = embedding.embeddings
        assert not rows.is_inference()
        assert rows.untyped_storage().nbytes() == rows.nbytes
        copy = pickle.loads(pickle.dumps(embedding))
        assert torch.equal(copy.embeddings, rows)
        assert copy != embedding
        assert embedding == embedding
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(tower.forward(again), tower.forward(batch))
    assert again != batch


def test_delayed_loading_plans_before_it_reads_weights(qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or original(self, *a, **k))
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype="float32", delay_load=True)
    assert not tower.is_loaded
    assert tower.hidden_size == 48
    assert tower.count_tokens(100, 100) == 16
    assert tower.memory_plan(64).peak_bytes > 0
    assert not [name for name in opened if name.endswith(".safetensors")]
    with pytest.raises(TowerNotLoadedError, match="load"):
        tower.encode(IMAGES[0])
    seen: list[tuple[int, int]] = []
    assert tower.load(progress=lambda done, total: seen.append((done, total))).is_loaded
    assert seen[-1][0] == seen[-1][1] > 0
    assert tower.encode(IMAGES[0])[0].num_tokens == tower.count_tokens(*SIZES[0])


def test_memory_plan_covers_allocated_memory(tower: VisionTower) -> None:
    batch = tower.preprocess(IMAGES)
    plan = tower.memory_plan([4 * tower.count_tokens(*size) for size in SIZES])
    assert plan.workload == batch.workload
    executor = tower.executor_for(batch)
    tower.forward(batch)
    assert executor.arena_bytes >= plan.arena_bytes
    assert plan.output_bytes >= batch.workload.tokens * 48 * 4
    executor.release()
    assert executor.arena_bytes == 0
    tower.forward(batch)
    assert executor.arena_bytes == plan.arena_bytes
    assert tower.memory_plan(np.int64(8)) == tower.memory_plan(8)


def test_description_shows_the_graph_that_runs(tower: VisionTower) -> None:
    description = tower.describe([16, 24])
    assert description.graph is tower.graph
    assert description.workload == tower.memory_plan([16, 24]).workload
    assert description.workload.scores == 16**2 + 24**2
    assert "40 patches → 10 tokens" in description.text()


GRAY = np.zeros((9, 9, 3), np.uint8)
INVALID_CALLS: dict[str, tuple[type[TowerError], str, Callable[[VisionTower], object]]] = {
    "aspect ratio": (AspectRatioError, "5 × 2000", lambda tower: tower.encode(np.zeros((2000, 5, 3), np.uint8))),
    "empty": (EmptyImageError, "0 pixels", lambda tower: tower.encode(np.zeros((0, 5, 3), np.uint8))),
    "text": (ImageTypeError, "Path", lambda tower: tower.encode(["photo.jpg"])),
    "planned": (
        ImageTooLargeError,
        "max_planned_pixels",
        lambda tower: tower.encode(GRAY, min_pixels=2**27, max_pixels=2**28),
    ),
    "no frames": (ProcessorError, "at least one frame", lambda tower: tower.encode_video([])),
    "sizes differ": (ProcessorError, "all frames one size", lambda tower: tower.encode_video(IMAGES[:2])),
    "bounds": (ProcessorError, "in order", lambda tower: tower.encode(GRAY, min_pixels=5000, max_pixels=4000)),
    "one token": (ProcessorError, "28 × 28", lambda tower: tower.encode(GRAY, min_pixels=1, max_pixels=700)),
    "bound type": (ProcessorError, "max_pixels", lambda tower: tower.encode(GRAY, max_pixels="5000")),
    "size text": (UsageError, "width", lambda tower: tower.count_tokens("1", 2)),
    "size float": (UsageError, "width", lambda tower: tower.count_tokens(1.5, 2)),
    "patches unit": (UsageError, "multiples of 4", lambda tower: tower.memory_plan(1023)),
    "batch number": (UsageError, r"result of preprocess\(\)", lambda tower: tower.forward(5)),
    "batch text": (UsageError, r"result of preprocess\(\)", lambda tower: tower.forward("pixels")),
    "batch scalar": (UsageError, r"result of preprocess\(\)", lambda tower: tower.forward(torch.tensor(5.0))),
    **{
        f"patches {patches}": (
            UsageError,
            "patches must be an integer",
            partial(VisionTower.memory_plan, patches=patches),
        )
        for patches in (4.0, "4", None, True, [4, "a"])
    },
    **{
        f"one frame {type(frame).__name__}": (
            UsageError,
            "list of the video's frames",
            partial(VisionTower.encode_video, frames=frame),
        )
        for frame in (GRAY, torch.from_numpy(GRAY), Image.fromarray(GRAY), Path("video.mp4"), None)
    },
}


@pytest.mark.parametrize(("error", "message", "call"), INVALID_CALLS.values(), ids=INVALID_CALLS)
def test_invalid_calls_are_rejected(
    tower: VisionTower, error: type[TowerError], message: str, call: Callable[[VisionTower], object]
) -> None:
    with pytest.raises(error, match=message):
        call(tower)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (UsageError, {"dtype": "int8"}),
        (UsageError, {"dtype": torch.int8}),
        (UsageError, {"device": "cuba"}),
        (UsageError, {"device": []}),
        (BackendUnavailableError, {"device": "mps"}),
        (UsageError, {"limits": 5}),
        (UsageError, {"cache": 5}),
        (UsageError, {"preprocessing": "mistral"}),
        *((UsageError, {"cuda_graphs": value}) for value in (0, 1, None, "", "yes", {})),
        (UsageError, {"model": None}),
    ],
    ids=str,
)
def test_invalid_loading_arguments_are_rejected(
    qwen2_vl: Path, error: type[TowerError], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        VisionTower.from_pretrained(**{"model": qwen2_vl, "delay_load": True, **options})


def test_batches_of_another_form_are_rejected(tmp_path: Path) -> None:
    towers = {
        case.name: VisionTower.from_pretrained(case.save(tmp_path / case.name), device="cpu") for case in all_cases()
    }
    towers["patch of 8"] = VisionTower.from_pretrained(
        save_qwen2_vl(tmp_path / "8", depth=1, patch_size=8), device="cpu"
    )
    batches = {name: tower.preprocess(IMAGES[0]) for name, tower in towers.items()}
    refused = 0
    for name, tower in towers.items():
        for other, batch in batches.items():
            if towers[other].config.batch_form == tower.config.batch_form:
                assert torch.equal(tower.forward(batch), tower.forward(replace(batch, form=tower.config.batch_form)))
                continue
            with pytest.raises(UsageError, match="must be this tower's, got one with "):
                tower.forward(batch)
            refused += 1
        video = tower.preprocess_video([IMAGES[0]] * 2) if tower.config.patch.temporal > 1 else batches[name]
        assert torch.isfinite(tower.forward(video)).all()
    assert refused > len(towers) ** 2 / 2
    # The same patches in another order: nothing but the form tells these two apart.
    one, other = batches["qwen2_vl"], batches["qwen2_5_vl"]
    assert (one.pixels.shape, one.tokens.rows_per_token) == (other.pixels.shape, other.tokens.rows_per_token)


def test_ambiguous_axis_order_must_be_given(tower: VisionTower) -> None:
    rows = noise(50, 3, 1)
    assert rows.shape == (3, 50, 3), "three rows of 50 pixels, or three channels of 50 rows of three"
    columns = np.ascontiguousarray(rows.transpose(1, 2, 0))
    for call in (tower.preprocess, tower.encode, tower.preprocess_video, tower.encode_video):
        with pytest.raises(ImageValueError, match="pass input_data_format="):
            call([rows])
    for encode in (tower.encode, lambda images, **how: [tower.encode_video(images, **how)]):
        (flat,) = encode([rows], input_data_format="channels_last")
        (tall,) = encode([rows], input_data_format="channels_first")
        assert (flat.original_size, tall.original_size) == ((50, 3), (3, 50))
        (same,) = encode([Image.fromarray(columns)])
        assert torch.equal(tall.embeddings, same.embeddings)
    for preprocess in (tower.preprocess, tower.preprocess_video):
        packed = preprocess([rows], input_data_format="channels_first")
        assert packed.images.original_sizes == ((3, 50),)
        assert torch.equal(packed.pixels, preprocess([Image.fromarray(columns)]).pixels)


def test_weights_that_do_not_fit_are_rejected(qwen2_vl: Path, tmp_path: Path) -> None:
    missing = rename_tensors(qwen2_vl, tmp_path / "missing", "visual.blocks.1.", "elsewhere.blocks.1.")
    with pytest.raises(CheckpointIncompleteError, match=r"blocks\.1\."):
        VisionTower.from_pretrained(missing)
    extra = rename_tensors(qwen2_vl, tmp_path / "extra", "lm_head.", "visual.lm_head.")
    with pytest.raises(TowerError, match=r"lm_head"):
        VisionTower.from_pretrained(extra)
    narrow = rename_tensors(qwen2_vl, tmp_path / "narrow", "lm_head.", "head.")
    config = (narrow / "config.json").read_text()
    (narrow / "config.json").write_text(config.replace('"embed_dim": 64', '"embed_dim": 32'))
    with pytest.raises(ShapeMismatchError):
        VisionTower.from_pretrained(narrow)


def test_has_vision(qwen2_vl: Path, tmp_path: Path) -> None:
    assert has_vision(qwen2_vl)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert not has_vision(tmp_path)
    with pytest.raises(TowerError):
        has_vision(tmp_path / "nowhere")


def test_repr_shows_architecture_dtype_and_device(qwen2_vl: Path, tower: VisionTower) -> None:
    assert repr(tower) == "<VisionTower qwen2_vl: 3 blocks, 64 → 48 wide, torch.float32 on cpu>"
    delayed = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    assert repr(delayed).endswith("not loaded, for cpu>")


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_the_declared_one(qwen2_vl: Path, tmp_path: Path, section: str | None, key: str) -> None:
    config = json.loads((qwen2_vl / "config.json").read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("dtype", None)
        part.pop("torch_dtype", None)
    (config[section] if section else config)[key] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VisionTower.from_pretrained(tmp_path, device="cpu", delay_load=True).dtype == torch.float16
