"""Registry of tuned launch configurations: the engine fills it once per device, kernels look their launches up.

An entry is a mapping with ``kernel`` (module path under this folder, such as ``"gemm.linear"``), ``dtype``, ``constants``
(widths, activation, …), ``sizes`` (rows, longest segment) and ``config``.  Sizes are compared by buckets of half a power of
two.  If no entry has the bucket of a launch, the nearest entry of the same kernel, dtype and constants applies, up to
:data:`FARTHEST` buckets away; beyond that the next table is tried, then the kernel's default.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

import torch

from .config import get_assumed_device

FARTHEST = 4
"""Largest distance in buckets between an entry and a launch: a factor of four."""

SAME_FOR_ALL_SIZES = ("attention.attention", "rowwise.norm", "gemm.patch_projection")
"""Kernels whose entries share the fields that decide the order of a row's sums.

Two tables may differ in these fields, so the first table with any entry for such a launch applies to every size.
"""

SPLIT_ROWS = 1024
"""Largest rows for which K may be split: the fp32 partial sums of all rows and columns go through a workspace."""

Entry = Mapping[str, Any]
Key = tuple[str, str, tuple[tuple[str, Any], ...], tuple[str, ...]]
Config = TypeVar("Config")


def bucket(size: int) -> int:
    """Rounds ``size`` to a half power of two and returns its number: 4096 → 24, 5793 → 25, 8192 → 26."""
    return round(2 * math.log2(max(1, size)))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class TunedTable:
    """The entries of one table, grouped by kernel, dtype, constants and names of sizes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_key: dict[Key, list[Entry]] = {}
        for entry in entries:
            key = _key(entry["kernel"], entry["dtype"], entry["constants"], entry["sizes"])
            self._by_key.setdefault(key, []).append(entry)

    def nearest(self, kernel: str, dtype: str, constants: Mapping[str, Any], sizes: Mapping[str, int]) -> Entry | None:
        """Returns the entry with the fewest buckets between it and ``sizes``; of two, the larger."""

        def distance(entry: Entry) -> tuple[int, int]:
            steps = [bucket(entry["sizes"][name]) - bucket(size) for name, size in sizes.items()]
            return sum(map(abs, steps)), -sum(steps)

        known = self._by_key.get(_key(kernel, dtype, constants, sizes), [])
        if bucket(sizes.get("rows", 1)) > bucket(SPLIT_ROWS):
            known = [entry for entry in known if entry["config"].get("split", 1) == 1]
        best = min(known, key=distance, default=None)
        if best is None or kernel in SAME_FOR_ALL_SIZES or distance(best)[0] <= FARTHEST:
            return best
        return None


def _key(kernel: str, dtype: str, constants: Mapping[str, Any], sizes: Mapping[str, int]) -> Key:
    return kernel, dtype, tuple(sorted(constants.items())), tuple(sorted(sizes))


_tables: dict[torch.device, Sequence[TunedTable]] = {}
_answers: dict[tuple[Any, ...], Any] = {}


def fill(device: torch.device, tables: Sequence[TunedTable]) -> None:
    """Sets the tables of ``device`` (with its index); the first table with an entry for a launch applies."""
    _tables[device] = tables
    _answers.clear()


def clear() -> None:
    """Removes all tables; kernels then use their defaults."""
    _tables.clear()
    _answers.clear()


def filled_devices() -> list[torch.device]:
    """Lists the devices whose tables were set."""
    return list(_tables)


def lookup(
    kind: type[Config],
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    constants: Mapping[str, object],
    sizes: Mapping[str, int],
) -> Config | None:
    """Returns the tuned configuration of a launch, or ``None``: the kernel's default then applies.

    ``constants`` are fixed by the tower, such as widths.  ``sizes`` vary from batch to batch; only their buckets matter.
    """
    if not _tables or isinstance(assumed := get_assumed_device(device), str):
        return None
    device = assumed
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    question = (
        kernel, device, dtype, tuple(sorted(constants.items())), tuple((n, bucket(s)) for n, s in sizes.items())
    )  # fmt: skip
    if question not in _answers:
        found = (
            table.nearest(kernel, dtype_name(dtype), constants, sizes) for table in _tables.get(device, ())
        )  # fmt: skip
        entry = next((entry for entry in found if entry is not None), None)
        _answers[question] = None if entry is None else make_config(kind, entry["config"])
    answer: Config | None = _answers[question]
    return answer


def make_config(kind: type[Config], values: Mapping[str, Any]) -> Config | None:
    """Returns ``kind(**values)``, or ``None`` if a name or a type does not fit: the entry is from another release."""
    types = get_type_hints(kind)
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if not set(values) <= known or any(not _has_type(value, types[name]) for name, value in values.items()):
        return None
    try:
        return kind(**values)
    except (TypeError, ValueError):
        return None


def _has_type(value: object, wanted: Any) -> bool:
    # Fields that are neither int nor bool are literals of strings.
    return type(value) is wanted if wanted in (int, bool) else isinstance(value, str)
