"""Shared parts of the rowwise kernels: tiles of rows × columns, and cache-sized chunks for the torch references."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..runtime._triton import tl, triton
from ..runtime.checks import ceil_div


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of one program's tile, powers of two, and its warps; none of it changes a bit of the result."""

    rows: int
    columns: int
    num_warps: int

    def grid(self, rows: int, width: int) -> tuple[int]:
        """Programs that cover ``rows × width``."""
        return (ceil_div(rows, self.rows) * ceil_div(width, self.columns),)

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernels."""
        return {"ROWS": self.rows, "COLUMNS": self.columns}


INTERPRETER_TILE = TileConfig(rows=64, columns=2048, num_warps=4)
"""Few, large programs: each is expensive in the interpreter."""


def default_config(architecture: str) -> TileConfig:
    """16 bytes per thread and load (16-bit elements), 256 bytes of each row: most widths are multiples of 128."""
    if architecture == "interpreter":
        return INTERPRETER_TILE
    return TileConfig(rows=16 if architecture.startswith("gfx") else 8, columns=128, num_warps=4)


@triton.jit
def locate_tile(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the rows and columns of this program's tile; neighboring programs own neighboring columns."""
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row_tile = program // column_tiles
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program - row_tile * column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column


def row_chunks(rows: int, width: int, elements: int) -> Iterator[slice]:
    """Cuts ``range(rows)`` into chunks of about ``elements`` elements per thread, which stay in the core's own cache."""
    step = max(1, elements * torch.get_num_threads() // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_index_range(index: torch.Tensor, lowest: int, rows: int, hint: str) -> None:
    """Raises ``ValueError`` for row numbers out of range; on the CPU only, where the check waits for no device."""
    if index.device.type != "cpu" or not index.numel():
        return
    smallest, largest = (int(bound) for bound in index.aminmax())
    if smallest < lowest or largest >= rows:
        wrong = smallest if smallest < lowest else largest
        raise ValueError(f"index must hold {lowest} to {rows - 1}, got {wrong}; {hint}")
