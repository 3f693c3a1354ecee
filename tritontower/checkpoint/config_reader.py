"""Typed reading of a checkpoint's JSON files, above all ``config.json``.

A configuration comes from somebody else.  Nothing in it is believed: a value has the wanted type and lies within the
wanted bounds, or a :class:`~tritontower.errors.ConfigError` says which key holds what and what is allowed.  Keys that
steer loaders into code (``auto_map``, ``_attn_implementation``) do not exist for this reader.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, overload

from tritontower.errors import CheckpointNotFoundError, ConfigError

__all__ = ["REQUIRED", "ConfigReader", "parse_json", "read_json"]

T = TypeVar("T", int, float, str, bool)

_TYPE_NAMES = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false", dict: "an object"}
_IGNORED_PREFIXES = ("auto_map", "attn_implementation", "_attn_implementation")
_ABSENT: Final = object()


class _Required:
    """The type of :data:`REQUIRED`."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
"""The default of a key that has to be there."""


def read_json(path: Path, limit_bytes: int = 64 * 2**20) -> dict[str, Any]:
    """The JSON object in the file ``path``.

    Raises:
        CheckpointNotFoundError: there is no such file, or it cannot be read.
        ConfigError: it is larger than ``limit_bytes``, or not one strict JSON object.
    """
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
    """The JSON object in ``data``: UTF-8 without a byte order mark, no duplicate keys, no NaN or infinity.

    Raises:
        ConfigError: anything else.
    """

    def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ConfigError(duplicate, "given twice", "every key once", source=source)
        return result

    def refuse_constant(text: str) -> None:
        raise ConfigError("", text, "strict JSON, which has no NaN and no infinity", source=source)

    if data.startswith(b"\xef\xbb\xbf"):
        raise ConfigError("", "text with a byte order mark", "UTF-8 without a byte order mark", source=source)
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=object_without_duplicates, parse_constant=refuse_constant
        )
    except ConfigError:
        raise
    except json.JSONDecodeError as error:
        problem = f"not JSON (line {error.lineno}, column {error.colno})"
        raise ConfigError("", problem, "a JSON object", source=source) from error
    except UnicodeDecodeError as error:
        raise ConfigError("", f"not UTF-8 (byte {error.start})", "a JSON object in UTF-8", source=source) from error
    except (RecursionError, ValueError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
        raise ConfigError("", problem, "an ordinary JSON object", source=source) from error
    if not isinstance(value, dict):
        raise ConfigError("", value, "a JSON object", source=source)
    return value


class ConfigReader:
    """Reads typed values out of a parsed JSON object by dotted path.

    Example::

        reader = ConfigReader.from_file(folder / "config.json")
        depth = reader.get(int, "vision_config.depth", minimum=1, maximum=1024)
        eps = reader.get(float, "vision_config.layer_norm_eps", 1e-6, minimum=0.0)

    ``null`` counts as absent: configurations write it for "the default".
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json", *, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(path, values, "a JSON object", source=source)
        self.source = source
        self._values = values
        self._path = path

    @classmethod
    def from_file(cls, path: Path) -> "ConfigReader":
        """The reader of the JSON file ``path``; raises what :func:`read_json` raises."""
        return cls(read_json(path), source=path.name)

    def has(self, key: str) -> bool:
        """Whether ``key`` is there and not ``null``."""
        return self._find(key) is not _ABSENT

    def section(self, key: str, *, optional: bool = False) -> "ConfigReader":
        """The object under ``key`` as a reader of its own; an empty one if it is ``optional`` and absent."""
        value = self._find(key)
        if value is _ABSENT and optional:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, None if value is _ABSENT else value, "an object")
        return ConfigReader(value, self.source, path=self._full(key))

    @overload
    def get(
        self,
        kind: type[T],
        key: str,
        default: T | _Required = REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[T] | None = None,
    ) -> T: ...

    @overload
    def get(
        self,
        kind: type[T],
        key: str,
        default: None,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[T] | None = None,
    ) -> T | None: ...

    def get(
        self,
        kind: type[T],
        key: str,
        default: T | _Required | None = REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[T] | None = None,
    ) -> T | None:
        """The value under ``key`` as ``kind``: ``int``, ``float``, ``str`` or ``bool``.

        ``true`` is not an integer and ``14.0`` is not one either; an integer is a valid ``float``.  ``default`` is
        returned as it is when the key is absent.

        Raises:
            ConfigError: the key is absent and has no default, or its value has another type, lies outside
                ``minimum`` … ``maximum`` (both included), or is none of ``choices``.
        """
        value = self._find(key)
        if value is _ABSENT:
            if isinstance(default, _Required):
                raise self.error(key, None, _allowed(kind, minimum, maximum, choices))
            return default
        return self._checked(kind, key, value, minimum, maximum, choices)

    def get_list(
        self,
        kind: type[T],
        key: str,
        default: Sequence[T] | _Required = REQUIRED,
        *,
        length: int | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        choices: Sequence[T] | None = None,
    ) -> tuple[T, ...]:
        """The list under ``key``, every element checked as in :meth:`get`, and ``length`` of them if that is given."""
        value = self._find(key)
        if value is _ABSENT:
            if isinstance(default, _Required):
                raise self.error(key, None, f"a list, each element {_allowed(kind, minimum, maximum, choices)}")
            return tuple(default)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            size = "" if length is None else f" of {length}"
            raise self.error(key, value, f"a list{size}, each element {_allowed(kind, minimum, maximum, choices)}")
        return tuple(
            self._checked(kind, f"{key}[{position}]", element, minimum, maximum, choices)
            for position, element in enumerate(value)
        )

    def get_rows(
        self,
        kind: type[T],
        key: str,
        default: Sequence[Sequence[T]] | _Required = REQUIRED,
        *,
        length: int,
        minimum: float | None = None,
    ) -> tuple[tuple[T, ...], ...]:
        """The list of lists under ``key``, each of ``length`` elements, every element checked as in :meth:`get`."""
        value = self._find(key)
        if value is _ABSENT and not isinstance(default, _Required):
            return tuple(map(tuple, default))
        each = f"{length}, each element {_allowed(kind, minimum, None, None)}"
        if not isinstance(value, list):
            raise self.error(key, None if value is _ABSENT else value, f"a list of lists of {each}")
        for position, row in enumerate(value):
            if not isinstance(row, list) or len(row) != length:
                raise self.error(f"{key}[{position}]", row, f"a list of {each}")
        return tuple(
            tuple(
                self._checked(kind, f"{key}[{position}][{place}]", element, minimum, None, None)
                for place, element in enumerate(row)
            )
            for position, row in enumerate(value)
        )

    def error(self, key: str, value: object, allowed: str) -> ConfigError:
        """A :class:`ConfigError` about ``key``, for checks that concern several values at once."""
        return ConfigError(self._full(key), value, allowed, source=self.source)

    def _checked(
        self,
        kind: type[T],
        key: str,
        value: object,
        minimum: float | None,
        maximum: float | None,
        choices: Sequence[T] | None,
    ) -> T:
        result = _as_kind(kind, value)
        if result is None:
            raise self.error(key, value, _allowed(kind, minimum, maximum, choices))
        if isinstance(result, (int, float)) and (
            (minimum is not None and result < minimum) or (maximum is not None and result > maximum)
        ):
            raise self.error(key, value, _allowed(kind, minimum, maximum, choices))
        if choices is not None and result not in choices:
            raise self.error(key, value, _allowed(kind, minimum, maximum, choices))
        return result

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _find(self, key: str) -> Any:
        value: Any = self._values
        done: list[str] = []
        for part in key.split("."):
            if not isinstance(value, Mapping):
                raise self.error(".".join(done), value, "an object")
            if part.startswith(_IGNORED_PREFIXES) or value.get(part) is None:
                return _ABSENT
            value = value[part]
            done.append(part)
        return value


def _as_kind(kind: type[T], value: Any) -> T | None:
    """``value`` as ``kind`` without any conversion but integer → float; ``None`` where it is something else."""
    if type(value) is kind:
        return value if not isinstance(value, float) or math.isfinite(value) else None
    if kind is float and type(value) is int and value.bit_length() <= 53:
        return kind(value)
    return None


def _allowed(kind: type[Any], minimum: float | None, maximum: float | None, choices: Sequence[Any] | None) -> str:
    if choices is not None:
        return "one of " + ", ".join(repr(choice) for choice in choices)
    bounds = [f"≥ {minimum}" if minimum is not None else "", f"≤ {maximum}" if maximum is not None else ""]
    return " ".join([_TYPE_NAMES[kind], " and ".join(bound for bound in bounds if bound)]).strip()
