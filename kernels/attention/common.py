"""What the forms of flash attention share: the configuration, the division of a head, and the device functions.

A head of ``head_dim`` columns is computed as ``MAIN`` columns and a ``TAIL`` (:func:`split_head_dim`).  ``HEAD_DIM`` is
the number of columns that count and ``WIDTH`` how many a head of keys or values has: the same, unless the heads are
padded (see :func:`.flash_attention.flash_attention_varlen`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.device_functions import dot

__all__ = [
    "VARIANTS",
    "FlashAttentionConfig",
    "Heads",
    "Variant",
    "in_log2",
    "is_sound",
    "key_and_value_pointers",
    "load_keys",
    "load_queries",
    "load_values",
    "online_softmax",
    "pointer_spec",
    "score",
    "score_factor",
    "split_head_dim",
    "store_rows",
    "stride_arguments",
    "tile_of",
]

Variant = Literal["online", "fixed", "specialized", "one_shot"]
VARIANTS: tuple[Variant, ...] = ("online", "fixed", "specialized", "one_shot")


@dataclass(frozen=True)
class FlashAttentionConfig:
    """How one launch divides the work."""

    block_queries: int
    """Query rows of one program."""
    block_keys: int
    """Keys taken at a time; it decides the order of the sums over keys, hence the bits of the result."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in flight from memory."""
    variant: Variant = "online"
    """Which softmax and which kernel: see :mod:`.flash_attention`."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")


def split_head_dim(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """``head_dim`` as a power of two and a tail that is zero or a power of two, together covering it, each at least 16.

    Tensor cores take power-of-two blocks.  Rounding 80 up to 128 would compute 60 % more than needed; 64 + 16 computes
    nothing in vain, and 72 = 64 + 16 wastes 8 columns.  Where the tail would be as wide as the main part (104 = 64 + 64)
    the two are one block, masked: a third part would add a tensor-core round trip to every block of keys.  fp32 keeps
    the two apart: without tensor cores a thread holds whole rows of a dot's operands in registers, and 64 is its limit.
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    if dtype == torch.float32:
        main = min(main, 64)
    if head_dim <= main:
        return main, 0
    tail = max(16, 1 << (head_dim - main - 1).bit_length())
    return (main, tail) if tail < main or (main == 64 and dtype == torch.float32) else (2 * main, 0)


@triton.jit
def tile_of(program, tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_QUERIES: tl.constexpr):
    """What a program owns: a head, and the rows from ``first_row`` on of a segment, which has a start and a length.

    Programs are numbered head by head, the tiles of each as the tile list has them; one that only fills up the list begins
    at or beyond the end of its segment.
    """
    head = program // tile_count
    line = tiles_pointer + 2 * (program % tile_count)
    segment = tl.load(line)
    first_row = tl.load(line + 1) * BLOCK_QUERIES
    start = tl.load(cu_seqlens_pointer + segment)
    length = tl.load(cu_seqlens_pointer + segment + 1) - start
    return head, first_row, start, length


@triton.jit
def key_and_value_pointers(
    key_pointer, value_pointer, head, start,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Where a segment's first block of keys (transposed) and of values begin, and the elements from block to block."""
    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    keys = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    key_pointers = key_pointer + tl.multiple_of(head * key_head_stride, ALIGNMENT)
    key_pointers += start * key_token_stride + keys[None, :] * key_token_stride
    value_pointers = value_pointer + tl.multiple_of(head * value_head_stride, ALIGNMENT)
    value_pointers += start * value_token_stride + keys[:, None] * value_token_stride
    key_step = tl.full([], BLOCK_KEYS, tl.int64) * key_token_stride
    value_step = tl.full([], BLOCK_KEYS, tl.int64) * value_token_stride
    return key_pointers, value_pointers, key_step, value_step


@triton.jit
def load_block(
    pointers, rows, row_limit, columns, COLUMN_LIMIT: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """A block of rows × columns (or its transpose) with zeros where it leaves the segment or the head."""
    if MASK_ROWS and MASK_COLUMNS:
        block = tl.load(pointers, mask=(rows < row_limit) & (columns < COLUMN_LIMIT), other=0.0)
    elif MASK_ROWS:
        block = tl.load(pointers, mask=rows < row_limit, other=0.0)
    elif MASK_COLUMNS:
        block = tl.load(pointers, mask=columns < COLUMN_LIMIT, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def _load_parts(
    pointers, rows, row_limit,
    LIMIT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    # Both parts of a block of rows; the columns, of which LIMIT count, lie along AXIS of what is loaded.
    columns = tl.expand_dims(tl.arange(0, MAIN), 1 - AXIS)
    PARTIAL: tl.constexpr = LIMIT < MAIN
    block = load_block(pointers + columns, rows, row_limit, columns, LIMIT, MASK_ROWS, PARTIAL)
    if TAIL > 0:
        tail_columns = tl.expand_dims(MAIN + tl.arange(0, TAIL), 1 - AXIS)
        PARTIAL_TAIL: tl.constexpr = LIMIT < MAIN + TAIL
        tail = load_block(pointers + tail_columns, rows, row_limit, tail_columns, LIMIT, MASK_ROWS, PARTIAL_TAIL)
    else:
        # A stand-in that nothing reads: the two forms of a kernel then share the signatures of its functions.
        tail = block
    return block, tail


@triton.jit
def load_queries(
    query_pointers, rows, length, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """The two parts of a tile of queries, zero beyond the segment and beyond the columns that count."""
    return _load_parts(query_pointers, rows[:, None], length, HEAD_DIM, MAIN, TAIL, True, 1)


@triton.jit
def load_keys(
    key_pointers, keys_left,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Both parts of a block of keys, transposed; zero from key ``keys_left`` on where that is asked for."""
    keys = tl.arange(0, BLOCK_KEYS)[None, :]
    return _load_parts(key_pointers, keys, keys_left, WIDTH, MAIN, TAIL, MASK_KEYS, 0)


@triton.jit
def load_values(
    value_pointers, keys_left,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Both parts of a block of values; zero from key ``keys_left`` on where that is asked for."""
    keys = tl.arange(0, BLOCK_KEYS)[:, None]
    return _load_parts(value_pointers, keys, keys_left, WIDTH, MAIN, TAIL, MASK_KEYS, 1)


@triton.jit
def score(query, query_tail, key, key_tail, TAIL: tl.constexpr):
    """Every query times every key, unscaled."""
    if TAIL > 0:
        return dot(query, key, dot(query_tail, key_tail))
    else:
        return dot(query, key)


@triton.jit
def in_log2(scores, score_scale):
    """Scores in units of log 2, which they are already where there is no factor (see :func:`score_factor`)."""
    if score_scale is not None:
        scores = scores * score_scale
    return scores


@triton.jit
def _online_block(
    query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
    key_pointers, value_pointers, keys_left, score_scale,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    # One block of keys for one tile of queries: scores, their softmax so far, and the values they weigh.
    key, key_tail = load_keys(key_pointers, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, MASK_KEYS)
    value, value_tail = load_values(value_pointers, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, MASK_KEYS)
    scores = score(query, query_tail, key, key_tail, TAIL)
    if MASK_KEYS:
        scores = tl.where(tl.arange(0, BLOCK_KEYS)[None, :] < keys_left, scores, -float("inf"))

    maximum = tl.maximum(row_maximum, in_log2(tl.max(scores, 1), score_scale))
    weights = tl.exp2(in_log2(scores, score_scale) - maximum[:, None])
    correction = tl.exp2(row_maximum - maximum)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    # No weight exceeds 1 by more than a rounding, so fp16 holds them as safely as bf16.
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value, accumulator * correction[:, None])
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail, accumulator_tail * correction[:, None])
    return accumulator, accumulator_tail, maximum, row_sum


@triton.jit
def online_softmax(
    query, query_tail, key_pointers, value_pointers, key_step, value_step, length, score_scale,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """All keys of a segment for one tile of queries: the weighed values, both parts, and the sum of the weights.

    ``key_step`` and ``value_step`` are the elements from one block of keys to the next.
    """
    accumulator = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
    accumulator_tail = accumulator
    if TAIL > 0:
        accumulator_tail = tl.zeros([BLOCK_QUERIES, TAIL], tl.float32)
    row_maximum = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    # Whole blocks need no mask: a mask on every score would cost a fifth of the loop's instructions.
    whole = length // BLOCK_KEYS * BLOCK_KEYS
    for _ in tl.range(0, whole, BLOCK_KEYS):
        accumulator, accumulator_tail, row_maximum, row_sum = _online_block(
            query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
            key_pointers, value_pointers, BLOCK_KEYS, score_scale, WIDTH, MAIN, TAIL, BLOCK_KEYS, False,
        )  # fmt: skip
        key_pointers += key_step
        value_pointers += value_step
    if whole < length:
        accumulator, accumulator_tail, row_maximum, row_sum = _online_block(
            query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
            key_pointers, value_pointers, length - whole, score_scale, WIDTH, MAIN, TAIL, BLOCK_KEYS, True,
        )  # fmt: skip
    return accumulator, accumulator_tail, row_sum


@triton.jit
def is_sound(accumulator, accumulator_tail, row_sum, LEAST: tl.constexpr, LIMIT: tl.constexpr, TAIL: tl.constexpr):
    """Per row: neither the sum of the weights nor any weighed value left the range in which they are exact."""
    wrong = tl.sum(tl.where(tl.abs(accumulator) < float("inf"), 0, 1), 1)
    if TAIL > 0:
        wrong += tl.sum(tl.where(tl.abs(accumulator_tail) < float("inf"), 0, 1), 1)
    # A comparison with NaN is false, which is what it should be.
    return (row_sum > LEAST) & (row_sum < LIMIT) & (wrong == 0)


@triton.jit
def store_rows(
    out_pointers, row_mask, accumulator, accumulator_tail, row_sum,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The weighed values divided by the sum of their weights, into the rows that ``row_mask`` names."""
    columns = tl.arange(0, MAIN)
    normalizer = (1.0 / row_sum)[:, None]
    result = (accumulator * normalizer).to(out_pointers.dtype.element_ty)
    tl.store(out_pointers + columns[None, :], result, mask=row_mask[:, None] & (columns[None, :] < HEAD_DIM))
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        result = (accumulator_tail * normalizer).to(out_pointers.dtype.element_ty)
        tl.store(
            out_pointers + tail_columns[None, :], result, mask=row_mask[:, None] & (tail_columns[None, :] < HEAD_DIM)
        )


@dataclass(frozen=True)
class Heads:
    """What a launch needs to know of its heads."""

    head_dim: int
    """Columns that count."""
    width: int
    """Columns of a head of queries, keys and values in memory."""
    main: int
    tail: int
    scaled: bool = False
    """Whether the queries hold the scale already, so that scores come in units of log 2."""

    @classmethod
    def of(cls, head_dim: int, width: int, dtype: torch.dtype, *, scaled: bool = False) -> "Heads":
        """Heads of ``head_dim`` columns, padded to ``width``."""
        return cls(head_dim, width, *split_head_dim(head_dim, dtype), scaled)

    @property
    def text(self) -> str:
        """For the name of a compile specification."""
        padded = f" in {self.width}" if self.width > self.head_dim else ""
        return f"head {self.head_dim}{padded} = {self.main}{f' + {self.tail}' if self.tail else ''}"

    def constants(self) -> dict[str, int]:
        """The compile-time arguments that every kernel has."""
        return {"HEAD_DIM": self.head_dim, "WIDTH": self.width, "MAIN": self.main, "TAIL": self.tail}


def score_factor(scale: float | None, *, alone: bool = False) -> float | None:
    """What brings scores to units of log 2, since exp2 is one instruction where exp is several.

    ``scale`` is ``None`` where the queries are scaled: then nothing has to.  ``None`` comes out, for a kernel without the
    multiplication, where that stands ``alone``; fused with a subtraction it costs nothing, and the factor is 1.
    """
    if scale is None:
        return None if alone else 1.0
    return scale * math.log2(math.e)


def stride_arguments(*tensors: torch.Tensor) -> list[int]:
    """Token and head stride of each tensor ``[T, H, columns]``, in the order of the kernels' arguments."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


TENSORS = ("query", "key", "value", "out")
TOKEN_STRIDES = tuple(f"{tensor}_token_stride" for tensor in TENSORS)
HEAD_STRIDES = tuple(f"{tensor}_head_stride" for tensor in TENSORS)


def pointer_spec(
    kernel: Any, heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig, label: str, **constants: Any
) -> CompileSpec:
    """How a launch that reads by pointers from the view of a fused projection is compiled."""
    name = TRITON_TYPES[dtype]
    types = {
        **{f"{tensor}_pointer": f"*{name}" for tensor in TENSORS},
        "faults_pointer": "*i8",
        "cu_seqlens_pointer": "*i32",
        "tiles_pointer": "*i32",
        "tile_count": "i32",
        "token_count": "i32",
        "score_scale": "fp32",
        **dict.fromkeys(TOKEN_STRIDES + HEAD_STRIDES, "i32"),
    }
    every = {
        **heads.constants(),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "ALIGNMENT": math.gcd(heads.width, 16),
        **constants,
    }
    aligned = tuple(stride for stride in HEAD_STRIDES if (heads.head_dim if "out" in stride else heads.width) % 16 == 0)
    return CompileSpec(
        name=f"{name} {heads.text}, {config.block_queries}x{config.block_keys} warps {config.num_warps} "
        f"stages {config.num_stages}{label}",
        kernel=kernel,
        signature={argument: types[argument] for argument in kernel.arg_names if argument in types},
        constants={argument: every[argument] for argument in kernel.arg_names if argument in every},
        divisible_by_16=TOKEN_STRIDES + aligned,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_queries * config.block_keys,
    )
