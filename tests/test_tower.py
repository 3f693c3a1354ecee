"""The public tower: images → embeddings, on small random checkpoints."""

import gc
import json
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import noise, rename_tensors
from support.layers import LEVEL
from support.processes import run_python
from support.towers.qwen import save_qwen2_vl
from triton.runtime import interpreter

import tritontower
from tritontower import VisionTower, errors, has_vision
from tritontower.parity.parity import compare, compare_nodes, relative_error

SIZES = [(157, 243), (28, 28), (300, 64), (14, 700), (90, 90)]
IMAGES = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tower(qwen2_vl):
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


def test_a_video_of_one_still_is_the_still(tower):
    # The size rules of videos and images differ; the same bounds make the same grid.
    bounds = {"min_pixels": 3136, "max_pixels": 100_000}
    still = tower.encode(IMAGES[0], **bounds)[0]
    video = tower.encode_video([IMAGES[0]], **bounds)
    assert video.grid_thw == still.grid_thw
    assert relative_error(video.embeddings, still.embeddings) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.usefixtures("restore_threads")
def test_an_image_alone_and_in_a_batch_is_bitwise_the_same(tower, threads):
    torch.set_num_threads(threads)
    batch = [noise(50 + 37 * seed, 40 + 29 * seed, seed) for seed in range(9)]
    batch.insert(4, noise(28, 28, 99))
    # The smallest image becomes one token: a matmul of one row.
    packed = tower.encode(batch, min_pixels=28 * 28)
    assert packed[4].num_tokens == 1
    for position in (0, 4, 9):
        alone = tower.encode(batch[position], min_pixels=28 * 28)[0]
        assert torch.equal(alone.embeddings, packed[position].embeddings), position


def test_a_wrong_weight_is_found_at_its_node(tower, qwen2_vl):
    class Broken(VisionTower):
        def read_weights(self, progress):
            weights = super().read_weights(progress)
            weights["blocks.1.mlp_up.bias"] += 0.1
            return weights

    broken = Broken.from_pretrained(qwen2_vl, device="cpu")
    found = compare_nodes(broken, broken.preprocess(IMAGES[:1]))
    wrong = next(line for line in found if line.error > 1e-4)
    assert (wrong.node, wrong.value) == ("blocks.1.mlp", "blocks.1.mlp_hidden")
    assert not compare(broken, broken.preprocess(IMAGES[:1])).passed


def test_a_deleted_tower_frees_its_memory_at_once(qwen2_vl):
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


def test_concurrent_loads_read_the_weights_once(qwen2_vl, monkeypatch):
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    reads: list[int] = []
    original = VisionTower.read_weights
    together = threading.Barrier(4)

    def read(self, progress):
        reads.append(1)
        time.sleep(0.05)
        return original(self, progress)

    def work(_):
        together.wait()
        return tower.load()

    monkeypatch.setattr(VisionTower, "read_weights", read)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {tower}
    assert reads == [1]
    assert tower.is_loaded


def test_an_interrupted_forward_pass_leaves_the_tower_usable(tower):
    batch = tower.preprocess(IMAGES[0])
    expected = tower.forward(batch)
    executor = tower.executor_for(batch)
    executor.release()
    for stop_at in (0, 7):  # after the first node, in a new arena, and later
        seen: list[object] = []

        def interrupt(*state, seen=seen, stop_at=stop_at):
            seen.append(state)
            if len(seen) > stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            executor.run(batch, interrupt)
        assert torch.equal(tower.forward(batch), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="records the launches of Triton's interpreter")
def test_calls_go_down_to_a_launch_in_ten_frames(tmp_path, kernel_device, monkeypatch):
    tower = VisionTower.from_pretrained(save_qwen2_vl(tmp_path, depth=1), device=kernel_device)
    root = Path(tritontower.__file__).resolve().parents[1]
    stacks: set[tuple[str, ...]] = set()

    def record(*arguments, **options):
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


FORK = """
import os, sys
import torch
from PIL import Image
from tritontower import VisionTower

torch.set_num_threads(2)
tower, image = VisionTower.from_pretrained(sys.argv[1], device="cpu"), Image.new("RGB", (600, 400), "red")
expected = tower.encode(image)[0].embeddings
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(tower.encode(image)[0].embeddings, expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_encodes_in_one_thread(qwen2_vl):
    run_python("-c", FORK, qwen2_vl, timeout=60, check=True)


def test_a_forked_process_cannot_use_the_gpu(qwen2_vl, monkeypatch):
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(tower, "device", torch.device("cuda", 0))
    with pytest.raises(errors.BackendUnavailableError, match='start it with the method "spawn"'):
        tower.encode(noise(28, 28, 0))


def test_delayed_loading_plans_before_it_reads_weights(qwen2_vl, opened):
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype="float32", delay_load=True)
    assert not tower.is_loaded
    assert repr(tower).endswith("not loaded, for cpu>")
    assert tower.hidden_size == 48
    assert tower.count_tokens(100, 100) == 16
    assert tower.memory_plan(64).peak_bytes > 0
    assert opened.files == []
    with pytest.raises(errors.TowerNotLoadedError, match="load"):
        tower.encode(IMAGES[0])
    seen: list[tuple[int, int]] = []
    assert tower.load(progress=lambda done, total: seen.append((done, total))).is_loaded
    assert seen[-1][0] == seen[-1][1] > 0
    assert tower.encode(IMAGES[0])[0].num_tokens == tower.count_tokens(*SIZES[0])
    assert repr(tower) == "<VisionTower qwen2_vl: 3 blocks, 64 → 48 wide, torch.float32 on cpu>"


GRAY = np.zeros((9, 9, 3), np.uint8)
NOT_BATCHES = (5, "pixels", torch.tensor(5.0))
FRAMES = (GRAY, torch.from_numpy(GRAY), Image.fromarray(GRAY), Path("video.mp4"), None)
PLANNED = {"min_pixels": 2**27, "max_pixels": 2**28}
INVALID_CALLS: list[tuple[type[errors.TowerError], str, Callable[[VisionTower], object]]] = [
    (errors.AspectRatioError, "5 × 2000", lambda tower: tower.encode(np.zeros((2000, 5, 3), np.uint8))),
    (errors.EmptyImageError, "0 pixels", lambda tower: tower.encode(np.zeros((0, 5, 3), np.uint8))),
    (errors.ImageTypeError, "Path", lambda tower: tower.encode(["photo.jpg"])),
    (errors.ImageTooLargeError, "max_planned_pixels", lambda tower: tower.encode(GRAY, **PLANNED)),
    (errors.ProcessorError, "at least one frame", lambda tower: tower.encode_video([])),
    (errors.ProcessorError, "all frames one size", lambda tower: tower.encode_video(IMAGES[:2])),
    (errors.ProcessorError, "in order", lambda tower: tower.encode(GRAY, min_pixels=5000, max_pixels=4000)),
    (errors.ProcessorError, "28 × 28", lambda tower: tower.encode(GRAY, min_pixels=1, max_pixels=700)),
    (errors.ProcessorError, "max_pixels", lambda tower: tower.encode(GRAY, max_pixels="5000")),
    *((errors.UsageError, "width", partial(VisionTower.count_tokens, width=width, height=2)) for width in ("1", 1.5)),
    (errors.UsageError, "multiples of 4", lambda tower: tower.memory_plan(1023)),
    *(
        (errors.UsageError, r"result of preprocess\(\)", partial(VisionTower.forward, batch=batch))
        for batch in NOT_BATCHES
    ),
    *(
        (errors.UsageError, "patches must be an integer", partial(VisionTower.memory_plan, patches=patches))
        for patches in (4.0, "4", None, True, [4, "a"])
    ),
    *(
        (errors.UsageError, "list of the video's frames", partial(VisionTower.encode_video, frames=one))
        for one in FRAMES
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), INVALID_CALLS)
def test_invalid_calls_are_rejected(tower, error, message, call):
    with pytest.raises(error, match=message):
        call(tower)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (errors.BackendUnavailableError, {"device": "mps"}),
        *((errors.UsageError, {"dtype": value}) for value in ("int8", torch.int8)),
        *((errors.UsageError, {"device": value}) for value in ("cuba", [])),
        *((errors.UsageError, {name: 5}) for name in ("limits", "cache")),
        *((errors.UsageError, {"cuda_graphs": value}) for value in (0, 1, None, "", "yes", {})),
        *((errors.UsageError, {name: value}) for name, value in (("preprocessing", "mistral"), ("model", None))),
    ],
    ids=str,
)
def test_invalid_loading_arguments_are_rejected(qwen2_vl, error, options):
    with pytest.raises(error, match=next(iter(options))):
        VisionTower.from_pretrained(**{"model": qwen2_vl, "delay_load": True, **options})


def test_ambiguous_axis_order_must_be_given(tower):
    rows = noise(50, 3, 1)
    assert rows.shape == (3, 50, 3), "three rows of 50 pixels, or three channels of 50 rows of three"
    columns = np.ascontiguousarray(rows.transpose(1, 2, 0))
    for call in (tower.preprocess, tower.encode, tower.preprocess_video, tower.encode_video):
        with pytest.raises(errors.ImageValueError, match="pass input_data_format="):
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


@pytest.mark.parametrize("section", [None, "vision_config", "text_config"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_the_declared_one(qwen2_vl, tmp_path, section, key):
    config = json.loads((qwen2_vl / "config.json").read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("dtype", None)
        part.pop("torch_dtype", None)
    (config[section] if section else config)[key] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VisionTower.from_pretrained(tmp_path, device="cpu", delay_load=True).dtype == torch.float16


def test_bounds_limit_the_tokens_of_an_image(tower):
    bounds = {"min_pixels": 50_000, "max_pixels": 60_000}
    (embedding,) = tower.encode(IMAGES[0], **bounds)
    assert embedding.num_tokens == tower.count_tokens(*SIZES[0], **bounds) != tower.count_tokens(*SIZES[0])
    assert embedding.processed_size == (embedding.grid_thw[2] * 14, embedding.grid_thw[1] * 14)


def test_embeddings_and_batches_are_pickled_alone(tower):
    batch = tower.preprocess(IMAGES)
    assert torch.equal(tower.forward(pickle.loads(pickle.dumps(batch))), tower.forward(batch))
    for embedding in tower.encode(IMAGES):
        # A view would take the memory of the whole batch along.
        assert embedding.embeddings.untyped_storage().nbytes() == embedding.embeddings.nbytes
        copy = pickle.loads(pickle.dumps(embedding))
        assert torch.equal(copy.embeddings, embedding.embeddings)
        assert (copy != embedding, embedding == embedding) == (True, True)


def test_weights_that_do_not_fit_are_rejected(qwen2_vl, tmp_path):
    lacking = rename_tensors(qwen2_vl, tmp_path / "lacking", "visual.blocks.1.", "elsewhere.blocks.1.")
    with pytest.raises(errors.CheckpointIncompleteError):
        VisionTower.from_pretrained(lacking)
    other = rename_tensors(qwen2_vl, tmp_path / "other", "lm_head.", "visual.lm_head.")
    with pytest.raises(errors.UnexpectedTensorError):
        VisionTower.from_pretrained(other)
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"embed_dim": 64', '"embed_dim": 32')
    )
    with pytest.raises(errors.ShapeMismatchError):
        VisionTower.from_pretrained(other)


def test_has_vision(qwen2_vl, tmp_path):
    assert has_vision(qwen2_vl)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    assert not has_vision(tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError):
        has_vision(tmp_path / "nowhere")
