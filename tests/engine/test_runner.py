"""The runner of a tower: which batch each takes, what they share, and how much memory the weights take."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import noise
from support.configs import CONFIG
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine import cuda_graphs
from tritontower.engine.ops import TRANSFORMS
from tritontower.engine.runner import ModelRunner, estimate_weights_bytes
from tritontower.errors import UsageError
from tritontower.graph.builder import build
from tritontower.graph.fusion import KERNEL_PASSES, fold_still_images, fuse
from tritontower.graph.ir import Graph
from tritontower.kernels.gemm import cpu

CASES = {case.name: case for case in all_cases()}
GAP = 128 * 4
"""Bytes that stand empty behind a tensor at most, in fp32."""

Towers = Callable[[str], VisionTower]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """A small fp32 tower of a case, whose weights nobody has read."""
    folders: dict[str, Path] = {}

    def tower(name: str) -> VisionTower:
        if name not in folders:
            folders[name] = CASES[name].save(tmp_path_factory.mktemp("runner") / name)
        return VisionTower.from_pretrained(folders[name], device="cpu", delay_load=True)

    return tower


def graphs_of(tower: VisionTower) -> list[Graph]:
    """For still images and for videos."""
    videos = fuse(build(tower.config))
    return [fold_still_images(videos), videos]


def made(tower: VisionTower, *, rescaled: bool = True) -> ModelRunner:
    rescaling = tower.preprocessor.rescaling if rescaled else None
    return ModelRunner(tower.config, graphs_of(tower), tower.read_weights(), normalization=lambda: rescaling)


def packs(tower: VisionTower) -> dict[str, PackedBatch]:
    """One batch for each executor that there can be."""
    frames = [noise(60, 60, 1), noise(60, 60, 2)]
    return {
        f"{what} in {'bytes' if raw else 'values'}": batch(frames, raw=raw)
        for what, batch in (("stills", tower.preprocess), ("clip", tower.preprocess_video))
        for raw in (False, True)
    }


def test_every_kind_of_batch_has_an_executor_of_its_own(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = made(tower)
    assert len([*runner]) == 2, "those for bytes only when there are any"
    found = {name: runner.executor_for(batch) for name, batch in packs(tower).items()}
    assert len(set(found.values())) == 4
    assert set(runner) == set(found.values())
    for name, batch in packs(tower).items():
        assert runner.executor_for(batch) is found[name]
        assert found[name].graph.values["pixels"].width == batch.pixels.shape[1]
        assert (found[name].graph.values["pixels"].dtype == "uint8") == (batch.pixels.dtype == torch.uint8)


def test_threads_that_bring_the_first_bytes_share_one_executor(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = made(tower)
    raw = packs(tower)["stills in bytes"]
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(runner.executor_for, [raw] * 8))
    assert len(found) == 1
    assert len([*runner]) == 3


def test_weights_are_shared_but_for_the_patch_projection(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = made(tower)
    still, still_bytes, video, video_bytes = (runner.executor_for(batch) for batch in packs(tower).values())
    for other in (video, still_bytes, video_bytes):
        shared = still.weights.keys() & other.weights.keys()
        own = {name for name in other.weights.keys() ^ still.weights.keys() if "patch_projection" not in name}
        assert own == set()
        assert all(other.weights[name].data_ptr() == still.weights[name].data_ptr() for name in shared)
    patch, width = tower.config.patch, tower.config.width
    own_shapes = {tuple(w.shape) for name, w in still_bytes.weights.items() if name not in still.weights}
    assert own_shapes == {(width, patch.still_inner), (width,)}


def test_batches_of_other_towers_are_refused_with_what_this_one_takes(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    stranger = towers("siglip").preprocess(noise(60, 60, 1))
    with pytest.raises(UsageError, match=r"is another tower's, with temporal 1 instead of 2, .*; pack .* preprocess"):
        made(tower).executor_for(stranger)
    cut = packs(tower)["stills in values"]
    with pytest.raises(
        UsageError, match=r"587 pixel values a patch; the tower takes \[588, 1176\]; pack .* preprocess"
    ):
        made(tower).executor_for(replace(cut, pixels=cut.pixels[:, 1:]))
    with pytest.raises(UsageError, match=r"uint8 pixels is another tower's.*preprocess\(\), without raw=True"):
        made(tower, rescaled=False).executor_for(packs(tower)["stills in bytes"])


def test_release_reaches_all_of_them(towers: Towers) -> None:
    tower = towers("qwen2_vl")
    runner = made(tower)
    for batch in packs(tower).values():
        runner.executor_for(batch).run(batch)
    assert all(executor.arena_bytes > 0 for executor in runner)
    runner.release()
    assert [executor.arena_bytes for executor in runner] == [0, 0, 0, 0]
    assert runner.captured_bytes == 0


def test_release_leaves_torchs_caches_alone_while_a_pass_is_captured(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = made(towers("qwen2_vl"))
    for executor in runner:
        executor.device = torch.device("cuda")  # as far as releasing goes
    emptied = threading.Event()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied.set)
    thread = threading.Thread(target=runner.release)
    with cuda_graphs._capturing:
        thread.start()
        assert not emptied.wait(0.1), "torch does not allow it during a capture, whoever captures"
    thread.join()
    assert emptied.is_set()


# -- how much memory weights take -------------------------------------------------------------------------------------


def kept_bytes(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator has given out during ``call`` and not got back."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
        gc.collect()
    assert profile.profiler is not None
    return sum(int(event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "clip", "mistral3", "gemma3"])
def test_the_weights_bytes_of_a_loaded_tower_are_those_that_loading_allocates(name: str, towers: Towers) -> None:
    # Twice: what the libraries keep of the first load is no weight.
    towers(name).load()
    tower = towers(name)
    assert kept_bytes(tower.load) == pytest.approx(tower.weights_bytes, abs=2 * GAP)
    raw = tower.preprocess(noise(60, 60, 1), raw=True)
    before = tower.weights_bytes
    assert kept_bytes(lambda: tower.executor_for(raw)) == pytest.approx(tower.weights_bytes - before, abs=2 * GAP)
    assert tower.weights_bytes > before


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_they_are_foreseen_but_for_gaps_where_nothing_is_packed(
    case: TowerCase, towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "can_prepack", lambda dtype: False)
    tower = towers(case.name)
    foreseen = tower.weights_bytes
    tower.load()
    assert foreseen <= tower.weights_bytes < foreseen + GAP * len(tower.graph.held_shapes)
    assert foreseen >= tower.graph.parameters * 4


def test_padding_and_what_videos_have_beside_still_images_count() -> None:
    config = replace(
        CONFIG,
        width=144,
        heads=2,
        depth=1,
        features=(1,),
        gated=True,
        activation="silu",
        mlp_hidden=70,
        projector=replace(CONFIG.projector, hidden=576),
    )
    videos = fuse(build(config), KERNEL_PASSES)
    heads = 3 * 2 * (80 - 72) * (144 + 1)
    gates = (128 - 70) * (3 * 144 + 2)
    assert estimate_weights_bytes([videos], 2) == 2 * (videos.parameters + heads + gates)
    folded = 144 * config.patch.still_inner
    assert estimate_weights_bytes([fold_still_images(videos), videos], 2) == 2 * (
        videos.parameters + heads + gates + folded
    )


def test_the_transforms_that_take_no_memory_are_tiles() -> None:
    tensor = torch.zeros(4, 3, 2, 5, 5)
    copies = {name for name, transform in TRANSFORMS.items() if transform(tensor).data_ptr() != tensor.data_ptr()}
    assert copies == {"fold_temporal"}


def test_a_batch_without_windows_never_runs_where_blocks_attend_within_them(towers: Towers) -> None:
    tower = towers("qwen2_5_vl").load()
    batch = tower.preprocess(noise(60, 60, 1))
    with pytest.raises(UsageError, match="attends within windows, and the batch has none: it is another tower's"):
        tower.forward(replace(batch, attention=replace(batch.attention, windows=None)))
