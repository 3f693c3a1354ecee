"""Shapes of the kernel cases: ``small`` for tests in the interpreter, ``cpu`` and ``gpu`` with the towers' shapes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

Grid = Literal["small", "cpu", "gpu"]
GRIDS: tuple[Grid, ...] = ("small", "cpu", "gpu")

_Sized = Iterator[tuple[str, dict[str, Any]]]

_LENGTHS: Mapping[Grid, Mapping[str, list[int]]] = {
    "small": {"70": [70], "5 × 16": [16] * 5, "mixed": [33, 1, 0, 64]},
    "cpu": {"1,024": [1024], "16 × 64": [64] * 16, "mixed": [700, 24, 300]},
    "gpu": {
        "1,024": [1024],
        "4,096": [4096],
        "16,384": [16384],
        "64 × 64": [64] * 64,
        "16 × 256": [256] * 16,
        "mixed": [4096, 64, 1540, 1024, 400, 16, 2304, 576],
    },
}
_HEADS: Mapping[Grid, Sequence[tuple[int, int, int]]] = {
    "small": ((2, 64, 64), (2, 72, 72), (2, 72, 80), (2, 80, 80), (1, 128, 128)),
    "cpu": ((16, 64, 64), (16, 72, 72), (16, 80, 80)),
    "gpu": ((16, 64, 64), (16, 72, 72), (16, 72, 80), (16, 80, 80), (16, 128, 128)),
}
"""Heads, columns of a head, and its width in memory."""
_ROWS: Mapping[Grid, Sequence[int]] = {"small": (70,), "cpu": (1024,), "gpu": (256, 1024, 4096, 16384)}

_LAYERS: Mapping[Grid, Sequence[tuple[str, int, int, str | None, bool]]] = {
    "small": (
        ("plain", 48, 80, None, False),
        ("residual", 40, 96, None, True),
        ("quick GELU", 96, 40, "quick_gelu", False),
        ("tanh GELU", 64, 48, "gelu_tanh", False),
        ("gated SiLU", 36, 64, "silu_gated", False),
    ),
    "cpu": (
        ("attention output", 1280, 1280, None, True),
        ("MLP up, quick GELU", 5120, 1280, "quick_gelu", False),
        ("MLP down", 1280, 5120, None, True),
        ("Qwen2.5-VL MLP up, gated SiLU", 3420, 1280, "silu_gated", False),
    ),
    "gpu": (
        ("QKV", 3840, 1280, None, False),
        ("attention output", 1280, 1280, None, True),
        ("MLP up, quick GELU", 5120, 1280, "quick_gelu", False),
        ("MLP down", 1280, 5120, None, True),
        ("Qwen2.5-VL MLP up, gated SiLU", 3420, 1280, "silu_gated", False),
        ("SigLIP MLP up, tanh GELU", 4304, 1152, "gelu_tanh", False),
        ("SigLIP MLP down", 1152, 4304, None, True),
    ),
}
"""Name, columns of the result, K, activation, residual."""


def _attention_sizes(grid: Grid) -> _Sized:
    for (heads, head_dim, padded), (name, lengths) in itertools.product(_HEADS[grid], _LENGTHS[grid].items()):
        sizes = {"heads": heads, "head_dim": head_dim, "padded": padded, "lengths": lengths}
        shown = f"{head_dim} of {padded}" if padded > head_dim else f"{head_dim}"
        yield f"heads {heads} × {shown}, rows {name}", sizes


def _linear_sizes(grid: Grid) -> _Sized:
    for (name, columns, inner, activation, residual), rows in itertools.product(_LAYERS[grid], _ROWS[grid]):
        sizes = {"rows": rows, "columns": columns, "inner": inner, "activation": activation, "residual": residual}
        yield f"{name}, {rows:,} × {columns:,} × {inner:,}", sizes


def _qkv_sizes(grid: Grid) -> _Sized:
    shapes = ((2, 16, 48),) if grid == "small" else ((16, 80, 1280), (16, 72, 1152))
    for (heads, head_dim, inner), rows in itertools.product(shapes, _ROWS[grid]):
        sizes = {"rows": rows, "heads": heads, "head_dim": head_dim, "inner": inner}
        yield f"heads {heads} × {head_dim}, {rows:,} rows", sizes


def _patch_sizes(grid: Grid) -> _Sized:
    shapes = ((48, 40),) if grid == "small" else ((588, 1280), (588, 1152))
    for (inner, columns), rows, pixels in itertools.product(shapes, _ROWS[grid], ("float32", "uint8")):
        sizes = {"rows": rows, "columns": columns, "inner": inner, "pixels": pixels}
        yield f"{pixels} pixels, {rows:,} × {columns:,} × {inner:,}", sizes


def _norm_sizes(grid: Grid) -> _Sized:
    widths = (48, 80) if grid == "small" else (1152, 1280)
    for width, rows, residual in itertools.product(widths, _ROWS[grid], (False, True)):
        for kind in ("layer_norm", "rms_norm"):
            added = " and residual" if residual else ""
            sizes = {"rows": rows, "width": width, "kind": kind, "residual": residual}
            yield f"{kind}{added}, {rows:,} × {width:,}", sizes


def _rope_sizes(grid: Grid) -> _Sized:
    heads = 2 if grid == "small" else 16
    for head_dim, rows in itertools.product((72, 80), _ROWS[grid]):
        yield f"heads {heads} × {head_dim}, {rows:,} rows", {"rows": rows, "heads": heads, "head_dim": head_dim}


def _gather_sizes(grid: Grid) -> _Sized:
    widths = (72,) if grid == "small" else (1280, 5120)
    for width, rows, taps in itertools.product(widths, _ROWS[grid], (1, 4)):
        yield f"{taps} of each {rows:,} rows of {width:,}", {"rows": rows, "width": width, "taps": taps}


SIZES: Mapping[str, Callable[[Grid], _Sized]] = {
    "attention": _attention_sizes,
    "linear": _linear_sizes,
    "qkv_projection": _qkv_sizes,
    "patch_projection": _patch_sizes,
    "norm": _norm_sizes,
    "rope": _rope_sizes,
    "gather": _gather_sizes,
}
"""Operation → label and sizes of each of its cases in a grid."""
