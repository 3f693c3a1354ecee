"""CUDA graphs on a GPU: the same bits, no synchronization, no allocation, and the planned memory."""

import contextvars
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import noise
from support.towers import TowerCase, all_cases

from tritontower import PackedBatch, VisionTower
from tritontower.engine.executor import Executor

pytestmark = pytest.mark.gpu

each_case = pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A failed capture warns, and none may fail."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="batches of up to")
        yield


@pytest.fixture
def tower(qwen2_vl: Path, kernel_device: torch.device) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device=kernel_device, dtype=torch.bfloat16)


def similar_batches(tower: VisionTower, count: int) -> list[PackedBatch]:
    """Different images of different shapes, with nearly the same number of patches in each batch."""
    sizes = [[(280, 280), (140, 140)], [(140, 280), (280, 210)], [(392, 224)], [(140, 140), (280, 280)]]
    batches = [
        tower.preprocess([noise(*size, 7 * number + index) for index, size in enumerate(sizes[number % len(sizes)])])
        for number in range(count)
    ]
    executor = tower.executor_for(batches[0])
    assert len({executor.graph_cache.bucket(batch) for batch in batches}) <= 4
    return batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_replays_have_the_bits_of_eager_launches(
    case: TowerCase, dtype: torch.dtype, tmp_path: Path, kernel_device: torch.device
) -> None:
    folder = case.save(tmp_path / "model")
    launched = VisionTower.from_pretrained(folder, device=kernel_device, dtype=dtype, cuda_graphs=False)
    replayed = VisionTower.from_pretrained(folder, device=kernel_device, dtype=dtype)
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]
    lists = [images, images[::-1], images[:2], images[:1], images[1:]]
    for _ in range(3):
        for each in lists:
            batch = launched.preprocess(each)
            expected, actual = launched.run(batch), replayed.run(batch)
            for name, rows in expected.items():
                assert torch.equal(actual[name].view(torch.uint8), rows.view(torch.uint8)), name
    executor = replayed.executor_for(batch)
    assert executor.captured == len({executor.graph_cache.bucket(launched.preprocess(each)) for each in lists}) > 0
    assert launched.captured_bytes == 0 < replayed.captured_bytes


@pytest.mark.parametrize("how", ["queued", "pinned", "two streams"])
def test_queued_forward_passes_do_not_mix(tower: VisionTower, how: str) -> None:
    batches = similar_batches(tower, 16)
    expected = [tower.forward(batch).clone() for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()] if how == "two streams" else [torch.cuda.current_stream()]
    found: list[torch.Tensor] = []
    for number in range(8 * len(batches)):
        batch = batches[number % len(batches)]
        # Nothing synchronizes in between: staging and pinned memory must not be reused before its copy has finished.
        with torch.cuda.stream(streams[number % len(streams)]):
            found.append(tower.forward(batch.pinned() if how == "pinned" else batch))
    torch.cuda.synchronize()
    for number, rows in enumerate(found):
        assert torch.equal(rows, expected[number % len(batches)]), number


def test_a_forward_pass_never_synchronizes(tower: VisionTower) -> None:
    batches = similar_batches(tower, 4)
    on_device = [batch.to(tower.device) for batch in batches]
    for _ in range(3):
        for batch in (*batches, *on_device):
            tower.forward(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [tower.forward(batch) for batch in (*batches, *on_device)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(results[: len(batches)], results[len(batches) :], strict=True):
        assert torch.equal(one, other)


def test_warm_forward_passes_allocate_only_results(tower: VisionTower) -> None:
    batches = similar_batches(tower, 4)
    for _ in range(3):
        for batch in batches:
            tower.forward(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(5):
        for batch in batches:
            tower.forward(batch)
    after = torch.cuda.memory_stats()
    for name in ("segment.all.allocated", "reserved_bytes.all.current", "num_alloc_retries"):
        assert after[name] == before[name], name
    assert after["allocation.all.allocated"] - before["allocation.all.allocated"] == 5 * 4 * len(tower.graph.outputs)


@pytest.mark.parametrize("raw", [False, None], ids=["float pixels", "bytes"])
def test_the_memory_plan_matches_the_allocated_peak(
    raw: bool | None, qwen2_vl: Path, kernel_device: torch.device
) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device=kernel_device, dtype=torch.bfloat16, cuda_graphs=False)
    batch = tower.preprocess(noise(1792, 1764, 1), raw=raw, max_pixels=2**22)
    counts = [t * h * w for t, h, w in batch.images.grids]
    tower.forward(tower.preprocess(noise(1792, 1764, 2), raw=raw, max_pixels=2**22))
    tower.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows = tower.forward(batch)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    plan = tower.memory_plan(counts).peak_bytes
    if raw is False:
        # The plan assumes uint8 pixels, as `encode` uses them.
        width = tower.graph.values["pixels"].width
        plan += 3 * width * tower.memory_plan(counts).workload.patches
    assert abs(taken - plan) <= 0.02 * plan, (taken, plan)
    assert rows.isfinite().all()


def test_release_frees_graphs_and_buffers(tower: VisionTower) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    batches = similar_batches(tower, 4)
    expected = [tower.forward(batch).cpu() for batch in batches for _ in range(3)][::3]
    assert tower.captured_bytes > 0
    tower.release()
    assert tower.captured_bytes == 0
    # Tables of angles belong to no tower and stay.
    assert torch.cuda.memory_allocated() - before < 2**20
    for batch, rows in zip(batches, expected, strict=True):
        assert torch.equal(tower.forward(batch).cpu(), rows)


def test_forward_waits_for_weights_of_another_stream(tower: VisionTower) -> None:
    batch = tower.preprocess(noise(280, 280, 1), raw=False)
    expected, weights = tower.run(batch), tower.read_weights()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)
        executor = Executor(tower.graph, {name: weight.clone() for name, weight in weights.items()})
    actual = executor.run(batch)
    for name, rows in expected.items():
        assert torch.equal(actual[name], rows), name


def test_other_threads_may_use_the_device_during_a_capture(tower: VisionTower) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def busy() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    side = torch.ones(256, 256, device="cuda")
                    (side @ side).sum().item()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(busy,))
    thread.start()
    try:
        sizes = [(56 * n, 56 * n) for n in range(1, 9)]
        assert tower.warm_up(sizes) == len(sizes)
    finally:
        stop.set()
        thread.join()
    assert failures == []
