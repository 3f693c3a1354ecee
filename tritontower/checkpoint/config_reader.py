"""Typed reading of a checkpoint's JSON files, above all ``config.json``.

Configurations are untrusted input.  Every value must have the requested type and bounds, or a
:class:`~tritontower.errors.ConfigError` names the key, the value and what is allowed.  Keys that make loaders run code
(``auto_map``, ``_attn_implementation``) are ignored.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Generic, TypeVar

from tritontower.errors import CheckpointNotFoundError, ConfigError

T = TypeVar("T", int, float, str, bool)
D = TypeVar("D")

_TYPE_NAMES = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", dict: "an object"}
_BLOCKS, _SIDE, _WIDTH = 1024, 4096, 65_536
LARGEST_INTEGERS = {
    **dict.fromkeys(("depth", "num_hidden_layers", "num_heads", "num_attention_heads"), _BLOCKS),
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes", "pan_and_scan_max_num_crops"), _BLOCKS),
    **dict.fromkeys(("patch_size", "temporal_patch_size", "spatial_merge_size", "window_size", "head_dim"), _SIDE),
    **dict.fromkeys(("num_channels", "in_channels", "mlp_ratio", "tokens_per_second"), _SIDE),
    **dict.fromkeys(("hidden_size", "out_hidden_size", "embed_dim", "dim", "projection_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "image_size", "max_image_size", "mm_tokens_per_image"), _WIDTH),
    "num_position_embeddings": _SIDE**2,
}
"""Key → the largest integer that a tower may have there, far above any published one; others may have 10¹²."""
_LARGEST_INTEGER = 10**12
_LONGEST_LIST = 1024
_IGNORED_PREFIXES = ("auto_map", "attn_implementation", "_attn_implementation")


def read_json(path: Path, limit_bytes: int = 2 * 2**20) -> dict[str, Any]:
    """Reads the JSON object in the file ``path``, which may have ``limit_bytes``."""
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path} does not exist or is not a file")
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise CheckpointNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise ConfigError("", data, f"at most {limit_bytes} bytes", source=str(path))
    return parse_json(data, source=str(path))


def parse_json(data: bytes, *, source: str) -> dict[str, Any]:
    """Parses a JSON object: UTF-8 without a byte order mark, no duplicate keys, no NaN or infinity."""

    def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ConfigError(duplicate, "given twice", "every key once", source=source)
        return result

    def reject_constant(text: str) -> None:
        raise ConfigError("", text, "strict JSON, which has no NaN and no infinity", source=source)

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=object_without_duplicates, parse_constant=reject_constant
        )
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:
        raise ConfigError("", _describe_problem(error), "a JSON object", source=source) from error
    if not isinstance(value, dict):
        raise ConfigError("", value, "a JSON object", source=source)
    return value


def _describe_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON (line {error.lineno}, column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


class ConfigReader:
    """Reads typed values from a parsed JSON object by dotted path.

    Example::

        reader = ConfigReader.from_file(folder / "config.json")
        depth = reader.get(int, "vision_config.depth", minimum=1, maximum=1024)
        eps = reader.get(float, "vision_config.layer_norm_eps", 1e-6, minimum=0.0)

    ``null`` counts as absent: in configurations it means "the default".  A key without a default (``...``) is required.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json", *, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(path, values, "a JSON object", source=source)
        self.source = source
        self._values = values
        self._path = path

    @classmethod
    def from_file(cls, path: Path) -> "ConfigReader":
        """Opens the JSON file ``path``."""
        return cls(read_json(path), source=path.name)

    def has(self, key: str) -> bool:
        """Tells if ``key`` is present and not ``null``."""
        return self._find(key) is not None

    def section(self, key: str, *, optional: bool = False) -> "ConfigReader":
        """Returns a reader of the object under ``key``; an empty one if it is ``optional`` and absent."""
        value = self._find(key)
        if value is None and optional:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return ConfigReader(value, self.source, path=self._full(key))

    def get(
        self,
        kind: type[T],
        key: str,
        default: D | EllipsisType = ...,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[T] | None = None,
    ) -> T | D:
        """Returns the value under ``key`` as ``kind``: ``int``, ``float``, ``str`` or ``bool``.

        ``true`` and ``14.0`` are not integers; an integer is a valid ``float``.  ``default`` is returned unchecked if the
        key is absent.  Bounds are included; without ``maximum`` that of an integer is in :data:`LARGEST_INTEGERS`.
        """
        value = self._find(key)
        if value is None and not isinstance(default, EllipsisType):
            return default
        return self._check(key, value, _Rule(kind, minimum, _bound(kind, key, maximum), choices))

    def get_list(
        self,
        kind: type[T],
        key: str,
        default: Sequence[T] | EllipsisType = ...,
        *,
        length: int | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> tuple[T, ...]:
        """Returns the list under ``key`` with ``length`` elements, each checked as in :meth:`get`."""
        value = self._find(key)
        if value is None and not isinstance(default, EllipsisType):
            return tuple(default)
        return self._check_list(key, value, _Rule(kind, minimum, _bound(kind, key, maximum)), length)

    def get_rows(
        self,
        kind: type[T],
        key: str,
        default: Sequence[Sequence[T]] | EllipsisType = ...,
        *,
        length: int,
        minimum: float | None = None,
    ) -> tuple[tuple[T, ...], ...]:
        """Returns the list of lists of ``length`` elements under ``key``, each element checked as in :meth:`get`."""
        value, rule = self._find(key), _Rule(kind, minimum, _bound(kind, key, None))
        if value is None and not isinstance(default, EllipsisType):
            return tuple(map(tuple, default))
        if not isinstance(value, list) or len(value) > _LONGEST_LIST:
            allowed = f"a list of at most {_LONGEST_LIST} lists of {length}, each element {rule.describe()}"
            raise self.error(key, value, allowed)
        return tuple(self._check_list(f"{key}[{index}]", row, rule, length) for index, row in enumerate(value))

    def error(self, key: str, value: object, allowed: str) -> ConfigError:
        """Makes a :class:`ConfigError` about ``key``, for checks of several values together."""
        return ConfigError(self._full(key), value, allowed, source=self.source)

    def _check(self, key: str, value: object, rule: "_Rule[T]") -> T:
        result = rule.convert(value)
        if result is None:
            raise self.error(key, value, rule.describe())
        return result

    def _check_list(self, key: str, value: object, rule: "_Rule[T]", length: int | None) -> tuple[T, ...]:
        if not isinstance(value, list) or length not in (None, len(value)) or len(value) > _LONGEST_LIST:
            size = f" of at most {_LONGEST_LIST}" if length is None else f" of {length}"
            raise self.error(key, value, f"a list{size}, each element {rule.describe()}")
        return tuple(self._check(f"{key}[{index}]", element, rule) for index, element in enumerate(value))

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _find(self, key: str) -> Any:
        value: Any = self._values
        done: list[str] = []
        for part in key.split("."):
            if not isinstance(value, Mapping):
                raise self.error(".".join(done), value, "an object")
            if part.startswith(_IGNORED_PREFIXES) or value.get(part) is None:
                return None
            value = value[part]
            done.append(part)
        return value


def _bound(kind: type, key: str, maximum: float | None) -> float | None:
    if kind is not int or maximum is not None:
        return maximum
    return LARGEST_INTEGERS.get(key.rpartition(".")[2], _LARGEST_INTEGER)


@dataclass(frozen=True)
class _Rule(Generic[T]):
    """Type, bounds and choices of a value."""

    kind: type[T]
    minimum: float | None = None
    maximum: float | None = None
    choices: Sequence[T] | None = None

    def convert(self, value: Any) -> T | None:
        """Returns ``value`` as ``kind``, converting only integers to float; ``None`` if it is not allowed."""
        if self.kind is float and type(value) is int and value.bit_length() <= 53:
            value = float(value)
        if type(value) is not self.kind or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if isinstance(value, (int, float)) and (
            (self.minimum is not None and value < self.minimum) or (self.maximum is not None and value > self.maximum)
        ):
            return None
        return value if self.choices is None or value in self.choices else None

    def describe(self) -> str:
        """States what is allowed."""
        if self.choices is not None:
            return "one of " + ", ".join(map(repr, self.choices))
        bounds = [f"≥ {self.minimum}"] if self.minimum is not None else []
        bounds += [f"≤ {self.maximum}"] if self.maximum is not None else []
        return " ".join([_TYPE_NAMES[self.kind], " and ".join(bounds)]).strip()
