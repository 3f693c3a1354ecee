"""Launch configurations of the matmuls, with a safe default for every shape and architecture."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..rowwise.activations import ACTIVATIONS
from ..runtime.checks import ceil_div

GATED = ("silu_gated", "silu_gated_interleaved")
"""Activations with two weight rows for each column: stacked as ``[gate; up]``, or alternating."""

EPILOGUES = (*ACTIVATIONS, *GATED)
"""Allowed values of ``activation``, besides ``None``."""

Operands = Literal["pointers", "descriptors"]


@dataclass(frozen=True)
class LinearConfig:
    """Launch configuration of a matmul.

    Block sizes are powers of two, at least 16.  ``block_columns`` counts columns of y, so a gated tile multiplies twice as
    many weight rows.  ``split`` > 1 splits K into that many parts (fewer, if K is short).

    ``operands`` selects how blocks of x and W are read: ``"descriptors"`` by the copy engine, if there is one (sm_90 and
    sm_100; in the interpreter always) and :func:`.tiles.can_use_descriptors` accepts both matrices, else by pointers.  The
    bits are the same.

    ``passes`` is the number of parts in which the epilogue processes a tile's columns (1, 2 or 4; 0:
    :func:`epilogue_passes` decides).  More parts need fewer registers, and wait for memory more often.

    ``vendor`` selects torch's own library where :func:`.vendor.can_use_vendor_gemm`; elsewhere the blocks apply.  Only a
    measurement may set it.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    group_rows: int
    num_warps: int
    num_stages: int
    split: int = 1
    operands: Operands = "pointers"
    passes: int = 0
    vendor: bool = False

    def __post_init__(self) -> None:
        blocks = (self.block_rows, self.block_columns, self.block_inner)
        if any(block < 16 or block & (block - 1) for block in blocks):
            raise ValueError(f"blocks must be powers of two of at least 16, got {blocks}")
        if min(self.group_rows, self.num_warps, self.num_stages, self.split) < 1:
            raise ValueError(f"group_rows, num_warps, num_stages and split must be at least 1, got {self}")
        if self.passes not in (0, 1, 2, 4):
            raise ValueError(f"passes must be 0 (selected for the epilogue), 1, 2 or 4, got {self.passes}")
        if self.operands not in get_args(Operands):
            raise ValueError(f"operands must be one of {', '.join(get_args(Operands))}, got {self.operands!r}")


def epilogue_passes(
    config: LinearConfig, activation: str | None, architecture: str, *, residual: bool = False, rotation: bool = False
) -> int:
    """Number of parts in which the epilogue processes a tile's columns.

    On NVIDIA, where columns are split within a thread, heavy epilogues use as many parts as let two programs of 128 × 128
    share a multiprocessor, and one of 128 × 256 keep its sums in registers.  On AMD a split goes through shared memory, so
    it is one part.
    """
    if config.passes:
        return min(config.passes, config.block_columns // 16)
    if architecture.startswith("gfx"):
        return 1
    if rotation:
        return max(1, min(4, config.block_columns // 32))
    return 2 if (residual or activation == "gelu") and config.block_columns >= 128 else 1


def part_length(inner: int, config: LinearConfig) -> int:
    """Elements of K in each part of a split K: whole blocks, except in the last part."""
    return ceil_div(ceil_div(inner, config.block_inner), config.split) * config.block_inner


def count_parts(inner: int, config: LinearConfig) -> int:
    """Number of parts of a K of ``inner``: ``split``, or fewer if K is short."""
    return ceil_div(inner, part_length(inner, config))


# Programs that fill a GPU: two for each multiprocessor or compute unit of the usual model.
_PROGRAMS = {"sm_80": 216, "sm_89": 256, "sm_90": 264, "sm_100": 296, "sm_120": 340, "gfx942": 608, "gfx950": 512}


def _tile(dtype: torch.dtype, activation: str | None, architecture: str, *, few: bool, wide: bool) -> LinearConfig:
    # The largest tile whose epilogue does not spill (the erf of ``gelu`` needs the most registers).
    nvidia = architecture.startswith("sm_")
    gated = activation in GATED
    if dtype == torch.float32:
        # True fp32 runs on the ordinary units, whose operands are registers: small tiles.
        columns, inner = (32, 16) if gated else (64, 32)
        return LinearConfig(64, columns, inner, group_rows=8, num_warps=4, num_stages=3 if nvidia else 2)
    if not nvidia:
        columns = 64 if gated else 128
        return LinearConfig(64 if few else 128, columns, 64, group_rows=8, num_warps=4 if few else 8, num_stages=2)
    if architecture in ("sm_80", "sm_89", "sm_120"):
        columns, warps = (64 if gated else 128), (8 if activation == "gelu" and not few else 4)
        return LinearConfig(64 if few else 128, columns, 32, group_rows=8, num_warps=warps, num_stages=3)
    if few:
        return LinearConfig(64, 64 if gated else 128, 64, group_rows=8, num_warps=4, num_stages=4)
    return LinearConfig(128, 256 if wide else 128, 64, group_rows=8, num_warps=8, num_stages=3)


def _split(rows: int, width: int, inner: int, config: LinearConfig, programs: int) -> int:
    # Splits K so that few rows also fill the GPU.  Depends on the row count only by "at most 64" and "at most 256", so that
    # the bits of a row depend as little as possible on the rest of its batch.
    if rows > 256:
        return 1
    tiles = ceil_div(64 if rows <= 64 else 256, config.block_rows) * ceil_div(width, config.block_columns)
    # Each part has at least 512 of K: a shorter one does not repay its share of the workspace traffic.
    return max(1, min(programs // tiles, inner // 512, 8))


def default_config(
    rows: int,
    columns: int,
    inner: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    architecture: str,
) -> LinearConfig:
    """A safe configuration for y ``[rows, columns]`` and K = ``inner``: no spills, and within shared memory.

    The bits of a row can differ between up to 64 rows, up to 256, and more, which use different ``split``.
    """
    if architecture == "interpreter":
        return LinearConfig(128, 128, 128, group_rows=8, num_warps=4, num_stages=1)
    programs = _PROGRAMS[architecture]
    # The 128 × 256 tile reads less per FLOP, but only large matrices fill a GPU with it, and the erf of ``gelu`` spills.
    wide = activation not in (*GATED, "gelu") and rows * columns >= programs * 128 * 256
    config = _tile(dtype, activation, architecture, few=rows <= 64, wide=wide)
    width = 2 * columns if activation in GATED else columns
    return replace(config, split=_split(rows, width, inner, config, programs))
