"""Errors: one builtin base each, pickling, and short messages without raw data."""

import pickle

import numpy as np
import pytest
import torch

from tritontower import errors
from tritontower.errors import TowerError, is_integer, is_out_of_memory, list_names, shorten

BUILTINS = (ValueError, OSError, RuntimeError, TypeError)
EXAMPLES: dict[str, TowerError] = {
    type(error).__name__: error
    for error in (
        errors.ConfigError("vision_config.depth", -3, "an integer ≥ 1"),
        errors.CheckpointIncompleteError("a", ["b"]),
        errors.ShapeMismatchError("a", (1, 2), (3,), source="b"),
        errors.UnexpectedTensorError("a", ["b"]),
        errors.NonFiniteWeightsError("a", "holds NaN"),
        errors.ImageDecodeError("a", index=1, source="b"),
        errors.ImageTypeError("a", index=2),
        errors.HostRefusalError("a", "b", "c", "d"),
    )
}


def leaves(kind=TowerError):
    return [leaf for child in kind.__subclasses__() for leaf in leaves(child)] or [kind]


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_errors_have_one_builtin_base_and_survive_pickling(kind):
    error = EXAMPLES.get(kind.__name__) or kind("a")
    error.completed = [1]
    assert [isinstance(error, builtin) for builtin in BUILTINS].count(True) == 1
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))


def test_messages_give_place_limit_and_value():
    texts = {name: str(error) for name, error in EXAMPLES.items()}
    assert texts["ConfigError"] == "config.json: vision_config.depth must be an integer ≥ 1, got -3"
    assert texts["ImageDecodeError"] == "image 1 (b): a"
    assert texts["ImageTypeError"] == "image 2: a"
    assert "tensor a in b must have the shape [1, 2]" in texts["ShapeMismatchError"]
    assert "got [3]" in texts["ShapeMismatchError"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gelu", "'gelu'"),
        (3, "3"),
        (None, "None"),
        (2**4000, "an integer of 4001 bits"),
        ("x" * 1000, "'" + "x" * 78 + "…"),
        (b"\0secret", "7 bytes"),
        ([1, 2, 3], "a list of 3"),
        (object(), "a object"),
    ],
)
def test_values_are_shortened_for_messages(value, expected):
    assert shorten(value) == expected


def test_long_lists_of_names_are_counted():
    assert list_names(["a", "b"]) == "a, b"
    assert list_names([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (and 2 more)"


def test_booleans_and_floats_are_not_integers():
    assert [is_integer(value) for value in (3, np.int64(3), True, 3.0, "3", None)] == [True, True] + 4 * [False]


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "no"])
def test_out_of_memory_is_recognized_by_class_or_text(text):
    assert is_out_of_memory(RuntimeError(text)) == (text != "no")
    assert is_out_of_memory(torch.OutOfMemoryError(text))
    assert is_out_of_memory(MemoryError(text))
    assert not is_out_of_memory(ValueError(text))
