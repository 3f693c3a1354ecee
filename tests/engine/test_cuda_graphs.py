"""Forward passes in static buffers: replays have the bits of exact-size passes, and memory stays within its limits.

Without a GPU, a recorder takes the place of CUDA graphs.
"""

import contextvars
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.recording import StepRecorder, bucketed
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine import graph_cache, static_buffers
from tritontower.engine.cuda_graphs import CudaCapture
from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits
from tritontower.engine.static_buffers import StaticBuffers, plan_static_buffers
from tritontower.errors import UsageError
from tritontower.kernels.attention import attention
from tritontower.kernels.gemm import linear, patch_projection, qkv_projection

CASES = all_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

Towers = Callable[[TowerCase], VisionTower]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """A small fp32 tower of a case, made once."""
    made: dict[str, VisionTower] = {}

    def tower(case: TowerCase) -> VisionTower:
        if case.name not in made:
            folder = case.save(tmp_path_factory.mktemp("captured") / case.name)
            made[case.name] = VisionTower.from_pretrained(folder, device="cpu")
        return made[case.name]

    return tower


@pytest.fixture(scope="module")
def tower(qwen2_vl: Path) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


@pytest.fixture(scope="module")
def small(tower: VisionTower) -> PackedBatch:
    return tower.preprocess(noise(90, 90, 1))


@pytest.fixture(scope="module")
def large(tower: VisionTower) -> PackedBatch:
    return tower.preprocess(noise(400, 400, 2))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A failed capture warns: only tests that expect it may."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def both(
    tower: VisionTower, recorder: StepRecorder | None = None, limits: CaptureLimits | None = None
) -> tuple[Executor, Executor]:
    """Executors for exact sizes and for buckets, over the same weights."""
    executor = tower.executor_for(tower.preprocess([]))
    return executor, bucketed(executor, recorder or StepRecorder(), limits)


def batches_of(case: TowerCase, tower: VisionTower) -> list[PackedBatch]:
    """Batches of very different shapes, several times each."""
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]
    lists = [images, images[::-1], images[:2], images[:1], images[1:], images[:2][::-1], images[:1] * 2]
    batches = [tower.preprocess(each) for each in lists]
    return [*batches, *batches[::-1], *batches]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, rows in expected.items():
        assert torch.equal(actual[name], rows), name


def buffers_of(executor: Executor) -> list[StaticBuffers]:
    assert executor.graph_cache is not None
    return [*executor.graph_cache.buffers.values()]


def memory_of(executor: Executor) -> int:
    """Bytes of the block for new buffers."""
    assert executor.graph_cache is not None
    return executor.graph_cache.memory.numel()


def room_for(graphs: int, tower: VisionTower) -> CaptureLimits:
    """Limits that some graphs fit into, with what their launches allocate, and no older block."""
    _, planned = both(tower)
    planned.warm_up(tower.preprocess(noise(90, 90, 1)))
    return CaptureLimits(max_bytes=graphs * planned.captured_bytes + 50_000)


def poison(executor: Executor) -> None:
    """Fills all buffers with NaN, or −1 for integers."""
    with torch.inference_mode():
        for buffers in buffers_of(executor):
            buffers.memory.fill_(255)


@each_case
def test_replays_have_the_bits_of_exact_sizes(case: TowerCase, towers: Towers, poisoned_empty: None) -> None:
    tower, recorder = towers(case), StepRecorder()
    exact, planned = both(tower, recorder)
    for batch in batches_of(case, tower):
        expected = exact.run(batch)
        poison(planned)
        assert_same(planned.run(batch), expected)
    assert recorder.captures == planned.captured > 0
    assert recorder.replays > 2 * recorder.captures


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter only; test_cuda_graphs_gpu.py tests the GPU")
@pytest.mark.parametrize(
    ("name", "replayed"),
    [
        ("llava_next", False),
        ("qwen2_5_vl", False),
        ("siglip", True),
        pytest.param("qwen3_vl", False, marks=pytest.mark.slow),
    ],
)
def test_repeated_launches_have_the_bits_of_exact_sizes(
    name: str, replayed: bool, tmp_path: Path, kernel_device: torch.device, poisoned_empty: None
) -> None:
    case = next(case for case in CASES if case.name == name)
    # Deepstack needs all blocks; LLaVA skips the last one.
    depth = {} if name == "qwen3_vl" else {"depth": 2 if name == "llava_next" else 1}
    tower = VisionTower.from_pretrained(case.save(tmp_path / "model", **depth), device=kernel_device)
    exact = tower.executor_for(tower.preprocess([]))
    planned = bucketed(exact, StepRecorder() if replayed else None)
    first, second = (noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:2]))
    planned.run(tower.preprocess([first, second]))
    (buffers,) = buffers_of(planned)
    assert buffers.launches is not None
    kernels = list(buffers.launches.kernels)
    assert len(kernels) > 5
    # Other pixels in another order, hence other segments.
    for images in ([second[::-1], first], [first[::-1], second]):
        batch = tower.preprocess(images)
        expected = exact.run(batch)
        poison(planned)
        with pytest.MonkeyPatch.context() as patch:
            for module in (linear, qkv_projection, patch_projection, attention):
                patch.setattr(module, "choose_config", None)  # repeated launches select nothing
            assert_same(planned.run(batch), expected)
    assert (buffers.replay is not None) == replayed
    assert buffers.launches.kernels == kernels
    launches = weakref.ref(buffers.launches)
    del buffers
    planned.release()
    assert launches() is None, "without Python's garbage collection"


def test_observers_see_the_valid_rows_of_eager_steps(tower: VisionTower) -> None:
    recorder = StepRecorder()
    batch = tower.preprocess([noise(300, 300, 1), noise(210, 300, 2)])
    exact, planned = both(tower, recorder)
    planned.warm_up(batch)
    before = recorder.replays
    seen: list[dict[str, torch.Tensor]] = []
    for executor in (exact, planned):
        found: dict[str, torch.Tensor] = {}
        executor.run(
            batch, lambda node, tensors, found=found: found.update((n, tensors[n].clone()) for n in node.outputs)
        )
        seen.append(found)
    assert_same(seen[1], seen[0])
    assert recorder.replays == before


def test_threads_share_graphs(tower: VisionTower) -> None:
    exact, planned = both(tower, limits=room_for(3, tower))
    sizes = [(157, 243), (28, 28), (300, 64), (14, 700), (90, 90)]
    batches = [tower.preprocess([noise(w, h, w + h)] * count) for w, h in sizes for count in (1, 2)]
    expected = [exact.run(batch)["embeddings"] for batch in batches]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = list(range(len(batches))) * 3
        random.Random(seed).shuffle(order)
        for number in order:
            if not torch.equal(planned.run(batches[number])["embeddings"], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert 0 <= planned.captured <= 3
        assert planned.captured_bytes >= 0
    for thread in threads:
        thread.join()
    assert wrong == []
    assert planned.captured == 3


def test_warming_up_captures_at_once(tower: VisionTower, small: PackedBatch) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder)
    assert planned.warm_up(small)
    assert planned.warm_up(small)
    assert (recorder.captures, planned.captured) == (1, 1)
    (buffers,) = buffers_of(planned)
    assert planned.captured_bytes == buffers.driver_bytes + 1000 > 1000
    assert_same(planned.run(small), exact.run(small))
    assert not exact.warm_up(small)
    assert (exact.captured, exact.captured_bytes) == (0, 0)


def test_a_failed_capture_leaves_its_bucket_eager(tower: VisionTower, small: PackedBatch, large: PackedBatch) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder)
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(
        RuntimeWarning, match=r"up to \d+ patches run without .*stream is capturing.*warm_up.*cuda_graphs"
    ):
        assert_same(planned.run(small), exact.run(small))
    planned.graph_cache.request_capture(planned.graph_cache.bucket(small))  # type: ignore[union-attr]
    recorder.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        planned.run(small)
    recorder.error = None
    for _ in range(3):
        assert_same(planned.run(small), exact.run(small))
    assert (recorder.captures, planned.captured) == (0, 0)
    assert planned.warm_up(large), "other buckets are not affected"
    assert planned.warm_up(small), "warm_up() tries again"


def test_a_failed_capture_is_ended_and_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = ["caller's"]
    calls: list[str] = []

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def capture_begin(self, **options: Any) -> None:
            calls.append(f"begin on the {current[0]} stream")

        def capture_end(self) -> None:
            calls.append("end")
            raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {"Stream": lambda device: "capture", "stream": on, "CUDAGraph": Graph}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    backend = CudaCapture(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="previous error"):
        backend.capture(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        backend.capture(Mock(side_effect=KeyboardInterrupt))
    assert calls == ["begin on the capture stream", "end"] * 2
    assert (current, backend.held_bytes) == (["caller's"], 0)


@pytest.mark.parametrize("case", ["videos", "on the device", "bfloat16", "float16", "one token", "nothing"])
def test_other_batches_are_replayed(case: str, qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = getattr(torch, case) if "float" in case else torch.float32
    tower, recorder = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype=dtype), StepRecorder()

    def pack(seed: int) -> PackedBatch:
        frames = [noise(200, 170, seed), noise(60, 90, seed)]
        if case == "videos":
            return tower.preprocess_video([frames[0], frames[0][::-1], frames[0]])
        if case == "one token":
            return tower.preprocess(noise(28, 28, seed), min_pixels=28 * 28)
        batch = tower.preprocess([] if case == "nothing" else frames)
        return replace(batch, pixels=batch.pixels.to(dtype))

    monkeypatch.setattr(static_buffers, "are_on_host", lambda tensors: case != "on the device")
    exact = tower.executor_for(pack(0))
    planned = bucketed(exact, recorder)
    for seed in range(4):
        expected = exact.run(pack(seed))
        poison(planned)
        assert_same(planned.run(pack(seed)), expected)
    assert (recorder.captures, recorder.replays) == ((0, 0) if case == "nothing" else (1, 4))


@pytest.mark.parametrize("fault", ["does nothing", "one bit"])
def test_a_replay_that_differs_is_never_used(tower: VisionTower, small: PackedBatch, fault: str) -> None:
    class Faulty(StepRecorder):
        def record(self, launch: Callable[[], None]) -> Callable[[], None]:
            def faulty() -> None:
                if fault == "one bit":
                    launch()
                    (buffers,) = buffers_of(planned)
                    buffers.tensors["embeddings"].view(torch.int32)[0, 0] ^= 1

            return faulty

    exact, planned = both(tower, Faulty())
    planned.run(small)
    with pytest.warns(RuntimeWarning, match="first replay differs"):
        planned.run(small)
    assert planned.captured == 0
    assert_same(planned.run(small), exact.run(small))


def test_a_table_created_during_a_capture_fails_it(tower: VisionTower, small: PackedBatch) -> None:
    class Late(StepRecorder):
        def record(self, launch: Callable[[], None]) -> Callable[[], None]:
            (buffers,) = buffers_of(planned)
            buffers.metadata.segments.tiles(48, torch.device("cpu"))
            return launch

    _, planned = both(tower, Late())
    with pytest.warns(RuntimeWarning, match="48"):
        planned.run(small)
    planned.run(small)


def test_the_least_recently_used_graph_is_evicted(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder, room_for(2, tower))
    batches = [tower.preprocess(noise(side, side, side)) for side in (280, 140, 56)]
    cache = planned.graph_cache
    assert cache is not None

    def captured() -> list[bool]:
        return [cache.bucket(batch) in cache.captured for batch in batches]

    for batch in batches[:2]:
        assert planned.warm_up(batch)
    planned.run(batches[0])
    assert planned.warm_up(batches[2])
    assert captured() == [True, False, True]
    # In turn, too many for the limit: none is captured again.
    for batch in batches * 10:
        assert_same(planned.run(batch), exact.run(batch))
    assert recorder.captures == 3
    # One that comes more often than the least recently used is.
    for _ in range(2):
        planned.run(batches[1])
    assert captured() == [False, True, True]


def test_a_graph_beyond_the_byte_limit_evicts_no_other(
    tower: VisionTower, small: PackedBatch, large: PackedBatch
) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder, room_for(3, tower))
    assert planned.warm_up(large)
    recorder.allocates = 2**30
    with pytest.warns(
        RuntimeWarning, match=r"its CUDA graph holds \d+ bytes, the limit is \d+ \(CaptureLimits.max_bytes"
    ):
        assert not planned.warm_up(small)
    recorder.allocates = 0
    for _ in range(3):
        assert_same(planned.run(small), exact.run(small))
    assert (planned.captured, recorder.captures) == (1, 2)
    planned.release()
    gc.collect()  # a recorder's replay refers to its buffers, which a CUDA graph does not
    assert planned.warm_up(small), "there is room after release()"


def test_the_pool_counts_until_its_last_graph_is_gone(
    tower: VisionTower, small: PackedBatch, large: PackedBatch
) -> None:
    """All graphs share one pool, which is freed only with the last of them."""
    recorder = StepRecorder()
    _, planned = both(tower, recorder, room_for(1, tower))
    planned.warm_up(large)
    recorder.allocates = 0
    planned.warm_up(small)
    assert planned.captured == 1
    assert planned.captured_bytes == buffers_of(planned)[-1].driver_bytes + 1000
    planned.release()
    gc.collect()  # as above
    assert planned.captured_bytes == 0
    planned.warm_up(small)
    assert planned.captured_bytes == buffers_of(planned)[0].driver_bytes


def test_graphs_keep_their_memory_beside_a_larger_one(
    tower: VisionTower, small: PackedBatch, large: PackedBatch
) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder)
    planned.warm_up(small)
    held, block = planned.captured_bytes, memory_of(planned)
    assert_same(planned.run(large), exact.run(large))
    # The smaller block is kept for its graph only.
    assert planned.captured_bytes == 2 * held + block
    assert memory_of(planned) > block
    before = recorder.replays
    assert_same(planned.run(small), exact.run(small))
    assert recorder.replays == before + 1
    # Smaller buckets that come later share the larger block.
    planned.warm_up(tower.preprocess(noise(60, 60, 3)))
    assert planned.captured_bytes == 3 * held + block


def test_release_frees_everything_at_once(tower: VisionTower, small: PackedBatch) -> None:
    recorder = StepRecorder()
    exact, planned = both(tower, recorder)
    planned.run(small)
    buffers, memory = weakref.ref(buffers_of(planned)[0]), weakref.ref(planned.graph_cache.memory)  # type: ignore[union-attr]
    gc.collect()
    gc.disable()
    try:
        planned.release()
        assert (buffers(), memory()) == (None, None), "without Python's garbage collection"
    finally:
        gc.enable()
    assert (planned.captured, memory_of(planned)) == (0, 0)
    assert_same(planned.run(small), exact.run(small))
    assert (planned.captured, recorder.captures) == (1, 2)


def test_few_uncaptured_buffers_and_histories_are_kept(
    tower: VisionTower, small: PackedBatch, large: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = bucketed(both(tower)[0], None)
    for count in range(60, 0, -1):  # a larger block of memory would drop the buffers
        planned.run(tower.preprocess(np.zeros((28, 28 * count, 3), np.uint8), min_pixels=28 * 28))
    assert len(buffers_of(planned)) == graph_cache.MOST_UNCAPTURED
    monkeypatch.setattr(graph_cache, "MOST_HISTORIES", 2)
    recorder = StepRecorder()
    _, planned = both(tower, recorder)
    recorder.error = RuntimeError("failed")
    with pytest.warns(RuntimeWarning, match="failed"):
        planned.run(small)
    recorder.error = None
    planned.run(small)
    assert recorder.captures == 0
    for batch in (large, tower.preprocess(noise(200, 200, 3)), small):
        planned.run(batch)
    assert recorder.captures == 3, "the failure was forgotten"


def test_the_limit_must_not_be_negative() -> None:
    with pytest.raises(UsageError, match="max_bytes must be at least 0, got -1; cuda_graphs=False"):
        CaptureLimits(max_bytes=-1)


def test_a_cpu_has_no_buckets_and_no_graphs(qwen2_vl: Path) -> None:
    for choice in (True, False, CaptureLimits(max_bytes=1)):
        tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cuda_graphs=choice)
        batch = tower.preprocess(noise(90, 90, 1))
        assert tower.executor_for(batch).graph_cache is None
        assert tower.warm_up([(90, 90), [(90, 90), (56, 28)]]) == 0
        assert tower.captured_bytes == 0
        assert tower.memory_plan(batch.workload).workload == batch.workload


@each_case
def test_the_plan_of_static_buffers_is_their_memory(case: TowerCase, towers: Towers) -> None:
    tower = towers(case)
    _, planned = both(tower)
    batch, config = batches_of(case, tower)[0], tower.config
    plan = plan_static_buffers(
        tower.graph, batch.workload, 4, rows_per_token=config.rows_per_token, tile_rows=config.longest_segment
    )
    outputs = planned.run(batch)
    (buffers,) = buffers_of(planned)
    assert replace(buffers.bucket.workload, tiles=plan.workload.tiles) == plan.workload
    taken = buffers.memory.numel() + sum(-(-rows.nbytes // 256) * 256 for rows in outputs.values())
    tables = 4 * (buffers.addresses.tables_end + 2 * 4 * 5)
    assert plan.peak_bytes - 256 * len(plan.offsets) <= taken <= plan.peak_bytes + tables + 256
