"""Typed reading of untrusted configurations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritontower.checkpoint.config_reader import ConfigReader, parse_json, read_json
from tritontower.errors import CheckpointNotFoundError, ConfigError, TowerError

NOT_JSON_OBJECTS = {
    "empty": b"",
    "garbage": b"hello",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"a": "\xff"}',
    "list": b"[1, 2]",
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": {"b": -Infinity}}',
    "duplicate key": b'{"a": 1, "b": 2, "a": 1}',
    "duplicate key deep inside": b'{"a": {"b": [{"c": 1, "c": 2}]}}',
    "100000 deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number of 10000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("data", NOT_JSON_OBJECTS.values(), ids=NOT_JSON_OBJECTS)
def test_only_one_strict_object_is_accepted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 400 + len(str(path))
    if b'"a": 1, "b"' in data:
        assert caught.value.key == "a", "the duplicate key"


def test_file_must_exist_and_keep_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for missing in (path, tmp_path):
        with pytest.raises(CheckpointNotFoundError, match="does not exist or is not a file"):
            read_json(missing)
    path.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(ConfigError, match="at most 64 bytes"):
        read_json(path, limit_bytes=64)
    assert read_json(path, limit_bytes=path.stat().st_size)["a"] == "x" * 100


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:0123e.-+nulltrefasNI', max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_a_tower_error(data: bytes) -> None:
    try:
        value = parse_json(data, source="config.json")
    except TowerError:
        return
    assert value == json.loads(data)


def reader(**values: Any) -> ConfigReader:
    return ConfigReader({"vision_config": values, "model_type": "qwen2_vl"})


def test_values_lists_and_lists_of_lists_are_read() -> None:
    config = reader(depth=32, eps=1e-6, act="gelu", bias=True, scale=2, layers=[5, 11], sizes=[[33, 67], [67, 33]])
    assert config.get(int, "vision_config.depth", minimum=1, maximum=64) == 32
    assert config.get(float, "vision_config.eps") == 1e-6
    assert config.get(str, "vision_config.act", choices=("gelu", "silu")) == "gelu"
    assert config.get(bool, "vision_config.bias") is True
    scale = config.get(float, "vision_config.scale")
    assert (scale, type(scale)) == (2.0, float)
    assert config.get_list(int, "vision_config.layers", length=2, minimum=0, maximum=31) == (5, 11)
    assert config.get_list(int, "vision_config.missing", (1, 2)) == (1, 2)
    assert config.get_rows(int, "vision_config.sizes", length=2, minimum=1) == ((33, 67), (67, 33))
    assert config.get_rows(int, "vision_config.missing", [[1, 2]], length=2) == ((1, 2),)


WRONG: dict[str, tuple[type[Any], Any, dict[str, Any]]] = {
    "true for an integer": (int, True, {}),
    "float for an integer": (int, 14.0, {}),
    "text for an integer": (int, "14", {}),
    "object for an integer": (int, {"a": 1}, {}),
    "one for a truth value": (bool, 1, {}),
    "true for a float": (float, True, {}),
    "NaN": (float, math.nan, {}),
    "infinity out of 1e999": (float, json.loads("1e999"), {}),
    "integer beyond floats": (float, 10**400, {}),
    "number for a text": (str, 3, {}),
    "layers −3": (int, -3, {"minimum": 1}),
    "hidden 2**40": (int, 2**40, {"maximum": 2**20}),
    "negative eps": (float, -1e-6, {"minimum": 0.0}),
    "hostile text": (int, "A" * 10_000 + "\x1b[2J\n", {}),
    "unknown activation": (str, "mish", {"choices": ("gelu", "silu")}),
}


@pytest.mark.parametrize(("kind", "value", "bounds"), WRONG.values(), ids=WRONG)
def test_wrong_value_is_named_with_what_is_allowed(kind: type[Any], value: Any, bounds: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        reader(key=value).get(kind, "vision_config.key", **bounds)
    error = caught.value
    assert error.key == "vision_config.key"
    assert error.value is value
    assert str(error).startswith("config.json: vision_config.key must be ")
    for bound in bounds.values():
        assert (repr(bound[0]) if isinstance(bound, tuple) else str(bound)) in error.allowed
    assert len(str(error)) < 300
    assert str(error).isprintable()


def test_absent_key_needs_a_default_and_null_is_absent() -> None:
    config = reader(nothing=None)
    for key in ("vision_config.nothing", "vision_config.missing", "other.missing"):
        assert not config.has(key)
        assert config.get(int, key, 7) == 7
        assert config.get(int, key, None) is None
        with pytest.raises(ConfigError, match="an integer ≥ 1"):
            config.get(int, key, minimum=1)


def test_section_keeps_the_full_path_in_messages() -> None:
    section = reader(depth="x").section("vision_config")
    with pytest.raises(ConfigError, match=r"vision_config\.depth must be an object, got 'x'"):
        reader(depth="x").get(int, "vision_config.depth.height")
    with pytest.raises(ConfigError, match=r"config\.json: vision_config\.depth must be an integer ≤ 1024, got 'x'"):
        section.get(int, "depth")
    assert not reader().section("nowhere", optional=True).has("depth")
    for name in ("nowhere", "model_type"):
        with pytest.raises(ConfigError, match=name):
            reader().section(name)


LISTS: dict[str, tuple[str, object, dict[str, Any], str]] = {
    # method, value, arguments, message
    "element too large": ("get_list", [5, 17], {"maximum": 16}, r"key\[1\] must be .*got 17"),
    "element of another type": ("get_list", [1, True], {}, r"key\[1\] must be .*got True"),
    "length": ("get_list", [1, 2, 3], {"length": 2}, "a list of 2"),
    "no value": ("get_list", None, {}, "a list of at most 1024, each element an integer"),
    "element of a row too small": (
        "get_rows",
        [[336, 1]],
        {"length": 2, "minimum": 9},
        r"key\[0\]\[1\] must be .*got 1",
    ),
    "element of a row a text": ("get_rows", [[1, 2], [3, "4"]], {"length": 2}, r"key\[1\]\[1\] must be .*got '4'"),
    "ragged": ("get_rows", [[1, 2], [3]], {"length": 2}, r"key\[1\] must be a list of 2"),
    "flat": ("get_rows", [1, 2], {"length": 2}, r"key\[0\] must be a list of 2.*got 1"),
    "no value for rows": (
        "get_rows",
        None,
        {"length": 2},
        "a list of at most 1024 lists of 2, each element an integer",
    ),
}


@pytest.mark.parametrize(("method", "value", "arguments", "text"), LISTS.values(), ids=LISTS)
def test_wrong_list_is_named_with_the_place(method: str, value: object, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        getattr(reader(key=value), method)(int, "vision_config.key", **arguments)


@pytest.mark.parametrize(
    "key", ["auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal"]
)
def test_keys_that_run_code_are_ignored(key: str) -> None:
    config = ConfigReader({key: "evil/kernel", "vision_config": {key: "evil/kernel"}})
    assert config.get(str, key, None) is None
    assert config.get(str, f"vision_config.{key}", None) is None
    assert not config.has(key)
