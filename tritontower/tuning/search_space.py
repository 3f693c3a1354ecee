"""What may be tried: the configurations of a task on an architecture, the likeliest first.

The order is that of the model (:mod:`.predict`), fed with a guess of what each will compile to; it decides only which are
compiled at all.  Configurations that cannot work (more shared memory than there is, more accumulators than registers) are
left out.

A row's numbers depend on its own segment and on the configuration; and the configuration on the size of the pass.  Where
fields decide in which order a row's sums are taken, attention, norms and the patch projection have them in common for all
sizes (:func:`uniform`), so there an image's numbers do not depend on what it is packed with.  Other products are the
exception: each number of rows may have another tile, and up to :data:`~tritontower.kernels.runtime.registry.SPLIT_ROWS` rows their K
may be cut, in another number of parts for another number of rows; sums of parts differ from whole ones in the last bits.
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
from .predict import CHIPS, Compiled, Prediction, attention_time, product_time, rows_time
from .tasks import Task

__all__ = ["candidates", "default_fields", "guess", "predict", "prediction", "uniform"]

Fields = dict[str, Any]

_PRODUCTS = ("gemm.linear", "gemm.patch_projection", "gemm.qkv_projection")
_COPY_ENGINE = ("sm_90", "sm_100")
_ACCUMULATORS = 128
"""fp32 sums that a thread may hold; the rest of its 255 registers is for operands, addresses and the epilogue."""
_SPLITS = (1, 2, 3, 4, 6, 8)


def uniform(kernel: str, architecture: str) -> tuple[str, ...]:
    """The fields of a kernel's configurations that all sizes of a task have in common."""
    if kernel == "rowwise.norm":
        return ("rows", "num_warps")
    if kernel == "gemm.patch_projection":
        return ("block_inner", "split")
    if kernel == "attention.attention":
        # Where the compiler lays the tiles of different heights out differently across lanes, these count as well.
        layout = () if architecture in ("sm_80", "sm_89", "sm_90") else ("block_queries", "num_warps")
        return ("variant", "block_keys", *layout)
    return ()


def default_fields(task: Task, architecture: str) -> Fields:
    """The fields of the configuration that is taken where no table has any."""
    dtype = getattr(torch, task.dtype)
    config: Any
    if task.kernel == "attention.attention":
        config = attention.default_config(
            task.fact("head_dim"),
            dtype,
            architecture,
            longest=task.fact("longest"),
            length_bound=task.fact("bounded") or None,
        )
    elif task.kernel == "rowwise.norm":
        config = norm.default_config(task.fact("width"), architecture)
    elif task.kernel == "gemm.patch_projection":
        config = patch_projection.default_config(dtype=dtype, architecture=architecture)
    elif task.kernel == "gemm.qkv_projection":
        config = qkv_projection.default_config(
            task.fact("rows"), task.fact("columns"), task.fact("inner"), dtype=dtype, architecture=architecture
        )
    else:
        config = linear_default(
            task.fact("rows"),
            task.fact("columns"),
            task.fact("inner"),
            dtype=dtype,
            activation=task.fact("activation"),
            residual=task.fact("residual"),
            architecture=architecture,
        )
    return asdict(config)


def candidates(task: Task, architecture: str, *, measured: bool = False) -> list[Fields]:
    """The configurations to try, the likeliest first.

    Args:
        task: what is tuned.
        architecture: for which chips.
        measured: whether each will be checked and timed on the GPU itself; only then those are listed that nothing but
            that can vouch for: the vendor's own product, and the specialized variant of attention.
    """
    makers = {"attention.attention": _attention, "rowwise.norm": _norm}
    kind = CONFIGS[task.kernel]
    found = [
        asdict(kind(**fields))
        for fields in makers.get(task.kernel, _product)(task, architecture)
        if measured or fields.get("variant") != "specialized"
    ]
    ranked = sorted(found, key=lambda fields: predict(task, architecture, fields, guess(task, architecture, fields)))
    # (The library neither rotates nor scales the heads of a projection, one of which a tower always asks for.)
    if measured and task.kernel == "gemm.linear" and "gated" not in str(task.fact("activation")):
        ranked.append(default_fields(task, architecture) | {"vendor": True})
    return ranked


# -- spaces -----------------------------------------------------------------------------------------------------------


def _product(task: Task, architecture: str) -> Iterator[Fields]:
    factors, size = _factors(task), _itemsize(task)
    tiles: Sequence[tuple[int, int]] = (
        (128, 256), (256, 128), (128, 128), (64, 256), (64, 128), (128, 64), (64, 64), (16, 128)
    )  # fmt: skip
    depths, stages = (32, 64), (3, 4)
    if size == 4:
        tiles, depths, stages = ((64, 64), (64, 32), (32, 64), (32, 32)), (16, 32), (2, 3)
    elif architecture.startswith("gfx"):
        stages = (2, 2)
    elif architecture in _COPY_ENGINE:
        depths = (64, 128)
    operands = ("pointers", "descriptors") if architecture in _COPY_ENGINE and _aligned(task) else ("pointers",)
    splits = (1,) if task.kernel == "gemm.patch_projection" else _SPLITS
    for (rows, columns), depth, stage, warp, read, split in itertools.product(
        tiles, depths, sorted(set(stages)), (4, 8), operands, splits
    ):
        memory = stage * (rows + columns) * depth * size
        held = rows * columns / (warp * CHIPS[architecture].warp)
        if columns // factors < 16 or memory > SHARED_MEMORY_LIMIT[architecture] or not 8 <= held <= _ACCUMULATORS:
            continue
        if split > 1 and not _worth_splitting(task, architecture, rows, columns // factors, split):
            continue
        if architecture in _COPY_ENGINE and rows < 64:
            # Its tensor cores take at least 64 rows at a time.
            continue
        yield {
            "block_rows": rows,
            "block_columns": columns // factors,
            "block_inner": depth,
            "group_rows": 8,
            "num_warps": warp,
            "num_stages": stage,
            "split": split,
            "operands": read,
        }


def _worth_splitting(task: Task, architecture: str, rows: int, columns: int, split: int) -> bool:
    """Whether the tiles alone leave multiprocessors idle, and each part keeps enough of K to repay its sums."""
    if task.fact("rows") > SPLIT_ROWS:
        return False
    tiles = -(-task.fact("rows") // rows) * -(-task.fact("columns") // columns)
    return bool(tiles * (split - 1) < 2 * CHIPS[architecture].multiprocessors and task.fact("inner") // split >= 256)


def _attention(task: Task, architecture: str) -> Iterator[Fields]:
    if _itemsize(task) == 4:
        yield default_fields(task, architecture)
        return
    nvidia, bound = architecture.startswith("sm_"), task.fact("bounded")
    variants = ["online"]
    if architecture in fixed_max.ARCHITECTURES:
        variants.append("fixed")
    if bound and bound <= 128:
        variants.append("single_block")
    if architecture == "sm_90":
        variants.append("specialized")
    for variant, queries, keys, warps, stages in itertools.product(
        variants, (64, 128), (32, 64, 128), (4, 8), (1, 2, 3) if nvidia else (1,)
    ):
        if queries == 64 and warps == 8:
            continue
        if variant == "specialized" and (queries, warps) != (128, 4):
            continue
        if variant == "single_block" and (keys < bound or stages > 1):
            # All keys are one block: there is no loop whose loads could run ahead.
            continue
        if variant != "single_block" and stages == 1 and nvidia:
            continue
        if bound and queries >= 2 * max(64, bound):
            continue
        width = sum(split_head_dim(task.fact("width"), getattr(torch, task.dtype)))
        memory = 2 * (queries + 2 * stages * keys) * width
        if memory > SHARED_MEMORY_LIMIT[architecture]:
            continue
        yield {
            "block_queries": queries,
            "block_keys": keys,
            "num_warps": warps,
            "num_stages": stages,
            "variant": variant,
        }


def _norm(task: Task, architecture: str) -> Iterator[Fields]:
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        # Values of a thread: from one 16-byte load to what registers hold easily.
        if 4 <= rows * task.fact("width") / (32 * warps) <= 64:
            yield {"rows": rows, "num_warps": warps}


# -- figures ----------------------------------------------------------------------------------------------------------


def predict(task: Task, architecture: str, fields: Mapping[str, Any], compiled: Compiled) -> float:
    """The predicted microseconds of one launch."""
    return prediction(task, architecture, fields, compiled).microseconds


def prediction(task: Task, architecture: str, fields: Mapping[str, Any], compiled: Compiled) -> Prediction:
    """What one launch should take."""
    size = _itemsize(task)
    if task.kernel == "attention.attention":
        return attention_time(
            architecture,
            compiled,
            rows=task.fact("rows"),
            length=task.fact("longest"),
            heads=task.fact("heads"),
            head_dim=task.fact("head_dim"),
            computed_dim=sum(split_head_dim(task.fact("width"), getattr(torch, task.dtype))),
            block_queries=fields["block_queries"],
            block_keys=fields["block_keys"],
            itemsize=size,
        )
    if task.kernel == "rowwise.norm":
        return rows_time(
            architecture,
            compiled,
            rows=task.fact("rows"),
            width=task.fact("width"),
            block_rows=fields["rows"],
            itemsize=size,
            streams=4 if task.fact("residual") else 2,
        )
    return product_time(
        architecture,
        compiled,
        rows=task.fact("rows"),
        columns=task.fact("columns"),
        inner=task.fact("inner"),
        block_rows=fields["block_rows"],
        block_columns=fields["block_columns"],
        block_inner=fields["block_inner"],
        factors=_factors(task),
        itemsize=size,
        split=fields.get("split", 1),
        residual=bool(dict(task.constants).get("residual")),
    )


def guess(task: Task, architecture: str, fields: Mapping[str, Any]) -> Compiled:
    """What a configuration should compile to, by what others did."""
    chip = CHIPS[architecture]
    threads = fields["num_warps"] * chip.warp
    if task.kernel == "rowwise.norm":
        held = fields["rows"] * task.fact("width") / threads
        return Compiled(threads, threads, max(1, 2048 // threads), 0, 60 + 12 * held)
    if task.kernel == "attention.attention":
        queries, keys = fields["block_queries"], fields["block_keys"]
        width = sum(split_head_dim(task.fact("width"), getattr(torch, task.dtype)))
        per_score = 4.3 + 1.3 * width / keys if fields["variant"] == "fixed" else 5.9 + 2.2 * width / keys
        memory = 2 * (queries + 2 * fields["num_stages"] * keys) * width
        held = queries * (width + keys) / threads + 60
        return Compiled(
            threads, threads, _fitting(architecture, threads, held, memory), per_score * queries * keys / threads, 600
        )
    factors = _factors(task)
    tile = fields["block_rows"] + fields["block_columns"] * factors
    memory = fields["num_stages"] * tile * fields["block_inner"] * _itemsize(task)
    held = fields["block_rows"] * fields["block_columns"] * factors / threads
    copies = 0.0
    if fields.get("operands") != "descriptors":
        copies = 3.0 * tile * fields["block_inner"] * _itemsize(task) / 16 / threads
    return Compiled(threads, threads, _fitting(architecture, threads, held + 70, memory), 50 + copies, 200 + 10 * held)


def _fitting(architecture: str, threads: int, registers: float, memory: int) -> int:
    per_processor = 65536 * (4 if architecture.startswith("gfx") else 1)
    by_registers = int(per_processor // (threads * min(255.0, registers)))
    return max(1, min(by_registers, SHARED_MEMORY_LIMIT[architecture] // max(1, memory)))


def _factors(task: Task) -> int:
    activation = dict(task.constants).get("activation")
    return 2 if activation is not None and "gated" in activation else 1


def _itemsize(task: Task) -> int:
    return int(torch.empty(0, dtype=getattr(torch, task.dtype)).element_size())


def _aligned(task: Task) -> bool:
    """Whether rows of the operands start where the copy engine can read: 16 bytes, padding included."""
    return task.kernel != "gemm.patch_projection" or task.fact("pixels") == task.dtype
