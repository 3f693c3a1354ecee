"""The cache of embeddings: bounded by bytes, never a wrong embedding, safe between threads."""

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import noise, save_qwen2_vl

from tritontower import VisionTower
from tritontower.cache import CacheStats, EmbeddingCache
from tritontower.embedding import ImageEmbedding
from tritontower.engine.executor import Executor
from tritontower.errors import BackendUnavailableError, NonFiniteOutputError, TowerError, UsageError
from tritontower.preprocessing.images.decode import decode_image
from tritontower.scheduler.outputs import ItemError


def filled(value: float, floats: int = 4) -> ImageEmbedding:
    return ImageEmbedding(torch.full((floats, 1), float(value)), (1, 1, 1), (1, 1), (1, 1), "")


def value_of(found: ImageEmbedding | None) -> float | None:
    return None if found is None else float(found.embeddings[0])


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    cache = EmbeddingCache(3 * 16)
    for number in range(3):
        cache.put(str(number), filled(number))
    assert value_of(cache.get("0")) == 0
    cache.put("3", filled(3))
    assert [value_of(cache.get(key)) for key in "0123"] == [0, None, 2, 3]
    assert cache.stats == CacheStats(hits=4, misses=1, evictions=1, bytes=48, entries=3)
    assert len(cache) == 3
    assert "0" in cache
    assert "1" not in cache
    cache.clear()
    assert cache.stats == CacheStats(hits=4, misses=1, evictions=1, bytes=0, entries=0)
    assert cache.get("0") is None


def test_all_tensors_count() -> None:
    rows = torch.zeros(4, 1)
    cache = EmbeddingCache(100)
    cache.put("a", replace(filled(0), deepstack=(rows, rows), pooled=torch.zeros(3, 1)))
    assert cache.stats.bytes == 3 * 16 + 12


def test_put_and_get_copy() -> None:
    cache = EmbeddingCache(100)
    original = filled(1)
    cache.put("a", original)
    original.embeddings.fill_(9)
    first = cache.get("a")
    assert value_of(first) == 1
    first.embeddings.fill_(8)
    assert value_of(cache.get("a")) == 1
    assert cache.get("a", device="meta").embeddings.device.type == "meta"


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, True])
def test_invalid_sizes_are_rejected(size: Any) -> None:
    with pytest.raises(UsageError, match="max_bytes"):
        EmbeddingCache(size)


@pytest.mark.parametrize(("device", "error"), [("mps", BackendUnavailableError), ("attic", UsageError)])
def test_unavailable_devices_are_rejected(device: str, error: type[TowerError]) -> None:
    with pytest.raises(error, match="device"):
        EmbeddingCache(1000, device=device)


@settings(max_examples=150, deadline=None)
@given(
    max_bytes=st.integers(0, 200),
    steps=st.lists(st.tuples(st.sampled_from(["put", "get", "clear"]), st.integers(0, 8), st.integers(0, 30))),
)
def test_cache_matches_a_model(max_bytes: int, steps: list[tuple[str, int, int]]) -> None:
    cache = EmbeddingCache(max_bytes)
    model: dict[str, tuple[float, int]] = {}  # the oldest first
    for number, (step, key_number, floats) in enumerate(steps):
        key = str(key_number)
        if step == "put":
            cache.put(key, filled(number, floats=floats + 1))
            if 4 * (floats + 1) <= max_bytes:
                model.pop(key, None)
                model[key] = (number, 4 * (floats + 1))
                while sum(size for _, size in model.values()) > max_bytes:
                    model.pop(next(iter(model)))
        elif step == "get":
            expected = model.pop(key, None)
            assert value_of(cache.get(key)) == (None if expected is None else expected[0])
            if expected is not None:
                model[key] = expected
        else:
            cache.clear()
            model.clear()
        stats = cache.stats
        assert stats.bytes == sum(size for _, size in model.values()) <= max_bytes
        assert stats.entries == len(model)


def test_threads_never_exceed_its_bytes() -> None:
    cache = EmbeddingCache(40 * 16)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(500):
            key = generator.randrange(80)
            found = cache.get(str(key))
            if found is None:
                cache.put(str(key), filled(key))
            elif not torch.equal(found.embeddings, torch.full((4, 1), float(key))):
                wrong.append("wrong embedding")
            if cache.stats.bytes > cache.max_bytes:
                wrong.append("too large")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = cache.stats
    assert stats.hits + stats.misses == 8 * 500
    assert stats.bytes == 16 * stats.entries


# -- in a tower -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Patches of every batch that any tower runs."""
    seen: list[int] = []
    run = Executor.run

    def counted(self: Executor, batch: Any, observer: Any = None) -> Any:
        seen.append(batch.workload.patches)
        return run(self, batch, observer)

    monkeypatch.setattr(Executor, "run", counted)
    return seen


def test_a_repeated_image_or_video_is_not_encoded_again(qwen2_vl: Path, batches: list[int]) -> None:
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
    assert len(batches) == 3
    tower.encode(image, max_pixels=np.int64(4000), min_pixels=None)
    assert len(batches) == 3
    assert cache.stats.entries == 3
    frames = [image, other]
    video = tower.encode_video(frames, fps=2)
    assert len(batches) == 4
    known = tower.encode_video(frames, timestamps=[3.0, 5.0], text_alias="<b>")
    assert len(batches) == 4
    assert torch.equal(known.embeddings, video.embeddings)
    assert (video.timestamps, known.timestamps) == ((0.25,), (4.0,))
    assert video.is_video
    assert known.is_video
    assert not again.is_video
    assert (video.text_alias, known.text_alias) == (None, "<b>")


def test_cached_embeddings_are_checked_on_request(qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=EmbeddingCache(2**20))
    run = Executor.run
    image, frames = noise(60, 60, 1), [noise(60, 60, 2)] * 2
    with monkeypatch.context() as patch:
        patch.setattr(
            Executor,
            "run",
            lambda *arguments: {name: rows.fill_(float("inf")) for name, rows in run(*arguments).items()},
        )
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
def test_a_cache_without_memory_does_not_stop_a_call(
    qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    cache = EmbeddingCache(2**20)
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=cache)
    image = noise(60, 60, 1)
    (first,) = tower.encode(image)
    cache.put("known", first)
    move = ImageEmbedding.to

    def full(self: ImageEmbedding, device: Any, *, copy: bool = False) -> ImageEmbedding:
        if copy:
            raise error
        return move(self, device)

    monkeypatch.setattr(ImageEmbedding, "to", full)
    again, other = tower.encode([image, noise(60, 60, 2)])
    assert torch.equal(again.embeddings, first.embeddings)
    assert other.num_tokens == first.num_tokens
    assert cache.stats.entries == 2
    error = RuntimeError("an illegal instruction")
    with pytest.raises(RuntimeError, match="an illegal instruction"):
        cache.get("known")
    with pytest.raises(RuntimeError, match="an illegal instruction"):
        cache.put("new", first)
    with pytest.raises(RuntimeError, match="an illegal instruction"):
        tower.encode(image)


def test_towers_that_differ_never_share(qwen2_vl: Path, tmp_path: Path, batches: list[int]) -> None:
    cache = EmbeddingCache(2**22)
    image = noise(60, 60, 1)
    tuned = save_qwen2_vl(tmp_path / "tuned", seed=1)

    def tower(folder: Path, **options: Any) -> VisionTower:
        return VisionTower.from_pretrained(folder, device="cpu", cache=cache, **options)

    towers = [
        tower(qwen2_vl),
        tower(qwen2_vl, dtype="bfloat16"),
        tower(qwen2_vl, processor_options={"image_mean": [0.0, 0.0, 0.0]}),
        tower(qwen2_vl, feature_layer=-2),
        tower(tuned),
    ]
    embeddings = [one.encode(image)[0].embeddings.float() for one in towers]
    assert len(batches) == len(towers)
    assert all(not torch.equal(a, b) for i, a in enumerate(embeddings) for b in embeddings[:i])
    assert torch.equal(tower(qwen2_vl).encode(image)[0].embeddings, embeddings[0])
    assert len(batches) == len(towers)


def _confusable() -> list[Image.Image]:
    """Images whose stored bytes are equal, and whose pixels are not."""
    stored = bytes(random.Random(0).randrange(256) for _ in range(3000 * 3))
    indices = Image.frombytes("P", (30, 30), stored[:900])
    palettes = [[channel for index in range(256) for channel in (index, 255 - index, base)] for base in (0, 200)]
    images = [
        Image.frombytes("RGB", (30, 100), stored),
        Image.frombytes("RGB", (100, 30), stored),
        Image.frombytes("L", (30, 30), stored[:900]),
    ]
    for palette in palettes:
        image = indices.copy()
        image.putpalette(palette)
        images.append(image)
    transparent = images[-1].copy()
    transparent.info["transparency"] = stored[0]
    images.append(transparent)
    for alpha in (0, 128, 255):
        image = images[0].convert("RGBA")
        image.putalpha(alpha)
        images.append(image)
    return images


def test_images_of_equal_bytes_are_kept_apart(qwen2_vl: Path) -> None:
    cache = EmbeddingCache(2**22)
    tower = VisionTower.from_pretrained(qwen2_vl, device="cpu", cache=cache)
    plain = VisionTower.from_pretrained(qwen2_vl, device="cpu")
    images = _confusable()
    expected = plain.encode(images)
    for _ in range(2):
        for found, one in zip(tower.encode(images), expected, strict=True):
            assert torch.equal(found.embeddings, one.embeddings)
    # Fully opaque is the same image; everything else is one of its own.
    assert cache.stats.entries == len(images) - 1
    assert len({decode_image(image).digest for image in images}) == len(images) - 1
