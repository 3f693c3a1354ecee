"""How a call of ``encode`` becomes passes: the same numbers however it is split, one slot per image whatever happens."""

import contextvars
import io
import math
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import noise
from support.towers import gemma3, llava_next, qwen3_vl

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.cache import EmbeddingCache
from tritontower.embedding import ImageEmbedding
from tritontower.engine.executor import Executor
from tritontower.errors import (
    AspectRatioError,
    ImageDecodeError,
    ImageTooLargeError,
    ImageTypeError,
    Limits,
    NonFiniteOutputError,
    ProcessorError,
    TowerNotLoadedError,
    TowerOutOfMemoryError,
    UsageError,
    is_out_of_memory,
)
from tritontower.kernels.runtime import dispatch
from tritontower.preprocessing.images import image as images
from tritontower.preprocessing.images.image import CanonicalImage
from tritontower.scheduler import prefetch, scheduler
from tritontower.scheduler.prefetch import workers
from tritontower.scheduler.scheduler import ItemError, patches_per_pass
from tritontower.scheduler.video import VideoTimes

SIZES = [(157, 243), (28, 28), (300, 64), (90, 90), (60, 120), (33, 47), (200, 150), (28, 56)]
IMAGES = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tower(qwen2_vl: Path) -> VisionTower:
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


@pytest.fixture(scope="module")
def expected(tower: VisionTower) -> list[ImageEmbedding]:
    # A fixture of the module is set up before a test has chosen its backend.
    with dispatch.use("reference"):
        return [tower.encode(image)[0] for image in IMAGES]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Patches of every pass that is run."""
    return count_passes(monkeypatch)


def count_passes(monkeypatch: pytest.MonkeyPatch, fail: Callable[[int], None] = lambda patches: None) -> list[int]:
    seen: list[int] = []
    run = Executor.run

    def counted(self: Executor, batch: PackedBatch, observer: Any = None) -> Any:
        fail(batch.workload.patches)
        seen.append(batch.workload.patches)
        return run(self, batch, observer)

    monkeypatch.setattr(Executor, "run", counted)
    return seen


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def assert_equal(found: Sequence[ImageEmbedding | ItemError], expected: Sequence[ImageEmbedding]) -> None:
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(one, ImageEmbedding), index
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(rows, other.tensors[name]) for name, rows in one.tensors.items()), index
        assert (one.grid_thw, one.original_size, one.content_hash) == (
            other.grid_thw,
            other.original_size,
            other.content_hash,
        )


# -- passes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_and_order_do_not_depend_on_how_a_call_is_split(
    tower: VisionTower, expected: list[ImageEmbedding], data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=9))
    limit = data.draw(st.none() | st.integers(1, 600))
    found = tower.encode([IMAGES[index] for index in chosen], max_patches=limit)
    assert_equal(found, [expected[index] for index in chosen])


@pytest.mark.parametrize("module", [gemma3, llava_next, qwen3_vl], ids=lambda module: module.__name__.split(".")[-1])
def test_splits_are_equal_in_towers_with_tiles_tiles_and_deepstack(module: Any, tmp_path: Path) -> None:
    case = module.CASES[0]
    tower = VisionTower.from_pretrained(case.save(tmp_path), device="cpu")
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]
    whole = tower.encode(images)
    assert_equal(tower.encode(images, max_patches=1), whole)
    assert_equal(tower.encode(images[::-1], max_patches=300)[::-1], whole)
    assert all(sum(one.tile_tokens) == one.num_tokens for one in whole)


def test_passes_hold_at_most_what_is_allowed(tower: VisionTower, passes: list[int]) -> None:
    patches = [h * w for _, h, w in tower.preprocess(IMAGES).images.grids]
    assert len(tower.encode(IMAGES)) == len(IMAGES)
    assert passes == [sum(patches)]
    passes.clear()
    tower.encode(IMAGES, max_patches=200)
    assert sum(passes) == sum(patches)
    # The first image alone is more than a pass may have, and runs all the same.
    assert passes[0] == patches[0] > 200
    assert all(one <= 200 for one in passes if one not in patches)
    # Cut greedily: what begins a pass would not have fitted into the one before.
    starts = [sum(passes[:number]) for number in range(len(passes))]
    sizes = dict(zip(np.cumsum([0, *patches[:-1]]).tolist(), patches, strict=True))
    assert all(done + sizes[start] > 200 for done, start in zip(passes, starts[1:], strict=False))


def test_equal_images_are_encoded_once(tower: VisionTower, passes: list[int]) -> None:
    one, other = IMAGES[0], IMAGES[3]
    kinds = [one, other, Image.fromarray(one), png(one), torch.from_numpy(other), one.copy()]
    found = tower.encode(kinds)
    assert sum(passes) == 4 * (found[0].num_tokens + found[1].num_tokens)
    for index, same in enumerate([0, 1, 0, 0, 1, 0]):
        assert torch.equal(found[index].embeddings, found[same].embeddings)
    # In memory of its own each.
    assert len({embedding.embeddings.data_ptr() for embedding in found}) == len(found)
    passes.clear()
    assert_equal(tower.encode(kinds, max_patches=1), found)
    assert len(passes) == 2
    swapped = [np.ascontiguousarray(one.reshape(one.shape[1], one.shape[0], 3)), one]
    first, second = tower.encode(swapped)
    assert first.content_hash != second.content_hash
    assert first.num_tokens * second.num_tokens > 0


def test_a_lone_images_digest_waits_until_the_device_has_work(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noted(image: CanonicalImage, digest: Callable[[CanonicalImage], str] = CanonicalImage.digest.func) -> str:
        events.append("digest")
        return digest(image)

    digest = cached_property(noted)
    digest.__set_name__(CanonicalImage, "digest")
    monkeypatch.setattr(CanonicalImage, "digest", digest)
    count_passes(monkeypatch, lambda patches: events.append("pass"))
    assert_equal(tower.encode(IMAGES[:1]), expected[:1])
    assert events == ["pass", "digest"]
    events.clear()
    assert_equal(tower.encode(IMAGES[:2]), expected[:2])
    assert events == ["digest", "digest", "pass"]


def test_the_default_size_of_a_pass_is_that_of_the_memory_plan(tower: VisionTower) -> None:
    patches = patches_per_pass(tower.memory_plan(4096), torch.device("cpu"))
    side = math.isqrt(patches // 4) * 2
    plan = tower.memory_plan(side * side)
    assert 0.95 * 2**30 < plan.peak_bytes - plan.workspace_bytes <= 2**30
    tiny = tower.memory_plan(4)
    assert patches_per_pass(tiny, torch.device("cpu")) > 1


@pytest.mark.parametrize("arguments", [{"max_patches": 0}, {"max_patches": 1.5}, {"on_error": "ignore"}])
def test_arguments_that_make_no_sense_are_refused(tower: VisionTower, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        tower.encode(IMAGES[:1], **arguments)


def test_an_unloaded_tower_says_so_before_anything_is_decoded(qwen2_vl: Path) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    with pytest.raises(TowerNotLoadedError):
        tower.encode([b"no image"])
    with pytest.raises(TowerNotLoadedError):
        tower.encode_video([b"no image"])


# -- decoding ---------------------------------------------------------------------------------------------------------


class Held:
    """Decoded images that are alive, and the most bytes that they ever took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.most = 0
        self.lock = threading.Lock()
        decode = images.canonical_rgb
        held = self

        class Counted(images.CanonicalImage):
            def __del__(self) -> None:
                held.add(-self.array.nbytes)

        def counted(*arguments: Any, **named: Any) -> images.CanonicalImage:
            image = decode(*arguments, **named)
            held.add(image.array.nbytes)
            return Counted(image.array, image.source)

        for module in (scheduler, prefetch):
            monkeypatch.setattr(module, "canonical_rgb", counted)

    def add(self, size: int) -> None:
        with self.lock:
            self.bytes += size
            self.most = max(self.most, self.bytes)


def test_decoded_images_keep_within_their_budget(
    qwen2_vl: Path, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    largest = max(image.nbytes for image in IMAGES)
    budget = 2 * largest
    limited = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=Limits(max_decoded_bytes=budget))
    paths = []
    for number, image in enumerate(IMAGES):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(png(image))
    for kinds in (IMAGES, paths, [path.read_bytes() for path in paths], [Image.open(path) for path in paths]):
        held = Held(monkeypatch)
        assert_equal(limited.encode(kinds), expected)
        assert largest <= held.most <= budget
        monkeypatch.undo()
    # An image larger than the budget comes alone.
    tiny = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=Limits(max_decoded_bytes=1))
    held = Held(monkeypatch)
    assert_equal(tiny.encode(IMAGES), expected)
    assert held.most == largest


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_what_has_to_be_decoded_at_once_keeps_within_the_budget(
    qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    frames = [noise(60, 40, seed) for seed in range(4)]
    given_frames: list[Any] = frames if kind == "arrays" else [png(frame) for frame in frames]
    limited = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=Limits(max_decoded_bytes=3 * frames[0].nbytes))
    held = Held(monkeypatch)
    message = rf"image 3: .* would take {4 * 7200} bytes, and all 4 .* limit is {3 * 7200} bytes.*max_decoded_bytes"
    for refuses in (limited.encode_video, limited.preprocess, limited.preprocess_video):
        with pytest.raises(ImageTooLargeError, match=message) as caught:
            refuses(given_frames)
        assert caught.value.index == 3
    assert held.most == 0
    assert limited.encode_video(given_frames[:3]).grid_thw[0] == 2
    assert len(limited.preprocess(given_frames[:3])) == 3
    # One alone is not in anybody's company, and a list is worked off in portions.
    single = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=Limits(max_decoded_bytes=1))
    assert len(single.preprocess(given_frames[:1])) == 1
    assert len(single.encode(given_frames)) == 4


@pytest.mark.parametrize("area", [(2**27, 2**28), (5000, 4000)], ids=["too large", "in no order"])
def test_an_image_that_was_refused_does_not_keep_its_pixels(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch, area: tuple[int, int]
) -> None:
    held = Held(monkeypatch)
    found = tower.encode(IMAGES, on_error="return", min_pixels=area[0], max_pixels=area[1])
    assert all(isinstance(one, ItemError) for one in found)
    assert held.most > 0
    assert held.bytes == 0


def test_sizes_for_the_budget_come_from_headers_and_shapes(tmp_path: Path) -> None:
    image = IMAGES[2]
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    tensor = torch.from_numpy(image)
    for kind in (image, tensor, tensor.permute(2, 0, 1), image[:, :, 0], path, path.read_bytes(), Image.open(path)):
        assert images.decoded_bytes(kind) == 300 * 64 * 3
    for odd in (
        "text",
        None,
        b"",
        b"garbage" * 20,
        tmp_path / "nowhere",
        tmp_path,
        np.zeros(5),
        7,
        path.read_bytes()[:20],
    ):
        assert images.decoded_bytes(odd) == 0  # type: ignore[arg-type]


def test_the_next_pass_is_prepared_while_the_device_works(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    prepared = threading.Semaphore(0)
    images, run = type(tower.preprocessor).images, Executor.run

    def preparing(self: Any, *arguments: Any, **named: Any) -> PackedBatch:
        batch = images(self, *arguments, **named)
        order.append("prepared")
        prepared.release()
        return batch

    def running(self: Executor, batch: PackedBatch, observer: Any = None) -> Any:
        order.append("running")
        first = order.count("running") == 1
        if first:
            assert prepared.acquire(timeout=30)
            assert prepared.acquire(timeout=30), "the second pass was not prepared while the first was running"
        return run(self, batch, observer)

    monkeypatch.setattr(type(tower.preprocessor), "images", preparing)
    monkeypatch.setattr(Executor, "run", running)
    assert_equal(tower.encode(IMAGES[:3], max_patches=1), expected[:3])
    assert order.count("prepared") == order.count("running") == 3


def test_workers_map_in_order_and_stop_early() -> None:
    started: list[int] = []

    def slow(number: int, other: int) -> int:
        started.append(number)
        time.sleep(random.Random(number).random() / 500)
        return number + other

    with workers(50) as each:
        assert list(each(slow, range(50), range(50))) == [2 * number for number in range(50)]
    started.clear()
    with workers(1000) as each:
        results = each(slow, range(1000), range(1000))
        assert next(iter(results)) == 0
        results.close()
    assert len(started) < 100
    with workers(1) as each:
        assert each is map


def test_threads_end_with_the_call(tower: VisionTower) -> None:
    before = threading.active_count()
    tower.encode(IMAGES, max_patches=1)
    with pytest.raises(ImageDecodeError):
        tower.encode([*IMAGES, b"garbage", *IMAGES], max_patches=1)
    assert threading.active_count() == before


# -- images that fail -----------------------------------------------------------------------------------------------

BAD = {1: b"garbage", 3: np.zeros((2000, 5, 3), np.uint8), 4: "photo.jpg", 7: np.zeros((0, 5, 3), np.uint8)}
KINDS = {1: ImageDecodeError, 3: AspectRatioError, 4: ImageTypeError}


@pytest.mark.parametrize("limit", [None, 1, 300])
def test_a_failing_image_keeps_its_place_and_harms_no_other(
    tower: VisionTower, expected: list[ImageEmbedding], limit: int | None
) -> None:
    mixed: list[Any] = [BAD.get(index, image) for index, image in enumerate(IMAGES)]
    found = tower.encode(mixed, on_error="return", max_patches=limit)
    assert len(found) == len(mixed)
    for index, one in enumerate(found):
        if index in BAD:
            assert isinstance(one, ItemError)
            assert one.index == one.error.index == index
            assert isinstance(one.error, KINDS.get(index, Exception))
            assert f"image {index}" in str(one.error)
        else:
            assert_equal([one], [expected[index]])
    with pytest.raises(ImageDecodeError, match="image 1") as caught:
        tower.encode(mixed, max_patches=limit)
    assert caught.value.index == 1
    assert_equal(caught.value.completed, expected[:1])
    with pytest.raises(AspectRatioError) as caught_later:
        tower.encode([*IMAGES[:3], BAD[3], IMAGES[0]], max_patches=limit)
    assert_equal(caught_later.value.completed, expected[:3])
    assert "source" in vars(caught_later.value)


def test_a_failing_image_that_comes_twice_fails_in_both_places(tower: VisionTower, monkeypatch: Any) -> None:
    fill = type(tower.preprocessor)._fill

    def refusing(self: Any, out: torch.Tensor, image: images.CanonicalImage, *arguments: Any) -> None:
        if (image.width, image.height) == (90, 90):
            raise ProcessorError("refused")
        fill(self, out, image, *arguments)

    monkeypatch.setattr(type(tower.preprocessor), "_fill", refusing)
    found = tower.encode([*IMAGES[:5], IMAGES[3]], on_error="return")
    assert [isinstance(one, ItemError) for one in found] == [False, False, False, True, False, True]
    assert [(one.index, one.error.index) for one in found if isinstance(one, ItemError)] == [(3, 3), (5, 5)]
    assert [str(one.error) for one in found if isinstance(one, ItemError)] == ["refused", "refused"]
    with pytest.raises(ProcessorError) as caught:
        tower.encode(IMAGES)
    assert caught.value.index == 3
    assert len(caught.value.completed) == 3


def test_what_is_wrong_with_the_call_is_raised_in_any_case(tower: VisionTower) -> None:
    with pytest.raises(UsageError, match="longest_edge"):
        tower.encode(IMAGES, on_error="return", longest_edge=300)
    with pytest.raises(UsageError, match="aliases"):
        tower.encode(IMAGES, on_error="return", text_alias=["<a>"])


def test_numbers_that_are_not_finite_are_found_on_request(qwen2_vl: Path, expected: list[ImageEmbedding]) -> None:
    broken = VisionTower.from_pretrained(qwen2_vl, device="cpu")
    forward = broken.run

    def run(batch: PackedBatch) -> dict[str, torch.Tensor]:
        outputs = forward(batch)
        start = 0
        for tokens, size in zip(batch.images.token_counts, batch.images.original_sizes, strict=True):
            if size == (90, 90):
                outputs["embeddings"][start + tokens - 1, 0] = float("nan")
            start += tokens
        return outputs

    broken.run = run  # type: ignore[method-assign]
    assert broken.encode(IMAGES)[3].embeddings.isnan().any()
    found = broken.encode(IMAGES, check_output=True, on_error="return")
    assert isinstance(found[3], ItemError)
    assert isinstance(found[3].error, NonFiniteOutputError)
    assert_equal(found[:3] + found[4:], expected[:3] + expected[4:])
    with pytest.raises(NonFiniteOutputError, match="NaN") as caught:
        broken.encode(IMAGES, check_output=True)
    assert caught.value.index == 3
    assert_equal(caught.value.completed, expected[:3])


# -- memory that runs out ---------------------------------------------------------------------------------------------


def too_large(limit: int) -> Callable[[int], None]:
    def fail(patches: int) -> None:
        if patches > limit:
            raise torch.OutOfMemoryError(f"tried to allocate for {patches} patches")

    return fail


@pytest.mark.parametrize("limit", [200, 260, 500])
def test_a_pass_that_does_not_fit_is_halved(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    patches = [4 * one.num_tokens for one in expected]
    passes = count_passes(monkeypatch, too_large(limit))
    chosen = [index for index, count in enumerate(patches) if count <= limit]
    released: list[int] = []
    release = Executor.release
    monkeypatch.setattr(Executor, "release", lambda self: released.append(1) or release(self))
    found = tower.encode([IMAGES[index] for index in chosen])
    assert_equal(found, [expected[index] for index in chosen])
    # Every image is in one finished pass, and no more.
    assert sum(passes) == sum(patches[index] for index in chosen)
    assert released


def test_an_image_that_never_fits_is_the_only_one_that_fails(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [1, 0, 2, 3]
    patches = [4 * expected[index].num_tokens for index in order]
    count_passes(monkeypatch, too_large(patches[1] - 1))
    found = tower.encode([IMAGES[index] for index in order], on_error="return")
    assert isinstance(found[1], ItemError)
    assert isinstance(found[1].error, TowerOutOfMemoryError)
    assert_equal([found[0], *found[2:]], [expected[1], expected[2], expected[3]])
    with pytest.raises(TowerOutOfMemoryError, match=rf"image 1 .*{patches[1]} patches") as caught:
        tower.encode([IMAGES[index] for index in order])
    assert_equal(caught.value.completed, [expected[1]])
    assert 1 in caught.value.remaining
    assert 0 not in caught.value.remaining
    assert caught.value.__cause__ is None
    with pytest.raises(TowerOutOfMemoryError, match="the clip"):
        tower.encode_video([IMAGES[0]] * 2)


def test_the_batch_that_did_not_fit_is_gone_when_its_halves_are_tried(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Executor.run
    seen: list[weakref.ref[PackedBatch]] = []
    alive: list[int] = []

    def counted(self: Executor, batch: PackedBatch, observer: Any = None) -> Any:
        alive.append(sum(other() is not None for other in seen))
        seen.append(weakref.ref(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")
        return run(self, batch, observer)

    monkeypatch.setattr(Executor, "run", counted)
    for on_error in ("raise", "return"):
        found = tower.encode(IMAGES, on_error=on_error)
        assert_equal(found, expected)
    assert alive == [0] * 14


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "no"])
def test_memory_that_ran_out_is_known_by_its_text_where_it_has_no_class(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text)) == (text != "no")
    assert is_out_of_memory(torch.OutOfMemoryError(text))
    assert is_out_of_memory(MemoryError(text))
    assert not is_out_of_memory(ValueError(text))


def test_memory_of_the_cpu_runs_out_as_that_of_a_gpu_does(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 4 * max(one.num_tokens for one in expected)

    def fail(patches: int) -> None:
        if patches > largest:
            torch.empty(2**60, dtype=torch.uint8)  # more than a process may address

    count_passes(monkeypatch, fail)
    assert_equal(tower.encode(IMAGES), expected)
    count_passes(monkeypatch, lambda patches: torch.empty(2**60, dtype=torch.uint8) and None)
    with pytest.raises(TowerOutOfMemoryError, match="image 0"):
        tower.encode(IMAGES)
    with pytest.raises(TowerOutOfMemoryError, match="the clip"):
        tower.encode_video([IMAGES[0]] * 2)


def test_what_is_wrong_with_a_device_is_no_lack_of_memory(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(patches: int) -> None:
        raise RuntimeError("an illegal instruction")

    passes = count_passes(monkeypatch, fail)
    for call in (lambda: tower.encode(IMAGES), lambda: tower.encode_video([IMAGES[0]] * 2)):
        with pytest.raises(RuntimeError, match="an illegal instruction"):
            call()
    assert passes == []


def test_later_passes_begin_at_the_size_that_fitted(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise(56, 56, seed) for seed in range(600)]
    refused: list[int] = []

    def fail(patches: int) -> None:
        if patches > 1000:
            refused.append(patches)
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(scheduler, "PORTION", 100)
    passes = count_passes(monkeypatch, fail)
    tower.encode(images)
    assert sum(passes) == 600 * 16
    # Only passes that were prepared before memory ran out could be too large.
    assert 1 <= len(refused) <= 2


def test_an_interruption_leaves_what_is_done(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    done: list[int] = []

    def interrupt(patches: int) -> None:
        done.append(patches)
        if len(done) == 3:
            raise KeyboardInterrupt

    count_passes(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        tower.encode(IMAGES, max_patches=1)
    assert_equal(vars(caught.value)["completed"], expected[:2])
    assert threading.active_count() == before
    monkeypatch.undo()
    assert_equal(tower.encode(IMAGES), expected)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 15_000, 2**24])
def test_eight_threads_share_a_tower_and_images_that_are_not_loaded_yet(
    tower: VisionTower, expected: list[ImageEmbedding], monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    """Also with a cache that cannot keep all of them, or that keeps everything."""
    monkeypatch.setattr(tower, "cache", EmbeddingCache(cache_bytes) if cache_bytes else None)
    encoded = [png(image) for image in IMAGES]
    wrong: list[object] = []

    def work(shared: list[Image.Image], together: threading.Barrier, seed: int) -> None:
        generator = random.Random(seed)
        order = generator.sample(range(len(shared)), len(shared))
        together.wait()
        try:
            found = tower.encode([shared[index] for index in order], max_patches=generator.choice([None, 1, 400]))
            assert_equal(found, [expected[index] for index in order])
        except BaseException as error:
            wrong.append(error)

    for attempt in range(4):
        shared = [Image.open(io.BytesIO(data)) for data in encoded]
        together = threading.Barrier(8)
        # A thread starts without this test's choice of backend unless it gets a copy of its context.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, shared, together, 8 * attempt + number))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_one_unloaded_image_many_times_in_one_call(tower: VisionTower, expected: list[ImageEmbedding]) -> None:
    for _ in range(10):
        lazy = Image.open(io.BytesIO(png(IMAGES[0])))
        assert_equal(tower.encode([lazy] * 8), [expected[0]] * 8)


# -- what comes back --------------------------------------------------------------------------------------------------


def test_embeddings_go_where_they_are_wanted(tower: VisionTower) -> None:
    assert {one.embeddings.device.type for one in tower.encode(IMAGES[:2], output_device="cpu")} == {"cpu"}
    assert tower.encode_video(IMAGES[:1], output_device=torch.device("cpu")).embeddings.device.type == "cpu"
    with pytest.raises(UsageError, match="device"):
        tower.encode(IMAGES[:1], output_device="cuba")


def test_tiles_and_spans_are_those_of_the_tower(tmp_path: Path, tower: VisionTower) -> None:
    (case,) = [case for case in gemma3.CASES if case.name == "gemma3"]
    folder = case.save(tmp_path)
    plain = VisionTower.from_pretrained(folder, device="cpu")
    image = noise(300, 100, 1)
    (one,) = plain.encode(image)
    assert one.bidirectional_spans == ((0, one.num_tokens),)
    assert one.tile_tokens == (one.num_tokens,)
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4}
    panning = VisionTower.from_pretrained(folder, device="cpu", processor_options=options)
    found, alone = panning.encode([image, noise(50, 50, 2)])
    tiles = found.num_tokens // one.num_tokens
    assert tiles > 1
    assert found.tile_tokens == (one.num_tokens,) * tiles
    assert found.bidirectional_spans == tuple(
        (tile * one.num_tokens, (tile + 1) * one.num_tokens) for tile in range(tiles)
    )
    assert alone.tile_tokens == (one.num_tokens,)
    assert tower.encode(IMAGES[0])[0].bidirectional_spans == ()


def test_images_get_their_aliases(tower: VisionTower) -> None:
    found = tower.encode(IMAGES[:3], text_alias=["<a>", None, "<c>"], max_patches=1)
    assert [one.text_alias for one in found] == ["<a>", None, "<c>"]
    assert tower.encode(IMAGES[0], text_alias="<a>")[0].text_alias == "<a>"
    same = tower.encode([IMAGES[0]] * 2, text_alias=["<a>", "<b>"])
    assert [one.text_alias for one in same] == ["<a>", "<b>"]
    mixed = tower.encode([b"garbage", IMAGES[0]], text_alias=["<a>", "<b>"], on_error="return")
    assert isinstance(mixed[1], ImageEmbedding)
    assert mixed[1].text_alias == "<b>"
    for neither in (3, {"<a>": 1, "<b>": 2}):
        with pytest.raises(UsageError, match="a list with one for each"):
            tower.encode(IMAGES[:2], text_alias=neither)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="1 aliases for 2 images"):
        tower.encode(IMAGES[:2], text_alias="<a>")
    for broken in (
        lambda: tower.encode(b"garbage", text_alias=""),
        lambda: tower.encode_video([b"garbage"], text_alias=""),
    ):
        with pytest.raises(UsageError, match="at least one character"):
            broken()


def test_one_image_or_several_in_the_manner_of_exllama(tower: VisionTower, expected: list[ImageEmbedding]) -> None:
    one = tower.get_image_embeddings(IMAGES[0])
    assert isinstance(one, ImageEmbedding)
    assert_equal([one], expected[:1])
    several = tower.get_image_embeddings(IMAGES[:3], embeddings_cpu=False)
    assert_equal(several, expected[:3])
    made_up = [
        one.text_alias,
        *(found.text_alias for found in several),
        tower.get_image_embeddings(IMAGES[0]).text_alias,
    ]
    assert len(set(made_up)) == 5
    assert all(alias is not None and alias.startswith("<$EMB_") and alias.endswith("$>") for alias in made_up)
    assert tower.get_image_embeddings(image=IMAGES[0], text_alias="<a>", embeddings_cpu=True).text_alias == "<a>"
    named = tower.get_image_embeddings(IMAGES[:2], ["<a>", None])
    assert named[0].text_alias == "<a>"
    assert named[1].text_alias not in (None, *made_up)
    assert tower.get_image_embeddings(IMAGES[0], max_pixels=4000).num_tokens < one.num_tokens
    assert tower.get_image_embeddings([]) == []


def test_a_progress_bar_is_shown_for_long_lists_on_a_terminal(
    tower: VisionTower, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(images: int, progress: bool | None) -> str:
        capsys.readouterr()
        tower.encode([IMAGES[1]] * images, progress=progress)
        return capsys.readouterr().err

    assert shown(3, None) == shown(70, None) == shown(70, False) == ""
    assert "3/3" in shown(3, True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "70/70" in shown(70, None)
    assert shown(3, None) == ""


def test_images_come_from_any_iterable(tower: VisionTower, expected: list[ImageEmbedding]) -> None:
    def generated() -> Iterator[np.ndarray]:
        yield from IMAGES[:3]

    assert_equal(tower.encode(generated(), max_patches=1), expected[:3])
    assert tower.encode([]) == tower.encode(iter(())) == []


# -- videos ------------------------------------------------------------------------------------------------------------


def test_videos_know_when_their_patches_are_shown(tower: VisionTower, tmp_path: Path) -> None:
    frames = [noise(60, 40, seed) for seed in range(5)]
    silent = tower.encode_video(frames)
    assert (silent.seconds_per_grid, silent.timestamps) == (None, ())
    assert silent.is_video
    assert tower.encode_video(frames[:1]).is_video
    assert not tower.encode(frames[:1])[0].is_video
    timed = tower.encode_video(frames, fps=4)
    assert torch.equal(timed.embeddings, silent.embeddings)
    assert timed.seconds_per_grid == 0.5
    assert timed.timestamps == (0.125, 0.625, 1.0)
    assert len(timed.timestamps) == timed.grid_thw[0]
    given_times = tower.encode_video(np.stack(frames), timestamps=[0.0, 0.25, 0.5, 0.75, 1.0])
    assert (given_times.seconds_per_grid, given_times.timestamps) == (0.5, timed.timestamps)
    paths = []
    for number, frame in enumerate(frames):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(png(frame))
    again = tower.encode_video(paths, fps=4, text_alias="<video>", check_output=True)
    assert torch.equal(again.embeddings, silent.embeddings)
    assert again.text_alias == "<video>"


def test_times_are_those_of_the_processor_of_qwen3_vl() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    video = ImageEmbedding(torch.zeros(1, 1), (1, 1, 1), (1, 1), (1, 1), "")
    for frames in range(1, 12):
        for fps in (0.5, 1, 2, 24, 29.97):
            times = Qwen3VLProcessor._calculate_timestamps(None, list(range(frames)), fps, 2)
            timed = VideoTimes.of(frames, fps, None).put_on(video, 2)
            assert timed.timestamps == pytest.approx(times, abs=1e-12)
            assert timed.seconds_per_grid == pytest.approx(2 / fps)


@pytest.mark.parametrize(
    "times",
    [
        {"fps": 0},
        {"fps": -1.0},
        {"fps": math.inf},
        {"fps": math.nan},
        {"fps": 5e-324},
        {"fps": Fraction(1, 10**400)},
        {"fps": Fraction(10**400)},
        {"fps": "2"},
        {"fps": True},
        {"fps": 2, "timestamps": [0, 1]},
        {"timestamps": [0]},
        {"timestamps": [0, -1]},
        {"timestamps": [1, 0]},
        {"timestamps": [0, math.nan]},
        {"timestamps": [1e308, 1e308]},
        {"timestamps": ["0", "1"]},
    ],
)
def test_times_that_make_no_sense_are_refused(tower: VisionTower, times: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"fps|timestamps"):
        tower.encode_video(IMAGES[:2], **times)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_embeddings_leave_a_gpu_in_page_locked_memory(qwen2_vl: Path) -> None:
    cache = EmbeddingCache(2**24, device="cuda")
    tower = VisionTower.from_pretrained(qwen2_vl, device="cuda", cache=cache)
    twice = [*IMAGES, IMAGES[0]]
    stay = tower.encode(twice, max_patches=1)
    assert {one.embeddings.device.type for one in stay} == {"cuda"}
    for attempt in range(2):
        found = tower.encode(twice, max_patches=1, output_device="cpu")
        assert all(one.embeddings.is_pinned() for one in found), attempt
        assert_equal([one.to("cuda") for one in found], stay)
        cache.clear()


@pytest.mark.gpu
def test_streams_that_share_a_cache_wait_for_each_other(qwen2_vl: Path) -> None:
    cache = EmbeddingCache(2**24, device="cuda")
    tower = VisionTower.from_pretrained(qwen2_vl, device="cuda", cache=cache)
    expected = VisionTower.from_pretrained(qwen2_vl, device="cuda").encode(IMAGES, max_patches=1)
    for _ in range(20):
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                assert_equal(tower.encode(IMAGES, max_patches=1), expected)
        # A tower has one arena: a pass on one stream waits for the last on the other.
        torch.cuda.synchronize()
        cache.clear()
