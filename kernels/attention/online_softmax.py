"""Attention with the online softmax: one pass over the keys, without any assumption about the scores.

One program owns ``block_queries`` query rows of one segment and one head.  It walks the segment's keys in blocks of
``block_keys`` and keeps the running maximum, the running sum and the output in fp32 registers (Milakov and Gimelshein,
arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691).
"""

from ..runtime._triton import tl, triton
from .common import (
    LaunchArguments,
    compute_score_factor,
    load_queries,
    locate_tile,
    make_key_value_ptrs,
    online_softmax,
    prepare_launch,
    store_rows,
)


@triton.jit(do_not_specialize=["tile_count"])
def _attention_online_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, tiles_ptr,
    tile_count, score_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = locate_tile(tl.program_id(0), tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_QUERIES)
    # Before the branch: after it, the compiler makes a longer loop for sm_100.
    head = head.to(tl.int64)
    if first_row >= length:
        # Padding of the tile list.
        return
    start = start.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    row_mask = rows < length
    # Triton only infers divisibility by 16.  The hint by 8 lets head_dim=72 use 16-byte loads.
    q_ptrs = q_ptr + tl.multiple_of(head * stride_qh, ALIGNMENT)
    q_ptrs += (start + rows)[:, None] * stride_qt
    query, query_tail = load_queries(q_ptrs, rows, length, HEAD_DIM, MAIN, TAIL)
    k_ptrs, v_ptrs, k_step, v_step = make_key_value_ptrs(
        k_ptr, v_ptr, head, start, stride_kt, stride_kh, stride_vt, stride_vh, BLOCK_KEYS, ALIGNMENT,
    )  # fmt: skip
    accumulator, accumulator_tail, row_sum = online_softmax(
        query, query_tail, k_ptrs, v_ptrs, k_step, v_step, length, score_scale,
        WIDTH, MAIN, TAIL, BLOCK_QUERIES, BLOCK_KEYS,
    )  # fmt: skip

    out_ptrs = out_ptr + tl.multiple_of(head * stride_oh, ALIGNMENT)
    out_ptrs += (start + rows)[:, None] * stride_ot
    store_rows(out_ptrs, row_mask, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


def launch(args: LaunchArguments) -> None:
    """Launches one program per head and query tile."""
    prepare_launch(_attention_online_kernel, args, compute_score_factor(args.scale), args.config.block_queries)()
