"""Shared parts of the attention kernels: configuration, split of a head, device functions and launch arguments.

A head of ``head_dim`` columns is computed as ``MAIN`` columns and a ``TAIL`` (:func:`split_head_dim`).  ``HEAD_DIM`` is
the number of valid columns.  ``WIDTH`` is the number of columns that a head of keys or values has in memory: the same,
unless heads are padded (see :func:`.attention.flash_attention_varlen`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch

from ..runtime._triton import tl, triton
from ..runtime.checks import next_power_of_two
from ..runtime.device_functions import dot
from ..runtime.launch import launch
from ..runtime.segments import Segments

Variant = Literal["online", "fixed", "single_block"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class FlashAttentionConfig:
    """Block sizes, warps, pipeline stages and kernel variant of one launch."""

    block_queries: int
    """Query rows of one program."""
    block_keys: int
    """Keys of one loop iteration; it fixes the order of the sums over keys, hence the bits of the result."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in flight from memory."""
    variant: Variant = "online"
    """Kernel and softmax; see :mod:`.attention`."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")


def split_head_dim(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Splits ``head_dim`` into a power of two and a tail that is zero or a power of two.

    Together they cover the head; each part is at least 16.  Tensor cores take power-of-two blocks: rounding 80 up to 128
    would compute 60 % more than needed; 64 + 16 wastes nothing, and 72 = 64 + 16 wastes 8 columns.  Where the tail would
    be as wide as the main part (104 = 64 + 64) the two are one masked block: a third part would add a tensor-core round
    trip to every block of keys.  fp32 keeps the two apart: without tensor cores a thread holds whole rows of a dot's
    operands in registers, and 64 is its limit.
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    if dtype == torch.float32:
        main = min(main, 64)
    if head_dim <= main:
        return main, 0
    tail = max(16, next_power_of_two(head_dim - main))
    return (main, tail) if tail < main or (main == 64 and dtype == torch.float32) else (2 * main, 0)


@triton.jit
def locate_tile(program, tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_QUERIES: tl.constexpr):
    """Finds a program's head, first row in the segment, and the segment's start and length.

    Programs are numbered head by head, in the order of the tile list.  Padding tiles begin at or after the end of their
    segment.
    """
    head = program // tile_count
    line = tiles_ptr + 2 * (program % tile_count)
    segment = tl.load(line)
    first_row = tl.load(line + 1) * BLOCK_QUERIES
    start = tl.load(cu_seqlens_ptr + segment)
    length = tl.load(cu_seqlens_ptr + segment + 1) - start
    return head, first_row, start, length


@triton.jit
def make_key_value_ptrs(
    k_ptr, v_ptr, head, start, stride_kt, stride_kh, stride_vt, stride_vh,
    BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Makes pointers to a segment's first block of keys (transposed) and values, and the step to the next block."""
    # Triton only infers divisibility by 16.  The hint by 8 lets head_dim=72 use 16-byte loads.
    keys = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    k_ptrs = k_ptr + tl.multiple_of(head * stride_kh, ALIGNMENT)
    k_ptrs += start * stride_kt + keys[None, :] * stride_kt
    v_ptrs = v_ptr + tl.multiple_of(head * stride_vh, ALIGNMENT)
    v_ptrs += start * stride_vt + keys[:, None] * stride_vt
    k_step = tl.full([], BLOCK_KEYS, tl.int64) * stride_kt
    v_step = tl.full([], BLOCK_KEYS, tl.int64) * stride_vt
    return k_ptrs, v_ptrs, k_step, v_step


@triton.jit
def load_block(
    ptrs, rows, row_limit, columns, COLUMN_LIMIT: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """Loads a block of rows × columns, or its transpose, with zeros outside the segment or the head."""
    if MASK_ROWS and MASK_COLUMNS:
        block = tl.load(ptrs, mask=(rows < row_limit) & (columns < COLUMN_LIMIT), other=0.0)
    elif MASK_ROWS:
        block = tl.load(ptrs, mask=rows < row_limit, other=0.0)
    elif MASK_COLUMNS:
        block = tl.load(ptrs, mask=columns < COLUMN_LIMIT, other=0.0)
    else:
        block = tl.load(ptrs)
    return block


@triton.jit
def _load_parts(
    ptrs, rows, row_limit,
    COLUMN_LIMIT: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    # Loads both parts of a block of rows.  The columns lie along AXIS; the first COLUMN_LIMIT are valid.
    columns = tl.expand_dims(tl.arange(0, MAIN), 1 - AXIS)
    PARTIAL: tl.constexpr = COLUMN_LIMIT < MAIN
    block = load_block(ptrs + columns, rows, row_limit, columns, COLUMN_LIMIT, MASK_ROWS, PARTIAL)
    if TAIL > 0:
        tail_columns = tl.expand_dims(MAIN + tl.arange(0, TAIL), 1 - AXIS)
        PARTIAL_TAIL: tl.constexpr = COLUMN_LIMIT < MAIN + TAIL
        tail = load_block(ptrs + tail_columns, rows, row_limit, tail_columns, COLUMN_LIMIT, MASK_ROWS, PARTIAL_TAIL)
    else:
        # Never read: kernels with and without a tail then share the signatures of their functions.
        tail = block
    return block, tail


@triton.jit
def load_queries(
    q_ptrs, rows, length, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Loads both parts of a tile of queries, with zeros outside the segment and the valid columns."""
    return _load_parts(q_ptrs, rows[:, None], length, HEAD_DIM, MAIN, TAIL, True, 1)


@triton.jit
def load_keys(
    k_ptrs, keys_left,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Loads both parts of a block of keys, transposed; with ``MASK_KEYS``, zeros from key ``keys_left`` on."""
    keys = tl.arange(0, BLOCK_KEYS)[None, :]
    return _load_parts(k_ptrs, keys, keys_left, WIDTH, MAIN, TAIL, MASK_KEYS, 0)


@triton.jit
def load_values(
    v_ptrs, keys_left,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    """Loads both parts of a block of values; with ``MASK_KEYS``, zeros from key ``keys_left`` on."""
    keys = tl.arange(0, BLOCK_KEYS)[:, None]
    return _load_parts(v_ptrs, keys, keys_left, WIDTH, MAIN, TAIL, MASK_KEYS, 1)


@triton.jit
def compute_scores(query, query_tail, key, key_tail, TAIL: tl.constexpr):
    """Multiplies every query by every key, unscaled."""
    if TAIL > 0:
        return dot(query, key, dot(query_tail, key_tail))
    else:
        return dot(query, key)


@triton.jit
def scale_to_log2(scores, score_scale):
    """Multiplies scores by the factor of :func:`compute_score_factor`, if there is one."""
    if score_scale is not None:
        scores = scores * score_scale
    return scores


@triton.jit
def _online_block(
    query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
    k_ptrs, v_ptrs, keys_left, score_scale,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    # Adds one block of keys to the running softmax of one tile of queries.
    key, key_tail = load_keys(k_ptrs, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, MASK_KEYS)
    value, value_tail = load_values(v_ptrs, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, MASK_KEYS)
    scores = compute_scores(query, query_tail, key, key_tail, TAIL)
    if MASK_KEYS:
        scores = tl.where(tl.arange(0, BLOCK_KEYS)[None, :] < keys_left, scores, -float("inf"))

    maximum = tl.maximum(row_maximum, scale_to_log2(tl.max(scores, 1), score_scale))
    weights = tl.exp2(scale_to_log2(scores, score_scale) - maximum[:, None])
    correction = tl.exp2(row_maximum - maximum)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    # No weight exceeds 1 by more than a rounding error, so fp16 holds them as safely as bf16.
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value, accumulator * correction[:, None])
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail, accumulator_tail * correction[:, None])
    return accumulator, accumulator_tail, maximum, row_sum


@triton.jit
def online_softmax(
    query, query_tail, k_ptrs, v_ptrs, k_step, v_step, length, score_scale,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of queries against all keys of its segment.

    ``k_step`` and ``v_step`` are the elements from one block of keys to the next.  Returns both parts of the weighted
    values, and the sum of the weights.
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
            k_ptrs, v_ptrs, BLOCK_KEYS, score_scale, WIDTH, MAIN, TAIL, BLOCK_KEYS, False,
        )  # fmt: skip
        k_ptrs += k_step
        v_ptrs += v_step
    if whole < length:
        accumulator, accumulator_tail, row_maximum, row_sum = _online_block(
            query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
            k_ptrs, v_ptrs, length - whole, score_scale, WIDTH, MAIN, TAIL, BLOCK_KEYS, True,
        )  # fmt: skip
    return accumulator, accumulator_tail, row_sum


@triton.jit
def is_in_range(
    accumulator, accumulator_tail, row_sum, MIN_SUM: tl.constexpr, MAX_SUM: tl.constexpr, TAIL: tl.constexpr
):
    """Tells per row if the sum of the weights and all weighted values are in their exact range."""
    wrong = tl.sum(tl.where(tl.abs(accumulator) < float("inf"), 0, 1), 1)
    if TAIL > 0:
        wrong += tl.sum(tl.where(tl.abs(accumulator_tail) < float("inf"), 0, 1), 1)
    # Comparisons with NaN are false, so that NaN counts as out of range.
    return (row_sum > MIN_SUM) & (row_sum < MAX_SUM) & (wrong == 0)


@triton.jit
def store_rows(
    out_ptrs, row_mask, accumulator, accumulator_tail, row_sum,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Divides the weighted values by the sum of their weights and stores the rows of ``row_mask``."""
    columns = tl.arange(0, MAIN)
    normalizer = (1.0 / row_sum)[:, None]
    result = (accumulator * normalizer).to(out_ptrs.dtype.element_ty)
    tl.store(out_ptrs + columns[None, :], result, mask=row_mask[:, None] & (columns[None, :] < HEAD_DIM))
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        result = (accumulator_tail * normalizer).to(out_ptrs.dtype.element_ty)
        tl.store(out_ptrs + tail_columns[None, :], result, mask=row_mask[:, None] & (tail_columns[None, :] < HEAD_DIM))


@dataclass(frozen=True)
class Heads:
    """Columns of a head, in memory and as they are computed."""

    head_dim: int
    """Valid columns."""
    width: int
    """Columns of a head of queries, keys and values in memory."""
    main: int
    tail: int

    @classmethod
    def split(cls, head_dim: int, width: int, dtype: torch.dtype) -> "Heads":
        """Splits heads of ``head_dim`` columns that are padded to ``width``."""
        return cls(head_dim, width, *split_head_dim(head_dim, dtype))

    def constants(self) -> dict[str, int]:
        """Compile-time arguments that all kernels take."""
        return {"HEAD_DIM": self.head_dim, "WIDTH": self.width, "MAIN": self.main, "TAIL": self.tail}


STRIDES = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh", "stride_ot", "stride_oh")
"""Token and head strides of queries, keys, values and output, as the kernels name them."""


@dataclass(frozen=True)
class LaunchArguments:
    """Arguments of one launch: valid, non-empty tensors that the variant supports.

    ``scale`` is ``None`` if the queries are already scaled.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    segments: Segments
    scale: float | None
    config: FlashAttentionConfig
    recomputed: torch.Tensor | None = None

    @cached_property
    def heads(self) -> Heads:
        """Columns of the heads."""
        return Heads.split(self.out.shape[2], self.q.shape[2], self.q.dtype)

    @cached_property
    def strides(self) -> dict[str, int]:
        """Run-time arguments :data:`STRIDES`."""
        values = [stride for tensor in (self.q, self.k, self.v, self.out) for stride in tensor.stride()[:2]]
        return dict(zip(STRIDES, values, strict=True))

    @property
    def alignment(self) -> int:
        """Elements, at most 16, that divide every head stride."""
        return math.gcd(16, *(stride for name, stride in self.strides.items() if name.endswith("h")))


def compute_score_factor(scale: float | None, *, is_optional: bool = False) -> float | None:
    """Returns the factor that brings scores to units of log 2: exp2 is one instruction where exp is several.

    ``scale`` is ``None`` if the queries are already scaled.  The result is then ``None`` if the kernel can leave the
    multiplication out (``is_optional``), else 1: fused with a subtraction it costs nothing.
    """
    if scale is None:
        return None if is_optional else 1.0
    return scale * math.log2(math.e)


def prepare_launch(
    kernel: Any, args: LaunchArguments, score_scale: float | None, block_rows: int, **others: Any
) -> Callable[[], None]:
    """Returns the launch of one program per head and tile of ``block_rows`` rows; ``others`` are this kernel's alone."""
    config, device = args.config, args.q.device
    tiles = args.segments.tiles(block_rows, device)
    tokens, heads, _ = args.q.shape
    arguments = {
        "q_ptr": args.q,
        "k_ptr": args.k,
        "v_ptr": args.v,
        "out_ptr": args.out,
        "cu_seqlens_ptr": args.segments.cu_seqlens_on(device),
        "tiles_ptr": tiles,
        "tile_count": len(tiles),
        "token_count": tokens,
        "score_scale": score_scale,
        **args.strides,
        **args.heads.constants(),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "ALIGNMENT": args.alignment,
        **others,
    }
    return partial(
        launch,
        kernel,
        (len(tiles) * heads,),
        **{name: arguments[name] for name in kernel.arg_names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
