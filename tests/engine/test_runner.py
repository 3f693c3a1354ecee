"""ModelRunner assigns batches to executors that share their weights, and counts the memory of the weights."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import noise
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine import cuda_graphs
from tritontower.engine.runner import ModelRunner
from tritontower.errors import UsageError
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse
from tritontower.kernels.gemm import cpu

CASES = {case.name: case for case in all_cases()}
GAP = 128 * 4
"""Largest number of empty bytes after a tensor, in fp32."""

Towers = Callable[[str], VisionTower]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """A small fp32 tower of a case, without weights."""
    folder = tmp_path_factory.mktemp("runner")

    def tower(name: str) -> VisionTower:
        path: Path = folder / name
        saved = path if path.exists() else CASES[name].save(path)
        return VisionTower.from_pretrained(saved, device="cpu", delay_load=True)

    return tower


def make_runner(tower: VisionTower, *, normalized: bool = True) -> ModelRunner:
    """A runner for still images and for videos."""
    videos = fuse(build(tower.config))
    normalization = tower.preprocessor.normalization if normalized else None
    graphs = [fold_still_images(videos), videos]
    return ModelRunner(tower.config, graphs, tower.read_weights(), normalization=lambda: normalization)


def make_batches(tower: VisionTower) -> list[PackedBatch]:
    """A batch for each possible executor: stills in float and uint8 pixels, a video in float and uint8 pixels."""
    frames = [noise(60, 60, 1), noise(60, 60, 2)]
    return [pack(frames, raw=raw) for pack in (tower.preprocess, tower.preprocess_video) for raw in (False, True)]


def test_every_kind_of_batch_has_its_own_executor(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = make_runner(tower)
    assert len([*runner]) == 2, "uint8 executors are created on first use"
    batches = make_batches(tower)
    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(runner.executor_for, [batches[1]] * 8)}) == 1
    found = [runner.executor_for(batch) for batch in batches]
    assert len({*found}) == 4
    assert {*runner} == {*found}
    for executor, batch in zip(found, batches, strict=True):
        assert runner.executor_for(batch) is executor
        pixels = executor.graph.values["pixels"]
        assert (pixels.width, pixels.dtype == "uint8") == (batch.pixels.shape[1], batch.pixels.dtype == torch.uint8)
        assert torch.equal(runner.run(batch)["embeddings"], executor.run(batch)["embeddings"])
    assert all(executor.arena_bytes > 0 for executor in runner)
    runner.release()
    assert [executor.arena_bytes for executor in runner] == [0, 0, 0, 0]
    assert runner.captured_bytes == 0


def test_weights_are_shared_except_the_patch_projection(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = make_runner(tower)
    still, still_uint8, video, video_uint8 = map(runner.executor_for, make_batches(tower))
    for other in (video, still_uint8, video_uint8):
        shared = still.weights.keys() & other.weights.keys()
        assert all("patch_projection" in name for name in other.weights.keys() ^ still.weights.keys())
        assert all(other.weights[name].data_ptr() == still.weights[name].data_ptr() for name in shared)
    patch, width = tower.config.patch, tower.config.width
    own_shapes = {tuple(w.shape) for name, w in still_uint8.weights.items() if name not in still.weights}
    assert own_shapes == {(width, patch.still_inner), (width,)}


def test_batches_of_other_towers_are_rejected(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = make_runner(tower)
    stranger = towers("siglip").preprocess(noise(60, 60, 1))
    with pytest.raises(
        UsageError, match=r"must be this tower's, got one with temporal 1 instead of 2, .*preprocess\(\)"
    ):
        runner.run(stranger)
    batch, raw, *_ = make_batches(tower)
    with pytest.raises(UsageError, match=r"one of \[588, 1176\] pixel values per patch, got 587; .* preprocess\(\)"):
        runner.run(replace(batch, pixels=batch.pixels[:, 1:]))
    with pytest.raises(UsageError, match=r"float pixels, got uint8: .*preprocess\(\) without raw=True"):
        make_runner(tower, normalized=False).run(raw)


def test_a_tower_with_windows_rejects_a_batch_without(towers: Towers) -> None:
    tower = towers("qwen2_5_vl").load()
    batch = tower.preprocess(noise(60, 60, 1))
    with pytest.raises(UsageError, match=r"must have windows .*preprocess\(\)"):
        tower.forward(replace(batch, attention=replace(batch.attention, windows=None)))


def test_release_waits_for_a_capture_to_end(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(towers("qwen2_vl"))
    for executor in runner:
        executor.device = torch.device("cuda")  # as far as release() is concerned
    emptied = threading.Event()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied.set)
    thread = threading.Thread(target=runner.release)
    with cuda_graphs.capture_lock:
        thread.start()
        assert not emptied.wait(0.1), "torch does not allow it during a capture"
    thread.join()
    assert emptied.is_set()


def kept_bytes(call: Callable[[], object]) -> int:
    """Bytes that ``call`` allocates on the CPU and keeps."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
        gc.collect()
    assert profile.profiler is not None
    return sum(int(event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "clip", "mistral3", "gemma3"])
def test_weights_bytes_are_what_loading_allocates(name: str, towers: Towers) -> None:
    # The second load: at the first, libraries allocate memory of their own.
    towers(name).load()
    tower = towers(name)
    assert kept_bytes(tower.load) == pytest.approx(tower.weights_bytes, abs=2 * GAP)
    raw = tower.preprocess(noise(60, 60, 1), raw=True)
    before = tower.weights_bytes
    assert kept_bytes(lambda: tower.executor_for(raw)) == pytest.approx(tower.weights_bytes - before, abs=2 * GAP)
    assert tower.weights_bytes > before


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_weights_bytes_are_estimated_up_to_gaps(
    case: TowerCase, towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "can_prepack", lambda dtype: False)
    tower = towers(case.name)
    estimate = tower.weights_bytes
    tower.load()
    assert estimate <= tower.weights_bytes < estimate + GAP * len(tower.graph.held_shapes)
    assert estimate >= tower.graph.parameters * 4
