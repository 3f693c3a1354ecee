"""The cache of embeddings: bounded by bytes, never a wrong embedding, safe between threads."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import noise
from support.towers.qwen import save_qwen2_vl

from tritontower import VisionTower
from tritontower.cache import CacheStats, EmbeddingCache
from tritontower.embedding import ImageEmbedding
from tritontower.engine.executor import Executor
from tritontower.errors import BackendUnavailableError, NonFiniteOutputError, UsageError
from tritontower.scheduler.outputs import ItemError


def filled(value, floats=4):
    return ImageEmbedding(torch.full((floats, 1), float(value)), (1, 1, 1), (1, 1), (1, 1), "")


def value_of(found):
    return None if found is None else float(found.embeddings[0])


def test_put_and_get_copy():
    cache = EmbeddingCache(100)
    original = filled(1)
    cache.put("a", original)
    original.embeddings.fill_(9)
    first = cache.get("a")
    assert value_of(first) == 1
    first.embeddings.fill_(8)
    assert value_of(cache.get("a")) == 1
    assert cache.get("a", device="meta").embeddings.device.type == "meta"


def test_invalid_sizes_and_devices_are_rejected():
    for size in (-1, 1.5, "1", None, True):
        with pytest.raises(UsageError, match="max_bytes"):
            EmbeddingCache(size)
    for device, error in (("mps", BackendUnavailableError), ("attic", UsageError)):
        with pytest.raises(error, match="device"):
            EmbeddingCache(1000, device=device)


@settings(max_examples=150, deadline=None)
@given(
    max_bytes=st.integers(0, 200),
    steps=st.lists(st.tuples(st.sampled_from(["put", "get", "clear"]), st.integers(0, 8), st.integers(0, 30))),
)
def test_cache_matches_a_model(max_bytes, steps):
    cache = EmbeddingCache(max_bytes)
    model: dict[str, ImageEmbedding] = {}  # the oldest first
    hits = misses = evictions = 0
    for number, (step, key, rows) in enumerate(steps):
        if step == "put":
            embedding = replace(filled(number, rows + 1), deepstack=(torch.zeros(rows, 1),), pooled=torch.zeros(1, 1))
            cache.put(str(key), embedding)
            if embedding.nbytes <= max_bytes:
                model.pop(str(key), None)
                model[str(key)] = embedding
                while sum(one.nbytes for one in model.values()) > max_bytes:
                    model.pop(next(iter(model)))
                    evictions += 1
        elif step == "get":
            expected = model.pop(str(key), None)
            assert value_of(cache.get(str(key))) == value_of(expected)
            hits, misses = hits + (expected is not None), misses + (expected is None)
            if expected is not None:
                model[str(key)] = expected
        else:
            cache.clear()
            model.clear()
        size = sum(one.nbytes for one in model.values())
        assert cache.stats == CacheStats(hits, misses, evictions, size, len(model))
        assert len(cache) == len(model)
        assert [number for number in range(9) if str(number) in cache] == sorted(map(int, model))
        assert size <= max_bytes


def test_threads_never_exceed_its_bytes():
    cache = EmbeddingCache(40 * 16)

    def work(seed):
        generator = random.Random(seed)
        for _ in range(500):
            key = generator.randrange(80)
            found = cache.get(str(key))
            if found is None:
                cache.put(str(key), filled(key))
            else:
                assert torch.equal(found.embeddings, torch.full((4, 1), float(key)))
            assert cache.stats.bytes <= cache.max_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = cache.stats
    assert stats.hits + stats.misses == 8 * 500
    assert stats.bytes == 16 * stats.entries


@pytest.fixture
def batches(monkeypatch):
    """Patches of every batch that any tower runs."""
    seen: list[int] = []
    run = Executor.run

    def counted(self, batch, observer=None):
        seen.append(batch.workload.patches)
        return run(self, batch, observer)

    monkeypatch.setattr(Executor, "run", counted)
    return seen


def test_a_repeated_image_or_video_is_not_encoded_again(qwen2_vl, batches):
    cache = EmbeddingCache(2**20)
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=cache)
    image, other = noise(90, 60, 1), noise(90, 60, 2)
    (first,) = tower.encode(image)
    assert len(batches) == 1
    again, new = tower.encode([Image.fromarray(image), other], text_alias=["<a>", None])
    assert len(batches) == 2
    assert batches[1] == 4 * new.num_tokens
    assert torch.equal(again.embeddings, first.embeddings)
    assert (again.text_alias, first.text_alias) == ("<a>", None)
    assert again.content_hash == first.content_hash
    # Other bounds make other rows; the same in another spelling do not.
    tower.encode(image, max_pixels=4000)
    tower.encode(image, max_pixels=np.int64(4000), min_pixels=None)
    assert len(batches) == cache.stats.entries == 3
    frames = [image, other]
    video = tower.encode_video(frames, fps=2)
    assert len(batches) == 4
    known = tower.encode_video(frames, timestamps=[3.0, 5.0], text_alias="<b>")
    assert len(batches) == 4
    assert torch.equal(known.embeddings, video.embeddings)
    assert (video.timestamps, known.timestamps) == ((0.25,), (4.0,))
    assert (video.is_video, known.is_video, again.is_video) == (True, True, False)
    assert (video.text_alias, known.text_alias) == (None, "<b>")


def test_cached_embeddings_are_checked_on_request(qwen2_vl, monkeypatch):
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=EmbeddingCache(2**20))
    run = Executor.run
    image, frames = noise(60, 60, 1), [noise(60, 60, 2)] * 2

    def spoil(*arguments):
        return {name: rows.fill_(float("inf")) for name, rows in run(*arguments).items()}

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "run", spoil)
        assert tower.encode(image)[0].embeddings.isinf().all()
        tower.encode_video(frames)
    for encode, argument in ((tower.encode, image), (tower.encode_video, frames)):
        with pytest.raises(NonFiniteOutputError, match="NaN or infinity"):
            encode(argument, check_output=True)
    bad, good = tower.encode([image, noise(60, 60, 3)], check_output=True, on_error="return")
    assert isinstance(bad, ItemError)
    assert isinstance(good, ImageEmbedding)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=["device", "cpu", "page-locked", "python"],
)
def test_a_cache_without_memory_does_not_stop_a_call(qwen2_vl, monkeypatch, error):
    cache = EmbeddingCache(2**20)
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=cache)
    image = noise(60, 60, 1)
    (first,) = tower.encode(image)
    cache.put("known", first)
    move = ImageEmbedding.to

    def full(self, device, *, copy=False):
        if copy:
            raise error
        return move(self, device)

    monkeypatch.setattr(ImageEmbedding, "to", full)
    again, other = tower.encode([image, noise(60, 60, 2)])
    assert torch.equal(again.embeddings, first.embeddings)
    assert other.num_tokens == first.num_tokens
    assert cache.stats.entries == 2
    error = RuntimeError("an illegal instruction")
    for call in (lambda: cache.get("known"), lambda: cache.put("new", first), lambda: tower.encode(image)):
        with pytest.raises(RuntimeError, match="an illegal instruction"):
            call()


def test_towers_that_differ_never_share(qwen2_vl, tmp_path, batches):
    cache = EmbeddingCache(2**22)
    image = noise(60, 60, 1)
    tuned = save_qwen2_vl(tmp_path / "tuned", seed=1)

    def tower(folder, **options):
        return VisionTower.from_pretrained(folder, device="cpu", cache=cache, **options)

    options = ({}, {"dtype": "bfloat16"}, {"processor_options": {"image_mean": [0.0] * 3}}, {"feature_layer": -2})
    towers = [*(tower(qwen2_vl, **changed) for changed in options), tower(tuned)]
    embeddings = [one.encode(image)[0].embeddings.float() for one in towers]
    assert len(batches) == len(towers)
    assert all(not torch.equal(a, b) for i, a in enumerate(embeddings) for b in embeddings[:i])
    assert torch.equal(tower(qwen2_vl).encode(image)[0].embeddings, embeddings[0])
    assert len(batches) == len(towers)


def test_images_of_equal_bytes_are_kept_apart(qwen2_vl):
    stored = bytes(random.Random(0).randrange(256) for _ in range(3000 * 3))
    images = [Image.frombytes(*form) for form in (("RGB", (30, 100), stored), ("RGB", (100, 30), stored))]
    images.append(Image.frombytes("L", (30, 30), stored[:900]))
    for base in (0, 200):
        images.append(Image.frombytes("P", (30, 30), stored[:900]))
        images[-1].putpalette([channel for index in range(256) for channel in (index, 255 - index, base)])
    for alpha in (0, 128, 255):
        images.append(images[0].convert("RGBA"))
        images[-1].putalpha(alpha)
    cache = EmbeddingCache(2**22)
    cached, plain = (VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=one) for one in (cache, None))
    expected = plain.encode(images)
    for _ in range(2):
        for found, one in zip(cached.encode(images), expected, strict=True):
            assert torch.equal(found.embeddings, one.embeddings)
    # Fully opaque is the same image; everything else is one of its own.
    assert cache.stats.entries == len(images) - 1
