"""Writing of tables: merging, agreement of sizes, and concurrent writers."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from support.tuning import CONFIG, GPU, LINEAR, make_entry

from tritontower.engine.tuned_tables import read_table
from tritontower.errors import UsageError
from tritontower.tuning.table_writer import merge, read_checked, table_key, table_text

KEY = table_key(GPU)


def attention(longest: int, *, keys: int, **changes: Any) -> dict[str, Any]:
    config = {"block_queries": 64, "block_keys": keys, "num_warps": 4, "num_stages": 2, "variant": "online"}
    constants = {"head_dim": 80, "padded": False, "bounded": 0}
    changes = {"constants": constants, "sizes": {"longest": longest}, "config": config, "runner_up": None} | changes
    return make_entry(kernel="attention.attention", **changes)


def held(path: Path) -> set[tuple[int, int]]:
    return {(each["sizes"]["longest"], each["config"]["block_keys"]) for each in read_table(path).entries}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "table.json"


def test_entries_merge_by_bucket(path):
    assert merge(path, KEY, [make_entry(4096, warps=1), make_entry(64, warps=2)]) == (2, 2, 0)
    assert merge(path, KEY, [make_entry(4300, warps=4)]) == (2, 1, 0)
    found = {(each["sizes"]["rows"], each["config"]["num_warps"]) for each in read_table(path).entries}
    assert found == {(64, 2), (4300, 4)}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    assert table_text(KEY, read_table(path).entries) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("stale", [{"source": "0" * 12}, {"triton": "1.0.0"}])
def test_a_current_entry_replaces_a_stale_one(path, stale):
    assert merge(path, KEY, [make_entry(warps=2, **stale)]) == (1, 1, 0)
    assert merge(path, KEY, [make_entry(warps=4)]) == (1, 1, 0)
    assert merge(path, KEY, [make_entry(warps=1, **stale)]) == (1, 0, 0)
    assert read_table(path).entries[0]["config"]["num_warps"] == 4


def test_sizes_agree_after_a_second_run(path):
    """Fields that decide the order of sums are those of the second run for all sizes."""
    merge(path, KEY, [attention(256, keys=64), attention(1024, keys=64)])
    assert merge(path, KEY, [attention(16384, keys=128)]) == (1, 1, 2)
    assert held(path) == {(16384, 128)}
    assert merge(path, KEY, [attention(256, keys=128)]) == (2, 1, 0)


def test_sizes_agree_within_an_import(path):
    entries = [attention(16384, keys=128), attention(256, keys=64), attention(64, keys=128)]
    assert merge(path, KEY, entries).added == 2
    assert held(path) == {(64, 128), (16384, 128)}


def test_a_stale_entry_removes_only_its_own_size(path):
    merge(path, KEY, [attention(256, keys=64)])
    assert merge(path, KEY, [attention(16384, keys=128, source="0" * 12)]) == (1, 0, 0)
    assert held(path) == {(256, 64)}


def test_different_launches_need_not_agree(path):
    other = attention(256, keys=64, constants={"head_dim": 64, "padded": False, "bounded": 0})
    assert merge(path, KEY, [other, attention(256, keys=128)]).held == 2


def test_a_broken_file_is_kept_aside(path):
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(UsageError, match="is no table of tuned configurations: a table must be JSON"):
        read_checked(path)
    assert merge(path, KEY, [make_entry()]).held == 1
    assert path.with_name("table.json.broken").read_text() == "mine"


def test_entries_that_break_the_schema_are_not_written(path):
    with pytest.raises(ValueError, match="num_warps must be a power of two"):
        merge(path, KEY, [make_entry(config={**CONFIG, "num_warps": 3})])
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".lock"] == []


def _merge_many(path: str, first: int, start: Any) -> None:
    start.wait()
    for step in range(10):
        merge(Path(path), KEY, [make_entry(constants={**LINEAR, "columns": first + step})])


def test_two_writers_lose_no_entry(path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    writers = [context.Process(target=_merge_many, args=(str(path), first, start)) for first in (100, 200)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    columns = {each["constants"]["columns"] for each in read_table(path).entries}
    assert columns == {*range(100, 110), *range(200, 210)}
    assert not list(path.parent.glob("*.tmp"))
    assert json.loads(path.read_text())["key"] == KEY
