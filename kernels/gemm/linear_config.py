"""How a product is cut into programs: the configuration, and a safe default for every shape and architecture."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ..rowwise.activations import ACTIVATIONS

__all__ = [
    "EPILOGUES",
    "GATED",
    "LinearConfig",
    "Operands",
    "default_config",
    "descriptor_tiles",
    "epilogue_passes",
    "part_length",
    "parts_of",
]

GATED = ("silu_gated", "silu_gated_interleaved")
"""The activations that take two weight rows for each column."""

EPILOGUES = (*ACTIVATIONS, *GATED)
"""What ``activation`` may be, besides ``None``."""

Operands = Literal["pointers", "descriptors"]


@dataclass(frozen=True)
class LinearConfig:
    """How a product is cut into programs.

    Block sizes are powers of two, at least 16; ``block_columns`` counts columns of y, so a gated tile multiplies twice as
    many weight rows.  ``split`` > 1 cuts K into that many parts (fewer, if K is short).

    ``operands`` says how blocks of x and W are read: ``"descriptors"`` by the copy engine, where there is one (sm_90 and
    sm_100; in the interpreter always) and :func:`.tiles.descriptors_fit` both matrices, else by pointers as with
    ``"pointers"``.  The bits are the same.

    ``passes`` says in how many passes over its columns a tile's epilogue goes (1, 2 or 4; 0: :func:`epilogue_passes`
    decides).  More of them take fewer registers, and wait for memory more often.

    ``vendor`` hands the product to torch's own library, where :func:`.vendor_product.can_use_vendor_gemm` it; the blocks count
    where it does not.  Only a measurement may set it.

    Raises:
        ValueError: a block that is no power of two of at least 16, another number that cannot be, unknown ``operands``.
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
            raise ValueError(f"blocks are {blocks}; each has to be a power of two of at least 16")
        if min(self.group_rows, self.num_warps, self.num_stages, self.split) < 1:
            raise ValueError(f"{self}: group_rows, num_warps, num_stages and split have to be at least 1")
        if self.passes not in (0, 1, 2, 4):
            raise ValueError(f"passes is {self.passes}; it has to be 0 (chosen for the epilogue), 1, 2 or 4")
        if self.operands not in get_args(Operands):
            raise ValueError(f"operands is {self.operands!r}; known are {', '.join(get_args(Operands))}")


def epilogue_passes(
    config: LinearConfig, activation: str | None, architecture: str, *, residual: bool = False, rotation: bool = False
) -> int:
    """In how many passes the epilogue of a tile goes over the tile's columns.

    Where columns are cut inside a thread (NVIDIA), heavy epilogues take as many as let two programs of 128 × 128 share a
    multiprocessor, and one of 128 × 256 keep its sums in registers.  AMD's tiles are cut by way of shared memory; there
    it is one.
    """
    if config.passes:
        return min(config.passes, config.block_columns // 16)
    if architecture.startswith("gfx"):
        return 1
    if rotation:
        return max(1, min(4, config.block_columns // 32))
    return 2 if (residual or activation == "gelu") and config.block_columns >= 128 else 1


def part_length(inner: int, config: LinearConfig) -> int:
    """Elements of K, whole blocks but for the last part's, in each part into which a split K is cut."""
    blocks = -(-inner // config.block_inner)
    return -(-blocks // config.split) * config.block_inner


def parts_of(inner: int, config: LinearConfig) -> int:
    """Into how many parts a K of ``inner`` is cut: as many as asked for, or fewer where it is short."""
    return -(-inner // part_length(inner, config))


def descriptor_tiles(activation: str | None) -> list[LinearConfig]:
    """Tiles to try in 16-bit floats where there is a copy engine (sm_90, sm_100); none of them spills.

    The widest reads the fewest bytes for each FLOP; of the next, with four warps, two programs share a multiprocessor, and
    one multiplies while the other is in its epilogue; the third has twice the threads for an epilogue; the last is for few
    rows.
    """

    def tile(rows: int, columns: int, warps: int, stages: int) -> LinearConfig:
        # A gated column is two columns of the product.
        columns = columns // 2 if activation in GATED else columns
        return LinearConfig(rows, columns, 64, 8, warps, stages, operands="descriptors")

    return [tile(128, 256, 8, 3), tile(128, 128, 4, 3), tile(128, 128, 8, 3), tile(64, 128, 4, 4)]


# Programs that fill a GPU: two for each multiprocessor or compute unit of the usual part.
_PROGRAMS = {"sm_80": 216, "sm_89": 256, "sm_90": 264, "sm_100": 296, "gfx942": 608, "gfx950": 512}


def _tile(dtype: torch.dtype, activation: str | None, architecture: str, *, few: bool, wide: bool) -> LinearConfig:
    """Blocks, warps and stages: the largest tile whose epilogue does not spill (the erf of ``gelu`` needs the most)."""
    nvidia = architecture.startswith("sm_")
    gated = activation in GATED
    if dtype == torch.float32:
        # True fp32 products run on the ordinary units, whose operands are registers: small tiles.
        columns, inner = (32, 16) if gated else (64, 32)
        return LinearConfig(64, columns, inner, group_rows=8, num_warps=4, num_stages=3 if nvidia else 2)
    if not nvidia:
        columns = 64 if gated else 128
        return LinearConfig(64 if few else 128, columns, 64, group_rows=8, num_warps=4 if few else 8, num_stages=2)
    if architecture in ("sm_80", "sm_89"):
        columns, warps = (64 if gated else 128), (8 if activation == "gelu" and not few else 4)
        return LinearConfig(64 if few else 128, columns, 32, group_rows=8, num_warps=warps, num_stages=3)
    if few:
        return LinearConfig(64, 64 if gated else 128, 64, group_rows=8, num_warps=4, num_stages=4)
    return LinearConfig(128, 256 if wide else 128, 64, group_rows=8, num_warps=8, num_stages=3)


def _split(rows: int, width: int, inner: int, config: LinearConfig, programs: int) -> int:
    """Into how many parts to cut K so that few rows still fill the GPU.

    Depends on the row count only through "at most 64" and "at most 256", so that the bits of a row change as rarely as
    possible with what it is packed with.
    """
    if rows > 256:
        return 1
    tiles = -(-(64 if rows <= 64 else 256) // config.block_rows) * -(-width // config.block_columns)
    # Each part keeps at least 512 of K: a shorter one does not repay its share of the workspace traffic.
    return max(1, min(programs // tiles, inner // 512, 8))


def default_config(
    rows: int,
    columns: int,
    inner: int,
    *,
    dtype: torch.dtype,
    activation: str | None,
    residual: bool = False,
    architecture: str,
) -> LinearConfig:
    """A safe configuration for y ``[rows, columns]`` and K = ``inner``: no spills, and within shared memory.

    The bits of a row can differ between up to 64 rows, up to 256, and more: these take different ``split``.  Pass one
    configuration for all of them where that matters.
    """
    if architecture == "interpreter":
        return LinearConfig(128, 128, 128, group_rows=8, num_warps=4, num_stages=1)
    programs = _PROGRAMS[architecture]
    # The 128 × 256 tile reads less per FLOP, but only large products fill a GPU with it.
    wide = activation not in GATED and rows * columns >= programs * 128 * 256
    config = _tile(dtype, activation, architecture, few=rows <= 64, wide=wide)
    width = 2 * columns if activation in GATED else columns
    return replace(config, split=_split(rows, width, inner, config, programs))
