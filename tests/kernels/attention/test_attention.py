"""Attention within segments: both backends against fp64, memory safety, and independence of what else is packed."""

import contextlib
import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.attention import torch_reference
from tritontower.kernels.attention.attention import (
    FlashAttentionConfig,
    default_config,
    flash_attention_varlen,
    split_head_dim,
)
from tritontower.kernels.gemm import cpu
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.segments import Segments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RAGGED = Segments([1, 64, 77, 0, 150])
SINGLE_BLOCK = FlashAttentionConfig(64, 64, 4, 1, "single_block")


def attention_fp64(q, k, v, segments, scale=None):
    """Attention by its definition, one segment and head at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=torch.float64)
    bounds = segments.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        for head in range(q.shape[1]):
            query, key, value = (tensor[start:stop, head].cpu().double() for tensor in (q, k, v))
            out[start:stop, head] = torch.softmax(query @ key.T * scale, dim=-1) @ value
    return out


def fused_projection(segments, head_dim, dtype, *, heads=2, device="cpu", seed=0):
    """Views of one ``[T, 3, H, head_dim]`` tensor, as a tower's projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(segments.total, 3, heads, head_dim, generator=generator).to(device, dtype)
    return qkv.unbind(1)


@pytest.fixture(params=["kernel", "fused", "products"])
def backend(request, monkeypatch):
    """Where to run: the Triton kernel, torch's fused attention, or the separate products that suit some CPUs better."""
    if request.param == "kernel":
        return contextlib.nullcontext
    monkeypatch.setattr(cpu, "is_fused_attention_slow", lambda: request.param == "products")
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_PRODUCTS", 1)
    monkeypatch.setattr(torch_reference, "_SCORES_BYTES", 1)
    return functools.partial(dispatch.use, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20, 36, 64, 72, 80, 88, 96, 104, 128])
def test_kernel_against_fp64(kernel_device, poisoned_empty, head_dim, dtype):
    q, k, v = fused_projection(RAGGED, head_dim, dtype, device=kernel_device)
    out = flash_attention_varlen(q, k, v, RAGGED)
    assert out.is_contiguous()
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 36, 72, 80, 128])
@pytest.mark.parametrize("by_products", [False, True])
def test_reference_against_fp64(monkeypatch, poisoned_empty, head_dim, dtype, by_products):
    monkeypatch.setattr(cpu, "is_fused_attention_slow", lambda: by_products)
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_PRODUCTS", 1)
    segments = Segments([1, 64, 64, 77, 0, 64, 150])
    q, k, v = fused_projection(segments, head_dim, dtype)
    out = flash_attention_varlen(q, k, v, segments)
    assert out.is_contiguous()
    assert relative_error(out, attention_fp64(q, k, v, segments)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "config",
    [
        FlashAttentionConfig(16, 64, 4, 1),
        FlashAttentionConfig(64, 16, 4, 2),
        FlashAttentionConfig(128, 128, 8, 2),
    ],
    ids=lambda config: f"{config.block_queries}x{config.block_keys}",
)
def test_explicit_configurations(kernel_device, poisoned_empty, config):
    q, k, v = fused_projection(RAGGED, 80, torch.bfloat16, device=kernel_device)
    out = flash_attention_varlen(q, k, v, RAGGED, config=config)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("head_dim", [40, 72, 104])
def test_only_the_segments_own_elements_are_read(kernel_device, backend, head_dim):
    """NaN lies around every head, before the first row and after the last; one read of it would reach the result."""

    def surrounded(seed):
        generator = torch.Generator().manual_seed(seed)
        buffer = torch.full((RAGGED.total + 200, 3, 160), float("nan"), dtype=torch.float16, device=kernel_device)
        view = buffer[100 : 100 + RAGGED.total, :2, 8 : 8 + head_dim]
        view.copy_(torch.randn(view.shape, generator=generator))
        return view

    q, k, v = (surrounded(seed) for seed in range(3))
    with backend():
        out = flash_attention_varlen(q, k, v, RAGGED)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[torch.float16]


def test_out_may_be_a_strided_view_and_nothing_else_is_written(kernel_device, backend):
    q, k, v = fused_projection(RAGGED, 72, torch.bfloat16, device=kernel_device)
    buffer = torch.full((RAGGED.total, 3, 96), 7.0, dtype=torch.bfloat16, device=kernel_device)
    out = buffer[:, 1:, 8:80]
    with backend():
        assert flash_attention_varlen(q, k, v, RAGGED, out=out) is out
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[torch.bfloat16]
    out.fill_(7.0)
    assert bool((buffer == 7.0).all())


def test_out_may_be_q(kernel_device, backend):
    q, k, v = fused_projection(RAGGED, 80, torch.float16, device=kernel_device)
    expected = attention_fp64(q, k, v, RAGGED)
    with backend():
        flash_attention_varlen(q, k, v, RAGGED, out=q)
    assert relative_error(q, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_separate_strides(kernel_device, poisoned_empty, dtype):
    """Token-major queries, head-major keys, values with gaps between heads."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(kernel_device, dtype)

    q = normal(RAGGED.total, 2, 80)
    k = normal(2, RAGGED.total, 80).transpose(0, 1)
    v = normal(RAGGED.total, 5, 88)[:, 1:5:2, :80]
    assert len({tensor.stride() for tensor in (q, k, v)}) == 3
    out = flash_attention_varlen(q, k, v, RAGGED)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["large", "equal", "one huge", "all very negative"])
def test_adversarial_scores(kernel_device, case, dtype, backend):
    """Scores of thousands, no differences at all, one key that takes everything, and a maximum far below zero."""
    segments = Segments([1, 77, 64])
    q, k, v = (tensor.clone() for tensor in fused_projection(segments, 64, dtype, device=kernel_device, seed=7))
    if case == "large":
        q *= 60
        k *= 60
    elif case == "equal":
        k[:] = k[0]
    elif case == "one huge":
        k[70] = q[40] * 100
    else:
        q[:] = q[3].abs() + 1
        k[:] = -q * 8 + k
    with backend():
        out = flash_attention_varlen(q, k, v, segments)
    # Scores of magnitude S carry an absolute error of about S · 2⁻²⁴ in fp32, which the exponential makes relative.
    largest = max((q[i].float() @ k[i].float().T).abs().max().item() for i in range(len(q))) * 64**-0.5
    tolerance = TOLERANCE[dtype] + largest * 2.0**-23
    assert relative_error(out, attention_fp64(q, k, v, segments)) <= tolerance


@pytest.mark.parametrize("scale", [1e-30, 0.05, 1.0])
def test_scale(kernel_device, scale, backend):
    q, k, v = fused_projection(RAGGED, 32, torch.float32, device=kernel_device)
    with backend():
        out = flash_attention_varlen(q, k, v, RAGGED, scale=scale)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED, scale)) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the neighbors are NaN, and numpy says so
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 33, 64, 100])
def test_a_segment_does_not_feel_its_neighbors(kernel_device, length, dtype, backend):
    """Alone, first, last, and in the middle of a pack of ten with longer ones and NaN: the same bits."""
    lengths = [length, 64, length, length, 7, 130, 1, length, 90, length]
    segments = Segments(lengths)
    q, k, v = (tensor.clone() for tensor in fused_projection(segments, 72, dtype, device=kernel_device))
    starts = [segments.cu_seqlens[i].item() for i, each in enumerate(lengths) if i in (0, 2, 3, 7, 9)]
    for tensor in (q, k, v):
        for start in starts[1:]:
            tensor[start : start + length] = tensor[:length]
        tensor[segments.cu_seqlens[5] : segments.cu_seqlens[6]] = float("nan")
    with backend():
        alone = flash_attention_varlen(q[:length], k[:length], v[:length], Segments([length]))
        packed = flash_attention_varlen(q, k, v, segments)
    assert bool(torch.isfinite(alone).all())
    for start in starts:
        assert torch.equal(packed[start : start + length], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 64, 200, 513, 700])
@pytest.mark.parametrize("by_products", [False, True])
def test_reference_grouping_is_invisible(monkeypatch, length, dtype, by_products):
    monkeypatch.setattr(cpu, "is_fused_attention_slow", lambda: by_products)
    """A batch of equal segments goes to torch as one call; every member keeps the bits it has alone."""
    segments = Segments([length] * 10)
    q, k, v = fused_projection(segments, 80, dtype, heads=3)
    grouped = flash_attention_varlen(q, k, v, segments)
    for start in range(0, segments.total, length):
        rows = slice(start, start + length)
        assert torch.equal(grouped[rows], flash_attention_varlen(q[rows], k[rows], v[rows], Segments([length])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_heads_result_depends_on_that_head_alone(kernel_device, dtype):
    q, k, v = fused_projection(RAGGED, 80, dtype, heads=3, device=kernel_device)
    together = flash_attention_varlen(q, k, v, RAGGED)
    assert torch.equal(together[:, 1:2], flash_attention_varlen(q[:, 1:2], k[:, 1:2], v[:, 1:2], RAGGED))


@pytest.mark.parametrize("architecture", [*configs.ARCHITECTURES, "interpreter"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 88, 96, 104, 128])
def test_the_order_of_sums_does_not_depend_on_the_pack(architecture, dtype, head_dim):
    """Short segments may get a shorter tile, but never other blocks of keys."""
    usual = default_config(head_dim, dtype, architecture)
    for longest in (1, 64, 65, 5000):
        chosen = default_config(head_dim, dtype, architecture, longest=longest)
        assert (chosen.block_keys, chosen.num_stages) == (usual.block_keys, usual.num_stages)
        assert chosen.block_queries <= usual.block_queries


def test_a_shorter_tile_leaves_the_bits_alone(kernel_device):
    segments = Segments([64, 20, 1])
    q, k, v = fused_projection(segments, 80, torch.bfloat16, device=kernel_device)
    usual = FlashAttentionConfig(128, 64, 4, 2)
    short = replace(usual, block_queries=64)
    assert torch.equal(
        flash_attention_varlen(q, k, v, segments, config=usual),
        flash_attention_varlen(q, k, v, segments, config=short),
    )


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (20, (32, 0)),
        (36, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (88, (64, 32)),
        (96, (64, 32)),
        (104, (128, 0)),
        (128, (128, 0)),
    ],
)
def test_split_head_dim(head_dim, expected):
    assert split_head_dim(head_dim) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_covers_every_head_dim(dtype):
    for head_dim in range(1, 129):
        main, tail = split_head_dim(head_dim, dtype)
        assert head_dim <= main + tail <= max(16, 2 * head_dim)
        assert all(part & (part - 1) == 0 and (part == 0 or part >= 16) for part in (main, tail))


def test_rows_further_apart_than_int32_reaches(kernel_device, tmp_path: Path, backend):
    """The third row lies 2³¹ elements behind the first, in a file that is all hole."""
    if kernel_device.type != "cpu":
        pytest.skip("a mapped file lives in host memory")
    stride, head_dim = 2**30, 16
    elements = 2 * stride + 3 * head_dim
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(elements * 2)
    memory = torch.from_file(str(path), shared=True, size=elements, dtype=torch.bfloat16)
    q, k, v = (memory.as_strided((3, 1, head_dim), (stride, head_dim, 1), part * head_dim) for part in range(3))
    for seed, tensor in enumerate((q, k, v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    segments = Segments([1, 2])
    expected = attention_fp64(q, k, v, segments)
    with backend():
        out = flash_attention_varlen(q, k, v, segments)
        flash_attention_varlen(q, k, v, segments, out=v)
    assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(v, out)


@pytest.mark.parametrize("shape", [(0, 2, 64), (3, 0, 64)])
def test_nothing_in_nothing_out(kernel_device, shape, backend):
    empty = torch.empty(shape, device=kernel_device)
    with backend():
        assert flash_attention_varlen(empty, empty, empty, Segments([0, shape[0]])).shape == shape


Q = torch.zeros(4, 2, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[tokens, heads, head_dim\] .* got shape \(2, 16\)"),
        ({name: torch.zeros(4, 2, 136) for name in "qkv"}, ValueError, r"head_dim from 1 to 128, got .*136"),
        ({name: Q.double() for name in "qkv"}, TypeError, "q must be float32, .* got torch.float64"),
        ({"k": [1.0]}, TypeError, "k must be a torch.Tensor, got list"),
        ({"k": Q[:3]}, ValueError, r"k must have shape \(4, 2, 16\), got \(3, 2, 16\)"),
        ({"v": Q.half()}, TypeError, "v must be torch.float32 on cpu, got torch.float16"),
        ({"k": torch.zeros(4, 16, 2).transpose(1, 2)}, ValueError, r"k must have last stride 1, .*\(32, 1, 2\)"),
        ({"out": torch.empty(4, 2, 32)}, ValueError, r"out must have shape .* got \(4, 2, 32\)"),
        ({"columns": 8, "out": Q}, ValueError, r"out must have shape \(4, 2, 8\)"),
        ({"columns": 16}, ValueError, "columns must be 1 to 15 .* got 16"),
        ({"columns": 0}, ValueError, "columns must be 1 to 15 .* got 0"),
        ({"segments": [4]}, TypeError, "segments must be Segments, got list"),
        ({"segments": Segments([3])}, ValueError, r"must cover the 4 rows of q, got Segments\(\[3\]\) with 3"),
        ({"scale": -1.0}, ValueError, "scale must be a positive, finite fp32 number, got -1.0"),
        ({"scale": 0.0}, ValueError, "scale must be a positive, finite"),
        ({"scale": float("nan")}, ValueError, "scale must be a positive, finite"),
        ({"scale": float("inf")}, ValueError, "scale must be a positive, finite"),
        ({"scale": 0.1, "queries_scaled": True}, ValueError, "scale must be left out .* got 0.1"),
        ({"length_bound": 3}, ValueError, "length_bound must be at least the longest segment, 4 rows, got 3"),
        ({"config": SINGLE_BLOCK}, ValueError, "must be at most block_keys=64 .* got None"),
        ({"config": SINGLE_BLOCK, "length_bound": 65}, ValueError, "must be at most block_keys=64 .* got 65"),
    ],
)
def test_refusals(changes, error, message):
    arguments = {"q": Q, "k": Q, "v": Q, "segments": Segments([4])} | changes
    with pytest.raises(error, match=message):
        flash_attention_varlen(**arguments)


def test_default_config_refuses_wide_heads():
    with pytest.raises(ValueError, match="head_dim must be at most 128, got 136"):
        default_config(136, torch.bfloat16, "sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 104, 128])
def test_many_long_and_short_segments(kernel_device, head_dim, dtype):
    segments = Segments([2048, 1, 64, 64, 333, 1500, 17])
    q, k, v = fused_projection(segments, head_dim, dtype, heads=4, device=kernel_device)
    out = flash_attention_varlen(q, k, v, segments)
    assert relative_error(out, attention_fp64(q, k, v, segments)) <= TOLERANCE[dtype]
    for index, length in enumerate(segments.lengths):
        rows = slice(segments.cu_seqlens[index].item(), segments.cu_seqlens[index].item() + length)
        assert torch.equal(out[rows], flash_attention_varlen(q[rows], k[rows], v[rows], Segments([length])))
