"""Search space: the configurations of a task on an architecture, in the order in which they are compiled.

The order is by load: work of the busiest multiprocessor, in matrix multiply-adds.  It decides only which configurations are
compiled; what is fastest is measured.  Configurations that cannot work (more shared memory or accumulators than there are)
are left out.

A row's result depends on its own segment and on the configuration, and the configuration depends on the size of the batch.
For attention, norms and the patch projection, the fields that decide the order of a row's sums are therefore the same for
all sizes (:func:`shared_fields`), so an image's embedding does not depend on the rest of the batch.  Other matmuls are the
exception: each number of rows may have another tile, and up to
:data:`~tritontower.kernels.runtime.registry.SPLIT_ROWS` rows their K may be split; such sums differ in the last bits.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tritontower.kernels.attention import attention, fixed_max
from tritontower.kernels.attention.common import split_head_dim
from tritontower.kernels.gemm import patch_projection, qkv_projection
from tritontower.kernels.gemm.linear_config import default_config as linear_default
from tritontower.kernels.rowwise import norm
from tritontower.kernels.runtime.config import SHARED_MEMORY_LIMIT
from tritontower.kernels.runtime.registry import SPLIT_ROWS

from .operations import CONFIGS
from .tasks import Task

Values = dict[str, Any]
"""Fields of a configuration."""

_MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx950": 256,
}
"""Of the usual part of each architecture (A100, L40S, H200, B200, MI300X, MI355X)."""
_HAS_TMA = ("sm_90", "sm_100")
_ACCUMULATORS = 128
"""Largest number of fp32 sums in a thread; the rest of its 255 registers holds operands, addresses and the epilogue."""
_SPLITS = (1, 2, 3, 4, 6, 8)
_MULTIPLY_ADDS_PER_OPERAND = 96
"""Multiply-adds that tensor cores do while the L2 cache delivers one 16-bit operand (about 60 on A100, 120 on H200)."""


def shared_fields(kernel: str, architecture: str) -> tuple[str, ...]:
    """Returns the fields of a kernel's configurations that are the same for all sizes of a launch."""
    if kernel == "rowwise.norm":
        return ("rows", "num_warps")
    if kernel == "gemm.patch_projection":
        return ("block_inner", "split")
    if kernel == "attention.attention":
        # Elsewhere the compiler distributes tiles of different heights differently across lanes.
        layout = () if architecture in ("sm_80", "sm_89", "sm_90", "sm_120") else ("block_queries", "num_warps")
        return ("variant", "block_keys", *layout)
    return ()


def default_values(task: Task, architecture: str) -> Values:
    """Returns the fields of the kernel's default configuration."""
    dtype = getattr(torch, task.dtype)
    options: dict[str, Any] = {"dtype": dtype, "architecture": architecture}
    config: Any
    if task.kernel == "attention.attention":
        bound = task.get("bounded") or None
        config = attention.default_config(
            task.get("head_dim"), dtype, architecture, longest=task.get("longest"), length_bound=bound
        )
    elif task.kernel == "rowwise.norm":
        config = norm.default_config(task.get("width"), architecture)
    elif task.kernel == "gemm.patch_projection":
        config = patch_projection.default_config(**options)
    else:
        shape: Any = task.get("rows"), task.get("columns"), task.get("inner")
        if task.kernel == "gemm.qkv_projection":
            config = qkv_projection.default_config(*shape, **options)
        else:
            config = linear_default(*shape, **options, activation=task.get("activation"))
    return asdict(config)


def list_candidates(task: Task, architecture: str) -> list[Values]:
    """Lists the configurations to try: the default, the vendor GEMM, then the others in the order of their load.

    Candidates of the same kind are spread: two of each value of the shared fields (so that every size has a candidate for
    any value), or one of each tile and way to load it (if one spills, its variants rarely do better) come first.
    """
    default = default_values(task, architecture)
    makers = {"attention.attention": _attention, "rowwise.norm": _norm}
    found = [asdict(CONFIGS[task.kernel](**values)) for values in makers.get(task.kernel, _gemm)(task, architecture)]
    found.sort(key=lambda values: _load(task, architecture, values))
    shared = shared_fields(task.kernel, architecture)
    seen: dict[tuple[Any, ...], int] = {}
    first: list[Values] = []
    rest: list[Values] = []
    for values in found:
        kind = tuple(values.get(name) for name in shared or ("block_rows", "block_columns", "num_warps", "operands"))
        seen[kind] = seen.get(kind, 0) + 1
        (first if seen[kind] <= (2 if shared else 1) else rest).append(values)
    # A vendor GEMM neither rotates nor scales the heads of a projection, and has no gated epilogue.
    vendor = [default | {"vendor": True}] if task.kernel == "gemm.linear" and not task.is_gated else []
    unique = {tuple(sorted(values.items())): values for values in (default, *vendor, *first, *rest)}
    return list(unique.values())


def _gemm(task: Task, architecture: str) -> Iterator[Values]:
    size = _itemsize(task)
    tiles: Sequence[tuple[int, int]] = (
        (128, 256), (256, 128), (128, 128), (64, 256), (64, 128), (128, 64), (64, 64), (16, 128)
    )  # fmt: skip
    depths: Sequence[int] = (32, 64)
    stages: Sequence[int] = (3, 4)
    if size == 4:
        tiles, depths, stages = ((64, 64), (64, 32), (32, 64), (32, 32)), (16, 32), (2, 3)
    elif architecture.startswith("gfx"):
        stages = (2,)
    elif architecture in _HAS_TMA:
        depths = (64, 128)
    # TMA reads rows that start at multiples of 16 bytes; rows of uint8 pixels need not.
    aligned = task.kernel != "gemm.patch_projection" or task.get("pixels") == task.dtype
    operands = ("descriptors", "pointers") if architecture in _HAS_TMA and aligned else ("pointers",)
    splits = (1,) if task.kernel == "gemm.patch_projection" else _SPLITS
    factor = 2 if task.is_gated else 1
    for (rows, columns), depth, stage, warps, read, split in itertools.product(
        tiles, depths, stages, (4, 8), operands, splits
    ):
        memory = stage * (rows + columns) * depth * size
        accumulators = rows * columns / (warps * (64 if architecture.startswith("gfx") else 32))
        if columns // factor < 16 or memory > SHARED_MEMORY_LIMIT[architecture]:
            continue
        # Hopper's and Blackwell's tensor cores take at least 64 rows at a time.
        if rows < 64 and architecture in _HAS_TMA:
            continue
        if not 8 <= accumulators <= _ACCUMULATORS or not _can_split(task, architecture, rows, columns // factor, split):
            continue
        yield {
            "block_rows": rows,
            "block_columns": columns // factor,
            "block_inner": depth,
            "group_rows": 8,
            "num_warps": warps,
            "num_stages": stage,
            "split": split,
            "operands": read,
        }


def _can_split(task: Task, architecture: str, rows: int, columns: int, split: int) -> bool:
    """Returns whether the tiles alone leave multiprocessors idle, and each part keeps enough of K to repay its sums."""
    if split == 1:
        return True
    tiles = -(-task.get("rows") // rows) * -(-task.get("columns") // columns)
    is_idle = tiles * (split - 1) < 2 * _MULTIPROCESSORS[architecture]
    return bool(task.get("rows") <= SPLIT_ROWS and is_idle and task.get("inner") // split >= 256)


def _attention(task: Task, architecture: str) -> Iterator[Values]:
    if _itemsize(task) == 4:
        yield default_values(task, architecture)
        return
    is_nvidia, bound = architecture.startswith("sm_"), task.get("bounded")
    variants = ["online"]
    if architecture in fixed_max.ARCHITECTURES:
        variants.insert(0, "fixed")
    if bound and bound <= 128:
        variants.insert(0, "single_block")
    for variant, queries, keys, warps, stages in itertools.product(
        variants, (128, 64), (128, 64, 32), (4, 8), (2, 3, 1) if is_nvidia else (1,)
    ):
        single_block = variant == "single_block"
        if queries == 64 and warps == 8:
            continue
        # A single block of keys has no loop whose loads could run ahead; all other variants need two stages on NVIDIA.
        if (single_block and (keys < bound or stages > 1)) or (not single_block and stages == 1 and is_nvidia):
            continue
        if bound and queries >= 2 * max(64, bound):
            continue
        if 2 * (queries + 2 * stages * keys) * _head_width(task) <= SHARED_MEMORY_LIMIT[architecture]:
            yield {
                "block_queries": queries,
                "block_keys": keys,
                "num_warps": warps,
                "num_stages": stages,
                "variant": variant,
            }


def _norm(task: Task, architecture: str) -> Iterator[Values]:
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        # From one 16-byte load per thread to as many values as its registers hold.
        if 4 <= rows * task.get("width") / (32 * warps) <= 64:
            yield {"rows": rows, "num_warps": warps}


def _load(task: Task, architecture: str, values: Mapping[str, Any]) -> float:
    """Returns the work of the busiest multiprocessor in multiply-adds, with the padding of partial tiles."""
    if task.kernel == "rowwise.norm":
        return 0.0
    processors = _MULTIPROCESSORS[architecture]
    if task.kernel == "attention.attention":
        length, width = task.get("longest"), _head_width(task)
        queries, keys = values["block_queries"], -(-length // values["block_keys"]) * values["block_keys"]
        programs = max(1, task.get("rows") // length) * task.get("heads") * -(-length // queries)
        work = 2 * width * keys * max(queries, _MULTIPLY_ADDS_PER_OPERAND)
        return float(-(-programs // processors) * work)
    factor, split = 2 if task.is_gated else 1, values["split"]
    rows, columns = values["block_rows"], values["block_columns"]
    programs = -(-task.get("rows") // rows) * -(-task.get("columns") // columns) * split
    work = max(rows * columns * factor, _MULTIPLY_ADDS_PER_OPERAND * (rows + columns * factor))
    load = -(-programs // processors) * work * task.get("inner") / split
    # Each part writes its fp32 sums and reads them again: four 16-bit operands.
    sums = 4 * split * task.get("rows") * task.get("columns") * factor if split > 1 else 0
    return float(load + sums * _MULTIPLY_ADDS_PER_OPERAND / processors)


def _head_width(task: Task) -> int:
    return sum(split_head_dim(task.get("width"), getattr(torch, task.dtype)))


def _itemsize(task: Task) -> int:
    return int(getattr(torch, task.dtype).itemsize)
