"""Backends of the tests, and shared fixtures.

Without a GPU every Triton kernel is interpreted: ``TRITON_INTERPRET`` has to be set before Triton is first imported, so
it is set here, at import.  A test that uses the ``kernel_device`` fixture runs the Triton kernels (interpreted on a CPU,
compiled on a GPU); every other test runs the torch reference.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pytest
from support.checkpoints import Opened
from support.towers.qwen import save_qwen2_vl

from tritontower.checkpoint import files as weight_files
from tritontower.kernels.runtime import dispatch


def pytest_collection_modifyitems(config, items):
    """Deselects the GPU tests on a machine without a GPU; skipping would hide which tests ran."""
    if HAS_GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True, scope="session")
def _reference_by_default():
    """Runs the torch reference unless a test requests the kernels; also in shared fixtures, before any test."""
    with dispatch.use("reference"):
        yield


@pytest.fixture
def kernel_device():
    """Device on which operations launch Triton kernels."""
    with dispatch.use("triton" if HAS_GPU else "interpreter"):
        yield torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["kernel", "reference"])
def device(request):
    """Device of each backend in turn."""
    return request.getfixturevalue("kernel_device") if request.param == "kernel" else torch.device("cpu")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fills ``torch.empty`` and its variants with NaN (or the largest integer) to reveal elements that are never written."""

    def poison(tensor):
        if tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _original=original, **kwargs: poison(_original(*args, **kwargs)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: poison(new_empty(self, *args, **kwargs))
    )


@pytest.fixture
def restore_threads():
    """Restores the number of torch's threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def distant_storage(device, tmp_path):
    """Allocates large fp32 storage; on a CPU in a sparse file, whose untouched pages take no memory."""

    def make(elements):
        if device.type == "cuda":
            return torch.empty(elements, dtype=torch.float32, device=device)
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(elements * 4)
        return torch.from_file(str(path), shared=True, size=elements, dtype=torch.float32)

    return make


@pytest.fixture
def opened(monkeypatch):
    """Weight files that the test opens, and what it reads from them."""
    record = Opened()
    monkeypatch.setattr(weight_files, "safe_open", record)
    return record


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Returns the small fp32 checkpoint of a case, made once per session; nobody may change it."""
    folders: dict[str, Path] = {}

    def save(case):
        if case.name not in folders:
            folders[case.name] = case.save(tmp_path_factory.mktemp("towers") / case.name)
        return folders[case.name]

    return save


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory):
    """A small random fp32 Qwen2-VL checkpoint."""
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
