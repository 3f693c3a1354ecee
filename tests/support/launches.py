"""Launches every kernel at the boundaries of its arguments, through Triton's own launch path without the device.

    python -m support.launches sm_90

See :mod:`tritontower.tuning.compile.recording`.  ``meta`` tensors stand for gigabytes.  Prints one line of JSON per launch;
runs in its own process, without ``TRITON_INTERPRET``.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tritontower.kernels.attention.attention import FlashAttentionConfig, flash_attention_varlen
from tritontower.kernels.attention.pooling_head import attention_pooling
from tritontower.kernels.gemm.linear import EPILOGUES, LinearConfig, linear
from tritontower.kernels.gemm.patch_projection import patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection
from tritontower.kernels.rowwise.activations import ACTIVATIONS, activation, add
from tritontower.kernels.rowwise.gather import MAX_TAPS, gather_rows
from tritontower.kernels.rowwise.mean_pool import mean_rows
from tritontower.kernels.rowwise.norm import norm
from tritontower.kernels.rowwise.positions import axial_frequencies, rotary_table
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.rowwise.splice import splice_rows
from tritontower.kernels.runtime.segments import Segments
from tritontower.kernels.runtime.valid_rows import ValidRows
from tritontower.tuning.compile.recording import install_recorder

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH, HEADS = 1280, 16
LONG = 2**31 + 16
"""A row stride that does not fit 32 bits."""

GATED = "silu_gated_interleaved"
SPLIT = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=2, split=2)

Case = tuple[str, Callable[[], Any]]


def make_rows(count: int, width: int, dtype: torch.dtype = BF16, gap: int = 0) -> torch.Tensor:
    """Makes ``count`` rows with ``gap`` unused elements after each; unwritten, they take no memory."""
    return torch.empty(count, width + gap, dtype=dtype)[:, :width]


def make_far_rows(count: int, width: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Makes ``meta`` rows with a stride of ``LONG`` elements."""
    return torch.empty_strided((count, width), (LONG, 1), dtype=dtype, device="meta")


def make_heads(patches: int, heads: int, head_dim: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    """Makes q, k and v as views of a fused projection."""
    return torch.empty(patches, 3, heads, head_dim, dtype=dtype).unbind(1)


def matmul(
    patches: int,
    inner: int,
    columns: int,
    kind: str | None = None,
    added: bool = False,
    dtype: torch.dtype = BF16,
    **options: Any,
) -> Any:
    """Launches a layer that overwrites its residual; rows are padded to 16 elements, as in the towers."""
    width = columns // 2 if kind == GATED else columns
    residual = make_rows(patches, width, dtype) if added else None
    return linear(
        make_rows(patches, inner, dtype, -inner % 16),
        make_rows(columns, inner, dtype, -inner % 16),
        torch.empty(columns, dtype=dtype),
        activation=kind,
        residual=residual,
        out=residual,
        **options,
    )


def plan(planned: int) -> ValidRows:
    """Planned rows whose number of valid rows is on the device."""
    return ValidRows(planned, torch.zeros(1, dtype=torch.int32))


def project_heads(
    patches: int,
    heads: int,
    head_dim: int,
    padded: int,
    dtype: torch.dtype = BF16,
    rotated: bool = True,
    **options: Any,
) -> Any:
    """Launches the projection to q, k and v; the queries of padded heads are scaled, rotated or not."""
    columns = 3 * heads * padded
    return qkv_projection(
        make_rows(patches, WIDTH, dtype),
        make_rows(columns, WIDTH, dtype),
        torch.empty(columns, dtype=dtype),
        *(torch.empty(patches, head_dim // 2) if rotated else None for _ in range(2)),
        heads=heads,
        head_dim=head_dim,
        padded_head_dim=padded,
        query_scale=1.0 if padded == head_dim else 0.17,
        **options,
    )


def project_patches(patches: int, inner: int, pixels: torch.dtype, dtype: torch.dtype = BF16, **options: Any) -> Any:
    gap = -inner % 16
    return patch_projection(
        make_rows(patches, inner, pixels, gap),
        make_rows(WIDTH, inner, dtype, gap),
        torch.empty(WIDTH, dtype=dtype),
        **options,
    )


def normalize(patches: int, width: int, kind: Any = "layer_norm", dtype: torch.dtype = BF16, **options: Any) -> Any:
    bias = torch.empty(width, dtype=dtype) if kind == "layer_norm" else None
    return norm(make_rows(patches, width, dtype), torch.empty(width, dtype=dtype), bias, kind=kind, eps=1e-6, **options)


def rotate(patches: int, heads: int, head_dim: int, dtype: torch.dtype = BF16, within: torch.dtype = FP32) -> None:
    q, k, _ = make_heads(patches, heads, head_dim, dtype)
    cos, sin = rotary_table(
        torch.zeros(patches, 2, dtype=torch.int32), axial_frequencies(head_dim, 10000.0, "halves"), side=4
    )
    rope_(q, k, cos, sin, rotation_dtype=within)


def attend(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype = BF16, **options: Any) -> Any:
    """Launches attention with heads of ``head_dim`` columns in memory; the option ``columns`` excludes padding."""
    return flash_attention_varlen(*make_heads(sum(lengths), heads, head_dim, dtype), Segments(lengths), **options)


def attention_variants() -> Iterator[Case]:
    """Variants that defaults or a measured table may select, on one segment, ragged ones and windows."""
    fixed = FlashAttentionConfig(128, 64, 8, 2, "fixed")
    scaled = {"columns": 72, "queries_scaled": True}
    variants: tuple[tuple[str, list[int], int, dict[str, Any]], ...] = (
        ("windows", [64, 1, 0, 33], 80, {"length_bound": 64}),
        ("padded heads", [1, 200], 80, {"columns": 72}),
        ("padded heads, scaled queries", [1, 200], 80, scaled),
        ("padded windows", [1, 64], 80, {**scaled, "length_bound": 64}),
        ("fixed", [1, 200], 80, {"config": fixed}),
    )
    for dtype in (BF16, FP16):
        for name, lengths, head_dim, options in variants:
            yield f"{name} {dtype}", partial(attend, lengths, HEADS, head_dim, dtype, **options)
    yield "padded heads in fp32", partial(attend, [1, 20], HEADS, 80, FP32, columns=72)


def gather(
    rows: int, width: int, taps: int = 1, dtype: torch.dtype = BF16, filled: bool = False, added: bool = False
) -> Any:
    """Launches a gather that writes into its residual, if there is one."""
    residual = make_rows(rows, width, dtype) if added else None
    return gather_rows(
        make_rows(9, width, dtype),
        torch.zeros(rows, taps, dtype=torch.int32),
        torch.zeros(rows, taps) if taps > 1 else None,
        fill=torch.empty(width, dtype=dtype) if filled else None,
        residual=residual,
        out=residual,
    )


def splice(
    prompt: int, width: int, text: torch.dtype = BF16, rows: torch.dtype = BF16, add: bool = False, inside: bool = True
) -> Any:
    """Launches a splice of an image's rows into a prompt's, or adds them."""
    target = make_rows(prompt, width, text)
    index = torch.zeros(prompt, dtype=torch.int32)
    return splice_rows(target, make_rows(9, width, rows), index, add=add, out=target if inside else None)


def pool(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype = BF16) -> Any:
    kv = torch.empty(sum(lengths), 2, heads, head_dim, dtype=dtype)
    return attention_pooling(torch.empty(heads, head_dim, dtype=dtype), kv, Segments(lengths))


def boundaries() -> Iterator[Case]:
    """Sizes of 1, odd sizes and strides, absent operands, other dtypes, row strides of gigabytes."""
    for dtype in (BF16, FP16, FP32):
        yield f"norm {dtype}", partial(normalize, 1, 1152, dtype=dtype)
        yield f"linear {dtype}", partial(matmul, 300, 96, 48, "gelu", dtype=dtype)
        yield f"linear split {dtype}", partial(matmul, 1, 2048, 64, GATED, added=True, dtype=dtype)
        yield f"patch projection {dtype}", partial(project_patches, 1, 588, torch.uint8, dtype)
        yield f"attention {dtype}", partial(attend, [1, 0, 3], 1, 72, dtype)
        yield f"rotation {dtype}", partial(rotate, 1, 1, 72, dtype, dtype)
        yield f"add {dtype}", partial(add, make_rows(1, 1, dtype), make_rows(1, 1, dtype))
        yield f"activation {dtype}", partial(activation, make_rows(3, 5, dtype, 3), "gelu")
        yield f"rows {dtype}", partial(gather, 1, 48, dtype=dtype)
        yield f"rows weighed, filled and added {dtype}", partial(gather, 3, 72, MAX_TAPS, dtype, True, True)
        yield f"splice {dtype}", partial(splice, 3, 72, dtype)
        yield f"splice of other rows {dtype}", partial(splice, 1, 33, BF16, dtype, add=True, inside=False)
        yield f"means {dtype}", partial(mean_rows, make_rows(27, 72, dtype, 3), 9)
        yield f"pooling {dtype}", partial(pool, [1, 3], 16, 72, dtype)
        yield f"qkv rotated {dtype}", partial(project_heads, 1, 1, 2, 2, dtype)
        for turned in (True, False):
            split = partial(project_heads, 1, 1, 18, 20, dtype, turned, config=SPLIT)
            yield f"qkv, rotated {turned}, split {dtype}", split
    for inner in (1280, 1176):
        for kind in (None, GATED):
            described = LinearConfig(64, 64, 64, 8, 4, 3, operands="descriptors")
            name = f"descriptors, {kind}, K of {inner}"
            yield name, partial(matmul, 300, inner, 512, kind, added=True, config=described)
        split = LinearConfig(64, 64, 64, 8, 4, 3, split=2, operands="descriptors")
        name = f"descriptors, split, planned, K of {inner}"
        yield name, partial(matmul, 300, inner, 512, config=split, valid_rows=plan(300))
    yield "qkv rotated, descriptors", partial(project_heads, 300, 16, 72, 80, config=described, valid_rows=plan(300))
    yield "patch projection, descriptors", partial(project_patches, 5, 1184, torch.uint8, config=described)
    yield "patch projection, planned", partial(project_patches, 5, 588, torch.uint8, valid_rows=plan(5))
    for kind in ACTIVATIONS:
        yield f"activation {kind}", partial(activation, make_rows(3, 1280), kind)
    for kind in EPILOGUES:
        yield f"linear {kind}", partial(matmul, 4096, 1280, 2560, kind)
    yield "linear of one element", partial(linear, make_rows(1, 1), make_rows(1, 1))
    yield "linear, odd rows", partial(linear, make_rows(7, 33), make_rows(17, 33), residual=make_rows(7, 17, gap=2))
    yield "patch projection of floats", partial(project_patches, 7, 588, FP32)
    positions = {"position_table": make_rows(9, WIDTH)}
    index = torch.zeros(5, dtype=torch.int32)
    yield "patch projection, positions in order", partial(project_patches, 5, 768, BF16, **positions)
    yield "patch projection of positions", partial(project_patches, 5, 768, FP32, **positions, position_index=index)
    for width in (1, 48, 80, 160, 320, 1000, 1152, 16384):
        yield f"norm of {width}", partial(normalize, 3, width, "rms_norm")
    yield "norm gathered", partial(normalize, 3, 1280, row_index=index)
    rounded = {"rounding": "before_weight", "residual": make_rows(2, 1280)}
    yield "norm rounded before the weight", partial(normalize, 2, 1280, "rms_norm", **rounded)
    yield "rows of one element", partial(gather, 1, 1)
    yield "weighed rows of one element", partial(gather, 1, 1, 2, filled=True, added=True)
    yield "splice of one element", partial(splice, 1, 1)
    yield "mean of one row of one element", partial(mean_rows, make_rows(1, 1), 1)
    yield "mean of many rows", partial(mean_rows, make_rows(729, 48), 729)
    yield "pooling of one element", partial(pool, [1], 1, 1)
    for head_dim in (40, 64, 104, 128):
        yield f"pooling, heads of {head_dim}", partial(pool, [5, 200], 3, head_dim)
        yield f"attention, heads of {head_dim}", partial(attend, [5, 200], 3, head_dim)
        yield f"rotation, heads of {head_dim}", partial(rotate, 5, 3, head_dim)
    yield from attention_variants()
    yield from unaligned_tiles()
    yield from far_rows()


def far_rows() -> Iterator[Case]:
    """Row strides that do not fit 32 bits."""
    meta = partial(torch.empty, device="meta")
    x, rows, text = make_far_rows(2, 64), make_far_rows(5, 33), make_far_rows(3, 33)
    yield "norm, long rows", partial(norm, x, x[0], kind="gemma_rms_norm", eps=1e-06)
    yield "add, long rows", partial(add, x, make_far_rows(2, 64))
    yield "means, long rows", partial(mean_rows, make_far_rows(8, 64), 4, out=x)
    yield "linear, long rows", partial(linear, make_far_rows(3, 64), make_far_rows(64, 64), out=make_far_rows(3, 64))
    projection = make_far_rows(3, 64), make_far_rows(120, 64), meta(120, dtype=BF16)
    tables = make_far_rows(3, 10, FP32), make_far_rows(3, 10, FP32)
    yield "qkv rotated, long rows", partial(qkv_projection, *projection, *tables, heads=2, head_dim=20)
    taps = {"index": meta(3, 4, dtype=torch.int32), "weights": meta(3, 4), "fill": meta(33, dtype=BF16)}
    yield "rows, odd and far apart", partial(gather_rows, rows, **taps, residual=text, out=text)
    index = meta(3, dtype=torch.int32)
    yield "splice, long rows", partial(splice_rows, text, rows, index, add=True, out=text)
    kv = torch.empty_strided((3, 2, 2, 72), (LONG, LONG // 2, 72, 1), dtype=BF16, device="meta")
    yield "pooling, long rows", partial(attention_pooling, meta(2, 72, dtype=BF16), kv, Segments([3]))
    q = torch.empty_strided((3, 2, 80), (LONG, 80, 1), dtype=BF16, device="meta")
    yield "attention, long rows", partial(flash_attention_varlen, q, q, q, Segments([3]))


def unaligned_tiles() -> Iterator[Case]:
    kv = torch.empty(5, 2 * 3 * 83 + 1, dtype=BF16)[:, 1:].view(5, 2, 3, 83)[..., 2:82]
    query = torch.empty(3, 83, dtype=BF16)[:, 3:]
    yield "pooling, unaligned tiles", partial(attention_pooling, query, kv, Segments([4, 1]))
    q = torch.empty(5, 3 * 83 + 1, dtype=BF16)[:, 1:].view(5, 3, 83)[..., 2:82]
    yield "attention, unaligned tiles", partial(flash_attention_varlen, q, q, q, Segments([4, 1]))


def main(architecture: str) -> None:
    """Prints the kernels of every case, or its error."""
    recorder = install_recorder()
    for name, launch in boundaries():
        recorder.start(architecture)
        try:
            launch()
        except Exception as error:
            print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[:2000]}), flush=True)
        for launched in recorder.launches:
            code = launched.compiled.asm
            has_barrier = "bar.sync" in code.get("ptx", "") or "s_barrier" in code.get("amdgcn", "")
            print(json.dumps({"case": name, "kernel": launched.kernel, "has_barrier": has_barrier}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
