"""Schema of tables: every rule rejects a file, and nothing in a file can do harm."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tuning import CONFIG, GPU, LINEAR, make_entry, make_table

from tritontower.engine.tuned_tables import check_table, read_table, schema
from tritontower.kernels.runtime.registry import TunedTable
from tritontower.tuning.table_writer import table_key

ATTENTION = {"block_queries": 128, "block_keys": 128, "num_warps": 4, "num_stages": 3, "variant": "fixed"}


def with_config(**changes: Any) -> dict[str, Any]:
    return make_table(make_entry(config={**CONFIG, **changes}))


BROKEN = {
    "JSON": "{",
    "JSON (nesting)": "[" * 100_000,
    "the table must be an object with": {"key": {}, "entries": []},
    "schema must be 1, got '2'": {**make_table(), "schema": 2},
    "entries must be a list": {**make_table(), "entries": {"a": 1}},
    "entries[0] must be an object": make_table({"kernel": "gemm.linear"}),
    "key.architecture": {**make_table(), "key": {**table_key(GPU), "architecture": "sm_1"}},
    "key.gpu must be": {**make_table(), "key": {**table_key(GPU), "gpu": None}},
    "key.gpu must have a letter": {**make_table(), "key": {**table_key(GPU), "gpu": "///"}},
    "constants must be an object of at most 32": make_table(make_entry(constants={f"n{i}": i for i in range(40)})),
    "kernel must have the form": make_table(make_entry() | {"kernel": "../../etc/passwd"}),
    "microseconds must be a number": make_table(make_entry(microseconds=float("nan"))),
    "sizes.rows must be an integer from 1": make_table(make_entry(0)),
    "block_rows must be a power of two": with_config(block_rows=96),
    "block_inner must be an integer from 16": with_config(block_inner=8),
    "num_warps must be a power of two": with_config(num_warps=5),
    "num_warps must be an integer from": with_config(num_warps=True),
    "operands must be a line": with_config(operands="a\nb"),
    "operands must be a number": with_config(operands=["pointers"]),
    "rows must be a power of two": make_table(make_entry(config={"rows": 3, "num_warps": 4})),
    "config must have tiles": with_config(block_rows=4096, block_columns=4096),
    "got 131072": make_table(
        make_entry(
            constants={**LINEAR, "activation": "silu_gated"}, config={**CONFIG, "block_rows": 256, "block_columns": 256}
        )
    ),
    "config must take at most": with_config(num_stages=8),
    "runner_up.config must take": make_table(
        make_entry(runner_up={"config": {**CONFIG, "num_stages": 8}, "microseconds": 1})
    ),
    "bytes of shared memory on sm_90": make_table(make_entry(constants={"head_dim": 256}, config=ATTENTION)),
    "config must have tiles of": make_table(
        make_entry(constants={"head_dim": 64}, config={**ATTENTION, "block_keys": 1024})
    ),
    "dtype must be one of": make_table(make_entry(dtype=["float32"])),
}


@pytest.mark.parametrize(("message", "content"), BROKEN.items(), ids=BROKEN.keys())
def test_a_broken_table_is_rejected(tmp_path, message, content):
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\w") as refusal:
        read_table(path)
    assert message.partition(" (")[0] in str(refusal.value)


def test_a_table_reads_back(tmp_path):
    path = tmp_path / "table.json"
    vendor = make_entry(config={**CONFIG, "vendor": True}, runner_up=None)
    path.write_text(json.dumps(make_table(make_entry(), vendor)), encoding="utf-8")
    found = read_table(path)
    assert found.key["gpu"] == GPU.gpu
    assert found.entries == [make_entry(), vendor]


def test_files_have_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "LARGEST_FILE", 1000)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(make_table(make_entry(), make_entry(64))))
    with pytest.raises(ValueError, match="at most 1000 bytes"):
        read_table(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_value_in_any_place_is_rejected_or_harmless(data):
    content = copy.deepcopy(make_table(make_entry(), make_entry(64)))
    place: Any = content
    while isinstance(place, (dict, list)) and place:
        names = sorted(place) if isinstance(place, dict) else range(len(place))
        name = data.draw(st.sampled_from(list(names)))
        if not isinstance(place[name], (dict, list)) or not place[name] or data.draw(st.booleans()):
            place[name] = data.draw(VALUES)
            break
        place = place[name]
    try:
        check_table(content)
    except ValueError:
        return
    found = TunedTable(content["entries"]).nearest("gemm.linear", "bfloat16", LINEAR, {"rows": 1})
    assert found is None or isinstance(found["config"], dict)
