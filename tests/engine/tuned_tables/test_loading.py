"""Tables of a GPU: which files are read, which entries are current, and how they reach the registry."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tuning import CONFIG, GPU, LINEAR, make_entry, make_table

from tritontower.demo.checkpoint import demonstration_checkpoint
from tritontower.engine.tuned_tables import (
    FOLDER_VARIABLE,
    cache_folder,
    fill_registry,
    loading,
    reload_tables,
    table_name,
    table_paths,
    user_folder,
)
from tritontower.engine.tuned_tables.schema import triton_minor
from tritontower.errors import UsageError
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime._triton import triton

DEVICE = torch.device("cuda", 0)
NAME = "NVIDIA_Test_1.json"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Iterator[dict[str, Path]]:
    """Sets up a GPU that does not exist, and empty folders in all places of tables."""
    places = {"chosen": tmp_path / "chosen", "user": tmp_path / "cache" / "tuned", "packaged": tmp_path / "tuned"}
    monkeypatch.setattr(loading, "identify", lambda device: GPU)
    monkeypatch.setattr("tritontower.engine.tuned_tables.folders.kernels_folder", lambda: tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(places["chosen"]))
    monkeypatch.setenv("TRITONTOWER_CACHE", str(tmp_path / "cache"))
    for place in places.values():
        place.mkdir(parents=True)
    registry.clear()
    yield places
    registry.clear()


def put(folder: Path, content: object) -> Path:
    path = folder / NAME
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def warps() -> int | None:
    """Fills the registry again and looks a launch up."""
    registry.clear()
    fill_registry(DEVICE)
    found = registry.lookup(LinearConfig, "gemm.linear", DEVICE, torch.bfloat16, LINEAR, {"rows": 4096})
    return None if found is None else found.num_warps


def test_the_chosen_folder_precedes_the_others(folders):
    assert warps() is None
    for count, place in ((1, "packaged"), (2, "user"), (4, "chosen")):
        put(folders[place], make_table(make_entry(warps=count)))
        assert warps() == count
    put(folders["chosen"], make_table(make_entry(warps=8, triton=f"{triton_minor(str(triton.__version__))}.99")))
    assert warps() == 8, "a patch release"
    assert table_paths(GPU.gpu) == [folders[place] / NAME for place in ("chosen", "user", "packaged")]


def test_files_are_read_once_per_process_and_after_a_reload(folders):
    put(folders["user"], make_table(make_entry(warps=2)))
    assert warps() == 2
    put(folders["user"], make_table(make_entry(warps=8)))
    question = LinearConfig, "gemm.linear", DEVICE, torch.bfloat16, LINEAR, {"rows": 4096}
    fill_registry(DEVICE)
    assert registry.lookup(*question).num_warps == 2
    reload_tables()
    assert registry.lookup(*question).num_warps == 8


def test_the_cpu_has_no_tables(folders):
    fill_registry(torch.device("cpu"))
    assert registry.filled_devices() == []


@pytest.mark.parametrize("change", [{"source": "0" * 12}, {"triton": "1.0.0"}])
def test_stale_entries_are_ignored(folders, caplog, change):
    put(folders["user"], make_table(make_entry(**change)))
    with caplog.at_level(logging.WARNING, "tritontower"):
        assert warps() is None
    assert "1 are from another release of the kernels or of Triton" in caplog.text


def test_one_warning_names_the_tuning_command(folders, caplog):
    with caplog.at_level(logging.WARNING, "tritontower"):
        fill_registry(DEVICE)
        fill_registry(DEVICE)
        assert [record.args for record in caplog.records] == [(GPU.gpu, "none was measured")]
        assert "`tritontower tune MODEL`" in caplog.text
        caplog.clear()
        put(folders["user"], make_table(make_entry()))
        assert warps() == 4
    assert caplog.text == ""


@pytest.mark.parametrize("content", ["{", b"\xff\xfe", make_table(make_entry(config={**CONFIG, "num_warps": 5}))])
def test_a_broken_file_is_ignored_with_one_warning(folders, caplog, content):
    path = put(folders["user"], content if not isinstance(content, bytes) else "")
    if isinstance(content, bytes):
        path.write_bytes(content)
    put(folders["packaged"], make_table(make_entry(warps=2)))
    with caplog.at_level(logging.WARNING, "tritontower"):
        assert warps() == 2
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("TRITONTOWER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_folder() is user_folder() is None
    assert warps() is None
    with pytest.raises(UsageError, match="TRITONTOWER_CACHE"):
        demonstration_checkpoint()


def test_names_of_files():
    assert table_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert table_name("日本 7") == "7.json"
    for gpu in ("///", "日本", "..", "_"):
        assert table_paths(gpu) == []
        with pytest.raises(ValueError, match="to name a table by"):
            table_name(gpu)
