"""Bidirectional attention within segments of a packed batch: flash attention for rows of variable length.

    out[i] = Σ_j softmax_j(scale · q[i]·k[j]) v[j]        j over the rows of i's own segment, per head

Shapes: ``q``, ``k``, ``v`` and ``out`` are ``[T, H, head_dim]``, T the rows of all segments.  There is no padding and no
mask: a segment is a range of rows (:class:`.segments.Segments`).

One program owns ``block_queries`` query rows of one segment and one head, and walks that segment's keys in blocks of
``block_keys``, keeping the running maximum, the running sum and the output in fp32 registers (online softmax: Milakov
and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691).  Programs are numbered head by head, so that the
keys and values of one head stay in the L2 cache while all its tiles are worked off, long segments first.

FLOPs: 4 · head_dim · H · Σ length².  Bytes from memory: 4 · T · H · head_dim elements where one head's keys and values
fit the L2 cache (5 MB for 16 384 rows of 80 in bf16), as they practically always do.
"""

import math
from dataclasses import dataclass

import torch

from . import configs, dispatch
from ._triton import tl, triton
from .attention_reference import flash_attention_varlen_reference
from .configs import CompileSpec
from .device import dot
from .segments import Segments

__all__ = [
    "FlashAttentionConfig",
    "compile_spec",
    "compile_specs",
    "default_config",
    "flash_attention_varlen",
    "launch_flash_attention",
    "split_head_dim",
]

LARGEST_HEAD_DIM = 128
"""A wider head needs more registers per query row than two accumulators leave."""


@triton.jit
def _load_block(
    pointers, rows, row_limit, columns, COLUMN_LIMIT: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    # A block of rows × columns (or its transpose) with zeros where it leaves the segment or the head.
    if MASK_ROWS and MASK_COLUMNS:
        block = tl.load(pointers, mask=(rows < row_limit) & (columns < COLUMN_LIMIT), other=0.0)
    elif MASK_ROWS:
        block = tl.load(pointers, mask=rows < row_limit, other=0.0)
    elif MASK_COLUMNS:
        block = tl.load(pointers, mask=columns < COLUMN_LIMIT, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def _attend(
    query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
    key_pointers, value_pointers, keys_left, score_scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASK_KEYS: tl.constexpr,
):  # fmt: skip
    # One block of keys for one tile of queries: scores, their softmax so far, and the values they weigh.
    keys = tl.arange(0, BLOCK_KEYS)
    columns = tl.arange(0, MAIN)
    PARTIAL: tl.constexpr = HEAD_DIM < MAIN
    key = _load_block(
        key_pointers + columns[:, None], keys[None, :], keys_left, columns[:, None], HEAD_DIM, MASK_KEYS, PARTIAL
    )
    value = _load_block(
        value_pointers + columns[None, :], keys[:, None], keys_left, columns[None, :], HEAD_DIM, MASK_KEYS, PARTIAL
    )
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        PARTIAL_TAIL: tl.constexpr = HEAD_DIM < MAIN + TAIL
        key_tail = _load_block(
            key_pointers + tail_columns[:, None], keys[None, :], keys_left, tail_columns[:, None],
            HEAD_DIM, MASK_KEYS, PARTIAL_TAIL,
        )  # fmt: skip
        value_tail = _load_block(
            value_pointers + tail_columns[None, :], keys[:, None], keys_left, tail_columns[None, :],
            HEAD_DIM, MASK_KEYS, PARTIAL_TAIL,
        )  # fmt: skip
        scores = dot(query, key, dot(query_tail, key_tail))
    else:
        scores = dot(query, key)
    if MASK_KEYS:
        scores = tl.where(keys[None, :] < keys_left, scores, -float("inf"))

    maximum = tl.maximum(row_maximum, tl.max(scores, 1) * score_scale)
    weights = tl.exp2(scores * score_scale - maximum[:, None])
    correction = tl.exp2(row_maximum - maximum)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    # No weight exceeds 1 by more than a rounding, so fp16 holds them as safely as bf16.
    weights = weights.to(value.dtype)
    accumulator = dot(weights, value, accumulator * correction[:, None])
    if TAIL > 0:
        accumulator_tail = dot(weights, value_tail, accumulator_tail * correction[:, None])
    return accumulator, accumulator_tail, maximum, row_sum


@triton.jit
def _flash_attention_kernel(
    query_pointer, key_pointer, value_pointer, out_pointer, cu_seqlens_pointer, tiles_pointer, tile_count, score_scale,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride,
    value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of query rows (a line of the tile list) of one head, and every key of its segment.
    program = tl.program_id(0)
    head = (program // tile_count).to(tl.int64)
    tile = program % tile_count
    segment = tl.load(tiles_pointer + 2 * tile)
    first_row = tl.load(tiles_pointer + 2 * tile + 1) * BLOCK_QUERIES
    start = tl.load(cu_seqlens_pointer + segment)
    length = tl.load(cu_seqlens_pointer + segment + 1) - start
    start = start.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    columns = tl.arange(0, MAIN)
    PARTIAL: tl.constexpr = HEAD_DIM < MAIN
    # Triton sees a stride's divisibility by 16 or nothing; head dim 72 needs to hear of the 8 to load 16 bytes at once.
    query_pointers = query_pointer + tl.multiple_of(head * query_head_stride, ALIGNMENT)
    query_pointers += (start + rows)[:, None] * query_token_stride
    query = _load_block(
        query_pointers + columns[None, :], rows[:, None], length, columns[None, :], HEAD_DIM, True, PARTIAL
    )
    accumulator = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
    if TAIL > 0:
        tail_columns = MAIN + tl.arange(0, TAIL)
        PARTIAL_TAIL: tl.constexpr = HEAD_DIM < MAIN + TAIL
        query_tail = _load_block(
            query_pointers + tail_columns[None, :], rows[:, None], length, tail_columns[None, :],
            HEAD_DIM, True, PARTIAL_TAIL,
        )  # fmt: skip
        accumulator_tail = tl.zeros([BLOCK_QUERIES, TAIL], tl.float32)
    else:
        # Stand-ins that nothing reads: the two forms of the kernel then share one signature of the loop.
        query_tail = query
        accumulator_tail = accumulator
    row_maximum = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)

    keys = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    key_pointers = key_pointer + tl.multiple_of(head * key_head_stride, ALIGNMENT)
    key_pointers += start * key_token_stride + keys[None, :] * key_token_stride
    value_pointers = value_pointer + tl.multiple_of(head * value_head_stride, ALIGNMENT)
    value_pointers += start * value_token_stride + keys[:, None] * value_token_stride
    key_step = tl.full([], BLOCK_KEYS, tl.int64) * key_token_stride
    value_step = tl.full([], BLOCK_KEYS, tl.int64) * value_token_stride

    # Whole blocks need no mask: a mask on every score would cost a fifth of the loop's instructions.
    whole = length // BLOCK_KEYS * BLOCK_KEYS
    for _ in tl.range(0, whole, BLOCK_KEYS):
        accumulator, accumulator_tail, row_maximum, row_sum = _attend(
            query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
            key_pointers, value_pointers, BLOCK_KEYS, score_scale, HEAD_DIM, MAIN, TAIL, BLOCK_KEYS, False,
        )  # fmt: skip
        key_pointers += key_step
        value_pointers += value_step
    if whole < length:
        accumulator, accumulator_tail, row_maximum, row_sum = _attend(
            query, query_tail, accumulator, accumulator_tail, row_maximum, row_sum,
            key_pointers, value_pointers, length - whole, score_scale, HEAD_DIM, MAIN, TAIL, BLOCK_KEYS, True,
        )  # fmt: skip

    normaliser = (1.0 / row_sum)[:, None]
    out_pointers = out_pointer + tl.multiple_of(head * out_head_stride, ALIGNMENT)
    out_pointers += (start + rows)[:, None] * out_token_stride
    result = (accumulator * normaliser).to(out_pointer.dtype.element_ty)
    row_mask = rows[:, None] < length
    tl.store(out_pointers + columns[None, :], result, mask=row_mask & (columns[None, :] < HEAD_DIM))
    if TAIL > 0:
        result = (accumulator_tail * normaliser).to(out_pointer.dtype.element_ty)
        tl.store(out_pointers + tail_columns[None, :], result, mask=row_mask & (tail_columns[None, :] < HEAD_DIM))


@dataclass(frozen=True)
class FlashAttentionConfig:
    """How one launch divides the work."""

    block_queries: int
    """Query rows of one program."""
    block_keys: int
    """Keys taken at a time; it decides the order of the sums over keys, hence the bits of the result."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in flight from memory."""


def split_head_dim(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """``head_dim`` as a power of two and a tail that is zero or a power of two, together covering it, each at least 16.

    Tensor cores take power-of-two blocks.  Rounding 80 up to 128 would compute 60 % more than needed; 64 + 16 computes
    nothing in vain, and 72 = 64 + 16 wastes 8 columns.  Where the tail would be as wide as the main part (104 = 64 + 64)
    the two are one block, masked: a third part would add a tensor-core round trip to every block of keys.  fp32 keeps
    the two apart: without tensor cores a thread holds whole rows of a dot's operands in registers, and 64 is its limit.
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    if dtype == torch.float32:
        main = min(main, 64)
    if head_dim <= main:
        return main, 0
    tail = max(16, 1 << (head_dim - main - 1).bit_length())
    return (main, tail) if tail < main or (main == 64 and dtype == torch.float32) else (2 * main, 0)


# The widest head that a configuration suits → the configuration, and the one for segments of at most 64 rows, which
# would leave half of a 128-row tile idle.  Each was compiled ahead of time and chosen for no spills, then for the fewest
# instructions per score at eight resident warps or more (STATIC.md).
#
# The second may differ from the first in block_queries and num_warps only: a segment's bits must not depend on what else
# is in the pack, so the order of its sums over keys may not.  For the same reason there is no short form where the
# compiler lays a 64-row tile out differently across lanes (Blackwell's tensor memory, AMD's matrix cores).
_DEFAULTS: dict[str, tuple[tuple[int, FlashAttentionConfig, FlashAttentionConfig], ...]] = {
    architecture: tuple(
        (widest, FlashAttentionConfig(*usual), FlashAttentionConfig(*short)) for widest, usual, short in rows
    )
    for architecture, rows in {
        "sm_80": (
            (64, (128, 128, 8, 2), (64, 128, 4, 2)),
            (96, (128, 64, 8, 2), (64, 64, 4, 2)),
            (128, (128, 32, 8, 2), (128, 32, 8, 2)),
        ),
        "sm_89": (
            (64, (128, 128, 8, 2), (64, 128, 4, 2)),
            (80, (128, 64, 8, 2), (64, 64, 4, 2)),
            (96, (64, 64, 4, 2), (64, 64, 4, 2)),
            (128, (128, 32, 8, 2), (128, 32, 8, 2)),
        ),
        "sm_90": (
            (64, (128, 128, 4, 2), (64, 128, 4, 2)),
            (80, (128, 64, 4, 3), (64, 64, 4, 3)),
            (128, (128, 128, 8, 2), (64, 128, 4, 2)),
        ),
        "sm_100": (
            (64, (128, 64, 4, 3), (128, 64, 4, 3)),
            (128, (128, 128, 8, 2), (128, 128, 8, 2)),
        ),
        "gfx942": ((128, (128, 64, 4, 1), (128, 64, 4, 1)),),
        "gfx950": ((128, (128, 64, 4, 1), (128, 64, 4, 1)),),
        "interpreter": ((128, (32, 32, 4, 1), (32, 32, 4, 1)),),
    }.items()
}
_FLOAT32 = FlashAttentionConfig(block_queries=16, block_keys=16, num_warps=8, num_stages=1)
"""fp32 multiplies without tensor cores: a thread holds its operands in registers, and only the smallest tile's fit."""
_FLOAT32_AMD = FlashAttentionConfig(block_queries=64, block_keys=32, num_warps=4, num_stages=1)
"""AMD's matrix cores do multiply fp32."""


def default_config(
    head_dim: int, dtype: torch.dtype, architecture: str, *, longest: int | None = None
) -> FlashAttentionConfig:
    """The configuration to take where nothing was measured.

    ``longest``, the rows of the longest segment, may halve ``block_queries`` and does not change a bit of the result.
    """
    if dtype == torch.float32 and architecture != "interpreter":
        return _FLOAT32_AMD if architecture.startswith("gfx") else _FLOAT32
    for widest, usual, short in _DEFAULTS[configs.nearest_architecture(architecture)]:
        if head_dim <= widest:
            return short if longest is not None and longest <= short.block_queries else usual
    raise ValueError(f"head_dim {head_dim} exceeds the limit of {LARGEST_HEAD_DIM}")


@dispatch.on_device_of_first
def launch_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    config: FlashAttentionConfig,
) -> None:
    """Launches one program for each query tile of each head; the arguments are valid, and at least one row exists."""
    _, heads, head_dim = q.shape
    main, tail = split_head_dim(head_dim, q.dtype)
    tiles = segments.tiles(config.block_queries, q.device)
    strides = [stride for tensor in (q, k, v, out) for stride in tensor.stride()[:2]]
    _flash_attention_kernel[(len(tiles) * heads,)](
        q,
        k,
        v,
        out,
        segments.cu_seqlens_on(q.device),
        tiles,
        len(tiles),
        # exp2 is one instruction where exp is several: the scores are in units of log 2 from the start.
        scale * math.log2(math.e),
        *strides,
        HEAD_DIM=head_dim,
        MAIN=main,
        TAIL=tail,
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        ALIGNMENT=math.gcd(16, *strides[1::2]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    config: FlashAttentionConfig | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to the rows of its own segment, head by head.

    Args:
        q: queries ``[T, H, head_dim]``, fp32, fp16 or bf16, ``head_dim`` at most 128.
        k: keys, shape, dtype and device of ``q``.
        v: values, likewise.  All three may have any strides between tokens and heads (views of a fused projection
            ``[T, 3, H, head_dim]``); the elements of a head are adjacent.
        segments: the division of the T rows.
        scale: what the scores are multiplied by; ``head_dim ** -0.5`` by default; positive.
        out: where to write, ``[T, H, head_dim]``, strides as free as those of ``q``.  It may be ``q`` itself, not
            otherwise overlap the inputs.
        config: the launch configuration; :func:`default_config` by default.

    Returns:
        ``[T, H, head_dim]`` in the dtype of ``q``: ``out``, or a new contiguous tensor.  A segment's rows depend on
        that segment alone, bit for bit, for one configuration.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices, strides, ``segments`` or ``scale`` do not fit.
    """
    _check(q, k, v, segments, out)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    # The running maximum is taken before the scaling, and -inf marks what lies outside: neither sign nor zero may change.
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale must be a positive, finite fp32 number, got {scale}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    if not dispatch.runs_kernel(q):
        return flash_attention_varlen_reference(q, k, v, segments, scale=scale, out=out)
    if config is None:
        architecture = configs.architecture(q.device)
        config = default_config(q.shape[-1], q.dtype, architecture, longest=segments.longest)
    launch_flash_attention(q, k, v, out, segments, scale=scale, config=config)
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, out: torch.Tensor | None) -> None:
    """Raises unless the arguments of :func:`flash_attention_varlen` fit together."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}; see Segments.from_lengths")
    named = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out})
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if q.dim() != 3:
        raise ValueError(f"q must be [tokens, heads, head_dim], got shape {list(q.shape)}")
    for name, tensor in named.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name} must be like q, {list(q.shape)} {q.dtype} on {q.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(f"the elements of a head of {name} must be adjacent, got strides {tensor.stride()}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention takes float32, float16 or bfloat16, got {q.dtype}")
    if not 1 <= q.shape[2] <= LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {LARGEST_HEAD_DIM}, got {q.shape[2]} in q {list(q.shape)}")
    if q.shape[0] != segments.total:
        raise ValueError(f"q {list(q.shape)} has {q.shape[0]} rows, but {segments} covers {segments.total}")


def compile_spec(head_dim: int, dtype: torch.dtype, config: FlashAttentionConfig) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled, for heads of ``head_dim``."""
    main, tail = split_head_dim(head_dim, dtype)
    name = configs.TRITON_TYPES[dtype]
    tensors = ("query", "key", "value", "out")
    aligned = head_dim % 16 == 0
    token_strides = tuple(f"{tensor}_token_stride" for tensor in tensors)
    head_strides = tuple(f"{tensor}_head_stride" for tensor in tensors)
    return CompileSpec(
        name=f"{name} head {head_dim} = {main}{f' + {tail}' if tail else ''}, {config.block_queries}x{config.block_keys} "
        f"warps {config.num_warps} stages {config.num_stages}",
        kernel=_flash_attention_kernel,
        signature={
            **{f"{tensor}_pointer": f"*{name}" for tensor in tensors},
            "cu_seqlens_pointer": "*i32",
            "tiles_pointer": "*i32",
            "tile_count": "i32",
            "score_scale": "fp32",
            **dict.fromkeys(token_strides + head_strides, "i32"),
        },
        constants={
            "HEAD_DIM": head_dim,
            "MAIN": main,
            "TAIL": tail,
            "BLOCK_QUERIES": config.block_queries,
            "BLOCK_KEYS": config.block_keys,
            "ALIGNMENT": math.gcd(head_dim, 16),
        },
        divisible_by_16=token_strides + (head_strides if aligned else ()),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=dtype != torch.float32,
        elements=config.block_queries * config.block_keys,
    )


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The default configurations of the head dims that vision towers have, and fp16 and fp32 of the commonest one."""

    def of(head_dim: int, dtype: torch.dtype, longest: int | None = None) -> CompileSpec:
        return compile_spec(head_dim, dtype, default_config(head_dim, dtype, architecture, longest=longest))

    specs = [of(head_dim, torch.bfloat16) for head_dim in (64, 72, 80, 88, 96, 104, 128)]
    specs += [of(80, torch.bfloat16, longest=64), of(80, torch.float16), of(80, torch.float32)]
    # Where short segments have no form of their own the list names one configuration twice.
    return list({spec.name: spec for spec in specs}.values())
