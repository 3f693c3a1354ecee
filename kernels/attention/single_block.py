"""Attention within segments that are short by nature, such as windows: all keys at once, and a plain softmax.

One program owns all rows of one segment and one head.  With every score in hand there is neither a loop nor a running
maximum; what is left are two products.  ``block_queries`` and ``block_keys`` are equal and no segment is longer; whoever
launches this vouches for it, for every pack that may ever come.
"""

import math

import torch

from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.device_functions import dot
from ..runtime.segments import Segments
from .common import (
    FlashAttentionConfig,
    Heads,
    load_keys,
    load_queries,
    load_values,
    pointer_spec,
    score,
    score_factor,
    store_rows,
    stride_arguments,
    tile_of,
)

__all__ = ["compile_spec", "launch"]


@triton.jit
def _attention_one_shot_kernel(
    query_pointer, key_pointer, value_pointer, out_pointer, cu_seqlens_pointer, tiles_pointer,
    tile_count, score_scale,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # One program owns one segment (a line of the tile list, whose tile is 0) of one head.
    head, first_row, start, length = tile_of(
        tl.program_id(0), tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_KEYS
    )
    if first_row >= length:
        # A tile that only fills up the list.
        return
    head, start = head.to(tl.int64), start.to(tl.int64)

    rows = tl.arange(0, BLOCK_KEYS)
    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    query_pointers = query_pointer + tl.multiple_of(head * query_head_stride, ALIGNMENT)
    query_pointers += (start + rows)[:, None] * query_token_stride
    query, query_tail = load_queries(query_pointers, rows, length, HEAD_DIM, MAIN, TAIL)
    key_pointers = key_pointer + tl.multiple_of(head * key_head_stride, ALIGNMENT)
    key_pointers += (start + rows)[None, :] * key_token_stride
    key, key_tail = load_keys(key_pointers, length, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)
    value_pointers = value_pointer + tl.multiple_of(head * value_head_stride, ALIGNMENT)
    value_pointers += (start + rows)[:, None] * value_token_stride
    value, value_tail = load_values(value_pointers, length, WIDTH, MAIN, TAIL, BLOCK_KEYS, True)

    scores = score(query, query_tail, key, key_tail, TAIL)
    scores = tl.where(rows[None, :] < length, scores, -float("inf"))
    weights = tl.exp2(scores * score_scale - (tl.max(scores, 1) * score_scale)[:, None])
    row_sum = tl.sum(weights, 1)
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value)
    accumulator_tail = accumulator
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail)
    out_pointers = out_pointer + tl.multiple_of(head * out_head_stride, ALIGNMENT)
    out_pointers += (start + rows)[:, None] * out_token_stride
    store_rows(out_pointers, rows < length, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


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
    """One program for each segment of each head."""
    heads = Heads.of(out.shape[2], q.shape[2], q.dtype)
    tiles = segments.tiles(config.block_keys, q.device)
    strides = stride_arguments(q, k, v, out)
    _attention_one_shot_kernel[(len(tiles) * q.shape[1],)](
        q,
        k,
        v,
        out,
        segments.cu_seqlens_on(q.device),
        tiles,
        len(tiles),
        score_factor(scale),
        *strides,
        **heads.constants(),
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, *strides[1::2]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_spec(heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled."""
    return pointer_spec(_attention_one_shot_kernel, heads, dtype, config, ", one shot")
