"""Bidirectional attention within segments of a packed batch: flash attention for rows of variable length.

    out[i] = Σ_j softmax_j(scale · q[i]·k[j]) v[j]        j over the rows of i's own segment, per head

Shapes: ``q``, ``k``, ``v`` and ``out`` are ``[T, H, head_dim]``, T the rows of all segments.  There is no padding of rows
and no mask: a segment is a range of rows (:class:`.segments.Segments`).

One program owns ``block_queries`` query rows of one segment and one head, and walks that segment's keys in blocks of
``block_keys``.  Programs are numbered head by head, so that the keys and values of one head stay in the L2 cache while all
its tiles are worked off, long segments first.  Four kernels do it, by the configuration's ``variant``:

==================  ================================================================================================
``"online"``        :mod:`.attention_online`: the online softmax, for everything
``"fixed"``         :mod:`.attention_fixed`: no running maximum in the loop, two thirds of the instructions; a tile that
                    proves to need one is done again in the same program
``"specialized"``   :mod:`.attention_specialized`: the same with warps that only fetch (Hopper)
``"one_shot"``      :mod:`.attention_one_shot`: segments that are never longer than one block of keys
==================  ================================================================================================

FLOPs: 4 · head_dim · H · Σ length².  Bytes from memory: 4 · T · H · head_dim elements where one head's keys and values
fit the L2 cache (5 MB for 16 384 rows of 80 in bf16), as they practically always do.
"""

import math
from typing import Any

import torch

from ..runtime import config as configs
from ..runtime import dispatch
from ..runtime.config import CompileSpec
from ..runtime.registry import lookup
from ..runtime.segments import Segments
from . import fixed_max, online_softmax, single_block, warp_specialized
from .common import VARIANTS, FlashAttentionConfig, Heads, Variant, split_head_dim
from .torch_reference import flash_attention_varlen_reference

__all__ = [
    "VARIANTS",
    "FlashAttentionConfig",
    "Variant",
    "choose_config",
    "compile_spec",
    "compile_specs",
    "default_config",
    "flash_attention_varlen",
    "launch_flash_attention",
    "split_head_dim",
]

LARGEST_HEAD_DIM = 128
"""A wider head needs more registers per query row than two accumulators leave."""
_MODULES: dict[Variant, Any] = {
    "online": online_softmax,
    "fixed": fixed_max,
    "specialized": warp_specialized,
    "one_shot": single_block,
}
ONE_SHOT_LENGTH = 64
"""The longest segment that the default takes in one shot: the scores of more would fill the registers."""

# The widest head that a configuration suits → the configuration, and the one for segments of at most 64 rows, which
# would leave half of a 128-row tile idle.  Each was compiled ahead of time and chosen for no spills, then for the fewest
# instructions per score at eight resident warps or more (STATIC.md).
#
# The second may differ from the first in block_queries and num_warps only: a segment's bits must not depend on what else
# is in the pack, so the order of its sums over keys may not.  For the same reason there is no short form where the
# compiler lays a 64-row tile out differently across lanes (Blackwell's tensor memory, AMD's matrix cores).
_ONLINE: dict[str, tuple[tuple[int, FlashAttentionConfig, FlashAttentionConfig], ...]] = {
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


# The same for the fixed stabilizer in bf16, where the compiler takes it without spills.
_FIXED: dict[str, tuple[tuple[int, FlashAttentionConfig, FlashAttentionConfig], ...]] = {
    architecture: tuple(
        (widest, FlashAttentionConfig(*usual, "fixed"), FlashAttentionConfig(*short, "fixed"))
        for widest, usual, short in rows
    )
    for architecture, rows in {
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
            (64, (128, 128, 8, 2), (64, 128, 4, 2)),
            (96, (128, 128, 8, 2), (128, 128, 8, 2)),
            (128, (128, 64, 8, 2), (128, 64, 8, 2)),
        ),
    }.items()
}
_ONE_SHOT = FlashAttentionConfig(block_queries=64, block_keys=64, num_warps=4, num_stages=1, variant="one_shot")


def default_config(
    head_dim: int,
    dtype: torch.dtype,
    architecture: str,
    *,
    longest: int | None = None,
    length_bound: int | None = None,
) -> FlashAttentionConfig:
    """The configuration to take where nothing was measured.

    ``longest``, the rows of the longest segment, may halve ``block_queries`` and does not change a bit of the result.
    ``length_bound``, which no segment of any pack exceeds, may choose the variant.  fp16 keeps the online softmax: its
    weights leave a fixed stabilizer little room.  ``"specialized"`` is never the default, since only a GPU can prove it.
    """
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} exceeds the limit of {LARGEST_HEAD_DIM}")
    if dtype == torch.float32 and architecture != "interpreter":
        return _FLOAT32_AMD if architecture.startswith("gfx") else _FLOAT32
    if length_bound is not None and length_bound <= ONE_SHOT_LENGTH:
        return _ONE_SHOT
    architecture = configs.nearest_architecture(architecture)
    table = _FIXED if dtype == torch.bfloat16 and architecture in _FIXED else _ONLINE
    usual, short = next((usual, short) for widest, usual, short in table[architecture] if head_dim <= widest)
    return short if longest is not None and longest <= short.block_queries else usual


def choose_config(
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    padded: bool,
    longest: int,
    length_bound: int | None,
) -> FlashAttentionConfig:
    """The configuration that the tables hold for a launch on ``device``, or the default."""
    constants = {"head_dim": head_dim, "padded": padded, "bounded": length_bound or 0}
    found = lookup(FlashAttentionConfig, "attention.attention", device, dtype, constants, {"longest": max(1, longest)})
    if found is not None and (
        found.variant != "one_shot" or (length_bound is not None and length_bound <= found.block_keys)
    ):
        return found
    return default_config(head_dim, dtype, configs.architecture(device), longest=longest, length_bound=length_bound)


@dispatch.on_device_of_first
def launch_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None,
    config: FlashAttentionConfig,
) -> None:
    """Launches the configured variant; the arguments are valid, at least one row exists, and the variant fits them.

    ``scale`` is ``None`` where the queries are scaled.  One launch; a second one, which repairs, for ``"specialized"`` in bf16.
    """
    _MODULES[config.variant].launch(q, k, v, out, segments, scale=scale, config=config)


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
) -> torch.Tensor:
    """Softmax attention of every row to the rows of its own segment, head by head.

    Args:
        q: queries ``[T, H, head_dim]``, fp32, fp16 or bf16, ``head_dim`` at most 128.
        k: keys, shape, dtype and device of ``q``.
        v: values, likewise.  All three may have any strides between tokens and heads (views of a fused projection
            ``[T, 3, H, head_dim]``); the elements of a head are adjacent.
        segments: the division of the T rows.
        scale: what the scores are multiplied by; ``head_dim ** -0.5`` by default (``columns ** -0.5`` where heads are
            padded); positive.
        out: where to write, ``[T, H, head_dim]`` (``[T, H, columns]`` where heads are padded), strides as free as those
            of ``q``.  It may be ``q`` itself (or lie in its columns), not otherwise overlap the inputs.
        config: the launch configuration; :func:`choose_config` by default.  Where its variant cannot take this launch
            (``"fixed"`` on an architecture whose compiler rejects it; ``"specialized"`` elsewhere than on sm_90, in fp32,
            for heads that it cannot divide or tensors that are not aligned to 16 bytes), the default counts.
        length_bound: rows that no segment ever has more of, as a property of the tower (its windows, its image size)
            and not of this pack; it may decide which kernel runs.
        columns: columns of a head that count, where heads are padded (72 of 80).  Column ``columns`` of every key and
            value must hold one and the columns after it zero; what the queries hold there does not matter.
        queries_scaled: the queries come multiplied by ``scale · log2 e`` (``query_scale`` of
            :func:`.qkv_projection.qkv_projection`), which saves the loop over padded heads a multiplication for every
            score; ``scale`` is then left out.

    Returns:
        ``[T, H, head_dim]`` (``[T, H, columns]``) in the dtype of ``q``: ``out``, or a new contiguous tensor.  A segment's
        rows depend on that segment alone, bit for bit, for one configuration.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices, strides, ``segments``, ``scale``, ``length_bound`` or ``columns`` do not fit,
            or ``config`` takes segments in one shot that nothing bounds to its block of keys.
    """
    _check(q, k, v, segments, out, columns)
    _check_bound(segments, length_bound, config)
    head_dim = q.shape[-1] if columns is None else columns
    if queries_scaled and scale is not None:
        raise ValueError(f"scale is {scale}, but queries_scaled says that the queries hold it already; leave one out")
    if scale is None:
        scale = math.log(2) if queries_scaled else head_dim**-0.5
    # The running maximum is taken before the scaling, and -inf marks what lies outside: neither sign nor zero may change.
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale must be a positive, finite fp32 number, got {scale}")
    if out is None:
        out = torch.empty((*q.shape[:2], head_dim), dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    if not dispatch.runs_kernel(q):
        query, key, value = (tensor[..., :head_dim] for tensor in (q, k, v))
        return flash_attention_varlen_reference(query, key, value, segments, scale=scale, out=out)
    if config is None:
        config = choose_config(
            head_dim,
            q.dtype,
            q.device,
            padded=columns is not None,
            longest=segments.longest,
            length_bound=length_bound,
        )
    architecture = configs.architecture(q.device)
    if (config.variant == "fixed" and architecture not in fixed_max.ARCHITECTURES) or (
        config.variant == "specialized"
        and warp_specialized.obstacle(q, k, v, head_dim, config, architecture) is not None
    ):
        config = default_config(head_dim, q.dtype, architecture, longest=segments.longest, length_bound=length_bound)
    launch_flash_attention(q, k, v, out, segments, scale=None if queries_scaled else scale, config=config)
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    out: torch.Tensor | None,
    columns: int | None,
) -> None:
    """Raises unless the tensors and the division of :func:`flash_attention_varlen` fit together."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}; see Segments.from_lengths")
    named = {"q": q, "k": k, "v": v} | ({} if out is None else {"out": out})
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if q.dim() != 3:
        raise ValueError(f"q must be [tokens, heads, head_dim], got shape {list(q.shape)}")
    if columns is not None and not (isinstance(columns, int) and 1 <= columns < q.shape[2]):
        raise ValueError(
            f"columns must be 1 to {q.shape[2] - 1}, fewer than a padded head of q {list(q.shape)} has, got {columns!r}; "
            "leave it out where heads are not padded"
        )
    for name, tensor in named.items():
        shape = q.shape if name != "out" or columns is None else (*q.shape[:2], columns)
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (tuple(shape), q.dtype, q.device):
            raise ValueError(
                f"{name} must be like q, {list(shape)} {q.dtype} on {q.device}, "
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


def _check_bound(segments: Segments, length_bound: int | None, config: FlashAttentionConfig | None) -> None:
    """Raises unless no segment exceeds ``length_bound``, nor that the block of a configuration that needs it."""
    if length_bound is not None and segments.longest > length_bound:
        raise ValueError(
            f"a segment has {segments.longest} rows, more than the length_bound of {length_bound} that was promised for "
            "every pack; raise it or leave it out"
        )
    if (
        config is not None
        and config.variant == "one_shot"
        and (length_bound is None or length_bound > config.block_keys)
    ):
        raise ValueError(
            f"the variant 'one_shot' takes at most block_keys={config.block_keys} rows of a segment, and length_bound is "
            f"{length_bound}; say length_bound, or take another variant"
        )


def compile_spec(
    head_dim: int, dtype: torch.dtype, config: FlashAttentionConfig, *, width: int | None = None, scaled: bool = False
) -> CompileSpec:
    """How one launch over the view of a fused projection is compiled, for heads of ``head_dim`` padded to ``width``.

    ``scaled``: the queries are.
    """
    heads = Heads.of(head_dim, width or head_dim, dtype, scaled=scaled)
    spec: CompileSpec = _MODULES[config.variant].compile_spec(heads, dtype, config)
    return spec


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The default configurations of the head dims that vision towers have, and what a measured table may choose instead.

    The head dims in bf16, the commonest one also in fp16 and fp32, padded heads, short segments, windows; on sm_90 the
    specialized forms, which only measured tables choose, and the online softmax that repairs for them.
    """

    def of(
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        longest: int | None = None,
        length_bound: int | None = None,
        width: int | None = None,
    ) -> CompileSpec:
        config = default_config(head_dim, dtype, architecture, longest=longest, length_bound=length_bound)
        # The projection that pads heads scales their queries.
        return compile_spec(head_dim, dtype, config, width=width, scaled=width is not None)

    specs = [of(head_dim) for head_dim in (64, 72, 80, 88, 96, 104, 128)]
    specs += [of(72, width=80), of(72, torch.float16, width=80), of(80, longest=64), of(64, longest=64)]
    specs += [of(80, torch.float16), of(80, torch.float32), of(80, length_bound=64)]
    specs += [compile_spec(80, torch.bfloat16, default_config(80, torch.float16, architecture))]
    if architecture == "sm_90":
        specialized = FlashAttentionConfig(128, 128, num_warps=4, num_stages=2, variant="specialized")
        specs += [compile_spec(head_dim, torch.bfloat16, specialized) for head_dim in (64, 80)]
        specs += [compile_spec(head_dim, torch.float16, specialized) for head_dim in (64, 80)]
        specs += [
            online_softmax.compile_spec(
                Heads.of(head_dim, width, torch.bfloat16), torch.bfloat16, warp_specialized.REPAIR, repair=True
            )
            for head_dim, width in ((64, 64), (72, 80), (80, 80))
        ]
    # Where short segments have no form of their own the list names one configuration twice.
    return list({(str(spec.kernel), spec.name): spec for spec in specs}.values())
