"""Bidirectional attention within the segments of a packed batch: flash attention for rows of variable length.

    out[i] = Σ_j softmax_j(scale · q[i]·k[j]) v[j]        j over the rows of the segment of i, per head

Shapes: ``q``, ``k``, ``v`` and ``out`` are ``[T, H, head_dim]``; T counts the rows of all segments.  Rows are not padded
and there is no mask: a segment is a range of rows (:class:`..runtime.segments.Segments`).

One program owns ``block_queries`` query rows of one segment and one head, and walks that segment's keys in blocks of
``block_keys``.  Programs are numbered head by head, long segments first, so that the keys and values of one head stay in
the L2 cache while all its tiles are computed.  The configuration's ``variant`` selects one of three kernels:

====================  ==============================================================================================
``"online"``          :mod:`.online_softmax`: supports every launch
``"fixed"``           :mod:`.fixed_max`: no running maximum in the loop, two thirds of the instructions; tiles that
                      overflow are recomputed in the same program
``"single_block"``    :mod:`.single_block`: segments that fit one block of keys
====================  ==============================================================================================

FLOPs: 4 · head_dim · H · Σ length².  Bytes from memory: 4 · T · H · head_dim elements if one head's keys and values fit
the L2 cache (5 MB for 16 384 rows of 80 in bf16), as they do in practice.
"""

import math
from typing import Any

import torch

from ..runtime import config as configs
from ..runtime import dispatch
from ..runtime.checks import check_float, check_rows, check_tensor
from ..runtime.registry import lookup
from ..runtime.segments import Segments
from . import fixed_max, online_softmax, single_block
from .common import FlashAttentionConfig, LaunchArguments, Variant
from .torch_reference import flash_attention_varlen_reference

LARGEST_HEAD_DIM = 128
"""A wider head needs more registers per query row than two accumulators leave."""
_MODULES: dict[Variant, Any] = {
    "online": online_softmax,
    "fixed": fixed_max,
    "single_block": single_block,
}
SINGLE_BLOCK_LENGTH = 64
"""The longest segment for which the default is a single block: more scores would fill the registers."""

# Widest head → the configuration, and the one for segments of at most 64 rows, which would leave half of a 128-row tile
# idle.  Each was compiled ahead of time and chosen for no spills, then for the fewest instructions per score at eight
# resident warps or more (STATIC.md).
#
# The second may differ from the first in block_queries and num_warps only: a segment's bits must not depend on the rest of
# the batch, so the order of its sums over keys may not either.  For the same reason there is no short form where the
# compiler lays a 64-row tile out differently across lanes (Blackwell's tensor memory, AMD's matrix cores).
_Rows = tuple[tuple[int, tuple[int, int, int, int], tuple[int, int, int, int]], ...]
_ONLINE: dict[str, _Rows] = {
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
    "sm_120": (
        (64, (128, 128, 8, 2), (64, 128, 4, 2)),
        (80, (64, 64, 4, 2), (64, 64, 4, 2)),
        (96, (128, 64, 8, 1), (128, 64, 8, 1)),
        (128, (128, 32, 8, 1), (128, 32, 8, 1)),
    ),
    "gfx942": ((128, (128, 64, 4, 1), (128, 64, 4, 1)),),
    "gfx950": ((128, (128, 64, 4, 1), (128, 64, 4, 1)),),
    "interpreter": ((128, (32, 32, 4, 1), (32, 32, 4, 1)),),
}
# The same for the fixed softmax offset in bf16, where the compiler takes it without spills.
_FIXED: dict[str, _Rows] = {
    "sm_80": (
        (64, (128, 128, 8, 2), (128, 128, 8, 2)),
        (96, (128, 64, 8, 2), (64, 64, 4, 2)),
        (128, (128, 64, 8, 2), (128, 64, 8, 2)),
    ),
    "sm_89": (
        (96, (128, 64, 8, 2), (64, 64, 4, 2)),
        (128, (128, 64, 8, 2), (128, 64, 8, 2)),
    ),
    "sm_90": (
        # Two programs share a multiprocessor: one computes exponentials while the other multiplies.
        (64, (128, 64, 4, 3), (64, 64, 4, 3)),
        (96, (128, 128, 8, 2), (128, 128, 8, 2)),
        (128, (128, 64, 8, 2), (128, 64, 8, 2)),
    ),
    "sm_120": (
        (96, (128, 64, 8, 2), (64, 64, 4, 2)),
        (128, (128, 32, 8, 2), (128, 32, 8, 2)),
    ),
}
_FLOAT32 = FlashAttentionConfig(block_queries=16, block_keys=16, num_warps=8, num_stages=1)
"""fp32 multiplies without tensor cores: a thread holds its operands in registers, and only the smallest tile's fit."""
_FLOAT32_AMD = FlashAttentionConfig(block_queries=64, block_keys=32, num_warps=4, num_stages=1)
"""AMD's matrix cores do multiply fp32."""
_SINGLE_BLOCK = FlashAttentionConfig(block_queries=64, block_keys=64, num_warps=4, num_stages=1, variant="single_block")


def default_config(
    head_dim: int,
    dtype: torch.dtype,
    architecture: str,
    *,
    longest: int | None = None,
    length_bound: int | None = None,
) -> FlashAttentionConfig:
    """Returns the configuration for a launch without a tuned one.

    ``longest``, the rows of the longest segment, may halve ``block_queries``, which changes no bit of the result.
    ``length_bound``, which no segment of any batch exceeds, may choose the variant.  fp16 keeps the online softmax: its
    weights leave a fixed softmax offset little room.
    """
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {LARGEST_HEAD_DIM}, got {head_dim}")
    if dtype == torch.float32 and architecture != "interpreter":
        return _FLOAT32_AMD if architecture.startswith("gfx") else _FLOAT32
    if length_bound is not None and length_bound <= SINGLE_BLOCK_LENGTH:
        return _SINGLE_BLOCK
    architecture = configs.nearest_architecture(architecture)
    variant: Variant = "fixed" if dtype == torch.bfloat16 and architecture in _FIXED else "online"
    rows = (_FIXED if variant == "fixed" else _ONLINE)[architecture]
    usual, short = next((usual, short) for widest, usual, short in rows if head_dim <= widest)
    is_short = longest is not None and longest <= short[0]
    return FlashAttentionConfig(*(short if is_short else usual), variant)


def choose_config(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    padded: bool,
    longest: int,
    length_bound: int | None,
) -> FlashAttentionConfig:
    """Returns the tuned configuration for a launch on ``device``, or the default."""
    constants = {"head_dim": head_dim, "padded": padded, "bounded": length_bound or 0}
    found = lookup(FlashAttentionConfig, "attention.attention", device, dtype, constants, {"longest": max(1, longest)})
    if found is not None and (
        found.variant != "single_block" or (length_bound is not None and length_bound <= found.block_keys)
    ):
        return found
    return default_config(head_dim, dtype, configs.architecture(device), longest=longest, length_bound=length_bound)


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    config: FlashAttentionConfig | None = None,
    length_bound: int | None = None,
    columns: int | None = None,
    queries_scaled: bool = False,
    recomputed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax attention of every row to the rows of its own segment, head by head.

    Args:
        q: queries ``[T, H, head_dim]``, fp32, fp16 or bf16, ``head_dim`` at most 128.
        k: keys, like ``q``.
        v: values, like ``q``.  All three may have any strides between tokens and heads (views of a fused projection
            ``[T, 3, H, head_dim]``); the last stride is 1.
        segments: lengths of the segments, T rows in total.
        scale: positive factor of the scores; ``head_dim ** -0.5`` by default (``columns ** -0.5`` if heads are padded).
        out: output ``[T, H, head_dim]`` (``[T, H, columns]`` if heads are padded), strides as free as those of ``q``.  It
            may be ``q`` itself (or lie in its columns), but not otherwise overlap the inputs.
        config: launch configuration; :func:`choose_config` by default.  The default replaces ``"fixed"`` on an
            architecture whose compiler rejects it.
        length_bound: upper bound of the length of all segments, as a property of the tower (its windows, its image size)
            and not of this batch; it may decide which kernel runs.
        columns: valid columns of a padded head (72 of 80).  Column ``columns`` of every key and value must hold one and
            the columns after it zero; the queries may hold anything there.
        queries_scaled: the queries are already multiplied by ``scale · log2 e`` (``query_scale`` of
            :func:`..gemm.qkv_projection.qkv_projection`), which saves the loop over padded heads a multiplication per
            score; ``scale`` must then be left out.
        recomputed: ``[1]`` int32, to which the variant ``"fixed"`` adds the number of tiles that it computed twice.

    Returns:
        ``out``, or a new contiguous tensor of that shape in the dtype of ``q``.  A segment's rows depend on that segment
        alone, bit for bit, for one configuration.

    Raises:
        TypeError: an argument has the wrong type, dtype or device.
        ValueError: a shape, stride or number does not fit, or ``config`` needs a ``length_bound`` and there is none.
    """
    _check(q, k, v, segments, out, columns, recomputed)
    _check_bound(segments, length_bound, config)
    head_dim = q.shape[-1] if columns is None else columns
    if queries_scaled and scale is not None:
        raise ValueError(f"scale must be left out if queries_scaled is set, got {scale}")
    if scale is None:
        scale = math.log(2) if queries_scaled else head_dim**-0.5
    # The running maximum is taken before the scaling, and -inf marks masked keys: neither sign nor zero may change.
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale must be a positive, finite fp32 number, got {scale}")
    if out is None:
        out = torch.empty((*q.shape[:2], head_dim), dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    if not dispatch.runs_kernel(q):
        query, key, value = (tensor[..., :head_dim] for tensor in (q, k, v))
        return flash_attention_varlen_reference(query, key, value, segments, scale=scale, out=out)
    longest = segments.longest
    if config is None:
        config = choose_config(
            head_dim, q.dtype, q.device, padded=columns is not None, longest=longest, length_bound=length_bound
        )
    architecture = configs.architecture(q.device)
    if config.variant == "fixed" and architecture not in fixed_max.ARCHITECTURES:
        config = default_config(head_dim, q.dtype, architecture, longest=longest, length_bound=length_bound)
    scale = None if queries_scaled else scale
    _MODULES[config.variant].launch(LaunchArguments(q, k, v, out, segments, scale, config, recomputed))
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    out: torch.Tensor | None,
    columns: int | None,
    recomputed: torch.Tensor | None,
) -> None:
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}; use Segments.from_lengths")
    tensors = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out})
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_float("q", q)
    if q.dim() != 3 or not 1 <= q.shape[2] <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"q must be [tokens, heads, head_dim] with head_dim from 1 to {LARGEST_HEAD_DIM}, got shape {tuple(q.shape)}"
        )
    if columns is not None and not (isinstance(columns, int) and 1 <= columns < q.shape[2]):
        raise ValueError(
            f"columns must be 1 to {q.shape[2] - 1} for heads of {q.shape[2]} columns, got {columns!r}; "
            "leave it out if heads are not padded"
        )
    for name, tensor in tensors.items():
        shape = q.shape if name != "out" or columns is None else (*q.shape[:2], columns)
        check_rows(name, tensor, shape, q)
    if recomputed is not None:
        check_tensor("recomputed", recomputed, (1,), torch.int32, q.device)
    if q.shape[0] != segments.total:
        raise ValueError(f"segments must cover the {q.shape[0]} rows of q, got {segments} with {segments.total}")


def _check_bound(segments: Segments, length_bound: int | None, config: FlashAttentionConfig | None) -> None:
    if length_bound is not None and segments.longest > length_bound:
        raise ValueError(
            f"length_bound must be at least the longest segment, {segments.longest} rows, got {length_bound}; "
            "raise it or leave it out"
        )
    if config is None or config.variant != "single_block":
        return
    if length_bound is None or length_bound > config.block_keys:
        raise ValueError(
            f"length_bound must be at most block_keys={config.block_keys} for the variant 'single_block', got "
            f"{length_bound}; set it, or use another variant"
        )
