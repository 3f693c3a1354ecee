"""Every error is a TowerError and a builtin, survives pickling, and keeps its message short and harmless."""

import pickle

import pytest

from tritontower import errors
from tritontower.errors import TowerError, list_names, shorten

EXAMPLES: list[TowerError] = [
    errors.UsageError("a"),
    errors.ConfigError("vision_config.depth", -3, "an integer ≥ 1"),
    errors.UnsupportedArchitectureError("a"),
    errors.NoVisionTowerError("a"),
    errors.CheckpointNotFoundError("a"),
    errors.CheckpointCorruptError("a"),
    errors.CheckpointIncompleteError("a", ["b"]),
    errors.CheckpointAmbiguousError("a"),
    errors.ShapeMismatchError("a", (1, 2), (3,), source="b"),
    errors.UnexpectedTensorError("a", ["b"]),
    errors.UnsupportedDtypeError("a"),
    errors.UnsafePathError("a"),
    errors.UnsafeFormatError("a"),
    errors.NonFiniteWeightsError("a", "holds NaN"),
    errors.ImageDecodeError("a", index=1, source="b"),
    errors.ImageFormatError("a"),
    errors.ImageTooLargeError("a", index=0),
    errors.EmptyImageError("a"),
    errors.AspectRatioError("a"),
    errors.ImageValueError("a"),
    errors.ImageTypeError("a", index=2),
    errors.ProcessorError("a"),
    errors.BackendUnavailableError("a"),
    errors.TowerNotLoadedError("a"),
    errors.TowerOutOfMemoryError("a"),
    errors.NonFiniteOutputError("a"),
    errors.EmbeddingFileError("a"),
    errors.PromptError("a"),
    errors.TokenSpaceExhaustedError("a"),
    errors.HostRefusalError("a", "b", "c", "d"),
]


def test_every_leaf_has_an_example() -> None:
    kinds = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]
    leaves = {kind for kind in kinds if issubclass(kind, TowerError) and not kind.__subclasses__()}
    assert leaves == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_is_also_a_builtin_and_survives_pickling(error: TowerError) -> None:
    assert isinstance(error, (ValueError, OSError, RuntimeError, TypeError))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_messages_say_what_where_and_what_is_allowed() -> None:
    by_type = {type(error).__name__: str(error) for error in EXAMPLES}
    assert by_type["ConfigError"] == "config.json: vision_config.depth is -3; allowed: an integer ≥ 1"
    assert by_type["ImageDecodeError"] == "image 1 (b): a"
    assert by_type["ImageTooLargeError"] == "image 0: a"
    assert "tensor a in b has shape [3], but config.json implies [1, 2]" in by_type["ShapeMismatchError"]


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
def test_shorten(value: object, expected: str) -> None:
    assert shorten(value) == expected


def test_list_names() -> None:
    assert list_names(["a", "b"]) == "a, b"
    assert list_names([str(number) for number in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (and 2 more)"
