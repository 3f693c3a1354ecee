"""Captured passes on a GPU: CUDA graphs by torch, the same bits, no waiting, no allocation, the memory that was planned."""

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
    """A capture that is refused says so in a warning, and none may be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="passes of up to")
        yield


@pytest.fixture
def tower(qwen2_vl: Path, kernel_device: torch.device) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device=kernel_device, dtype=torch.bfloat16)


def packs_of_one_bucket(tower: VisionTower, count: int) -> list[PackedBatch]:
    """Different images of different shapes, as many patches together each time, or nearly."""
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
def test_replayed_passes_are_bitwise_the_launched_ones(
    case: TowerCase, dtype: torch.dtype, tmp_path: Path, kernel_device: torch.device
) -> None:
    folder = case.save(tmp_path / "model")
    launched = VisionTower.from_pretrained(folder, device=kernel_device, dtype=dtype, cuda_graphs=False)
    replayed = VisionTower.from_pretrained(folder, device=kernel_device, dtype=dtype)
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]
    packs = [images, images[::-1], images[:2], images[:1], images[1:]]
    for _ in range(3):
        for pack in packs:
            batch = launched.preprocess(pack)
            expected, actual = launched.run(batch), replayed.run(batch)
            for name, rows in expected.items():
                assert torch.equal(actual[name].view(torch.uint8), rows.view(torch.uint8)), name
    executor = replayed.executor_for(batch)
    assert executor.captured == len({executor.graph_cache.bucket(launched.preprocess(pack)) for pack in packs}) > 0
    assert launched.captured_bytes == 0 < replayed.captured_bytes


def test_passes_in_a_row_do_not_wait_for_each_other_and_do_not_mix(tower: VisionTower) -> None:
    batches = packs_of_one_bucket(tower, 16)
    expected = [tower.forward(batch).clone() for batch in batches]
    torch.cuda.synchronize()
    # Nothing is waited for in between: the memory that copies come from must not be written again too early.
    actual = [tower.forward(batch) for _ in range(8) for batch in batches]
    for number, rows in enumerate(actual):
        assert torch.equal(rows, expected[number % len(batches)]), number


def test_nothing_in_a_forward_waits_for_the_device(tower: VisionTower) -> None:
    batches = packs_of_one_bucket(tower, 4)
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


def test_nothing_but_the_results_is_allocated_after_the_first_passes(tower: VisionTower) -> None:
    batches = packs_of_one_bucket(tower, 4)
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
def test_the_memory_plan_is_what_a_pass_takes(raw: bool | None, qwen2_vl: Path, kernel_device: torch.device) -> None:
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
        # The plan is of what `encode` does, which is bytes where the image processor's arithmetic is known.
        width = tower.graph.values["pixels"].width
        plan += 3 * width * tower.memory_plan(counts).workload.patches
    assert abs(taken - plan) <= 0.02 * plan, (taken, plan)
    assert rows.isfinite().all()


def test_release_gives_graphs_and_buffers_back(tower: VisionTower) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    batches = packs_of_one_bucket(tower, 4)
    expected = [tower.forward(batch).cpu() for batch in batches for _ in range(3)][::3]
    assert tower.captured_bytes > 0
    tower.release()
    assert tower.captured_bytes == 0
    # What is left are the tables of angles, which belong to no tower.
    assert torch.cuda.memory_allocated() - before < 2**20
    for batch, rows in zip(batches, expected, strict=True):
        assert torch.equal(tower.forward(batch).cpu(), rows)


def test_two_streams_share_a_tower(tower: VisionTower) -> None:
    batches = packs_of_one_bucket(tower, 8)
    expected = [tower.forward(batch).clone() for batch in batches for _ in range(2)][::2]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[torch.Tensor] = []
    for number in range(64):
        with torch.cuda.stream(streams[number % 2]):
            found.append(tower.forward(batches[number % len(batches)]))
    torch.cuda.synchronize()
    for number, rows in enumerate(found):
        assert torch.equal(rows, expected[number % len(batches)]), number


def test_weights_that_another_stream_is_still_making_are_waited_for(tower: VisionTower) -> None:
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


def test_warming_up_leaves_nothing_to_be_made(tower: VisionTower) -> None:
    assert tower.warm_up([(280, 280), [(280, 280), (140, 140)]]) == 2
    executor = tower.executor_for(tower.preprocess(noise(280, 280, 1)))
    before = executor.captured
    for pack in ([noise(280, 280, 2)], [noise(280, 280, 3), noise(140, 140, 4)]):
        assert tower.forward(tower.preprocess(pack)).isfinite().all()
    assert executor.captured == before


def test_a_tower_without_graphs_captures_nothing(qwen2_vl: Path, kernel_device: torch.device) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device=kernel_device, cuda_graphs=False)
    batch = tower.preprocess(noise(280, 280, 1))
    first = tower.forward(batch)
    for _ in range(3):
        assert torch.equal(tower.forward(batch), first)
    assert (tower.warm_up([(280, 280)]), tower.captured_bytes) == (0, 0)


def test_pixels_in_page_locked_memory_are_taken_from_there(tower: VisionTower) -> None:
    batches = packs_of_one_bucket(tower, 8)
    expected = [tower.forward(batch).clone() for batch in batches]
    pinned = [batch.pinned() for batch in batches]
    assert all(batch.pixels.is_pinned() for batch in pinned)
    for _ in range(3):
        # Gone as soon as the pass is queued: the memory may be handed out again only when the copy is done.
        found = [tower.forward(batch.pinned()) for batch in batches] + [tower.forward(batch) for batch in pinned]
    for number, rows in enumerate(found):
        assert torch.equal(rows, expected[number % len(batches)]), number


def test_encoding_is_the_same_with_and_without_graphs(qwen2_vl: Path, kernel_device: torch.device) -> None:
    images = [noise(28 * (2 + number % 9), 28 * (2 + number % 5), number) for number in range(60)]
    found = []
    for graphs in (False, True):
        tower = VisionTower.from_pretrained(qwen2_vl, device=kernel_device, cuda_graphs=graphs)
        for _ in range(3):
            embeddings = tower.encode(images, max_patches=400)
        found.append([embedding.embeddings for embedding in embeddings])
    assert all(map(torch.equal, *found))
