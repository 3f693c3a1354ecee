"""Attention with a fixed softmax offset: no running maximum, rescaling or mask in the loop over the keys.

A softmax may subtract any number m from the scores of a row, as long as nothing leaves the range of the arithmetic:

    out = Σ_j 2^(s_j - m) v_j / Σ_j 2^(s_j - m)        s_j in units of log 2

The online softmax keeps m at the running maximum.  That costs a comparison for every score, and in every step a
multiplication for every element of the output.  Here m is the maximum of the *last* ``BLOCK_KEYS`` scores: that block needs
a mask anyway, so it is computed first, and m is a constant of the loop over the whole blocks.  The keys that the loop visits
too have the weight zero in it.

The result is exact, not approximate.  fp32 and bf16 have the same precision at 2⁹⁰ as at 1, so a score far above m costs
nothing until it overflows.  The maximum of the last block is one of the terms, so the sum cannot vanish; terms that vanish
beside it would also vanish beside a greater maximum.  A row whose sum or output leaves the safe range (or is NaN) is *not*
written: the same program recomputes the tile with the online softmax and writes the overflowed rows then.  Weights in
fp16 overflow at 2¹⁶, so the safe range ends at 2¹⁵ there.

The sum is that of the *rounded* weights, by which the values are multiplied, so that a rounding of the largest weight
cancels.  (With the online softmax that weight is 1, which has none.)

*Padded heads* (``HEAD_DIM < WIDTH``) have spare columns.  The first one, which is one in every key and value, does two
more jobs (``SPARE``): the queries hold -m there, so that their matmul with the keys gives s - m; and the ones of the
values make that column of the output the sum of the weights.  m is rounded to the queries' dtype.  That is no error, since
any m is valid, but it moves the largest term away from 1; therefore the sum is also checked against a lower bound.

Between the matmul and the exponential only the scaling is left.  Queries that are already scaled by their projection save
that too (:mod:`..gemm.qkv_projection` scales before its only rounding; scaling here would round once more, which costs a
fifth of the accuracy of the whole).
"""

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.device_functions import dot
from .common import (
    LaunchArguments,
    compute_score_factor,
    compute_scores,
    is_in_range,
    load_keys,
    load_queries,
    load_values,
    locate_tile,
    make_key_value_ptrs,
    online_softmax,
    prepare_launch,
    scale_to_log2,
    split_head_dim,
    store_rows,
)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942", "gfx950", "interpreter")
"""Architectures where the kernel compiles: Triton 3.6 and 3.7 find no layout for it in the tensor memory of sm_100."""
GROUPS = 8
"""Columns that together hold the sum of a row's weights: the fewest that a matmul may have."""
GROUPS_AMD = 16
MIN_SUM = 2.0**-60
"""Below it the terms of a sum may have lost digits; only a rounded softmax offset can lead there."""
RECOMPUTE_KEYS = 32
"""Block of keys of the second attempt."""


def max_sum(dtype: torch.dtype) -> float:
    """The sum of weights from which a row is recomputed: below it no weight, and no weighted value below 2³⁷, overflows."""
    return 2.0**15 if dtype == torch.float16 else 2.0**90


def has_spare_column(head_dim: int, width: int, dtype: torch.dtype) -> bool:
    """Tells if a padded head has a spare column, in a dtype that can hold a softmax offset."""
    return head_dim < min(width, sum(split_head_dim(head_dim, dtype))) and dtype != torch.float16


@triton.jit
def _add_weights(weights, sums, GROUPS: tl.constexpr):
    # Adds a block of weights to `sums`, whose GROUPS columns together are the sum of a row.
    if weights.dtype == tl.float32:
        # Each thread adds up its own registers; the reduction across threads follows the loop.
        sums += tl.sum(tl.reshape(weights, [weights.shape[0], weights.shape[1] // GROUPS, GROUPS]), 1)
    else:
        # A tensor core adds more numbers per instruction than a vector unit.
        ones = tl.full([weights.shape[1], GROUPS], 1.0 / GROUPS, tl.float32).to(weights.dtype)
        sums = dot(weights, ones, sums)
    return sums


@triton.jit
def recompute_tile(
    overflowed, q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, tiles_ptr,
    tile_count, score_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, RECOMPUTE_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # Recomputes a tile with the online softmax, in blocks of keys that need no more registers than the first attempt.
    # Only overflowed rows are written, so that a row does not depend on the others in its tile.  All values are derived
    # again, also to save registers: cu_seqlens begins with a zero, which the compiler cannot assume, so it keeps nothing
    # of the first attempt in registers.
    program = tl.program_id(0) + tl.load(cu_seqlens_ptr, volatile=True)
    head, first_row, start, length = locate_tile(program, tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_QUERIES)
    head, start = head.to(tl.int64), start.to(tl.int64)
    q_ptr += tl.multiple_of(head * stride_qh, ALIGNMENT)
    out_ptr += tl.multiple_of(head * stride_oh, ALIGNMENT)
    k_ptrs, v_ptrs, k_step, v_step = make_key_value_ptrs(
        k_ptr, v_ptr, head, start, stride_kt, stride_kh, stride_vt, stride_vh, RECOMPUTE_KEYS, ALIGNMENT,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    q_ptrs = q_ptr + (start + rows)[:, None] * stride_qt
    query, query_tail = load_queries(q_ptrs, rows, length, HEAD_DIM, MAIN, TAIL)
    accumulator, accumulator_tail, row_sum = online_softmax(
        query, query_tail, k_ptrs, v_ptrs, k_step, v_step, length, score_scale,
        WIDTH, MAIN, TAIL, BLOCK_QUERIES, RECOMPUTE_KEYS,
    )  # fmt: skip
    out_ptrs = out_ptr + (start + rows)[:, None] * stride_ot
    store_rows(out_ptrs, overflowed, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


@triton.jit(do_not_specialize=["tile_count"])
def _attention_fixed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, recomputed_ptr, cu_seqlens_ptr, tiles_ptr,
    tile_count, score_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SPARE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
    MIN_SUM: tl.constexpr, MAX_SUM: tl.constexpr, GROUPS: tl.constexpr, RECOMPUTE_KEYS: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = locate_tile(tl.program_id(0), tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_QUERIES)
    if first_row >= length:
        # Padding of the tile list.
        return
    head, start = head.to(tl.int64), start.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    row_mask = rows < length
    # Triton only infers divisibility by 16.  The hint by 8 lets head_dim=72 use 16-byte loads.
    q_ptrs = q_ptr + tl.multiple_of(head * stride_qh, ALIGNMENT)
    q_ptrs += (start + rows)[:, None] * stride_qt
    query, query_tail = load_queries(q_ptrs, rows, length, HEAD_DIM, MAIN, TAIL)
    k_ptrs, v_ptrs, k_step, v_step = make_key_value_ptrs(
        k_ptr, v_ptr, head, start, stride_kt, stride_kh, stride_vt, stride_vh, BLOCK_KEYS, ALIGNMENT,
    )  # fmt: skip
    columns = tl.arange(0, MAIN)

    # The last keys of the segment, up to BLOCK_KEYS, determine the softmax offset.  Those before `whole` belong to the loop.
    whole = (length - 1) // BLOCK_KEYS * BLOCK_KEYS
    first_key = tl.maximum(length - BLOCK_KEYS, 0)
    keys_left = length - first_key
    keys = tl.arange(0, BLOCK_KEYS)[None, :]
    last_keys = k_ptrs + first_key.to(tl.int64) * stride_kt
    key, key_tail = load_keys(last_keys, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    scores = compute_scores(query, query_tail, key, key_tail, TAIL)
    scores = tl.where(keys < keys_left, scores, -float("inf"))
    if SPARE:
        shift = (-tl.max(scores, 1)).to(query.dtype)
        weights = tl.exp2(scale_to_log2(scores + shift.to(tl.float32)[:, None], score_scale))
        if HEAD_DIM < MAIN:
            query = tl.where(columns[None, :] == HEAD_DIM, shift[:, None], query)
        else:
            tail_columns = MAIN + tl.arange(0, TAIL)
            query_tail = tl.where(tail_columns[None, :] == HEAD_DIM, shift[:, None], query_tail)
    else:
        softmax_offset = tl.max(scores, 1) * score_scale
        weights = tl.exp2(scores * score_scale - softmax_offset[:, None])
    last_values = v_ptrs + first_key.to(tl.int64) * stride_vt
    value, value_tail = load_values(last_values, keys_left, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    if SPARE:
        # Masked values, with their ones, do the same as masked weights, which would cost moves in the loop.
        left = (tl.arange(0, BLOCK_KEYS) >= whole - first_key)[:, None]
        value = tl.where(left, value, tl.zeros_like(value))
        value_tail = tl.where(left, value_tail, tl.zeros_like(value_tail))
        weights = weights.to(value.dtype)
    else:
        weights = tl.where(keys >= whole - first_key, weights, 0.0).to(value.dtype)
        sums = _add_weights(weights, tl.zeros([BLOCK_QUERIES, GROUPS], tl.float32), GROUPS)
    accumulator = dot(weights, value)
    accumulator_tail = accumulator
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail)

    for _ in tl.range(0, whole, BLOCK_KEYS):
        key, key_tail = load_keys(k_ptrs, BLOCK_KEYS, WIDTH, MAIN, TAIL, BLOCK_KEYS, False)
        value, value_tail = load_values(v_ptrs, BLOCK_KEYS, WIDTH, MAIN, TAIL, BLOCK_KEYS, False)
        scores = compute_scores(query, query_tail, key, key_tail, TAIL)
        if SPARE:
            weights = tl.exp2(scale_to_log2(scores, score_scale))
        else:
            weights = tl.exp2(scores * score_scale - softmax_offset[:, None])
        weights = weights.to(value.dtype)
        if not SPARE:
            sums = _add_weights(weights, sums, GROUPS)
        accumulator = dot(weights, value, accumulator)
        if TAIL > 0:
            accumulator_tail = dot(weights, value_tail, accumulator_tail)
        k_ptrs += k_step
        v_ptrs += v_step

    if SPARE:
        if HEAD_DIM < MAIN:
            row_sum = tl.sum(tl.where(columns[None, :] == HEAD_DIM, accumulator, 0.0), 1)
        else:
            row_sum = tl.sum(tl.where((MAIN + tl.arange(0, TAIL))[None, :] == HEAD_DIM, accumulator_tail, 0.0), 1)
    else:
        row_sum = tl.sum(sums, 1)
    in_range = is_in_range(accumulator, accumulator_tail, row_sum, MIN_SUM, MAX_SUM, TAIL)
    out_ptrs = out_ptr + tl.multiple_of(head * stride_oh, ALIGNMENT)
    out_ptrs += (start + rows)[:, None] * stride_ot
    store_rows(out_ptrs, row_mask & in_range, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)
    overflowed = row_mask & (in_range == 0)
    if tl.max(overflowed.to(tl.int32), 0) != 0:
        if recomputed_ptr is not None:
            tl.atomic_add(recomputed_ptr, 1)
        # The queries of overflowed rows are still in memory, even if `out` is `q`.
        recompute_tile(
            overflowed, q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, tiles_ptr,
            tile_count, score_scale,
            stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
            HEAD_DIM, WIDTH, MAIN, TAIL, BLOCK_QUERIES, RECOMPUTE_KEYS, ALIGNMENT,
        )  # fmt: skip


def launch(args: LaunchArguments) -> None:
    """Launches one program per head and query tile."""
    spare = has_spare_column(args.heads.head_dim, args.heads.width, args.q.dtype)
    groups = GROUPS_AMD if configs.architecture(args.q.device).startswith("gfx") else GROUPS
    prepare_launch(
        _attention_fixed_kernel,
        args,
        compute_score_factor(args.scale, is_optional=spare),
        args.config.block_queries,
        recomputed_ptr=args.recomputed,
        SPARE=spare,
        MIN_SUM=MIN_SUM,
        MAX_SUM=max_sum(args.q.dtype),
        GROUPS=groups,
        RECOMPUTE_KEYS=min(RECOMPUTE_KEYS, args.config.block_keys),
    )()
