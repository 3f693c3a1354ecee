"""Attention with a fixed stabilizer: no running maximum, no rescaling and no mask in the loop over the keys.

A softmax may subtract any number m from the scores of a row, provided that nothing leaves the range of the arithmetic:

    out = Σ_j 2^(s_j - m) v_j / Σ_j 2^(s_j - m)        s_j in units of log 2

The online softmax keeps m at the maximum so far, at the price of a comparison for every score and a multiplication for
every element of the output in every step.  Here m is the maximum of the *last* block of keys, the one that needs a mask
anyway: it is taken first, and the loop over the whole blocks has m as a constant.

That is exact, not approximate.  fp32 and bf16 have the same precision at 2⁹⁰ as at 1, so a score far above m costs
nothing until it overflows; the maximum of the last block is itself one of the terms, so the sum cannot vanish, and terms
that vanish beside it would have vanished beside any greater maximum.  A row whose sum or output leaves the safe range
(or is NaN) is *not* written: the tile is computed once more, in the same program, with the online softmax, and the rows
that were in doubt are written then.  Weights in fp16 overflow at 2¹⁶, so that its safe range ends at 2¹⁵.

*Padded heads* (``HEAD_DIM < WIDTH``) have columns to spare, and the first of them, which holds one in every key and value,
does two more jobs (``SPARE``): the queries carry -m there, so that their product with the keys arrives as s - m; and the
values' ones make that column of the output the sum of the weights.  m is rounded to the queries' dtype, which is no
error, since any m will do, but takes the largest term away from 1: therefore the sum is also checked against a lower
bound.

Between the product and the exponential nothing is then left to do but to scale, and that too is saved where the queries
come scaled from their projection (:mod:`.qkv_projection` does it before its one rounding; here they would be rounded once
more, which costs a fifth of the accuracy of the whole).
"""

import math
from typing import Any

import torch

from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.device_functions import dot
from ..runtime.segments import Segments
from .common import (
    FlashAttentionConfig,
    Heads,
    in_log2,
    is_sound,
    key_and_value_pointers,
    load_keys,
    load_queries,
    load_values,
    online_softmax,
    pointer_spec,
    score,
    score_factor,
    split_head_dim,
    store_rows,
    stride_arguments,
    tile_of,
)

__all__ = ["ARCHITECTURES", "LEAST_SUM", "compile_spec", "launch", "spare_column", "sum_limit"]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "gfx942", "gfx950", "interpreter")
"""Where the kernel compiles: Triton 3.6 and 3.7 find no layout for it in the tensor memory of sm_100."""
GROUPS = 8
"""Columns of a product that neighboring threads share: their sums stay apart until the end of the loop."""

LEAST_SUM = 2.0**-60
"""Below it the terms of a sum may have lost digits; only a rounded stabilizer can lead there."""
REDO_KEYS = 32
"""Block of keys of the second attempt."""


def sum_limit(dtype: torch.dtype) -> float:
    """The sum of weights from which a row is computed anew: no weight, and no weighed value below 2³⁷, overflows."""
    return 2.0**15 if dtype == torch.float16 else 2.0**90


def spare_column(head_dim: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a padded head has a column that the products compute anyway, in a dtype that can hold a stabilizer there."""
    return head_dim < min(width, sum(split_head_dim(head_dim, dtype))) and dtype != torch.float16


@triton.jit
def _sums(weights, GROUPS: tl.constexpr):
    # Sums of every GROUPS-th weight: each thread adds up what it holds, and threads talk once, after the loop.
    return tl.sum(tl.reshape(weights, [weights.shape[0], weights.shape[1] // GROUPS, GROUPS]), 1)


@triton.jit
def _redo(
    faulty, query_pointer, key_pointer, value_pointer, out_pointer, cu_seqlens_pointer, tiles_pointer,
    tile_count, score_scale,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, REDO_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # A tile with the online softmax, in blocks of keys that need no more registers than the first attempt; only faulty rows
    # are written, so that a row does not depend on which others share its tile.  For the sake of registers, again,
    # everything is worked out afresh: cu_seqlens begins with a zero, which the compiler cannot know, so that it keeps
    # nothing of the first attempt in registers meanwhile.
    program = tl.program_id(0) + tl.load(cu_seqlens_pointer, volatile=True)
    head, first_row, start, length = tile_of(program, tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_QUERIES)
    head, start = head.to(tl.int64), start.to(tl.int64)
    query_pointer += tl.multiple_of(head * query_head_stride, ALIGNMENT)
    out_pointer += tl.multiple_of(head * out_head_stride, ALIGNMENT)
    key_pointers, value_pointers, key_step, value_step = key_and_value_pointers(
        key_pointer, value_pointer, head, start,
        key_token_stride, key_head_stride, value_token_stride, value_head_stride, REDO_KEYS, ALIGNMENT,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    query_pointers = query_pointer + (start + rows)[:, None] * query_token_stride
    query, query_tail = load_queries(query_pointers, rows, length, HEAD_DIM, MAIN, TAIL)
    accumulator, accumulator_tail, row_sum = online_softmax(
        query, query_tail, key_pointers, value_pointers, key_step, value_step, length, score_scale,
        WIDTH, MAIN, TAIL, BLOCK_QUERIES, REDO_KEYS,
    )  # fmt: skip
    out_pointers = out_pointer + (start + rows)[:, None] * out_token_stride
    store_rows(out_pointers, faulty, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


@triton.jit
def _attention_fixed_kernel(
    query_pointer, key_pointer, value_pointer, out_pointer, cu_seqlens_pointer, tiles_pointer,
    tile_count, score_scale,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SPARE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
    LEAST: tl.constexpr, LIMIT: tl.constexpr, GROUPS: tl.constexpr, REDO_KEYS: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = tile_of(
        tl.program_id(0), tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_QUERIES
    )
    if first_row >= length:
        # A tile that only fills up the list.
        return
    head, start = head.to(tl.int64), start.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    row_mask = rows < length
    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    query_pointers = query_pointer + tl.multiple_of(head * query_head_stride, ALIGNMENT)
    query_pointers += (start + rows)[:, None] * query_token_stride
    query, query_tail = load_queries(query_pointers, rows, length, HEAD_DIM, MAIN, TAIL)
    key_pointers, value_pointers, key_step, value_step = key_and_value_pointers(
        key_pointer, value_pointer, head, start,
        key_token_stride, key_head_stride, value_token_stride, value_head_stride, BLOCK_KEYS, ALIGNMENT,
    )  # fmt: skip
    columns = tl.arange(0, MAIN)

    # The last block, of 1 to BLOCK_KEYS keys, fixes the stabilizer.
    whole = (length - 1) // BLOCK_KEYS * BLOCK_KEYS
    keys_left = length - whole
    last_keys = key_pointers + whole.to(tl.int64) * key_token_stride
    key, key_tail = load_keys(last_keys, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    scores = score(query, query_tail, key, key_tail, TAIL)
    scores = tl.where(tl.arange(0, BLOCK_KEYS)[None, :] < keys_left, scores, -float("inf"))
    if SPARE:
        shift = (-tl.max(scores, 1)).to(query.dtype)
        weights = tl.exp2(in_log2(scores + shift.to(tl.float32)[:, None], score_scale))
        if HEAD_DIM < MAIN:
            query = tl.where(columns[None, :] == HEAD_DIM, shift[:, None], query)
        else:
            tail_columns = MAIN + tl.arange(0, TAIL)
            query_tail = tl.where(tail_columns[None, :] == HEAD_DIM, shift[:, None], query_tail)
    else:
        stabilizer = tl.max(scores, 1) * score_scale
        weights = tl.exp2(scores * score_scale - stabilizer[:, None])
        sums = _sums(weights, GROUPS)
    last_values = value_pointers + whole.to(tl.int64) * value_token_stride
    value, value_tail = load_values(last_values, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value)
    accumulator_tail = accumulator
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail)

    for _ in tl.range(0, whole, BLOCK_KEYS):
        key, key_tail = load_keys(key_pointers, BLOCK_KEYS, WIDTH, MAIN, TAIL, BLOCK_KEYS, False)
        value, value_tail = load_values(value_pointers, BLOCK_KEYS, WIDTH, MAIN, TAIL, BLOCK_KEYS, False)
        scores = score(query, query_tail, key, key_tail, TAIL)
        if SPARE:
            weights = tl.exp2(in_log2(scores, score_scale))
        else:
            weights = tl.exp2(scores * score_scale - stabilizer[:, None])
            sums += _sums(weights, GROUPS)
        weights = weights.to(value.dtype)
        accumulator = dot(weights, value, accumulator)
        if TAIL > 0:
            accumulator_tail = dot(weights, value_tail, accumulator_tail)
        key_pointers += key_step
        value_pointers += value_step

    if SPARE:
        if HEAD_DIM < MAIN:
            row_sum = tl.sum(tl.where(columns[None, :] == HEAD_DIM, accumulator, 0.0), 1)
        else:
            row_sum = tl.sum(tl.where((MAIN + tl.arange(0, TAIL))[None, :] == HEAD_DIM, accumulator_tail, 0.0), 1)
    else:
        row_sum = tl.sum(sums, 1)
    sound = is_sound(accumulator, accumulator_tail, row_sum, LEAST, LIMIT, TAIL)
    out_pointers = out_pointer + tl.multiple_of(head * out_head_stride, ALIGNMENT)
    out_pointers += (start + rows)[:, None] * out_token_stride
    store_rows(out_pointers, row_mask & sound, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)
    faulty = row_mask & (sound == 0)
    if tl.max(faulty.to(tl.int32), 0) != 0:
        # A faulty row's queries are still in memory, even where `out` is `q`.
        _redo(
            faulty, query_pointer, key_pointer, value_pointer, out_pointer, cu_seqlens_pointer, tiles_pointer,
            tile_count, score_scale,
            query_token_stride, query_head_stride, key_token_stride, key_head_stride,
            value_token_stride, value_head_stride, out_token_stride, out_head_stride,
            HEAD_DIM, WIDTH, MAIN, TAIL, BLOCK_QUERIES, REDO_KEYS, ALIGNMENT,
        )  # fmt: skip


def _constants(heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig) -> dict[str, int | float | bool]:
    return {
        "SPARE": spare_column(heads.head_dim, heads.width, dtype),
        "LEAST": LEAST_SUM,
        "LIMIT": sum_limit(dtype),
        "GROUPS": min(GROUPS, config.block_keys),
        "REDO_KEYS": min(REDO_KEYS, config.block_keys),
    }


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    config: FlashAttentionConfig,
) -> None:
    """One program for each query tile of each head."""
    heads = Heads.of(out.shape[2], q.shape[2], q.dtype)
    constants = _constants(heads, q.dtype, config)
    tiles = segments.tiles(config.block_queries, q.device)
    strides = stride_arguments(q, k, v, out)
    _attention_fixed_kernel[(len(tiles) * q.shape[1],)](
        q,
        k,
        v,
        out,
        segments.cu_seqlens_on(q.device),
        tiles,
        len(tiles),
        score_factor(scale, alone=bool(constants["SPARE"])),
        *strides,
        **heads.constants(),
        **constants,
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, *strides[1::2]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_spec(heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled."""
    constants: dict[str, Any] = _constants(heads, dtype, config)
    label = ", spare column" if constants["SPARE"] else ""
    if heads.scaled and constants["SPARE"]:
        label += ", scaled queries"
        constants["score_scale"] = None
    return pointer_spec(_attention_fixed_kernel, heads, dtype, config, label, **constants)
