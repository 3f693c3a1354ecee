"""Attention with the online softmax: no assumption about the scores, one pass over the keys.

One program owns ``block_queries`` query rows of one segment and one head, and walks that segment's keys in blocks of
``block_keys``, keeping the running maximum, the running sum and the output in fp32 registers (Milakov and Gimelshein,
arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691).  The same kernel repairs what :mod:`.attention_specialized` could
not vouch for: then it computes only the tiles with such a row, and writes only such rows.
"""

import math

import torch

from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.segments import Segments
from .common import (
    FlashAttentionConfig,
    Heads,
    key_and_value_pointers,
    load_queries,
    online_softmax,
    pointer_spec,
    score_factor,
    store_rows,
    stride_arguments,
    tile_of,
)

__all__ = ["compile_spec", "launch"]


@triton.jit
def _attention_online_kernel(
    query_pointer, key_pointer, value_pointer, out_pointer, faults_pointer, cu_seqlens_pointer, tiles_pointer,
    tile_count, token_count, score_scale,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = tile_of(
        tl.program_id(0), tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_QUERIES
    )
    # Before the branch: behind it, the compiler makes a longer loop for sm_100.
    head = head.to(tl.int64)
    if first_row >= length:
        # A tile that only fills up the list.
        return
    start = start.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    row_mask = rows < length
    if REPAIR:
        faulty = tl.load(faults_pointer + head * token_count + start + rows, mask=row_mask, other=0) != 0
        if tl.max(faulty.to(tl.int32), 0) == 0:
            return
        row_mask = faulty

    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    query_pointers = query_pointer + tl.multiple_of(head * query_head_stride, ALIGNMENT)
    query_pointers += (start + rows)[:, None] * query_token_stride
    query, query_tail = load_queries(query_pointers, rows, length, HEAD_DIM, MAIN, TAIL)
    key_pointers, value_pointers, key_step, value_step = key_and_value_pointers(
        key_pointer, value_pointer, head, start,
        key_token_stride, key_head_stride, value_token_stride, value_head_stride, BLOCK_KEYS, ALIGNMENT,
    )  # fmt: skip
    accumulator, accumulator_tail, row_sum = online_softmax(
        query, query_tail, key_pointers, value_pointers, key_step, value_step, length, score_scale,
        WIDTH, MAIN, TAIL, BLOCK_QUERIES, BLOCK_KEYS,
    )  # fmt: skip

    out_pointers = out_pointer + tl.multiple_of(head * out_head_stride, ALIGNMENT)
    out_pointers += (start + rows)[:, None] * out_token_stride
    store_rows(out_pointers, row_mask, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    config: FlashAttentionConfig,
    faults: torch.Tensor | None = None,
) -> None:
    """One program for each query tile of each head; with ``faults`` (``[H, T]`` int8) only the rows marked there."""
    heads = Heads.of(out.shape[2], q.shape[2], q.dtype)
    tiles = segments.tiles(config.block_queries, q.device)
    strides = stride_arguments(q, k, v, out)
    _attention_online_kernel[(len(tiles) * q.shape[1],)](
        q,
        k,
        v,
        out,
        faults,
        segments.cu_seqlens_on(q.device),
        tiles,
        len(tiles),
        q.shape[0],
        score_factor(scale),
        *strides,
        **heads.constants(),
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, *strides[1::2]),
        REPAIR=faults is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_spec(
    heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig, *, repair: bool = False
) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled."""
    absent = {} if repair else {"faults_pointer": None}
    return pointer_spec(
        _attention_online_kernel, heads, dtype, config, ", repair" if repair else "", REPAIR=repair, **absent
    )
