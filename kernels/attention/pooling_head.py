"""Attention of one learned query to the rows of each image: the pooling head of SigLIP.

    out[s] = Σ_j softmax_j(scale · query·k[j]) v[j]        j over the rows of segment s, per head

It is the attention of transformers' ``SiglipMultiheadAttentionPoolingHead`` (``torch.nn.MultiheadAttention`` with a
probe) between its projections: the probe is the same for every image, so its query is projected once and not per
image.

Shapes: query ``[H, head_dim]``, kv ``[T, 2, H, head_dim]`` (keys at 0, values at 1), T the rows of all segments, out
``[S, H, head_dim]``.  One program owns one head of one segment and walks its rows in blocks of ``block_keys``, keeping
the running maximum, the running sum and the output in fp32 (online softmax: Milakov and Gimelshein, arXiv 1805.02867).
A single query leaves nothing for tensor cores to do: the kernel is bound by memory, reads ``2·T·H·head_dim`` elements
once, and does as many multiplications and additions.  Few programs run (12 to 16 heads for each image), yet next to
the layers before it the head is cheap.
"""

import math
from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel
from ..runtime.segments import Segments

__all__ = [
    "AttentionPoolingConfig",
    "attention_pooling",
    "attention_pooling_reference",
    "compile_specs",
    "default_config",
    "launch_attention_pooling",
]

LARGEST_HEAD_DIM = 128
"""A wider head is beyond what a program of the shipped configurations holds in registers."""

_CHUNK = 2**20  # fp32 keys and values that the reference holds at a time


def attention_pooling_reference(
    query: torch.Tensor, kv: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Two products and a softmax in fp32, segment by segment and a few heads at a time.

    A segment's bits depend on nothing else: every call sees one segment, in fresh memory whose alignment is always the
    same, and how many heads it takes follows from that segment's length.
    """
    heads, head_dim = query.shape
    asked = (query.float() * scale).unsqueeze(2)
    start = 0
    for segment, length in enumerate(segments.lengths):
        rows = kv[start : start + length]
        start += length
        step = max(1, _CHUNK // (2 * length * head_dim))
        for first in range(0, heads, step):
            some = slice(first, first + step)
            # Copied, so that neither strides nor place decide how torch multiplies.
            fused = rows[:, :, some].permute(1, 2, 0, 3)
            keys, values = torch.empty(fused.shape, dtype=torch.float32, device="cpu").copy_(fused)
            weights = torch.softmax(torch.bmm(keys, asked[some]), dim=1)
            out[segment, some] = torch.bmm(weights.transpose(1, 2), values).squeeze(1)
    return out


@triton.jit
def _attention_pooling_kernel(
    QUERY, KV, OUT, CU_SEQLENS, heads, score_scale,
    query_head_stride, kv_token_stride, kv_part_stride, kv_head_stride, out_segment_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # Owns one head of one segment.
    program = tl.program_id(0)
    segment = program // heads
    head = (program - segment * heads).to(tl.int64)
    start = tl.load(CU_SEQLENS + segment)
    length = tl.load(CU_SEQLENS + segment + 1) - start

    column = tl.arange(0, COLUMNS)
    inside = column < HEAD_DIM
    query = tl.load(QUERY + head * query_head_stride + column, mask=inside, other=0.0).to(tl.float32) * score_scale
    keys = tl.arange(0, BLOCK_KEYS)
    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    pointers = KV + start.to(tl.int64) * kv_token_stride + tl.multiple_of(head * kv_head_stride, ALIGNMENT)
    pointers += keys.to(tl.int64)[:, None] * kv_token_stride + column[None, :]
    to_values = tl.multiple_of(tl.full([], 1, tl.int64) * kv_part_stride, ALIGNMENT)
    step = tl.full([], BLOCK_KEYS, tl.int64) * kv_token_stride

    maximum = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulator = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, length, BLOCK_KEYS):
        present = first + keys < length
        mask = present[:, None] & inside[None, :]
        key = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(pointers + to_values, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(present, tl.sum(key * query[None, :], axis=1), -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        correction = tl.exp2(maximum - higher)
        total = total * correction + tl.sum(weights, axis=0)
        accumulator = accumulator * correction + tl.sum(weights[:, None] * value, axis=0)
        maximum = higher
        pointers += step
    target = OUT + segment.to(tl.int64) * out_segment_stride + head * out_head_stride + column
    tl.store(target, (accumulator / total).to(OUT.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class AttentionPoolingConfig:
    """Rows of a segment taken at a time (it decides the order of the sums, hence the bits), and warps."""

    block_keys: int
    num_warps: int


def _columns(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def default_config(head_dim: int, architecture: str) -> AttentionPoolingConfig:
    """8192 keys and 8192 values at a time, 32 of each a thread (16 on AMD, whose warps are twice as wide).

    The lengths of the segments have no say: an image's bits must not depend on what else is in the pack.
    """
    if architecture == "interpreter":
        return AttentionPoolingConfig(block_keys=64, num_warps=4)
    return AttentionPoolingConfig(block_keys=8192 // max(64, _columns(head_dim)), num_warps=8)


@on_device_of_first
def launch_attention_pooling(
    query: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    out: torch.Tensor,
    *,
    scale: float,
    config: AttentionPoolingConfig,
) -> None:
    """Launches one program for each head of each segment; the arguments are valid, and there is one at least."""
    heads, head_dim = query.shape
    token_stride, part_stride, head_stride = kv.stride()[:3]
    _attention_pooling_kernel[(segments.count * heads,)](
        query,
        kv,
        out,
        segments.cu_seqlens_on(kv.device),
        heads,
        # exp2 is one instruction where exp is several: the scores are in units of log 2 from the start.
        scale * math.log2(math.e),
        query.stride(0),
        token_stride,
        part_stride,
        head_stride,
        out.stride(0),
        out.stride(1),
        HEAD_DIM=head_dim,
        COLUMNS=_columns(head_dim),
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, part_stride, head_stride),
        num_warps=config.num_warps,
        num_stages=1,
    )


def _check(name: str, tensor: torch.Tensor, query: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}; query is {query.dtype} on {query.device}, they have to agree"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be {shape}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a head have to be "
            "adjacent (last stride 1)"
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
    """What one query takes from each segment, head by head: softmax attention in fp32, rounded once.

    Args:
        query: ``[H, head_dim]`` float32, float16 or bfloat16, ``head_dim`` at most 128, last stride 1; the same for
            every segment.
        kv: keys and values ``[T, 2, H, head_dim]`` of ``query``'s dtype; any strides but the last, which is 1.
        segments: the division of the T rows, one segment for each image; none may be empty.
        scale: what the scores are multiplied by; ``head_dim ** -0.5`` by default; positive.
        out: where to write, ``[S, H, head_dim]``, any strides but the last, which is 1; must not overlap ``kv``.
        config: how to launch the kernel; the default is chosen for the head's width and the device.

    Returns:
        ``[S, H, head_dim]``, S the number of segments: ``out``, or a new contiguous tensor.  A segment's part of it
        depends on that segment alone, bit for bit, for one configuration.

    Raises:
        ValueError: shapes, strides or ``segments`` that do not fit, a segment without rows, a scale that is not
            positive.
        TypeError: dtypes or devices that differ, a dtype that is none of the three, or ``segments`` of another type.
    """
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}; see Segments.from_lengths")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"query is {query.dtype}; attention_pooling takes float32, float16 and bfloat16")
    if query.dim() != 2 or not 1 <= query.shape[1] <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; it has to be [heads, head_dim] with "
            f"1 <= head_dim <= {LARGEST_HEAD_DIM}"
        )
    heads, head_dim = query.shape
    _check("query", query, query, (heads, head_dim))
    _check("kv", kv, query, (segments.total, 2, heads, head_dim))
    if 0 in segments.lengths:
        raise ValueError(
            f"segment {segments.lengths.index(0)} of {segments} has no rows; an image needs at least one row"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale is {scale}; it has to be a positive, finite float32 number")
    out = query.new_empty(segments.count, heads, head_dim) if out is None else out
    _check("out", out, query, (segments.count, heads, head_dim))
    if not out.numel():
        return out
    if not runs_kernel(query):
        return attention_pooling_reference(query, kv, segments, scale=scale, out=out)
    config = config or default_config(head_dim, configs.architecture(query.device))
    launch_attention_pooling(query, kv, segments, out, scale=scale, config=config)
    return out


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configurations: SigLIP's heads (64 wide in base, 72 in so400m), every dtype, and the widest."""
    variants = [(64, torch.bfloat16), (72, torch.bfloat16), (72, torch.float16), (72, torch.float32)]
    variants += [(LARGEST_HEAD_DIM, torch.bfloat16)]
    return [_compile_spec(head_dim, dtype, default_config(head_dim, architecture)) for head_dim, dtype in variants]


def _compile_spec(head_dim: int, dtype: torch.dtype, config: AttentionPoolingConfig) -> CompileSpec:
    element = TRITON_TYPES[dtype]
    head_strides = ("query_head_stride", "kv_head_stride", "out_head_stride")
    strides = ("kv_token_stride", "kv_part_stride", "out_segment_stride")
    return CompileSpec(
        name=f"attention_pooling {element} head {head_dim}, {config.block_keys} keys",
        kernel=_attention_pooling_kernel,
        signature=dict.fromkeys(("QUERY", "KV", "OUT"), f"*{element}")
        | {"CU_SEQLENS": "*i32", "heads": "i32", "score_scale": "fp32"}
        | dict.fromkeys((*head_strides, *strides), "i32"),
        constants={
            "HEAD_DIM": head_dim,
            "COLUMNS": _columns(head_dim),
            "BLOCK_KEYS": config.block_keys,
            "ALIGNMENT": math.gcd(head_dim, 16),
        },
        divisible_by_16=strides + (head_strides if head_dim % 16 == 0 else ()),
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=config.block_keys,
    )
