"""Attention with specialized warps and Hopper's copy engine (TMA): some warps load, the others compute.

The softmax is that of :mod:`.fixed_max` (or, with ``ONLINE``, the running one).  Its form is the only one that Triton's
warp specialization compiles (Triton 3.6 to 3.9, sm_90):

* four warps and 128 query rows, which the compiler divides between two groups of four warps; a third group loads;
* keys and values through descriptors made by the host, queries through one made on the device: with a host's
  descriptor of the queries, Triton 3.6 copies 128 rows into a buffer of 64;
* no load through a pointer in the loop; no matmul with the values before it; no reduction over the queries.

So the last block, whose keys need the mask, is scored twice: before the loop, for the softmax offset, and after it.  A
tile cannot be recomputed in place: rows whose sum or output left the safe range are not written but marked in
``overflowed``, and a second launch (:mod:`.online_softmax`) computes them with the online softmax.  That is one more
launch per call; its programs end at once where no row is marked.

A descriptor loads whole blocks: rows after the segment too, and zeros after the last row of all.  Such keys are masked in
the scores.  Such values get the weight zero, but a NaN would survive that, so they are replaced by zeros in the last
block.  No value of a neighbor can reach a segment's rows.

The interpreter ignores warp specialization and runs everything else.
"""

import contextvars
from dataclasses import replace
from typing import Any

import torch

from ..runtime._triton import tl, triton
from ..runtime.device_functions import dot
from ..runtime.launch import allocate_workspace
from . import online_softmax
from .common import (
    FlashAttentionConfig,
    Heads,
    LaunchArguments,
    compute_score_factor,
    is_in_range,
    locate_tile,
    prepare_launch,
    scale_to_log2,
    store_rows,
)
from .fixed_max import MIN_SUM, has_spare_column, max_sum

RECOMPUTE = FlashAttentionConfig(block_queries=128, block_keys=64, num_warps=8, num_stages=2)
"""Configuration of the second launch: one that suits every head dim, since it rarely computes."""


@triton.jit
def _scores(query, query_tail, k_desc, k_tail_desc, row, column, TAIL: tl.constexpr, MAIN: tl.constexpr):
    if TAIL > 0:
        scores = dot(query_tail, k_tail_desc.load([row, column + MAIN]).T)
        scores = dot(query, k_desc.load([row, column]).T, scores)
    else:
        scores = dot(query, k_desc.load([row, column]).T)
    return scores


@triton.jit
def _sum_rounded(weights, DTYPE: tl.constexpr):
    # Values are multiplied by rounded weights; divided by the sum of these, a rounding of the largest one cancels.
    return tl.sum(weights.to(DTYPE).to(tl.float32), 1)


@triton.jit(do_not_specialize=["tile_count", "token_count"])
def _attention_specialized_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, v_tail_desc, out_ptr, overflowed_ptr,
    cu_seqlens_ptr, tiles_ptr, tile_count, token_count, query_columns, score_scale,
    stride_qt, stride_qh, stride_kh, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SPARE: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
    MIN_SUM: tl.constexpr, MAX_SUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = locate_tile(tl.program_id(0), tile_count, tiles_ptr, cu_seqlens_ptr, BLOCK_QUERIES)
    # Tiles that pad the list compute nothing.  The compiler cannot specialize warps across an early return.
    if first_row < length:
        key_column = head * stride_kh
        value_column = head * stride_vh

        queries = tl.make_tensor_descriptor(
            q_ptr, shape=[token_count, query_columns], strides=[stride_qt, 1],
            block_shape=[BLOCK_QUERIES, MAIN],
        )  # fmt: skip
        query = queries.load([start + first_row, head * stride_qh])
        if TAIL > 0:
            queries_tail = tl.make_tensor_descriptor(
                q_ptr, shape=[token_count, query_columns], strides=[stride_qt, 1],
                block_shape=[BLOCK_QUERIES, TAIL],
            )  # fmt: skip
            query_tail = queries_tail.load([start + first_row, head * stride_qh + MAIN])
        else:
            query_tail = query
        if SPARE:
            tail_columns = MAIN + tl.arange(0, TAIL)
            query_tail = tl.where(tail_columns[None, :] < HEAD_DIM, query_tail, tl.zeros_like(query_tail))

        # The last block, of 1 to BLOCK_KEYS keys, determines the softmax offset.
        whole = (length - 1) // BLOCK_KEYS * BLOCK_KEYS
        inside = (tl.arange(0, BLOCK_KEYS) < length - whole)[None, :]
        scores = _scores(query, query_tail, k_desc, k_tail_desc, start + whole, key_column, TAIL, MAIN)
        scores = tl.where(inside, scores, -float("inf"))
        if SPARE:
            shift = (-tl.max(scores, 1)).to(query.dtype)
            query_tail = tl.where(tail_columns[None, :] == HEAD_DIM, shift[:, None], query_tail)
        else:
            softmax_offset = tl.max(scores, 1) * score_scale
        row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
        accumulator = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
        accumulator_tail = accumulator
        if TAIL > 0:
            accumulator_tail = tl.zeros([BLOCK_QUERIES, TAIL], tl.float32)

        for key in tl.range(0, whole, BLOCK_KEYS, warp_specialize=True, num_stages=STAGES):
            scores = _scores(query, query_tail, k_desc, k_tail_desc, start + key, key_column, TAIL, MAIN)
            if SPARE:
                weights = tl.exp2(scale_to_log2(scores, score_scale))
            elif ONLINE:
                maximum = tl.maximum(softmax_offset, tl.max(scores, 1) * score_scale)
                weights = tl.exp2(scores * score_scale - maximum[:, None])
                correction = tl.exp2(softmax_offset - maximum)
                row_sum = row_sum * correction + _sum_rounded(weights, query.dtype)
                softmax_offset = maximum
                accumulator = accumulator * correction[:, None]
                if TAIL > 0:
                    accumulator_tail = accumulator_tail * correction[:, None]
            else:
                weights = tl.exp2(scores * score_scale - softmax_offset[:, None])
                row_sum += _sum_rounded(weights, query.dtype)
            weights = weights.to(query.dtype)
            accumulator = dot(weights, v_desc.load([start + key, value_column]), accumulator)
            if TAIL > 0:
                accumulator_tail = dot(weights, v_tail_desc.load([start + key, value_column + MAIN]), accumulator_tail)

        scores = _scores(query, query_tail, k_desc, k_tail_desc, start + whole, key_column, TAIL, MAIN)
        scores = tl.where(inside, scores, -float("inf"))
        if SPARE:
            weights = tl.exp2(scale_to_log2(scores, score_scale))
        else:
            weights = tl.exp2(scores * score_scale - softmax_offset[:, None])
            row_sum += _sum_rounded(weights, query.dtype)
        weights = weights.to(query.dtype)
        left = (tl.arange(0, BLOCK_KEYS) < length - whole)[:, None]
        value = v_desc.load([start + whole, value_column])
        value = tl.where(left, value, tl.zeros_like(value))
        accumulator = dot(weights, value, accumulator)
        if TAIL > 0:
            value_tail = v_tail_desc.load([start + whole, value_column + MAIN])
            value_tail = tl.where(left, value_tail, tl.zeros_like(value_tail))
            accumulator_tail = dot(weights, value_tail, accumulator_tail)

        if SPARE:
            row_sum = tl.sum(tl.where(tail_columns[None, :] == HEAD_DIM, accumulator_tail, 0.0), 1)
        rows = first_row + tl.arange(0, BLOCK_QUERIES)
        row_mask = rows < length
        out_ptrs = out_ptr + tl.multiple_of(head.to(tl.int64) * stride_oh, ALIGNMENT)
        out_ptrs += (start + rows).to(tl.int64)[:, None] * stride_ot
        if not ONLINE:
            in_range = is_in_range(accumulator, accumulator_tail, row_sum, MIN_SUM, MAX_SUM, TAIL)
            overflowed = overflowed_ptr + head.to(tl.int64) * token_count + start + rows
            tl.store(overflowed, 1 - in_range.to(tl.int8), mask=row_mask)
            # The queries of overflowed rows stay in memory, even if `out` is `q`: the second launch needs them.
            row_mask = row_mask & in_range
        store_rows(out_ptrs, row_mask, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


def triton_supports_padded_heads() -> bool:
    """Tells if Triton is 3.7 or newer, which padded heads need."""
    return tuple(int(part) for part in str(triton.__version__).split(".")[:2]) >= (3, 7)


def find_obstacle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int, config: FlashAttentionConfig, architecture: str
) -> str | None:
    """Returns the reason why this launch cannot use the specialized kernel, or ``None`` if it can."""
    heads = Heads.split(head_dim, q.shape[2], q.dtype)
    computed = heads.main + heads.tail
    if architecture not in ("sm_90", "interpreter"):
        return f"the compiler specializes warps for sm_90, not for {architecture}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies 16-bit floats, not {q.dtype}"
    if (config.block_queries, config.num_warps) != (128, 4):
        return "it takes 128 query rows and 4 warps"
    if head_dim != computed:
        if not (has_spare_column(head_dim, heads.width, q.dtype) and heads.tail and heads.width >= computed):
            return f"a head of {head_dim} columns is computed as {computed}, and a descriptor masks none of them"
        if not triton_supports_padded_heads():
            return "padded heads need Triton 3.7"
    size = q.element_size()
    for tensor in (q, k, v):
        # The copy engine's rules: 16-byte base and strides, and no row inside another.
        row = (q.shape[1] - 1) * tensor.stride(1) + q.shape[2]
        if tensor.data_ptr() % 16 or any(stride * size % 16 for stride in tensor.stride()[:2]):
            return "the copy engine needs tensors, rows and heads that begin at multiples of 16 bytes"
        if tensor.stride(1) < 0 or tensor.stride(0) < row or max(tensor.shape[0], row) >= 2**31:
            return "the copy engine needs rows that lie one after another"
    return None


def _allocate_scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # torch's allocator returns blocks of 512 bytes, on the current stream and in the current graph: those of the launch.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _make_descriptor(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    length, heads, width = tensor.shape
    whole = (heads - 1) * tensor.stride(1) + width
    return TensorDescriptor(tensor, [length, whole], [tensor.stride(0), 1], [rows, columns])


def launch(args: LaunchArguments) -> None:
    """Launches one program per head and query tile; in bf16, a second launch recomputes the rows that overflowed."""
    # The device's descriptor takes memory at launch, for which Triton asks the allocator of the current context.  Ours is
    # set in a copy of the context, so the caller's stays.
    contextvars.copy_context().run(_launch, args)


def _launch(args: LaunchArguments) -> None:
    triton.set_allocator(_allocate_scratch)
    q, config, heads = args.q, args.config, args.heads
    tokens, count, width = q.shape
    overflowed = None if q.dtype == torch.float16 else allocate_workspace((count, tokens), torch.int8, q.device)
    spare = heads.head_dim < heads.main + heads.tail
    descriptors = {
        f"{name}_desc": _make_descriptor(tensor, config.block_keys, columns) if columns else None
        for name, tensor, columns in (
            ("k", args.k, heads.main),
            ("k_tail", args.k, heads.tail),
            ("v", args.v, heads.main),
            ("v_tail", args.v, heads.tail),
        )
    }
    prepare_launch(
        _attention_specialized_kernel,
        args,
        compute_score_factor(args.scale, is_optional=spare),
        config.block_queries,
        **descriptors,
        overflowed_ptr=overflowed,
        query_columns=(count - 1) * q.stride(1) + width,
        SPARE=spare,
        # Weights in fp16 leave too little room above the last block's maximum.
        ONLINE=q.dtype == torch.float16,
        MIN_SUM=MIN_SUM,
        MAX_SUM=max_sum(q.dtype),
        STAGES=config.num_stages,
    )()
    if overflowed is not None:
        online_softmax.launch(replace(args, config=RECOMPUTE), overflowed=overflowed)
