"""Attention of one learned query to the rows of each image: the pooling head of SigLIP.

    out[s] = Σ_j softmax_j(scale · query·k[j]) v[j]        j over the rows of segment s, per head

It is the attention of transformers' ``SiglipMultiheadAttentionPoolingHead`` (``torch.nn.MultiheadAttention`` with a
probe) between its projections: the probe is the same for every image, so its query is projected once.

Shapes: query ``[H, head_dim]``, kv ``[T, 2, H, head_dim]`` (keys at 0, values at 1), T the rows of all segments, out
``[S, H, head_dim]``.  One program owns one head of one segment and walks its rows in blocks of ``block_keys``, keeping
the running maximum, the running sum and the output in fp32 (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
A single query leaves no work for tensor cores: the kernel is memory bound, reads ``2·T·H·head_dim`` elements once, and
does as many multiplications and additions.  Few programs run (12 to 16 heads per image), but the layers before it cost far
more.
"""

import math
from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_rows, checked_output, next_power_of_two
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from ..runtime.segments import Segments

LARGEST_HEAD_DIM = 128
"""A wider head exceeds the registers of a program in the default configurations."""
CHUNK = 2**20
"""fp32 keys and values per chunk of the reference."""


def attention_pooling_reference(
    query: torch.Tensor, kv: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Two matmuls and a softmax in fp32, segment by segment and a few heads at a time.

    A segment's bits depend on nothing else: every call sees one segment, in fresh memory whose alignment is always the
    same, and its number of heads depends on that segment's length alone.
    """
    heads, head_dim = query.shape
    scaled = (query.float() * scale).unsqueeze(2)
    start = 0
    for segment, length in enumerate(segments.lengths):
        rows = kv[start : start + length]
        start += length
        step = max(1, CHUNK // (2 * length * head_dim))
        for first in range(0, heads, step):
            some = slice(first, first + step)
            # Copied, so that neither strides nor addresses decide how torch multiplies.
            fused = rows[:, :, some].permute(1, 2, 0, 3)
            keys, values = torch.empty(fused.shape, dtype=torch.float32, device="cpu").copy_(fused)
            weights = torch.softmax(torch.bmm(keys, scaled[some]), dim=1)
            out[segment, some] = torch.bmm(weights.transpose(1, 2), values).squeeze(1)
    return out


@triton.jit
def _attention_pooling_kernel(
    q_ptr, kv_ptr, out_ptr, cu_seqlens_ptr, heads, score_scale,
    stride_qh, stride_kvt, stride_kvp, stride_kvh, stride_os, stride_oh,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # One program owns one head of one segment.
    program = tl.program_id(0)
    segment = program // heads
    head = (program - segment * heads).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + segment)
    length = tl.load(cu_seqlens_ptr + segment + 1) - start

    column = tl.arange(0, COLUMNS)
    inside = column < HEAD_DIM
    query = tl.load(q_ptr + head * stride_qh + column, mask=inside, other=0.0).to(tl.float32) * score_scale
    keys = tl.arange(0, BLOCK_KEYS)
    # Triton only infers divisibility by 16.  The hint by 8 lets head_dim=72 use 16-byte loads.
    ptrs = kv_ptr + start.to(tl.int64) * stride_kvt + tl.multiple_of(head * stride_kvh, ALIGNMENT)
    ptrs += keys.to(tl.int64)[:, None] * stride_kvt + column[None, :]
    to_values = tl.multiple_of(tl.full([], 1, tl.int64) * stride_kvp, ALIGNMENT)
    step = tl.full([], BLOCK_KEYS, tl.int64) * stride_kvt

    maximum = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulator = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, length, BLOCK_KEYS):
        present = first + keys < length
        mask = present[:, None] & inside[None, :]
        key = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(ptrs + to_values, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(present, tl.sum(key * query[None, :], axis=1), -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        correction = tl.exp2(maximum - higher)
        total = total * correction + tl.sum(weights, axis=0)
        accumulator = accumulator * correction + tl.sum(weights[:, None] * value, axis=0)
        maximum = higher
        ptrs += step
    target = out_ptr + segment.to(tl.int64) * stride_os + head * stride_oh + column
    tl.store(target, (accumulator / total).to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class AttentionPoolingConfig:
    """Rows of a segment per loop iteration (they decide the order of the sums, hence the bits), and warps."""

    block_keys: int
    num_warps: int


def _columns(head_dim: int) -> int:
    return max(16, next_power_of_two(head_dim))


def default_config(head_dim: int, architecture: str) -> AttentionPoolingConfig:
    """8192 keys and 8192 values at a time: 32 of each per thread, 16 on AMD.

    The lengths of the segments have no effect: an image's bits must not depend on the rest of the batch.
    """
    if architecture == "interpreter":
        return AttentionPoolingConfig(block_keys=64, num_warps=4)
    return AttentionPoolingConfig(block_keys=8192 // max(64, _columns(head_dim)), num_warps=8)


def launch_attention_pooling(
    query: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    out: torch.Tensor,
    *,
    scale: float,
    config: AttentionPoolingConfig,
) -> None:
    """Launches one program per head and segment, for valid, non-empty tensors."""
    heads, head_dim = query.shape
    launch(
        _attention_pooling_kernel,
        (segments.count * heads,),
        query,
        kv,
        out,
        segments.cu_seqlens_on(kv.device),
        heads,
        # exp2 is one instruction where exp is several: the scores are in units of log 2 from the start.
        scale * math.log2(math.e),
        query.stride(0),
        *kv.stride()[:3],
        *out.stride()[:2],
        HEAD_DIM=head_dim,
        COLUMNS=_columns(head_dim),
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, *kv.stride()[1:3]),
        num_warps=config.num_warps,
        num_stages=1,
    )


def attention_pooling(
    query: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    config: AttentionPoolingConfig | None = None,
) -> torch.Tensor:
    """Computes softmax attention of one query to each segment, head by head, in fp32 and rounded once.

    Args:
        query: ``[H, head_dim]`` float32, float16 or bfloat16, ``head_dim`` at most 128, last stride 1; the same for
            every segment.
        kv: keys and values ``[T, 2, H, head_dim]`` of ``query``'s dtype; any strides but the last, which is 1.
        segments: lengths of the S segments, one per image, T rows in total; none may be empty.
        scale: positive factor of the scores; ``head_dim ** -0.5`` by default.
        out: output ``[S, H, head_dim]``, any strides but the last, which is 1; a new tensor by default; must not overlap
            ``kv``.
        config: launch configuration.

    Returns:
        ``out``.  A segment's part depends on that segment alone, bit for bit, for one configuration.

    Raises:
        ValueError: a shape, stride or scale does not fit, or a segment is empty.
        TypeError: a dtype or device does not fit, or ``segments`` has another type.
    """
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}; use Segments.from_lengths")
    check_float("query", query)
    if query.dim() != 2 or not 1 <= query.shape[1] <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"query must be [heads, head_dim] with head_dim from 1 to {LARGEST_HEAD_DIM}, got {tuple(query.shape)}"
        )
    heads, head_dim = query.shape
    check_rows("query", query, (heads, head_dim), query)
    check_rows("kv", kv, (segments.total, 2, heads, head_dim), query)
    if 0 in segments.lengths:
        raise ValueError(
            f"segments must not be empty, got {segments} with segment {segments.lengths.index(0)} of 0 rows"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale must be a positive, finite fp32 number, got {scale}")
    out = checked_output(out, (segments.count, heads, head_dim), query)
    if not out.numel():
        return out
    if not runs_kernel(query):
        return attention_pooling_reference(query, kv, segments, scale=scale, out=out)
    config = config or default_config(head_dim, configs.architecture(query.device))
    launch_attention_pooling(query, kv, segments, out, scale=scale, config=config)
    return out
