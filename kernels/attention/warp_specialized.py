"""Attention with specialized warps and the copy engine of Hopper (TMA): some warps fetch, the others compute.

The softmax is that of :mod:`.attention_fixed` (or, with ``ONLINE``, the running one), arranged as Triton's warp
specialization takes it, and no other way (Triton 3.6 to 3.9, sm_90):

* four warps and 128 query rows, which the compiler divides between two groups of four warps; a third group fetches;
* keys and values through descriptors made by the host, queries through one made on the device: with a host's
  descriptor of the queries Triton 3.6 copies 128 rows into a buffer of 64;
* no pointer is loaded from in the loop; no product with the values comes before it; nothing is reduced over the queries.

So the last block, whose keys need the mask, is scored before the loop, for the stabilizer, and again after it.  And a tile
cannot be repaired in place: rows whose sum or output left the safe range are not written but marked in ``faults``, and a
second launch (:mod:`.attention_online`) computes them with the online softmax.  That is one more launch per call, whose
programs end at once where nothing is marked.

A descriptor fetches whole blocks: rows that follow the segment, or zeros after the last row of all.  Such keys are masked
in the scores.  Such values get the weight zero, which a NaN would survive; so zeros take their place in the last block.
Nothing a neighbor holds can reach a segment's rows.

The interpreter ignores warp specialization and runs everything else.
"""

import contextvars
import math
from typing import Any

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import CompileSpec
from ..runtime.device_functions import dot
from ..runtime.segments import Segments
from . import online_softmax
from .common import FlashAttentionConfig, Heads, in_log2, is_sound, score_factor, store_rows, stride_arguments, tile_of
from .fixed_max import LEAST_SUM, spare_column, sum_limit

__all__ = ["REPAIR", "compile_spec", "launch", "obstacle"]

REPAIR = FlashAttentionConfig(block_queries=128, block_keys=64, num_warps=8, num_stages=2)
"""The second launch: what suits every head dim, since it hardly ever computes."""


@triton.jit
def _scores(
    query, query_tail, KEYS, KEYS_TAIL, row, column, TAIL: tl.constexpr, MAIN: tl.constexpr
):  # fmt: skip
    if TAIL > 0:
        scores = dot(query_tail, KEYS_TAIL.load([row, column + MAIN]).T)
        scores = dot(query, KEYS.load([row, column]).T, scores)
    else:
        scores = dot(query, KEYS.load([row, column]).T)
    return scores


@triton.jit
def _attention_specialized_kernel(
    query_pointer, KEYS, KEYS_TAIL, VALUES, VALUES_TAIL, out_pointer, faults_pointer,
    cu_seqlens_pointer, tiles_pointer, tile_count, token_count, query_columns, score_scale,
    query_token_stride, query_head_stride, key_head_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SPARE: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
    LEAST: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    head, first_row, start, length = tile_of(
        tl.program_id(0), tile_count, tiles_pointer, cu_seqlens_pointer, BLOCK_QUERIES
    )
    # A tile that only fills up the list has nothing to do; a return would be more than the compiler can specialize.
    if first_row < length:
        key_column = head * key_head_stride
        value_column = head * value_head_stride

        queries = tl.make_tensor_descriptor(
            query_pointer, shape=[token_count, query_columns], strides=[query_token_stride, 1],
            block_shape=[BLOCK_QUERIES, MAIN],
        )  # fmt: skip
        query = queries.load([start + first_row, head * query_head_stride])
        if TAIL > 0:
            queries_tail = tl.make_tensor_descriptor(
                query_pointer, shape=[token_count, query_columns], strides=[query_token_stride, 1],
                block_shape=[BLOCK_QUERIES, TAIL],
            )  # fmt: skip
            query_tail = queries_tail.load([start + first_row, head * query_head_stride + MAIN])
        else:
            query_tail = query
        if SPARE:
            tail_columns = MAIN + tl.arange(0, TAIL)
            query_tail = tl.where(tail_columns[None, :] < HEAD_DIM, query_tail, tl.zeros_like(query_tail))

        # The last block, of 1 to BLOCK_KEYS keys, fixes the stabilizer.
        whole = (length - 1) // BLOCK_KEYS * BLOCK_KEYS
        inside = (tl.arange(0, BLOCK_KEYS) < length - whole)[None, :]
        scores = _scores(query, query_tail, KEYS, KEYS_TAIL, start + whole, key_column, TAIL, MAIN)
        scores = tl.where(inside, scores, -float("inf"))
        if SPARE:
            shift = (-tl.max(scores, 1)).to(query.dtype)
            query_tail = tl.where(tail_columns[None, :] == HEAD_DIM, shift[:, None], query_tail)
        else:
            stabilizer = tl.max(scores, 1) * score_scale
        row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
        accumulator = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
        accumulator_tail = accumulator
        if TAIL > 0:
            accumulator_tail = tl.zeros([BLOCK_QUERIES, TAIL], tl.float32)

        for key in tl.range(0, whole, BLOCK_KEYS, warp_specialize=True, num_stages=STAGES):
            scores = _scores(query, query_tail, KEYS, KEYS_TAIL, start + key, key_column, TAIL, MAIN)
            if SPARE:
                weights = tl.exp2(in_log2(scores, score_scale))
            elif ONLINE:
                maximum = tl.maximum(stabilizer, tl.max(scores, 1) * score_scale)
                weights = tl.exp2(scores * score_scale - maximum[:, None])
                correction = tl.exp2(stabilizer - maximum)
                row_sum = row_sum * correction + tl.sum(weights, 1)
                stabilizer = maximum
                accumulator = accumulator * correction[:, None]
                if TAIL > 0:
                    accumulator_tail = accumulator_tail * correction[:, None]
            else:
                weights = tl.exp2(scores * score_scale - stabilizer[:, None])
                row_sum += tl.sum(weights, 1)
            weights = weights.to(query.dtype)
            accumulator = dot(weights, VALUES.load([start + key, value_column]), accumulator)
            if TAIL > 0:
                accumulator_tail = dot(weights, VALUES_TAIL.load([start + key, value_column + MAIN]), accumulator_tail)

        scores = _scores(query, query_tail, KEYS, KEYS_TAIL, start + whole, key_column, TAIL, MAIN)
        scores = tl.where(inside, scores, -float("inf"))
        if SPARE:
            weights = tl.exp2(in_log2(scores, score_scale))
        else:
            weights = tl.exp2(scores * score_scale - stabilizer[:, None])
            row_sum += tl.sum(weights, 1)
        weights = weights.to(query.dtype)
        left = (tl.arange(0, BLOCK_KEYS) < length - whole)[:, None]
        value = VALUES.load([start + whole, value_column])
        value = tl.where(left, value, tl.zeros_like(value))
        accumulator = dot(weights, value, accumulator)
        if TAIL > 0:
            value_tail = VALUES_TAIL.load([start + whole, value_column + MAIN])
            value_tail = tl.where(left, value_tail, tl.zeros_like(value_tail))
            accumulator_tail = dot(weights, value_tail, accumulator_tail)

        if SPARE:
            row_sum = tl.sum(tl.where(tail_columns[None, :] == HEAD_DIM, accumulator_tail, 0.0), 1)
        rows = first_row + tl.arange(0, BLOCK_QUERIES)
        row_mask = rows < length
        out_pointers = out_pointer + tl.multiple_of(head.to(tl.int64) * out_head_stride, ALIGNMENT)
        out_pointers += (start + rows).to(tl.int64)[:, None] * out_token_stride
        if not ONLINE:
            sound = is_sound(accumulator, accumulator_tail, row_sum, LEAST, LIMIT, TAIL)
            faults = faults_pointer + head.to(tl.int64) * token_count + start + rows
            tl.store(faults, 1 - sound.to(tl.int8), mask=row_mask)
            # A faulty row's queries stay where they are, even where `out` is `q`: the repair needs them.
            row_mask = row_mask & sound
        store_rows(out_pointers, row_mask, accumulator, accumulator_tail, row_sum, HEAD_DIM, MAIN, TAIL)


def _triton_is_recent() -> bool:
    return tuple(int(part) for part in str(triton.__version__).split(".")[:2]) >= (3, 7)


def obstacle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int, config: FlashAttentionConfig, architecture: str
) -> str | None:
    """Why this launch cannot take the specialized kernel, in words; ``None`` where it can."""
    heads = Heads.of(head_dim, q.shape[2], q.dtype)
    computed = heads.main + heads.tail
    if architecture not in ("sm_90", "interpreter"):
        return f"the compiler specializes warps for sm_90, not for {architecture}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies 16-bit floats, not {q.dtype}"
    if (config.block_queries, config.num_warps) != (128, 4):
        return "it takes 128 query rows and 4 warps"
    if head_dim != computed:
        if not (spare_column(head_dim, heads.width, q.dtype) and heads.tail and heads.width >= computed):
            return f"a head of {head_dim} columns is computed as {computed}, and a descriptor masks none of them"
        if not _triton_is_recent():
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


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # torch's allocator hands out blocks of 512 bytes and knows the current stream and graph, which are the launch's.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    length, heads, width = tensor.shape
    whole = (heads - 1) * tensor.stride(1) + width
    return TensorDescriptor(tensor, [length, whole], [tensor.stride(0), 1], [rows, columns])


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
    """One program for each query tile of each head, and in bf16 a second launch for rows that left the safe range."""
    # The device's descriptor takes memory at launch, for which Triton asks the allocator of the current context.  The
    # caller's own stays as it is: ours is set in a copy of the context.
    contextvars.copy_context().run(_launch, q, k, v, out, segments, scale, config)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    segments: Segments,
    scale: float | None,
    config: FlashAttentionConfig,
) -> None:
    triton.set_allocator(_scratch)
    heads = Heads.of(out.shape[2], q.shape[2], q.dtype)
    tiles = segments.tiles(config.block_queries, q.device)
    tokens, count, _ = q.shape
    faults = None if q.dtype == torch.float16 else torch.empty(count, tokens, dtype=torch.int8, device=q.device)
    strides = stride_arguments(q, k, v, out)
    constants = _constants(heads, q.dtype, config, math.gcd(16, *strides[1::2]))
    parts = [
        _descriptor(tensor, config.block_keys, part) if part else None
        for tensor in (k, v)
        for part in (heads.main, heads.tail)
    ]
    _attention_specialized_kernel[(len(tiles) * count,)](
        q,
        *parts,
        out,
        faults,
        segments.cu_seqlens_on(q.device),
        tiles,
        len(tiles),
        tokens,
        (count - 1) * q.stride(1) + q.shape[2],
        score_factor(scale, alone=bool(constants["SPARE"])),
        q.stride(0),
        q.stride(1),
        k.stride(1),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        **constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if faults is not None:
        online_softmax.launch(q, k, v, out, segments, scale=scale, config=REPAIR, faults=faults)


def _constants(
    heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig, alignment: int
) -> dict[str, int | float | bool]:
    return {
        "HEAD_DIM": heads.head_dim,
        "MAIN": heads.main,
        "TAIL": heads.tail,
        "SPARE": heads.head_dim < heads.main + heads.tail,
        # Weights in fp16 leave too little room above the last block's maximum.
        "ONLINE": dtype == torch.float16,
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "ALIGNMENT": alignment,
        "LEAST": LEAST_SUM,
        "LIMIT": sum_limit(dtype),
        "STAGES": config.num_stages,
    }


def compile_spec(heads: Heads, dtype: torch.dtype, config: FlashAttentionConfig) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled."""
    name = configs.TRITON_TYPES[dtype]
    constants: dict[str, Any] = _constants(heads, dtype, config, math.gcd(heads.width, 16))
    strides = (
        "query_token_stride", "query_head_stride", "key_head_stride", "value_head_stride", "out_token_stride",
        "out_head_stride",
    )  # fmt: skip
    signature = {
        "query_pointer": f"*{name}",
        "KEYS": f"tensordesc<{name}[{config.block_keys}, {heads.main}]>",
        "KEYS_TAIL": f"tensordesc<{name}[{config.block_keys}, {heads.tail}]>",
        "VALUES": f"tensordesc<{name}[{config.block_keys}, {heads.main}]>",
        "VALUES_TAIL": f"tensordesc<{name}[{config.block_keys}, {heads.tail}]>",
        "out_pointer": f"*{name}",
        "faults_pointer": "*i8",
        "cu_seqlens_pointer": "*i32",
        "tiles_pointer": "*i32",
        **dict.fromkeys(("tile_count", "token_count", "query_columns"), "i32"),
        "score_scale": "fp32",
        **dict.fromkeys(strides, "i32"),
    }
    absent: tuple[str, ...] = () if heads.tail else ("KEYS_TAIL", "VALUES_TAIL")
    absent += ("faults_pointer",) if constants["ONLINE"] else ()
    softmax = "online" if constants["ONLINE"] else "spare column" if constants["SPARE"] else "fixed"
    if heads.scaled and constants["SPARE"]:
        absent += ("score_scale",)
        softmax += ", scaled queries"
    constants |= dict.fromkeys(absent)
    return CompileSpec(
        name=f"{name} {heads.text}, {config.block_queries}x{config.block_keys} warps {config.num_warps} "
        f"stages {config.num_stages}, {softmax}",
        kernel=_attention_specialized_kernel,
        signature=signature,
        constants=constants,
        divisible_by_16=tuple(
            stride
            for stride in strides
            if stride.endswith("token_stride") or (heads.head_dim if "out" in stride else heads.width) % 16 == 0
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=True,
        elements=config.block_queries * config.block_keys,
    )
