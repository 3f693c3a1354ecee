"""Scheduling of a call: the same bits however it is split, and one result per image whatever happens."""

import contextvars
import io
import math
import random
import shutil
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.towers.gemma import PAN_AND_SCAN, save_gemma3

from tritontower import VisionTower, errors
from tritontower.batch.packed_batch import PackedBatch
from tritontower.cache import EmbeddingCache
from tritontower.embedding import ImageEmbedding
from tritontower.engine import runner
from tritontower.engine.executor import Executor
from tritontower.engine.planning import patches_per_batch
from tritontower.preprocessing import Preprocessor
from tritontower.preprocessing.images import decode as images
from tritontower.scheduler import prefetch, scheduler
from tritontower.scheduler.outputs import HostCopies, ItemError
from tritontower.scheduler.video import VideoTimes

SIZES = [(157, 243), (28, 28), (300, 64), (90, 90), (60, 120), (33, 47), (200, 150), (28, 56)]
IMAGES = [noise(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tower(qwen2_vl):
    return VisionTower.from_pretrained(qwen2_vl, device="cpu")


@pytest.fixture(scope="module")
def expected(tower):
    return [tower.encode(image)[0] for image in IMAGES]


def record_batches(monkeypatch, before=lambda batch: None, after=lambda batch, outputs: None):
    """Records the patches of every batch that runs; ``before`` may fail it, ``after`` may change its outputs."""
    seen: list[int] = []
    run = Executor.run

    def recorded(self, batch, observer=None):
        before(batch)
        seen.append(batch.workload.patches)
        outputs = run(self, batch, observer)
        after(batch, outputs)
        return outputs

    monkeypatch.setattr(Executor, "run", recorded)
    return seen


def limit_memory(patches, allocate=None):
    """Makes batches of more patches run out of memory."""

    def fail(batch):
        if batch.workload.patches > patches:
            if allocate is not None:
                allocate()
            raise torch.OutOfMemoryError(f"tried to allocate for {batch.workload.patches} patches")

    return fail


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert isinstance(one, ImageEmbedding), index
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(rows, other.tensors[name]) for name, rows in one.tensors.items()), index
        assert (one.grid_thw, one.original_size) == (other.grid_thw, other.original_size)
        assert one.content_hash == other.content_hash


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_and_order_do_not_depend_on_the_split(tower, expected, data):
    chosen = data.draw(st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=9))
    limit = data.draw(st.none() | st.integers(1, 600))
    found = tower.encode((IMAGES[index] for index in chosen), max_patches=limit)
    assert_equal(found, [expected[index] for index in chosen])
    assert tower.encode([]) == []


def test_batches_are_filled_greedily_up_to_max_patches(tower, monkeypatch):
    patches = [4 * tower.count_tokens(width, height) for width, height in SIZES]
    batches = record_batches(monkeypatch)
    tower.encode(IMAGES)
    assert batches == [sum(patches)]
    batches.clear()
    tower.encode(IMAGES, max_patches=200)
    expected: list[int] = []
    for count in patches:
        if expected and expected[-1] + count <= 200:
            expected[-1] += count
        else:
            expected.append(count)
    # The first image alone is larger than a batch may be, and runs all the same.
    assert batches == expected
    assert batches[0] == patches[0] > 200


def test_equal_images_are_encoded_once(tower, monkeypatch, tmp_path):
    batches = record_batches(monkeypatch)
    one, other = IMAGES[0], IMAGES[3]
    path = tmp_path / "image.png"
    path.write_bytes(png(one))
    kinds = [one, other, Image.fromarray(one), path, png(one), torch.from_numpy(other), one.copy()]
    found = tower.encode(kinds)
    assert sum(batches) == 4 * (found[0].num_tokens + found[1].num_tokens)
    for index, same in enumerate([0, 1, 0, 0, 0, 1, 0]):
        assert torch.equal(found[index].embeddings, found[same].embeddings)
    assert len({embedding.embeddings.data_ptr() for embedding in found}) == len(found), "memory of their own"
    batches.clear()
    assert_equal(tower.encode(kinds, max_patches=1), found)
    assert len(batches) == 2


def test_default_batch_size_follows_from_the_memory_plan(tower):
    patches = patches_per_batch(tower.memory_plan(4096), torch.device("cpu"))
    side = math.isqrt(patches // 4) * 2
    plan = tower.memory_plan(side * side)
    assert 0.95 * 2**30 < plan.peak_bytes - plan.workspace_bytes <= 2**30
    assert patches_per_batch(tower.memory_plan(4), torch.device("cpu")) > 1


def test_free_memory_is_queried_again_only_after_a_release(qwen2_vl, monkeypatch):
    queries, batches = [], record_batches(monkeypatch)

    def query(plan, device):
        queries.append(device)
        return 1 if len(queries) == 1 else 10_000

    monkeypatch.setattr(runner, "patches_per_batch", query)
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu")
    for _ in range(2):
        tower.encode(IMAGES[:3])
    assert (len(queries), len(batches)) == (1, 6)
    tower.release()
    for _ in range(2):
        tower.encode(IMAGES[:3])
    assert (len(queries), len(batches)) == (2, 8)


def test_invalid_calls_are_rejected_before_decoding(tower, qwen2_vl):
    for arguments in (
        {"output_device": "cuba"},
        {"max_patches": 0},
        {"max_patches": 1.5},
        {"max_patches": True},
        {"on_error": "ignore"},
    ):
        with pytest.raises(errors.UsageError, match=next(iter(arguments)).removeprefix("output_")):
            tower.encode([b"no image"], **arguments)
    for call in (tower.preprocess, tower.encode, tower.preprocess_video, tower.encode_video):
        with pytest.raises(errors.UsageError, match="got longest_edge"):
            call([b"no image"], longest_edge=100)
    with pytest.raises(errors.UsageError, match="aliases"):
        tower.encode(IMAGES, on_error="return", text_alias=["<a>"])
    unloaded = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True)
    for encode in (unloaded.encode, unloaded.encode_video):
        with pytest.raises(errors.TowerNotLoadedError):
            encode([b"no image"])


class Held:
    """Decoded images that are alive, and the most bytes that they ever took."""

    def __init__(self, monkeypatch):
        self.bytes = self.most = 0
        self.lock = threading.Lock()

        def counted(*arguments, **named):
            image = images.decode_image(*arguments, **named)
            self.add(image.array.nbytes)
            weakref.finalize(image, self.add, -image.array.nbytes)
            return image

        monkeypatch.setattr(prefetch, "decode_image", counted)

    def add(self, size):
        with self.lock:
            self.bytes += size
            self.most = max(self.most, self.bytes)


def test_decoded_images_keep_within_their_budget(qwen2_vl, expected, monkeypatch, tmp_path):
    largest = max(image.nbytes for image in IMAGES)
    budget = 2 * largest
    limited = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=errors.Limits(max_decoded_bytes=budget))
    paths = [tmp_path / f"{number}.png" for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        path.write_bytes(png(image))
    for kinds in (IMAGES, paths, [path.read_bytes() for path in paths], [Image.open(path) for path in paths]):
        held = Held(monkeypatch)
        assert_equal(limited.encode(kinds), expected)
        assert largest <= held.most <= budget
        monkeypatch.undo()
    # An image larger than the budget is decoded alone.
    tiny = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=errors.Limits(max_decoded_bytes=1))
    held = Held(monkeypatch)
    assert_equal(tiny.encode(IMAGES), expected)
    assert held.most == largest


def test_images_needed_at_once_must_fit_into_the_budget(qwen2_vl, monkeypatch):
    frames: list[Any] = [noise(60, 40, seed) for seed in range(4)]
    limited = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=errors.Limits(max_decoded_bytes=3 * 7200))
    held = Held(monkeypatch)
    message = rf"image 3: .* would take {4 * 7200} bytes, and all 4 .* limit is {3 * 7200} bytes.*max_decoded_bytes"
    for rejects in (limited.encode_video, limited.preprocess, limited.preprocess_video):
        with pytest.raises(errors.ImageTooLargeError, match=message) as caught:
            rejects(frames)
        assert caught.value.index == 3
    assert held.most == 0
    assert limited.encode_video(frames[:3]).grid_thw[0] == 2
    assert len(limited.preprocess(frames[:3])) == 3
    single = VisionTower.from_pretrained(qwen2_vl, device="cpu", limits=errors.Limits(max_decoded_bytes=1))
    assert len(single.preprocess(frames[:1])) == 1


@pytest.mark.parametrize("area", [(2**27, 2**28), (5000, 4000)], ids=["too large", "in no order"])
def test_rejected_images_do_not_keep_their_pixels(tower, monkeypatch, area):
    held = Held(monkeypatch)
    found = tower.encode(IMAGES, on_error="return", min_pixels=area[0], max_pixels=area[1])
    assert all(isinstance(one, ItemError) for one in found)
    assert held.most > 0
    assert held.bytes == 0


def test_next_batch_is_prepared_while_the_device_works(tower, expected, monkeypatch):
    prepared, running = threading.Semaphore(0), []
    pack = Preprocessor.preprocess_images

    def preparing(self, *arguments, **named):
        batch = pack(self, *arguments, **named)
        prepared.release()
        return batch

    def first_waits_for_two(batch):
        running.append(batch)
        if len(running) == 1:
            assert prepared.acquire(timeout=30)
            assert prepared.acquire(timeout=30), "the second batch was not prepared while the first was running"

    monkeypatch.setattr(Preprocessor, "preprocess_images", preparing)
    record_batches(monkeypatch, first_waits_for_two)
    assert_equal(tower.encode(IMAGES[:3], max_patches=1), expected[:3])
    assert len(running) == 3


BAD = {1: b"garbage", 3: np.zeros((2000, 5, 3), np.uint8), 4: "photo.jpg", 7: np.zeros((0, 5, 3), np.uint8)}
KINDS = {1: errors.ImageDecodeError, 3: errors.AspectRatioError, 4: errors.ImageTypeError}


@pytest.mark.parametrize("limit", [None, 1, 300])
def test_a_failing_image_keeps_its_place_and_harms_no_other(tower, expected, limit):
    threads = threading.active_count()
    mixed: list[Any] = [BAD.get(index, image) for index, image in enumerate(IMAGES)]
    found = tower.encode(mixed, on_error="return", max_patches=limit)
    assert len(found) == len(mixed)
    for index, one in enumerate(found):
        if index in BAD:
            assert isinstance(one, ItemError)
            assert one.index == one.error.index == index
            assert isinstance(one.error, KINDS.get(index, errors.TowerError))
            assert f"image {index}" in str(one.error)
        else:
            assert_equal([one], [expected[index]])
    with pytest.raises(errors.ImageDecodeError, match="image 1") as caught:
        tower.encode(mixed, max_patches=limit)
    assert caught.value.index == 1
    assert_equal(caught.value.completed, expected[:1])
    with pytest.raises(errors.AspectRatioError, match=r"image 3 \(numpy") as caught_later:
        tower.encode([*IMAGES[:3], BAD[3], IMAGES[0]], max_patches=limit)
    assert_equal(caught_later.value.completed, expected[:3])
    assert threading.active_count() == threads


def test_a_failing_image_that_comes_twice_fails_in_both_places(tower, monkeypatch):
    pack = Preprocessor.preprocess_images

    def rejecting(self, decoded, **options):
        if any((image.width, image.height) == (90, 90) for image in decoded):
            raise errors.ProcessorError("rejected")
        return pack(self, decoded, **options)

    monkeypatch.setattr(Preprocessor, "preprocess_images", rejecting)
    found = tower.encode([*IMAGES[:5], IMAGES[3]], on_error="return")
    failed = [(one.index, one.error.index, str(one.error)) for one in found if isinstance(one, ItemError)]
    assert failed == [(3, 3, "rejected"), (5, 5, "rejected")]
    with pytest.raises(errors.ProcessorError) as caught:
        tower.encode(IMAGES)
    assert (caught.value.index, len(caught.value.completed)) == (3, 3)


BROKEN = [
    (b"garbage", errors.ImageDecodeError),
    (Path("/proc/self/mem"), errors.ImageDecodeError),
    (Path("x" * 5000), errors.ImageDecodeError),
    (memoryview(b"abcdef")[::2], errors.ImageDecodeError),
    (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]), errors.ImageTypeError),
    ("photo.jpg", errors.ImageTypeError),
    (None, errors.ImageTypeError),
    (np.full((28, 28), np.nan), errors.ImageValueError),
    (np.zeros((0, 28, 3), np.uint8), errors.EmptyImageError),
    (np.zeros((2, 800, 3), np.uint8), errors.AspectRatioError),
]


def test_fifty_bad_images_of_a_thousand_leave_the_others_alone(tower):
    generator = random.Random(0)
    good = [noise(generator.randint(20, 60), generator.randint(20, 60), seed) for seed in range(950)]
    places = sorted(generator.sample(range(1000), 50))
    mixed: list[Any] = list(good)
    for number, place in enumerate(places):
        mixed.insert(place, BROKEN[number % len(BROKEN)][0])
    found = tower.encode(mixed, on_error="return")
    assert_equal([one for one in found if not isinstance(one, ItemError)], tower.encode(good))
    failed = [(one.index, type(one.error)) for one in found if isinstance(one, ItemError)]
    assert failed == [(place, BROKEN[number % len(BROKEN)][1]) for number, place in enumerate(places)]


def test_non_finite_outputs_are_found_on_request(tower, expected, monkeypatch):
    def spoil(batch, outputs):
        for position in range(batch.workload.tokens):
            if torch.equal(outputs["embeddings"][position], expected[3].embeddings[-1]):
                outputs["embeddings"][position, 0] = float("nan")

    record_batches(monkeypatch, after=spoil)
    assert tower.encode(IMAGES)[3].embeddings.isnan().any()
    found = tower.encode(IMAGES, check_output=True, on_error="return")
    assert isinstance(found.pop(3).error, errors.NonFiniteOutputError)
    assert_equal(found, expected[:3] + expected[4:])
    with pytest.raises(errors.NonFiniteOutputError, match="NaN") as caught:
        tower.encode(IMAGES, check_output=True)
    assert caught.value.index == 3
    assert_equal(caught.value.completed, expected[:3])
    with pytest.raises(errors.UsageError, match="check_output must be True, False or None, got 'x'"):
        tower.encode(IMAGES, check_output="x")


def test_overflow_in_float16_is_reported_by_default(qwen2_vl, tmp_path):
    folder = shutil.copytree(qwen2_vl, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("merger.mlp.2.weight"))
    weights[name] = weights[name].sign() * 60_000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tower = VisionTower.from_pretrained(folder, device="cpu", dtype="float16")
    with pytest.raises(errors.NonFiniteOutputError, match=r"in torch\.float16; .* use bfloat16 or float32"):
        tower.encode(IMAGES[0])
    assert not tower.encode(IMAGES[0], check_output=False)[0].embeddings.isfinite().all()
    tower = VisionTower.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert tower.encode(IMAGES[0])[0].embeddings.isfinite().all()


@pytest.mark.parametrize("limit", [200, 260, 500])
def test_a_batch_that_does_not_fit_is_halved(tower, expected, monkeypatch, limit):
    patches = [4 * one.num_tokens for one in expected]
    batches = record_batches(monkeypatch, limit_memory(limit))
    chosen = [index for index, count in enumerate(patches) if count <= limit]
    released: list[int] = []
    release = Executor.release
    monkeypatch.setattr(Executor, "release", lambda self: released.append(1) or release(self))
    found = tower.encode([IMAGES[index] for index in chosen])
    assert_equal(found, [expected[index] for index in chosen])
    assert sum(batches) == sum(patches[index] for index in chosen), "every image is in one finished batch"
    assert released


@pytest.mark.parametrize("allocate", [None, lambda: torch.empty(2**60, dtype=torch.uint8)], ids=["gpu", "cpu"])
def test_an_image_that_never_fits_is_the_only_one_that_fails(tower, expected, monkeypatch, allocate):
    order = [1, 0, 2, 3]
    patches = [4 * expected[index].num_tokens for index in order]
    record_batches(monkeypatch, limit_memory(patches[1] - 1, allocate))
    found = tower.encode([IMAGES[index] for index in order], on_error="return")
    assert isinstance(found.pop(1).error, errors.TowerOutOfMemoryError)
    assert_equal(found, expected[1:4])
    with pytest.raises(errors.TowerOutOfMemoryError, match=rf"image 1 .*{patches[1]} patches") as caught:
        tower.encode([IMAGES[index] for index in order])
    assert_equal(caught.value.completed, [expected[1]])
    assert [number in caught.value.remaining for number in (0, 1)] == [False, True]
    assert caught.value.__cause__ is None
    with pytest.raises(errors.TowerOutOfMemoryError, match="the video"):
        tower.encode_video([IMAGES[0]] * 2)


def test_a_failed_batch_is_freed_before_its_halves_run(tower, expected, monkeypatch):
    seen: list[weakref.ref[PackedBatch]] = []
    alive: list[int] = []

    def fail(batch):
        alive.append(sum(other() is not None for other in seen))
        seen.append(weakref.ref(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")

    record_batches(monkeypatch, fail)
    for on_error in ("raise", "return"):
        assert_equal(tower.encode(IMAGES, on_error=on_error), expected)
    assert alive == [0] * 14


def test_device_errors_are_not_taken_for_lack_of_memory(tower, monkeypatch):
    def fail(batch):
        raise RuntimeError("an illegal instruction")

    batches = record_batches(monkeypatch, fail)
    for call in (lambda: tower.encode(IMAGES), lambda: tower.encode_video([IMAGES[0]] * 2)):
        with pytest.raises(RuntimeError, match="an illegal instruction"):
            call()
    assert batches == []


def test_later_batches_start_at_the_size_that_fitted(tower, monkeypatch):
    refused: list[int] = []

    def fail(batch):
        if batch.workload.patches > 500:
            refused.append(batch.workload.patches)
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(scheduler, "PORTION_IMAGES", 50)
    batches = record_batches(monkeypatch, fail)
    tower.encode([noise(56, 56, seed) for seed in range(300)])
    assert sum(batches) == 300 * 16
    # Only batches that were prepared before memory ran out could be too large.
    assert 1 <= len(refused) <= 2


def test_an_interruption_keeps_completed_embeddings(tower, expected, monkeypatch):
    threads = threading.active_count()
    started: list[int] = []

    def interrupt(batch):
        started.append(1)
        if len(started) == 3:
            raise KeyboardInterrupt

    record_batches(monkeypatch, interrupt)
    with pytest.raises(errors.EncodeInterrupted) as caught:
        tower.encode(IMAGES, max_patches=1)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception)
    assert_equal(caught.value.completed, expected[:2])
    assert threading.active_count() == threads
    monkeypatch.undo()
    assert_equal(tower.encode(IMAGES), expected)


@pytest.mark.parametrize("cache_bytes", [0, 15_000, 2**24], ids=["no cache", "small cache", "large cache"])
def test_threads_share_a_tower_and_unloaded_images(tower, expected, monkeypatch, cache_bytes):
    monkeypatch.setattr(tower, "cache", EmbeddingCache(cache_bytes) if cache_bytes else None)
    encoded = [png(image) for image in IMAGES]

    def work(shared: list[Image.Image], together: threading.Barrier, seed: int) -> None:
        generator = random.Random(seed)
        order = generator.sample(range(len(shared)), len(shared))
        together.wait()
        found = tower.encode([shared[index] for index in order], max_patches=generator.choice([None, 1, 400]))
        assert_equal(found, [expected[index] for index in order])

    for attempt in range(3):
        shared = [Image.open(io.BytesIO(data)) for data in encoded]
        together = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            # A thread starts without this test's choice of backend unless it gets a copy of its context.
            tasks = [
                pool.submit(contextvars.copy_context().run, work, shared, together, 8 * attempt + thread)
                for thread in range(8)
            ]
        for task in tasks:
            task.result()


def test_tile_tokens_and_spans_follow_the_tiles(tmp_path, tower):
    folder = save_gemma3(tmp_path)
    image = noise(300, 100, 1)
    (one,) = VisionTower.from_pretrained(folder, device="cpu").encode(image)
    rows = one.num_tokens
    assert (one.bidirectional_spans, one.tile_tokens) == (((0, rows),), (rows,))
    panning = VisionTower.from_pretrained(folder, device="cpu", processor_options=PAN_AND_SCAN)
    found, alone = panning.encode([image, noise(50, 50, 2)])
    tiles = found.num_tokens // rows
    assert tiles > 1
    assert found.tile_tokens == (rows,) * tiles
    assert found.bidirectional_spans == tuple((tile * rows, (tile + 1) * rows) for tile in range(tiles))
    assert alone.tile_tokens == (rows,)
    assert tower.encode(IMAGES[0])[0].bidirectional_spans == ()


def test_images_get_their_aliases(tower):
    def aliases(images, text_alias, **options):
        found = tower.encode(images, text_alias=text_alias, **options)
        return [one.text_alias for one in found if isinstance(one, ImageEmbedding)]

    assert aliases(IMAGES[:3], ["<a>", None, "<c>"], max_patches=1) == ["<a>", None, "<c>"]
    assert aliases(IMAGES[0], "<a>") == ["<a>"]
    assert aliases([IMAGES[0]] * 2, ["<a>", "<b>"]) == ["<a>", "<b>"]
    assert aliases([b"garbage", IMAGES[0]], ["<a>", "<b>"], on_error="return") == ["<b>"]
    for neither in (3, {"<a>": 1, "<b>": 2}):
        with pytest.raises(errors.UsageError, match="a list with one for each"):
            aliases(IMAGES[:2], neither)
    with pytest.raises(errors.UsageError, match="1 aliases for 2 images"):
        aliases(IMAGES[:2], "<a>")
    for encode in (tower.encode, tower.encode_video):
        with pytest.raises(errors.UsageError, match="at least one character"):
            encode([b"garbage"], text_alias="")


def test_get_image_embeddings_takes_one_image_or_several(tower, expected):
    one = tower.get_image_embeddings(IMAGES[0])
    several = tower.get_image_embeddings(IMAGES[:3], embeddings_cpu=False)
    assert_equal([one], expected[:1])
    assert_equal(several, expected[:3])
    named = tower.get_image_embeddings(IMAGES[:2], ["<a>", None])
    assert named[0].text_alias == "<a>"
    made_up = [found.text_alias for found in (one, *several, named[1], tower.get_image_embeddings(IMAGES[0]))]
    assert len(set(made_up)) == 6
    assert all(alias is not None and alias.startswith("<$EMB_") and alias.endswith("$>") for alias in made_up)
    assert tower.get_image_embeddings(image=IMAGES[0], text_alias="<a>", embeddings_cpu=True).text_alias == "<a>"
    assert tower.get_image_embeddings(IMAGES[0], max_pixels=4000).num_tokens < one.num_tokens
    assert tower.get_image_embeddings([]) == []


def test_progress_bar_is_shown_for_long_lists_on_a_terminal(tower, capsys, monkeypatch):
    def shown(images, progress):
        capsys.readouterr()
        tower.encode([IMAGES[1]] * images, progress=progress)
        return capsys.readouterr().err

    assert shown(3, None) == shown(70, None) == shown(70, False) == ""
    assert "3/3" in shown(3, True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "70/70" in shown(70, None)
    assert shown(3, None) == ""


def test_videos_have_the_times_of_their_patches(tower):
    frames: list[Any] = [noise(60, 40, seed) for seed in range(5)]
    silent = tower.encode_video(frames)
    assert (silent.seconds_per_grid, silent.timestamps, silent.is_video) == (None, (), True)
    assert tower.encode_video(frames[:1]).is_video
    assert not tower.encode(frames[:1])[0].is_video
    timed = tower.encode_video(map(png, frames), fps=4, text_alias="<video>", check_output=True)
    assert torch.equal(timed.embeddings, silent.embeddings)
    assert (timed.seconds_per_grid, timed.timestamps, timed.text_alias) == (0.5, (0.125, 0.625, 1.0), "<video>")
    stamped = tower.encode_video(np.stack(frames), timestamps=[0.0, 0.25, 0.5, 0.75, 1.0])
    assert (stamped.seconds_per_grid, stamped.timestamps) == (0.5, timed.timestamps)


def test_times_are_those_of_the_processor_of_qwen3_vl():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    video = ImageEmbedding(torch.zeros(1, 1), (1, 1, 1), (1, 1), (1, 1), "")
    for frames in range(1, 12):
        for fps in (0.5, 1, 2, 24, 29.97):
            times = Qwen3VLProcessor._calculate_timestamps(None, list(range(frames)), fps, 2)
            timed = VideoTimes.parse(frames, fps, None).attach(video, 2)
            assert timed.timestamps == pytest.approx(times, abs=1e-12)
            assert timed.seconds_per_grid == pytest.approx(2 / fps)


@pytest.mark.parametrize(
    "times",
    [
        *({"fps": fps} for fps in (0, -1.0, math.inf, math.nan, 5e-324, Fraction(1, 10**400), "2", True)),
        {"fps": 2, "timestamps": [0, 1]},
        *({"timestamps": times} for times in (5, [0], [0, -1], [1, 0], [0, math.nan], [1e308, 1e308], ["0", "1"])),
    ],
)
def test_invalid_times_are_rejected(tower, times):
    with pytest.raises(errors.UsageError, match=r"fps|timestamps"):
        tower.encode_video(IMAGES[:2], **times)


def test_copies_to_the_host_hold_few_bytes_at_a_time():
    """Staged tensors are filled only when their event is waited for, as by a slow GPU."""
    staged, most = [], []

    class Copy:
        def __init__(self, source):
            self.source, self.staged = source, torch.full_like(source, math.nan)
            staged.append(self)
            most.append(sum(copy.staged.nbytes for copy in staged))

        def synchronize(self):
            assert staged.pop(0) is self, "the oldest first"
            self.staged.copy_(self.source)

    def stage(tensor):
        copy = Copy(tensor)
        return copy.staged, copy

    copies = HostCopies(1000, stage)
    sources = [torch.randn(count) for count in (100, 100, 50, 400, 10, 0, 100)]
    found = [copies.start(source) for source in sources]
    copies.finish()
    assert staged == []
    assert max(most) == 1600, "one tensor may be larger than the limit"
    assert sorted(most)[-2] <= 1000
    assert all(torch.equal(one, source) for one, source in zip(found, sources, strict=True))


def test_an_interrupted_copy_to_the_host_is_finished_later():
    interrupts = [KeyboardInterrupt()]

    class Copied:
        def synchronize(self):
            if interrupts:
                raise interrupts.pop()

    copies = HostCopies(0, lambda tensor: (tensor.clone(), Copied()))
    source = torch.randn(100)
    first = copies.start(source).fill_(math.nan)
    with pytest.raises(KeyboardInterrupt):
        copies.start(source)
    copies.finish()
    assert torch.equal(first, source)


@pytest.mark.gpu
def test_embeddings_leave_a_gpu_in_ordinary_memory(qwen2_vl):
    cache = EmbeddingCache(2**24, device="cuda")
    tower = VisionTower.from_pretrained(qwen2_vl, device="cuda", cache=cache)
    twice = [*IMAGES, IMAGES[0]]
    stay = tower.encode(twice, max_patches=1)
    assert {one.embeddings.device.type for one in stay} == {"cuda"}
    for attempt in range(2):
        found = tower.encode(twice, max_patches=1, output_device="cpu")
        assert not any(one.embeddings.is_pinned() for one in found), attempt
        assert_equal([one.to("cuda") for one in found], stay)
        cache.clear()


@pytest.mark.gpu
def test_streams_that_share_a_cache_wait_for_each_other(qwen2_vl):
    cache = EmbeddingCache(2**24, device="cuda")
    tower = VisionTower.from_pretrained(qwen2_vl, device="cuda", cache=cache)
    expected = VisionTower.from_pretrained(qwen2_vl, device="cuda").encode(IMAGES, max_patches=1)
    for _ in range(20):
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                assert_equal(tower.encode(IMAGES, max_patches=1), expected)
        # A tower has one arena: a forward pass on one stream waits for the last on the other.
        torch.cuda.synchronize()
        cache.clear()
