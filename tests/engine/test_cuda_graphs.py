"""Planned passes: what they are planned for, and that nothing of it shows in a result.

There is no GPU here.  Instead of CUDA graphs, recorders replay a pass over the same static buffers: one runs its steps
again, the other the very launches of Triton's interpreter, with the arguments they were recorded with.
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

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.recording import LaunchRecorder, StepRecorder
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.engine import graph_cache, static_buffers
from tritontower.engine.buckets import STEPS, Division, Planner, planned, rounded
from tritontower.engine.cuda_graphs import CudaCapture
from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits
from tritontower.engine.static_buffers import plan_static_buffers
from tritontower.errors import TowerNotLoadedError, UsageError
from tritontower.graph.ir import Workload
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.segments import Segments

CASES = all_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SIZES = [(157, 243), (28, 28), (300, 64), (14, 700), (90, 90)]

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


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A capture that is refused says so in a warning: none may be, unless a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def both(
    tower: VisionTower, recorder: StepRecorder | None = None, limits: CaptureLimits | None = None
) -> tuple[Executor, Executor]:
    """The exact and the planned executor over the same weights."""
    sources = tower.read_weights()
    planned_one = Executor(tower.graph, sources, cuda_graphs=recorder or StepRecorder(), limits=limits)
    return Executor(tower.graph, sources), planned_one


def batches_of(case: TowerCase, tower: VisionTower) -> list[PackedBatch]:
    """Packs of very different shapes, most of them more than once in sizes that share a bucket."""
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]
    packs = [images, images[::-1], images[:2], images[:1], images[1:], images[:2][::-1], images[:1] * 2]
    return [tower.preprocess(pack) for pack in (*packs, *packs[::-1], *packs)]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, rows in expected.items():
        assert torch.equal(actual[name], rows), name


def poison(executor: Executor) -> None:
    """Nothing but NaN, and for integers −1, in everything that a pass holds."""
    assert executor.graph_cache is not None
    with torch.inference_mode():
        for entry in executor.graph_cache.buffers.values():
            entry.memory.fill_(255)


# -- what a pass is planned for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 16])
def test_rounding_wastes_less_than_its_promise(steps: int) -> None:
    before = 0
    for count in range(1, 70_000):
        size = rounded(count, steps)
        assert 0 <= size - count < max(1, count / steps)
        assert size >= before
        assert rounded(size, steps) == size
        before = size
    assert [rounded(count) for count in (0, 1, 31, 33, 577, 1000, 16384)] == [0, 1, 31, 34, 608, 1024, 16384]
    assert len({rounded(count) for count in range(2**12, 2**13 + 1)}) == 17


@each_case
def test_every_dimension_is_planned_for_at_least_what_there_is_and_comes_out_even(
    case: TowerCase, towers: Towers
) -> None:
    tower = towers(case)
    config, per_token = tower.config, tower.config.rows_per_token
    generator = random.Random(0)
    for images in (1, 2, 5, 17, 33):
        sizes = [(generator.randint(28, 120), generator.randint(28, 120)) for _ in range(images)]
        workload = tower.workload(sizes)
        plan = planned(workload, rows_per_token=per_token, tile_rows=config.longest_segment)
        for dimension in ("patches", "selected", "merged", "tokens", "tiles"):
            live, size = workload.rows(dimension), plan.rows(dimension)
            assert live <= size <= live + live / STEPS, dimension
        assert plan.rows("selected") == plan.rows("merged") * per_token
        if workload.tokens == workload.rows("merged"):
            assert plan.tokens == plan.rows("merged")
        if workload.rows("selected") == workload.patches:
            assert plan.rows("selected") == plan.patches
        if config.longest_segment is not None:
            assert plan.patches == plan.tiles * config.longest_segment
        again = planned(plan, rows_per_token=per_token, tile_rows=config.longest_segment)
        assert again == plan


def test_tiles_that_do_not_have_the_rows_that_they_are_said_to_have() -> None:
    with pytest.raises(ValueError, match="3 tiles of 5 rows have 15 rows, not 14"):
        planned(Workload(14, 14, 0, tiles=3), tile_rows=5)


@pytest.mark.parametrize("bound", [None, 4000])
def test_padding_is_in_short_segments_of_its_own(bound: int | None) -> None:
    segments = Segments([4000, 96, 1])
    division = Division.of(segments, rounded(4097), bound)
    lengths = division.lengths(segments)
    assert lengths == (4000, 96, 1, 64, 64, 64, 63)
    assert sum(lengths) == division.total
    assert len(lengths) <= division.count
    assert division.longest == (bound or 4096)
    assert Division.of(Segments([5, 3]), 10, None).lengths(Segments([5, 3])) == (5, 3, 2)


def test_segments_have_room_for_all_the_padding_that_there_can_be() -> None:
    for live in range(1, 20_000, 7):
        total, segments = rounded(live), Segments([live])
        division = Division.of(segments, total, None)
        assert len(division.lengths(segments)) <= division.count


def test_packs_of_about_one_size_are_one_bucket(tower: VisionTower) -> None:
    planner = Planner(tower.graph, tower.device)
    shapes = [(1400, 1400), (1372, 1400), (1400, 1386), (1092, 1820)]
    buckets = [planner.bucket(tower.preprocess(np.zeros((h, w, 3), np.uint8))) for w, h in shapes]
    assert len(set(buckets)) == 2, "patches in one sixteenth of each other, and a side beyond a power of two"
    assert buckets[0] == buckets[1] == buckets[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs only where there is no GPU")
def test_what_one_backend_launched_is_not_replayed_for_another(tower: VisionTower) -> None:
    planner, batch = Planner(tower.graph, tower.device), tower.preprocess(noise(90, 90, 1))
    with dispatch.use("interpreter"):
        interpreted = planner.bucket(batch)
    assert interpreted is not None
    assert interpreted != planner.bucket(batch)
    assert replace(interpreted, backend="reference") == planner.bucket(batch)


def test_tiles_of_several_sizes_that_count_are_not_planned(towers: Towers) -> None:
    case = next(case for case in CASES if case.name == "clip")
    tower = towers(case)
    batch = tower.preprocess([noise(64, 64, 1)] * 2)
    planner = Planner(tower.graph, tower.device)
    planner._bound = None
    assert planner.bucket(batch) is not None
    tiles = Segments([1, batch.attention.segments.total - 1])
    assert planner.bucket(replace(batch, attention=replace(batch.attention, tiles=tiles))) is None


# -- that it does not show --------------------------------------------------------------------------------------------


@each_case
def test_replayed_passes_are_bitwise_those_of_exact_size(case: TowerCase, towers: Towers, poisoned_empty: None) -> None:
    tower, recorder = towers(case), StepRecorder()
    exact, planned_one = both(tower, recorder)
    for batch in batches_of(case, tower):
        expected = exact.run(batch)
        poison(planned_one)
        assert_same(planned_one.run(batch), expected)
    assert recorder.captures == planned_one.captured > 0
    # One at the capture, and passes after it.
    assert recorder.replays > 2 * recorder.captures


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's test; test_capture_gpu.py has the GPU's own")
@pytest.mark.parametrize("name", ["clip", "gemma3", "llava_next", "qwen2_5_vl", "qwen3_vl", "siglip"])
def test_repeated_launches_are_bitwise_those_of_exact_size(
    name: str, tmp_path: Path, kernel_device: torch.device, poisoned_empty: None
) -> None:
    case = next(case for case in CASES if case.name == name)
    depth = {} if name == "qwen3_vl" else {"depth": 1}  # whose deepstack needs more
    tower = VisionTower.from_pretrained(case.save(tmp_path / "model", **depth), device=kernel_device)
    recorder = LaunchRecorder()
    exact, planned_one = both(tower, recorder)
    first, second = (noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:2]))
    planned_one.run(tower.preprocess([first, second]))
    # Other numbers in another order, hence another division into segments; captured now, and replayed once.
    batch = tower.preprocess([second[::-1], first])
    assert_same(planned_one.run(batch), exact.run(batch))
    assert (recorder.captures, recorder.replays) == (1, 1)
    batch = tower.preprocess([first[::-1], second])
    poison(planned_one)
    assert_same(planned_one.run(batch), exact.run(batch))
    assert (recorder.captures, recorder.replays) == (1, 2)


@each_case
def test_padding_is_finite_in_every_value(case: TowerCase, towers: Towers, poisoned_empty: None) -> None:
    tower = towers(case)
    _, planned_one = both(tower)
    batch = batches_of(case, tower)[0]
    planned_one.run(batch)
    assert planned_one.graph_cache is not None
    (entry,) = planned_one.graph_cache.buffers.values()
    poison(planned_one)
    with torch.inference_mode():
        entry.fill(batch)
        for node, step in planned_one._steps:
            step(entry.tensors, entry.facts)
            for name in node.outputs:
                assert entry.tensors[name].isfinite().all(), name
    assert entry.bucket.workload.patches >= batch.workload.patches


def test_numbers_of_a_pack_that_are_not_finite_stay_its_own(tower: VisionTower) -> None:
    exact, planned_one = both(tower)
    batch = tower.preprocess([noise(300, 300, 1), noise(210, 300, 2)])
    bad = replace(batch, pixels=torch.full_like(batch.pixels, float("nan")))
    for _ in range(3):
        planned_one.run(bad)
        assert_same(planned_one.run(batch), exact.run(batch))


def test_one_token_and_nothing_at_all(tower: VisionTower) -> None:
    exact, planned_one = both(tower)
    smallest = tower.preprocess(noise(28, 28, 1), min_pixels=28 * 28)
    assert sum(smallest.images.token_counts) == 1
    nothing = tower.preprocess([])
    for _ in range(4):
        assert_same(planned_one.run(smallest), exact.run(smallest))
        assert_same(planned_one.run(nothing), exact.run(nothing))
    assert planned_one.captured == 1
    assert not planned_one.warm_up(nothing)


def test_inputs_that_are_on_the_device_already(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, planned_one = both(tower)
    monkeypatch.setattr(static_buffers, "_are_on_host", lambda tensors: False)
    for seed in range(4):
        batch = tower.preprocess([noise(300, 200, seed), noise(90, 90, seed)])
        expected = exact.run(batch)
        if seed:
            poison(planned_one)
        assert_same(planned_one.run(batch), expected)


def test_videos_are_planned_like_images(tower: VisionTower) -> None:
    videos = tower.executor_for(tower.preprocess_video([noise(120, 90, 1)])).graph
    sources = tower.read_weights()
    exact = Executor(videos, sources)
    recorder = StepRecorder()
    planned_one = Executor(videos, sources, cuda_graphs=recorder)
    for seed in range(4):
        batch = tower.preprocess_video([noise(120, 90, seed + frame) for frame in range(5)])
        assert_same(planned_one.run(batch), exact.run(batch))
    assert (recorder.captures, recorder.replays) == (1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_other_dtypes_are_planned_alike(dtype: torch.dtype, qwen2_vl: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", dtype=dtype)
    exact, planned_one = both(tower)
    for pixels in (torch.float32, dtype):
        for seed in range(3):
            batch = tower.preprocess([noise(200, 170, seed), noise(60, 90, seed)])
            batch = replace(batch, pixels=batch.pixels.to(pixels))
            assert_same(planned_one.run(batch), exact.run(batch))
    assert planned_one.captured == 2, "a buffer for each dtype of pixels"


# -- what is captured, and what goes ----------------------------------------------------------------------------------


def test_a_bucket_is_captured_when_it_comes_the_second_time(tower: VisionTower) -> None:
    recorder = StepRecorder()
    _, planned_one = both(tower, recorder)
    batch = tower.preprocess(noise(90, 90, 1))
    for use, (captures, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        planned_one.run(batch)
        assert (recorder.captures, recorder.replays) == (captures, replays), use


def test_warming_up_captures_at_once(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch = tower.preprocess(noise(90, 90, 1))
    assert planned_one.warm_up(batch)
    assert planned_one.warm_up(batch)
    assert (recorder.captures, planned_one.captured) == (1, 1)
    assert planned_one.captured_bytes == planned_one.graph_cache.memory.numel() + 1000
    assert_same(planned_one.run(batch), exact.run(batch))
    assert not exact.warm_up(batch)
    assert (exact.captured, exact.captured_bytes) == (0, 0)


def test_an_observer_sees_the_rows_that_count_and_nothing_is_replayed(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch = tower.preprocess([noise(300, 300, 1), noise(210, 300, 2)])
    planned_one.warm_up(batch)
    before = recorder.replays
    seen: list[dict[str, torch.Tensor]] = []
    for executor in (exact, planned_one):
        found: dict[str, torch.Tensor] = {}
        executor.run(
            batch, lambda node, tensors, found=found: found.update((n, tensors[n].clone()) for n in node.outputs)
        )
        seen.append(found)
    assert_same(seen[1], seen[0])
    assert recorder.replays == before


def test_a_capture_that_fails_is_remembered_and_warned_of_once(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch, other = tower.preprocess(noise(90, 90, 1)), tower.preprocess(noise(300, 300, 1))
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    planned_one.run(batch)
    with pytest.warns(
        RuntimeWarning, match=r"up to \d+ patches run launch by launch: .*stream is capturing.*cuda_graphs"
    ):
        result = planned_one.run(batch)
    assert_same(result, exact.run(batch))
    recorder.error = None
    for _ in range(3):
        assert_same(planned_one.run(batch), exact.run(batch))
    assert (recorder.captures, planned_one.captured) == (0, 0)
    assert not planned_one.warm_up(batch)
    assert planned_one.warm_up(other), "another bucket is another matter"


@pytest.mark.parametrize("hidden", [False, True], ids=["as it is", "behind the end of the capture"])
def test_a_capture_without_memory_is_tried_again_later_and_by_warming_up(tower: VisionTower, hidden: bool) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch = tower.preprocess(noise(90, 90, 1))
    expected = exact.run(batch)
    failure: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    if hidden:
        ended = RuntimeError("operation failed due to a previous error during capture")
        ended.__context__ = failure
        failure = ended
    recorder.error = failure
    planned_one.run(batch)
    with pytest.warns(RuntimeWarning, match="tried again after 6 more of them"):
        assert_same(planned_one.run(batch), expected)
    recorder.error = None
    # Not at once: a capture that fails costs a pass.
    for use in range(6):
        assert planned_one.captured == 0, use
        assert_same(planned_one.run(batch), expected)
    assert planned_one.captured == 1
    other = tower.preprocess(noise(300, 300, 1))
    recorder.error = failure
    with pytest.warns(RuntimeWarning, match="tried again"):
        assert not planned_one.warm_up(other)
    recorder.error = None
    assert planned_one.warm_up(other)


def test_a_capture_that_cannot_be_ended_leaves_the_current_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: Any = None) -> None: ...
        def wait_stream(self, other: Any) -> None: ...
        def synchronize(self) -> None: ...

    caller = Stream()
    current: list[Any] = [caller]
    ran_on: list[Any] = []

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(graph: Any, *, stream: Any, **options: Any) -> Iterator[None]:
        """As torch's: nothing is put back if the capture cannot be ended."""
        current[0] = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {"Stream": Stream, "stream": on, "graph": graph, "current_stream": lambda device: current[0]}
    fakes |= {"empty_cache": lambda: None, "memory_reserved": lambda device: 0, "CUDAGraph": object}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    backend = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            backend.capture(lambda: ran_on.append(current[0]))
        assert current[0] is caller
    assert len({*ran_on}) == 1, "all on the stream that captures"
    assert caller not in ran_on


def test_an_interrupted_capture_leaves_the_tower_usable(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch = tower.preprocess(noise(90, 90, 1))
    planned_one.run(batch)
    recorder.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        planned_one.run(batch)
    assert_same(planned_one.run(batch), exact.run(batch))


@pytest.mark.parametrize("fault", ["does nothing", "one bit"])
def test_a_replay_that_differs_is_never_used(tower: VisionTower, fault: str) -> None:
    class Faulty(StepRecorder):
        def capture(self, work: Callable[[], None]) -> Any:
            replay = super().capture(work)

            def faulty() -> None:
                if fault == "one bit":
                    replay()
                    rows = entry.tensors["embeddings"].view(torch.int32)
                    rows[0, 0] ^= 1

            faulty.allocated = 0
            (entry,) = planned_one.graph_cache.buffers.values()
            return faulty

    exact, planned_one = both(tower, Faulty())
    batch = tower.preprocess(noise(90, 90, 1))
    planned_one.run(batch)
    with pytest.warns(RuntimeWarning, match="first replay differs"):
        planned_one.run(batch)
    assert planned_one.captured == 0
    assert_same(planned_one.run(batch), exact.run(batch))


def test_a_table_that_appears_only_while_launches_are_captured_fails_the_capture(tower: VisionTower) -> None:
    class Late(StepRecorder):
        def capture(self, work: Callable[[], None]) -> Any:
            (entry,) = planned_one.graph_cache.buffers.values()
            entry.facts.segments.tiles(48, torch.device("cpu"))
            return super().capture(work)

    _, planned_one = both(tower, Late())
    batch = tower.preprocess(noise(90, 90, 1))
    planned_one.run(batch)
    with pytest.warns(RuntimeWarning, match="tiles of 48 rows"):
        planned_one.run(batch)
    planned_one.run(batch)


def test_the_least_recently_used_graph_goes_first(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder, CaptureLimits(max_graphs=2))
    batches = [tower.preprocess(noise(side, side, side)) for side in (56, 140, 280)]
    for batch in batches[:2]:
        assert planned_one.warm_up(batch)
    planned_one.run(batches[0])
    assert planned_one.warm_up(batches[2])
    passes = planned_one.graph_cache
    assert [passes.bucket(batch) in passes._captured() for batch in batches] == [True, False, True]
    for batch in batches:
        assert_same(planned_one.run(batch), exact.run(batch))
    assert planned_one.captured == 2
    # What was evicted is captured again, but each time only after it has come more often.
    captures = recorder.captures
    for _ in range(40):
        for batch in batches:
            assert_same(planned_one.run(batch), exact.run(batch))
    assert 1 <= recorder.captures - captures <= 12
    assert planned_one.captured == 2


def test_a_graph_beyond_the_limit_of_bytes_is_given_up(tower: VisionTower) -> None:
    exact, planned_one = both(tower, limits=CaptureLimits(max_bytes=10_000))
    batch = tower.preprocess(noise(90, 90, 1))
    with pytest.warns(RuntimeWarning, match="the limit is 10000"):
        assert not planned_one.warm_up(batch)
    assert planned_one.captured_bytes == 0
    for _ in range(3):
        assert_same(planned_one.run(batch), exact.run(batch))


def test_a_graph_beyond_the_limit_of_bytes_drives_no_other_out(tower: VisionTower) -> None:
    small, large = tower.preprocess(noise(90, 90, 1)), tower.preprocess(noise(400, 400, 2))
    _, free = both(tower)
    free.warm_up(small)
    _, planned_one = both(tower, limits=CaptureLimits(max_bytes=free.captured_bytes))
    assert planned_one.warm_up(small)
    with pytest.warns(RuntimeWarning, match="the limit is"):
        assert not planned_one.warm_up(large)
    assert planned_one.captured == 1
    assert planned_one.warm_up(small)


def test_memory_of_a_larger_pass_refuses_a_graph_only_as_long_as_it_is_there(tower: VisionTower) -> None:
    small, large = tower.preprocess(noise(90, 90, 1)), tower.preprocess(noise(400, 400, 2))
    _, free = both(tower)
    free.warm_up(small)
    _, planned_one = both(tower, limits=CaptureLimits(max_bytes=free.captured_bytes))
    planned_one.run(large)
    with pytest.warns(RuntimeWarning, match=r"the limit is .* other passes, release\(\) gives"):
        assert not planned_one.warm_up(small)
    planned_one.release()
    assert planned_one.warm_up(small)


def test_what_an_evicted_graph_allocated_is_counted_as_long_as_any_graph_is_there(tower: VisionTower) -> None:
    """All graphs share one pool, which no graph but the last gives back."""
    recorder = StepRecorder()
    _, planned_one = both(tower, recorder, limits=CaptureLimits(max_graphs=1))
    first, second = tower.preprocess(noise(400, 400, 2)), tower.preprocess(noise(90, 90, 1))
    planned_one.warm_up(first)
    recorder.allocates = 0
    planned_one.warm_up(second)
    assert planned_one.captured == 1
    assert planned_one.captured_bytes == planned_one.graph_cache.memory.numel() + 1000
    planned_one.release()
    gc.collect()  # a recorder's replay knows its pass, which a CUDA graph does not
    assert planned_one.captured_bytes == 0
    planned_one.warm_up(second)
    assert planned_one.captured_bytes == planned_one.graph_cache.memory.numel()


def test_what_other_graphs_allocated_may_leave_no_room(tower: VisionTower) -> None:
    recorder = StepRecorder()
    batch = tower.preprocess(noise(400, 400, 2))
    _, free = both(tower)
    free.warm_up(batch)
    _, planned_one = both(tower, recorder, limits=CaptureLimits(max_bytes=free.captured_bytes))
    assert planned_one.warm_up(batch)
    with pytest.warns(RuntimeWarning, match="the limit is"):
        assert not planned_one.warm_up(tower.preprocess(noise(90, 90, 1)))
    assert planned_one.captured == 1
    assert planned_one.captured_bytes == free.captured_bytes + 1000, "the pool keeps what was taken in vain"


def test_graphs_keep_their_memory_when_a_larger_pass_comes(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    small, large = tower.preprocess(noise(90, 90, 1)), tower.preprocess(noise(400, 400, 2))
    planned_one.warm_up(small)
    held = planned_one.captured_bytes
    assert_same(planned_one.run(large), exact.run(large))
    assert planned_one.captured_bytes == held
    before = recorder.replays
    assert_same(planned_one.run(small), exact.run(small))
    assert recorder.replays == before + 1
    planned_one.warm_up(large)
    assert planned_one.captured_bytes == held + planned_one.graph_cache.memory.numel() + 1000


def test_buckets_share_memory_when_the_largest_comes_first(tower: VisionTower) -> None:
    _, planned_one = both(tower)
    for side in (400, 300, 200, 90):
        planned_one.warm_up(tower.preprocess(noise(side, side, 1)))
    assert planned_one.captured_bytes == planned_one.graph_cache.memory.numel() + 4 * 1000


def test_release_gives_everything_back(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder)
    batch = tower.preprocess(noise(90, 90, 1))
    planned_one.warm_up(batch)
    planned_one.release()
    gc.collect()  # as above
    assert (planned_one.captured, planned_one.captured_bytes, planned_one.graph_cache.memory.numel()) == (0, 0, 0)
    assert_same(planned_one.run(batch), exact.run(batch))
    assert recorder.captures == 2, "it has come before"


def test_what_is_released_is_gone_at_once(tower: VisionTower) -> None:
    """Device memory must not wait for Python's collector of rings."""
    _, planned_one = both(tower)
    planned_one.run(tower.preprocess(noise(90, 90, 1)))
    (entry,) = map(weakref.ref, planned_one.graph_cache.buffers.values())
    memory = weakref.ref(planned_one.graph_cache.memory)
    gc.collect()
    gc.disable()
    try:
        planned_one.release()
        assert (entry(), memory()) == (None, None)
    finally:
        gc.enable()


def test_few_passes_without_a_graph_are_kept(tower: VisionTower) -> None:
    _, planned_one = both(tower)
    for count in range(1, 20):
        planned_one.run(tower.preprocess(np.zeros((28, 28 * count, 3), np.uint8), min_pixels=28 * 28))
    assert len(planned_one.graph_cache.buffers) <= graph_cache.MOST_UNCAPTURED


def test_what_is_remembered_of_buckets_is_bounded(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_cache, "MOST_HISTORIES", 2)
    exact, planned_one = both(tower)
    batches = [tower.preprocess(noise(side, side, side)) for side in (56, 140, 280)]
    for batch in (*batches, *batches, batches[0], *batches[::-1]):
        assert_same(planned_one.run(batch), exact.run(batch))
    assert len(planned_one.graph_cache._histories) == 2


def test_threads_share_graphs(tower: VisionTower) -> None:
    recorder = StepRecorder()
    exact, planned_one = both(tower, recorder, CaptureLimits(max_graphs=3))
    batches = [tower.preprocess([noise(w, h, w + h)] * count) for w, h in SIZES for count in (1, 2)]
    expected = [exact.run(batch) for batch in batches]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = list(range(len(batches))) * 3
        random.Random(seed).shuffle(order)
        for number in order:
            if not torch.equal(planned_one.run(batches[number])["embeddings"], expected[number]["embeddings"]):
                wrong.append(number)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        # Somebody watches meanwhile.
        assert 0 <= planned_one.captured <= 3
        assert planned_one.captured_bytes >= 0
    for thread in threads:
        thread.join()
    assert wrong == []
    assert planned_one.captured == 3


def test_limits_that_make_no_sense() -> None:
    for wrong in ({"max_graphs": 0}, {"max_bytes": -1}):
        with pytest.raises(UsageError, match="cuda_graphs=False"):
            CaptureLimits(**wrong)


# -- the tower's own face ---------------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_is_planned_or_captured(qwen2_vl: Path) -> None:
    for choice in (True, False, CaptureLimits(max_graphs=1)):
        tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cuda_graphs=choice)
        batch = tower.preprocess(noise(90, 90, 1))
        assert tower.executor_for(batch).graph_cache is None
        assert tower.warm_up([(90, 90), [(90, 90), (56, 28)]]) == 0
        assert tower.captured_bytes == 0
        assert tower.memory_plan(batch.workload).workload == batch.workload
    for wrong in (("a", 5), (5,), 7, [(5, 6, 7)], [5, (6, 7)], "ab"):
        with pytest.raises(UsageError):
            tower.warm_up([wrong])


def test_weights_have_to_be_there_to_warm_up(qwen2_vl: Path) -> None:
    with pytest.raises(TowerNotLoadedError, match="load"):
        VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True).warm_up([(90, 90)])


@each_case
def test_the_plan_of_a_planned_pass_is_its_memory(case: TowerCase, towers: Towers) -> None:
    tower = towers(case)
    _, planned_one = both(tower)
    batch = batches_of(case, tower)[0]
    config = tower.config
    plan = plan_static_buffers(
        tower.graph,
        batch.workload,
        4,
        rows_per_token=config.rows_per_token,
        tile_rows=config.longest_segment,
    )
    outputs = planned_one.run(batch)
    (entry,) = planned_one.graph_cache.buffers.values()
    assert replace(entry.bucket.workload, tiles=plan.workload.tiles) == plan.workload
    taken = entry.memory.numel() + sum(-(-rows.nbytes // 256) * 256 for rows in outputs.values())
    tables = 4 * (entry._layout.tables_end + 2 * 4 * 5)
    assert plan.peak_bytes - 256 * len(plan.offsets) <= taken <= plan.peak_bytes + tables + 256
