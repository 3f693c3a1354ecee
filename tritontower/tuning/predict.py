"""What a launch should cost on a chip that is not here: a model of where its time goes, fed with what it compiled to.

A model to *rank* configurations with, good to some 15 % where it was held against published figures (Triton's own tutorial
attention and FlashAttention-3 on the H100, arXiv 2407.08608) and unproven elsewhere.  Its figures are predictions and are
marked so wherever they are stored or printed.

Products (``linear`` and its variants).  A program works through K in steps; the time of a step on one multiprocessor is the
largest of

* tensor cores: 2 · rows · columns · depth operations at 92 % of the dense 16-bit rate (the data sheet's);
* issue: instructions of the loop × warps ÷ 4 a clock;
* operands: bytes of both tiles from the second-level cache at its share per multiprocessor.

Then comes what is not overlapped: filling the pipeline, the instructions outside the loop and the stores, halved where
two programs share a multiprocessor.  A lone group of four warps feeds the tensor cores at 80 %.

Attention.  For each score, the products (4 · head columns operations, padding included) *and*, not overlapped with them,
the larger of its exponential (16 a clock on a multiprocessor) and 1.5 × its issue slots.  That no kernel hides one
behind the other is what the published figures say: the sum predicts FlashAttention-3 within 5 % at head dims 64 and 128.
Where few query rows share a block of keys, the second-level cache bounds it instead.

Both: programs go to multiprocessors in waves, so the time is that of the multiprocessor with the most programs; nothing
is faster than its compulsory bytes from memory; a launch takes 2 µs to begin and end.
"""

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "Compiled", "Prediction", "attention_time", "product_time", "rows_time"]


@dataclass(frozen=True)
class Chip:
    """One representative of an architecture, by its data sheet; rates per clock and multiprocessor."""

    name: str
    multiprocessors: int
    clock: float
    """Sustained, Hz."""
    tensor: int
    """Dense 16-bit operations (two per multiply–add)."""
    scalar: int
    """fp32 operations outside the tensor cores."""
    exponentials: int
    cache: float
    """Bytes per second from the second-level cache, whole chip."""
    memory: float
    """Bytes per second from memory."""
    warp: int = 32

    @property
    def peak(self) -> float:
        """Dense 16-bit operations per second at the sustained clock."""
        return self.multiprocessors * self.clock * self.tensor


CHIPS = {
    "sm_80": Chip("A100 80GB", 108, 1.41e9, 2048, 128, 16, 4.5e12, 1.94e12),
    "sm_89": Chip("L40S", 142, 2.2e9, 1024, 256, 16, 4.5e12, 0.86e12),
    "sm_90": Chip("H200", 132, 1.755e9, 4096, 256, 16, 8e12, 4.3e12),
    "sm_100": Chip("B200", 148, 1.85e9, 8192, 256, 16, 12e12, 7.2e12),
    "gfx942": Chip("MI300X", 304, 1.9e9, 2048, 256, 16, 8e12, 4.3e12, 64),
    "gfx950": Chip("MI355X", 256, 2.2e9, 4096, 256, 16, 10e12, 6.5e12, 64),
}
"""Operations are those of the data sheets; the bandwidths of the caches are estimates (that of the H200 from what large
products reach there), those of memory what copies reach, some nine tenths of the data sheets'."""

_TENSOR_SHARE = 0.92
_LONE_GROUP = 0.8
_LAUNCH = 2e-6
_KEPT = 24e6
"""Bytes that the second-level cache keeps from one launch to the next, with what else passes through it."""
_FILL = 1200.0
"""Clocks from a program's start to its first product: the way from memory."""


@dataclass(frozen=True)
class Compiled:
    """What the machine code says, or is expected to say before there is any."""

    threads: int
    """Of one program, producers of data included."""
    working: int
    """Threads among them that compute."""
    occupancy: int
    """Programs that fit one multiprocessor."""
    loop_instructions: float
    """Instructions of the hot loop, per warp that computes."""
    other_instructions: float = 0.0
    """Instructions outside it, per warp."""


@dataclass(frozen=True)
class Prediction:
    """A predicted time, and the useful operations that it amounts to."""

    microseconds: float
    tflops: float


def product_time(
    architecture: str,
    compiled: Compiled,
    *,
    rows: int,
    columns: int,
    inner: int,
    block_rows: int,
    block_columns: int,
    block_inner: int,
    factors: int = 1,
    itemsize: int = 2,
    split: int = 1,
    residual: bool = False,
) -> Prediction:
    """``rows × columns`` results of products over ``inner``; ``factors``: matrices multiplied at once (2 where gated)."""
    chip = CHIPS[architecture]
    rate = chip.tensor * _TENSOR_SHARE if itemsize < 4 else float(chip.scalar)
    warps = compiled.working / chip.warp
    tensor = 2.0 * block_rows * block_columns * block_inner * factors / rate
    issue = compiled.loop_instructions * warps / 4
    per_processor = chip.cache / chip.multiprocessors / chip.clock
    operands = (block_rows + block_columns * factors) * block_inner * itemsize / per_processor

    row_tiles, column_tiles = -(-rows // block_rows), -(-columns // block_columns)
    steps = -(-inner // block_inner)
    parts = max(1, min(split, steps))
    steps = -(-steps // parts)
    programs = row_tiles * column_tiles * parts
    resident, most = _waves(programs, compiled.occupancy, chip)
    groups = resident * warps / 4
    step = max(tensor if groups >= 2 else tensor / _LONE_GROUP, issue, operands)
    stored = block_rows * block_columns * (4 if parts > 1 else itemsize * (2 if residual else 1)) / per_processor
    outside = _FILL + compiled.other_instructions * warps / 4 + stored
    clocks = most * (steps * step + outside / resident)
    seconds = clocks / chip.clock + _LAUNCH

    moved = itemsize * (rows * inner + columns * factors * inner + rows * columns * (2 if residual else 1))
    seconds = max(seconds, moved / chip.memory)
    if parts > 1:
        # The workspace is written, then read; a large one does not stay in the cache between the two.
        workspace = 4.0 * parts * rows * columns * factors
        seconds += 2 * workspace / (chip.cache if workspace < _KEPT else chip.memory) + _LAUNCH
    return _prediction(seconds, 2.0 * rows * columns * factors * inner)


def attention_time(
    architecture: str,
    compiled: Compiled,
    *,
    rows: int,
    length: int,
    heads: int,
    head_dim: int,
    computed_dim: int,
    block_queries: int,
    block_keys: int,
    itemsize: int = 2,
) -> Prediction:
    """``rows`` rows in segments of ``length`` each; ``computed_dim``: columns of a head with their padding."""
    chip = CHIPS[architecture]
    rate = float(chip.tensor if itemsize < 4 else chip.scalar)
    warps = compiled.working / chip.warp
    scores = block_queries * block_keys
    products = 4.0 * computed_dim * scores / rate
    exponentials = scores * (1 + 1 / block_keys) / chip.exponentials
    issue = compiled.loop_instructions * warps / 4
    segments = max(1, rows // length)
    programs = segments * heads * -(-length // block_queries)
    resident, most = _waves(programs, compiled.occupancy, chip)
    step = products + max(exponentials, 1.5 * issue)
    if resident * warps / 4 < 2:
        step /= _LONE_GROUP
    per_processor = chip.cache / chip.multiprocessors / chip.clock
    step = max(step, 2.0 * computed_dim * block_keys * itemsize / per_processor)
    steps = -(-length // block_keys)
    outside = _FILL + compiled.other_instructions * warps / 4
    seconds = most * (steps * step + outside / resident) / chip.clock + _LAUNCH
    seconds = max(seconds, 4.0 * rows * heads * head_dim * itemsize / chip.memory)
    return _prediction(seconds, 4.0 * segments * length * length * heads * head_dim)


def rows_time(
    architecture: str, compiled: Compiled, *, rows: int, width: int, block_rows: int, itemsize: int, streams: int
) -> Prediction:
    """An operation on whole rows, ``streams`` of which are read or written: bound by memory, or by its instructions."""
    chip = CHIPS[architecture]
    resident, most = _waves(-(-rows // block_rows), compiled.occupancy, chip)
    warps = compiled.working / chip.warp
    clocks = most * (compiled.other_instructions * warps / 4 + _FILL / resident)
    moved = streams * rows * width * itemsize
    return _prediction(max(clocks / chip.clock, moved / chip.memory) + _LAUNCH, 0.0)


def _waves(programs: int, occupancy: int, chip: Chip) -> tuple[int, int]:
    """Programs that share a multiprocessor, and how many the busiest one works off."""
    most = -(-programs // chip.multiprocessors)
    return max(1, min(occupancy, most)), most


def _prediction(seconds: float, operations: float) -> Prediction:
    return Prediction(seconds * 1e6, operations / seconds / 1e12)
