"""Where a tower runs: what a caller says, as the device that is meant, on machines with and without GPUs."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tritontower import EmbeddingCache, load_embeddings, save_embeddings
from tritontower.devices import parse_device
from tritontower.embedding import ImageEmbedding
from tritontower.errors import BackendUnavailableError, UsageError


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.local]:
    """A machine with four GPUs; ``current.index`` is each thread's current one, which is number 0 at first."""
    each = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(each, "index", 0))
    return each


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_a_gpu_has_the_number_of_the_threads_current_one(
    device: str | torch.device | None, current: threading.local
) -> None:
    current.index = 1
    assert parse_device(device) == torch.device("cuda", 1)
    assert EmbeddingCache(100, device=device).device == torch.device("cuda", 1)
    others: list[torch.device] = []
    thread = threading.Thread(target=lambda: others.append(parse_device(device)))
    thread.start()
    thread.join()
    assert others == [torch.device("cuda", 0)], "a thread's current GPU is its own"


@pytest.mark.usefixtures("current")
def test_a_number_that_is_given_stays() -> None:
    assert parse_device("cuda:3") == torch.device("cuda", 3)
    assert parse_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendUnavailableError, match="sees 4 GPUs here, counted from 0"):
        parse_device("cuda:4")


def test_embeddings_are_loaded_where_there_is_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    embedding = ImageEmbedding(
        embeddings=torch.ones(1, 4),
        grid_thw=(1, 2, 2),
        original_size=(28, 28),
        processed_size=(28, 28),
        content_hash="",
        tile_tokens=(1,),
    )
    path = tmp_path / "embeddings.safetensors"
    save_embeddings(path, [embedding])
    for load in (load_embeddings, ImageEmbedding.load):
        with pytest.raises(BackendUnavailableError, match="sees no GPU here"):
            load(path, device="cuda")
        with pytest.raises(UsageError, match="'bogus' is not one of torch's"):
            load(path, device="bogus")
        load(path, device=torch.device("cpu"))
