"""Parsing of devices, on machines with and without GPUs."""

import threading

import pytest
import torch

from tritontower import EmbeddingCache, load_embeddings
from tritontower.devices import parse_device
from tritontower.errors import BackendUnavailableError, UsageError


@pytest.fixture
def current(monkeypatch):
    """A machine with four GPUs; ``current.index`` is the thread's current one, at first number 0."""
    each = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(each, "index", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return each


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_a_gpu_gets_the_index_of_the_threads_current_one(device, current):
    current.index = 1
    assert parse_device(device) == torch.device("cuda", 1)
    assert EmbeddingCache(100, device=device).device == torch.device("cuda", 1)
    others: list[torch.device] = []
    thread = threading.Thread(target=lambda: others.append(parse_device(device)))
    thread.start()
    thread.join()
    assert others == [torch.device("cuda", 0)], "each thread has its own current GPU"


@pytest.mark.usefixtures("current")
def test_a_given_index_is_kept():
    assert parse_device("cuda:3") == torch.device("cuda", 3)
    assert parse_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendUnavailableError, match=r"one of 4 GPUs, counted from 0, got 'cuda:4'"):
        parse_device("cuda:4")


@pytest.mark.usefixtures("current")
def test_gpus_that_triton_has_no_tensor_cores_for_are_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for device in (None, "cuda", "cuda:2"):
        with pytest.raises(BackendUnavailableError, match=r"8\.0 or higher, got 7\.5 \(Tesla T4\); pass device='cpu'"):
            parse_device(device)


def test_devices_that_are_not_here_are_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for parse in (parse_device, lambda device: load_embeddings("nowhere", device=device)):
        with pytest.raises(BackendUnavailableError, match="sees no GPU here"):
            parse("cuda")
        with pytest.raises(UsageError, match="got 'bogus'"):
            parse("bogus")
