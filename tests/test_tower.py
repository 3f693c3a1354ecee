"""The whole way: images → embeddings, held against transformers on small random checkpoints."""

import contextvars
import gc
import json
import pickle
import random
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import noise, rename_tensors, save_qwen2_vl
from support.towers import all_cases

from tritontower import VisionTower, has_vision
from tritontower.engine.graph_cache import CaptureLimits
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
from tritontower.graph.ir import Workload
from tritontower.models.common.hf_reference import flat_patches
from tritontower.parity.parity import compare, compare_nodes, relative_error

SIZES = [(157, 243), (28, 28), (300, 64), (14, 700), (90, 90)]
IMAGES = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tower(qwen2_vl: Path) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


def rows_of(embeddings: list[Any]) -> torch.Tensor:
    return torch.cat([embedding.embeddings for embedding in embeddings])


def test_a_video_of_one_still_is_the_still(tower: VisionTower) -> None:
    # The size rules of videos and images differ; the same bounds make the same grid.
    bounds = {"min_pixels": 3136, "max_pixels": 100_000}
    still = tower.encode(IMAGES[0], **bounds)[0]
    video = tower.encode_video([IMAGES[0]], **bounds)
    assert video.grid_thw == still.grid_thw
    assert relative_error(video.embeddings, still.embeddings) <= 1e-5


def test_frames_of_a_video_do_not_see_each_other(tower: VisionTower) -> None:
    video = [noise(120, 80, seed) for seed in range(6)]
    other = [*video[:4], noise(120, 80, 77), noise(120, 80, 78)]
    first, second = (tower.encode_video(frames).embeddings for frames in (video, other))
    third = len(first) // 3
    assert torch.equal(first[: 2 * third], second[: 2 * third])
    assert not torch.equal(first[2 * third :], second[2 * third :])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_image_alone_and_in_a_pack_of_ten_is_bitwise_the_same(tower: VisionTower, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pack = [noise(50 + 37 * seed, 40 + 29 * seed, seed) for seed in range(9)]
        pack.insert(4, noise(28, 28, 99))
        # The smallest image becomes one token: the row of a product that has no other row.
        packed = tower.encode(pack, min_pixels=28 * 28)
        assert packed[4].num_tokens == 1
        for position in (0, 4, 9):
            alone = tower.encode(pack[position], min_pixels=28 * 28)[0]
            assert torch.equal(alone.embeddings, packed[position].embeddings), position
        again = tower.encode(pack[::-1], min_pixels=28 * 28)[::-1]
        assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(packed, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_folding_the_frames_of_a_still_leaves_the_numbers_where_they_were(tower: VisionTower) -> None:
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


def test_the_kinds_of_images_agree(tower: VisionTower, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(path)
    tensor = torch.from_numpy(IMAGES[0])
    kinds = [IMAGES[0], Image.fromarray(IMAGES[0]), path, path.read_bytes(), tensor]
    embeddings = tower.encode(kinds)
    assert all(torch.equal(embedding.embeddings, embeddings[0].embeddings) for embedding in embeddings)
    assert len({embedding.content_hash for embedding in embeddings}) == 1
    assert embeddings[0].original_size == SIZES[0]
    assert embeddings[0].processed_size == (embeddings[0].grid_thw[2] * 14, embeddings[0].grid_thw[1] * 14)


def test_no_images_is_no_work(tower: VisionTower) -> None:
    assert tower.encode([]) == []


def test_a_tower_that_goes_gives_its_memory_back_at_once(qwen2_vl: Path) -> None:
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


def test_results_outlive_later_passes(tower: VisionTower) -> None:
    first = tower.encode(IMAGES[0])[0].embeddings
    kept = first.clone()
    tower.encode(IMAGES[1:])
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_threads_share_a_tower(tower: VisionTower) -> None:
    expected = [tower.encode(image)[0].embeddings for image in IMAGES]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = list(range(len(IMAGES)))
        random.Random(seed).shuffle(order)
        for number in order:
            if not torch.equal(tower.encode(IMAGES[number])[0].embeddings, expected[number]):
                wrong.append(number)

    # A thread starts without this test's choice of backend unless it gets a copy of its context.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_load_at_once_read_the_weights_once(qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_interrupted_pass_leaves_the_tower_usable(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tower.encode(IMAGES[0])[0].embeddings
    batch = tower.preprocess(IMAGES[0])
    executor = tower.executor_for(batch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run(batch, interrupt)
    assert torch.equal(tower.forward(batch), expected)
    executor.release()
    plan = executor.plan(batch.workload)
    with monkeypatch.context() as patch:  # while the arena is being laid out
        patch.setattr(Workload, "rows", interrupt)
        patch.setattr(executor, "_allocate", lambda *_: torch.empty(batch.workload.tokens, 48))
        patch.setattr(executor, "plan", lambda _: plan)
        with pytest.raises(KeyboardInterrupt):
            executor.run(batch)
    assert torch.equal(tower.forward(batch), expected)


def test_several_images_come_in_any_iterable(tower: VisionTower) -> None:
    expected = rows_of(tower.encode(IMAGES[:2]))
    for several in (tuple(IMAGES[:2]), iter(IMAGES[:2]), dict(enumerate(IMAGES[:2])).values()):
        assert torch.equal(rows_of(tower.encode(several)), expected)
    frames = [IMAGES[0], IMAGES[0][::-1]]
    video = tower.encode_video(frames).embeddings
    assert torch.equal(tower.encode_video(np.stack(frames)).embeddings, video)
    assert torch.equal(tower.encode_video(frame for frame in frames).embeddings, video)


def test_an_embedding_is_an_ordinary_tensor_of_its_own(tower: VisionTower) -> None:
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


def test_delayed_loading_answers_before_it_reads_weights(qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_memory_plan_covers_what_a_pass_allocates(tower: VisionTower) -> None:
    batch = tower.preprocess(IMAGES)
    counts = [h * w for _, h, w in batch.images.grids]
    plan = tower.memory_plan(counts)
    assert plan.workload == batch.workload
    tower.forward(batch)
    executor = tower.executor_for(batch)
    assert executor.arena_bytes >= plan.arena_bytes
    assert plan.output_bytes >= batch.workload.tokens * 48 * 4
    executor.release()
    assert executor.arena_bytes == 0
    tower.forward(batch)
    assert executor.arena_bytes == plan.arena_bytes
    with pytest.raises(UsageError, match="multiples of 4"):
        tower.memory_plan(1023)


def test_description_is_of_the_graph_that_runs(tower: VisionTower) -> None:
    description = tower.describe([16, 24])
    assert description.graph is tower.graph
    assert description.workload == tower.memory_plan([16, 24]).workload
    assert description.workload.scores == 16**2 + 24**2
    assert "40 patches → 10 tokens" in description.text()


def test_wrong_images_are_refused_by_name(tower: VisionTower) -> None:
    with pytest.raises(AspectRatioError, match="5 × 2000"):
        tower.encode(np.zeros((2000, 5, 3), np.uint8))
    with pytest.raises(EmptyImageError):
        tower.encode(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ImageTypeError, match="Path"):
        tower.encode(["photo.jpg"])
    with pytest.raises(ImageTooLargeError, match="max_planned_pixels"):
        tower.encode(np.zeros((9, 9, 3), np.uint8), min_pixels=2**27, max_pixels=2**28)
    with pytest.raises(ProcessorError, match="at least one frame"):
        tower.encode_video([])
    with pytest.raises(ProcessorError, match="differ in size"):
        tower.encode_video([IMAGES[0], IMAGES[1]])
    with pytest.raises(ProcessorError, match="in order"):
        tower.encode(IMAGES[0], min_pixels=5000, max_pixels=4000)
    with pytest.raises(ProcessorError, match="28 × 28"):
        tower.encode(IMAGES[0], min_pixels=1, max_pixels=700)
    with pytest.raises(ProcessorError, match="whole number of pixels"):
        tower.encode(IMAGES[0], max_pixels="5000")
    for single in (IMAGES[0], torch.from_numpy(IMAGES[0]), Image.fromarray(IMAGES[0]), Path("clip.mp4"), None):
        with pytest.raises(UsageError, match="list of the video's frames"):
            tower.encode_video(single)


@pytest.mark.parametrize("size", [("1", 2), (float("nan"), 3), (1.5, 2)])
def test_sizes_that_are_no_whole_numbers_are_refused(tower: VisionTower, size: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="whole numbers"):
        tower.count_tokens(*size)


@pytest.mark.parametrize("patches", [4.0, "4", None, [4, "a"]])
def test_patches_that_are_no_whole_numbers_are_refused(tower: VisionTower, patches: Any) -> None:
    with pytest.raises(UsageError, match="whole number"):
        tower.memory_plan(patches)
    assert tower.memory_plan(np.int64(8)) == tower.memory_plan(8)


def test_batches_of_all_towers_of_another_form_are_refused(tmp_path: Path) -> None:
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
            with pytest.raises(UsageError, match="is another tower's, with "):
                tower.forward(batch)
            refused += 1
        video = tower.preprocess_video([IMAGES[0]] * 2) if tower.config.patch.temporal > 1 else batches[name]
        assert torch.isfinite(tower.forward(video)).all()
    assert refused > len(towers) ** 2 / 2
    # The same patches in another order: nothing but the form tells these two apart.
    one, other = batches["qwen2_vl"], batches["qwen2_5_vl"]
    assert (one.pixels.shape, one.rows_per_token) == (other.pixels.shape, other.rows_per_token)


def test_wrong_arguments_are_refused(qwen2_vl: Path) -> None:
    with pytest.raises(UsageError, match=r"int8.*allowed.*bfloat16"):
        VisionTower.from_pretrained(qwen2_vl, dtype="int8")
    with pytest.raises(UsageError, match="allowed"):
        VisionTower.from_pretrained(qwen2_vl, dtype=torch.int8)
    with pytest.raises(UsageError, match="device"):
        VisionTower.from_pretrained(qwen2_vl, device="cuba")
    with pytest.raises(UsageError, match="device"):
        VisionTower.from_pretrained(qwen2_vl, device=[])
    with pytest.raises(UsageError, match="model is None"):
        VisionTower.from_pretrained(None)
    with pytest.raises(BackendUnavailableError):
        VisionTower.from_pretrained(qwen2_vl, device="mps")


@pytest.mark.parametrize("value", [0, 1, None, "", "yes", {}])
def test_whether_graphs_are_captured_is_said_plainly(qwen2_vl: Path, value: Any) -> None:
    with pytest.raises(UsageError, match=r"cuda_graphs is .*; allowed: True, False, or CaptureLimits"):
        VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True, cuda_graphs=value)
    for fine in (True, False, CaptureLimits(2, 2**20)):
        VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True, cuda_graphs=fine)


@pytest.mark.parametrize("name", ["limits", "cache"])
def test_what_a_tower_keeps_is_checked_at_once(qwen2_vl: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 5; allowed: .*, or None"):
        VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True, **{name: 5})


def test_arguments_of_calls_are_checked_at_the_door(tower: VisionTower) -> None:
    for wrong in (None, 5, "pixels", torch.tensor(5.0)):
        with pytest.raises(UsageError, match=r"batch is .*; allowed: what preprocess\(\) returned"):
            tower.forward(wrong)
    with pytest.raises(UsageError, match="timestamps is 5; allowed: a number of seconds for each frame"):
        tower.encode_video(IMAGES[:1], timestamps=5)
    with pytest.raises(UsageError, match="max_patches is True; allowed: a whole number"):
        tower.encode(IMAGES[:1], max_patches=True)
    with pytest.raises(UsageError, match="patches is True; allowed: a whole number"):
        tower.memory_plan(True)


def test_an_order_of_axes_is_said_where_a_shape_allows_both(tower: VisionTower) -> None:
    rows = noise(50, 3, 1)
    assert rows.shape == (3, 50, 3), "three rows of 50 pixels, or three channels of 50 rows of three"
    columns = np.ascontiguousarray(rows.transpose(1, 2, 0))
    for call in (tower.preprocess, tower.encode, tower.preprocess_video, tower.encode_video):
        with pytest.raises(ImageValueError, match="say which with input_data_format="):
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


def test_a_foreign_bound_is_refused_before_anything_is_decoded(tower: VisionTower) -> None:
    for call in (tower.preprocess, tower.encode, tower.preprocess_video, tower.encode_video):
        with pytest.raises(UsageError, match="no bound longest_edge"):
            call([b"no image"], longest_edge=100)


def test_weights_that_do_not_fit_are_refused(qwen2_vl: Path, tmp_path: Path) -> None:
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


def test_a_tower_says_what_it_is(qwen2_vl: Path, tower: VisionTower) -> None:
    assert repr(tower) == "<VisionTower qwen2_vl: 3 blocks, 64 → 48 wide, torch.float32 on cpu>"
    delayed = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    assert repr(delayed).endswith("not loaded, for cpu>")


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_the_declared_one_wherever_it_is_declared(
    qwen2_vl: Path, tmp_path: Path, section: str | None, key: str
) -> None:
    config = json.loads((qwen2_vl / "config.json").read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("dtype", None)
        part.pop("torch_dtype", None)
    (config[section] if section else config)[key] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VisionTower.from_pretrained(tmp_path, device="cpu", delay_load=True).dtype == torch.float16
