"""Attention in segments that fit one block of keys, such as windows: all keys at once, and a plain softmax.

One program owns all rows of one segment and one head.  With all scores in registers it needs neither a loop nor a running
maximum; two matmuls remain.  ``block_queries`` equals ``block_keys``, and the caller guarantees that no segment of any
batch is longer.
"""

from ..runtime._triton import tl, triton
from ..runtime.device_functions import dot
from .common import (
    LaunchArguments,
    compute_score_factor,
    compute_scores,
    load_keys,
    load_queries,
    load_values,
    locate_tile,
    prepare_launch,
    store_rows,
)


@triton.jit(do_not_specialize=["tile_count"])
def _attention_single_block_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, tiles_ptr,
    tile_count, score_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # One program owns one segment (a line of the tile list, whose tile is 0) of one head.
    head, first_row, start, length = locate_tile(tl.program_id(0), tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_KEYS)
    if first_row >= length:
        # Padding of the tile list.
        return
    head, start = head.to(tl.int64), start.to(tl.int64)

    rows = tl.arange(0, BLOCK_KEYS)
    # Triton only infers divisibility by 16.  The hint by 8 lets head_dim=72 use 16-byte loads.
    q_ptrs = q_ptr + tl.multiple_of(head * stride_qh, ALIGNMENT)
    q_ptrs += (start + rows)[:, None] * stride_qt
    query, query_tail = load_queries(q_ptrs, rows, length, HEAD_DIM, MAIN, TAIL)
    k_ptrs = k_ptr + tl.multiple_of(head * stride_kh, ALIGNMENT)
    k_ptrs += (start + rows)[None, :] * stride_kt
    key, key_tail = load_keys(k_ptrs, length, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    v_ptrs = v_ptr + tl.multiple_of(head * stride_vh, ALIGNMENT)
    v_ptrs += (start + rows)[:, None] * stride_vt
    value, value_tail = load_values(v_ptrs, length, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)

    scores = compute_scores(query, query_tail, key, key_tail, TAIL)
    scores = tl.where(rows[None, :] < length, scores, -float("inf"))
    weights = tl.exp2(scores * score_scale - (tl.max(scores, 1) * score_scale)[:, None])
    row_sum = tl.sum(weights, 1)
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value)
    accumulator_tail = accumulator
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail)
    out_ptrs = out_ptr + tl.multiple_of(head * stride_oh, ALIGNMENT)
    out_ptrs += (start + rows)[:, None] * stride_ot
    store_rows(out_ptrs, rows < length, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


def launch(args: LaunchArguments) -> None:
    """Launches one program per head and segment."""
    factor = compute_score_factor(args.scale)
    prepare_launch(_attention_single_block_kernel, args, factor, args.config.block_keys)()
