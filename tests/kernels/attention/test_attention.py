"""Attention within segments, by the kernel and both references: accuracy, memory safety, independence, refusals."""

import contextlib
import functools

import pytest
import torch
from support.attention import attention_fp64, make_projection
from support.numbers import TOLERANCE, relative_error

from tritontower.kernels.attention import torch_reference
from tritontower.kernels.attention.attention import default_config, flash_attention_varlen
from tritontower.kernels.attention.common import FlashAttentionConfig, split_head_dim
from tritontower.kernels.gemm import cpu
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.segments import DeviceSegments, Segments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RAGGED = Segments([1, 64, 77, 0, 150])
SINGLE_BLOCK = FlashAttentionConfig(64, 64, 4, 1, "single_block")


AMD_FAMILIES = {"fused": 0, "converted": 25, "matmuls": 26}
"""Form of the CPU attention and the CPU that it is for: torch's in the dtype, torch's in fp32, or separate matmuls."""


@pytest.fixture(params=["kernel", *AMD_FAMILIES])
def backend(request, monkeypatch):
    """A context for the Triton kernel or a form of the CPU attention."""
    if request.param == "kernel":
        return contextlib.nullcontext
    monkeypatch.setattr(cpu, "amd_family", lambda: AMD_FAMILIES[request.param])
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_MATMULS", 1)
    monkeypatch.setattr(torch_reference, "SCORES_BYTES", 1)
    return functools.partial(dispatch.use, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 36, 72, 80, 128])
@pytest.mark.parametrize("form", AMD_FAMILIES)
def test_reference_against_fp64(monkeypatch, poisoned_empty, head_dim, dtype, form):
    monkeypatch.setattr(cpu, "amd_family", lambda: AMD_FAMILIES[form])
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_MATMULS", 1)
    segments = Segments([1, 64, 64, 77, 0, 64, 150])
    q, k, v = make_projection(segments, head_dim, dtype)
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
    q, k, v = make_projection(RAGGED, 80, torch.bfloat16, device=kernel_device)
    out = flash_attention_varlen(q, k, v, RAGGED, config=config)
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("head_dim", [40, 72, 104])
def test_only_the_segments_own_elements_are_read(kernel_device, backend, head_dim):
    """NaN surrounds every head and the rows; reading one would show in the result."""

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


@pytest.mark.parametrize("lengths", [[1, 64, 77, 0, 150], [0, 32, 32], [300], [5] * 40 + [0]])
@pytest.mark.parametrize("read_length", [max, None])
def test_boundaries_of_the_device_are_not_read(kernel_device, lengths, read_length):
    segments = Segments(lengths)
    q, k, v = make_projection(segments, 72, torch.bfloat16, device=kernel_device)
    longest = torch.tensor(read_length(lengths)) if read_length else None
    boundaries = DeviceSegments(segments.cu_seqlens_on(kernel_device).long(), segments.total, longest)
    out = flash_attention_varlen(q, k, v, boundaries)
    assert "lengths" not in vars(boundaries)
    assert torch.equal(out, flash_attention_varlen(q, k, v, segments))
    with dispatch.use("reference"):
        out = flash_attention_varlen(q, k, v, boundaries)
    assert relative_error(out, attention_fp64(q, k, v, segments)) <= TOLERANCE[torch.bfloat16]


def test_only_out_is_written(kernel_device, backend):
    q, k, v = make_projection(RAGGED, 72, torch.bfloat16, device=kernel_device)
    buffer = torch.full((RAGGED.total, 3, 96), 7.0, dtype=torch.bfloat16, device=kernel_device)
    out = buffer[:, 1:, 8:80]
    with backend():
        assert flash_attention_varlen(q, k, v, RAGGED, out=out) is out
    assert relative_error(out, attention_fp64(q, k, v, RAGGED)) <= TOLERANCE[torch.bfloat16]
    out.fill_(7.0)
    assert bool((buffer == 7.0).all())


def test_out_may_be_q(kernel_device, backend):
    q, k, v = make_projection(RAGGED, 80, torch.float16, device=kernel_device)
    expected = attention_fp64(q, k, v, RAGGED)
    with backend():
        flash_attention_varlen(q, k, v, RAGGED, out=q)
    assert relative_error(q, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["large", "equal", "one huge", "all very negative"])
def test_adversarial_scores(kernel_device, case, dtype, backend):
    """Scores of thousands, equal scores, one key that takes all the weight, and a maximum far below zero."""
    segments = Segments([1, 77, 64])
    q, k, v = (tensor.clone() for tensor in make_projection(segments, 64, dtype, device=kernel_device, seed=7))
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


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy warns of the neighbors' NaN
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 33, 100])
@pytest.mark.parametrize("backend", ["fused", "matmuls"], indirect=True)
def test_a_segment_does_not_depend_on_its_neighbors(kernel_device, length, dtype, backend):
    """Alone, first, last, and in the middle of ten segments with longer ones and NaN: the same bits."""
    lengths = [length, 64, length, length, 7, 130, 1, length, 90, length]
    segments = Segments(lengths)
    q, k, v = (tensor.clone() for tensor in make_projection(segments, 72, dtype, device=kernel_device))
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
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("form", AMD_FAMILIES)
def test_cpu_forms_are_as_accurate_as_torch(monkeypatch, head_dim, dtype, form):
    """The error against fp64 is at most 1.10 × that of torch's fused attention, from flat to one-hot softmax rows."""
    monkeypatch.setattr(cpu, "amd_family", lambda: AMD_FAMILIES[form])
    segments = Segments([577])
    for deviation in (1, 3, 6, 12, 20, 40, 100):
        q, k, v = (tensor.float() for tensor in make_projection(segments, head_dim, torch.float32))
        q, k, v = (part.to(dtype) for part in (q * deviation**0.5, k * deviation**0.5, v))
        expected = attention_fp64(q, k, v, segments)
        fused = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in (q, k, v)))
        limit = 1.10 * relative_error(fused[0].transpose(0, 1), expected)
        assert relative_error(flash_attention_varlen(q, k, v, segments), expected) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 200, 513])
@pytest.mark.parametrize("form", AMD_FAMILIES)
def test_grouping_equal_segments_changes_no_bit(monkeypatch, length, dtype, form):
    """torch computes a run of equal segments in one call; every segment keeps the bits that it has alone."""
    monkeypatch.setattr(cpu, "amd_family", lambda: AMD_FAMILIES[form])
    # Two heads at once if a segment is alone, one in the run.
    monkeypatch.setattr(torch_reference, "HEADS_BYTES", 2 * 16 * length * 80)
    segments = Segments([length] * 10)
    q, k, v = make_projection(segments, 80, dtype, heads=3)
    grouped = flash_attention_varlen(q, k, v, segments)
    for start in range(0, segments.total, length):
        rows = slice(start, start + length)
        assert torch.equal(grouped[rows], flash_attention_varlen(q[rows], k[rows], v[rows], Segments([length])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_covers_every_head_dim(dtype):
    known = {20: (32, 0), 36: (32, 16), 72: (64, 16), 88: (64, 32), 104: (128, 0)}
    assert {head_dim: split_head_dim(head_dim) for head_dim in known} == known
    assert split_head_dim(104, torch.float32) == (64, 64)
    for head_dim in range(1, 129):
        main, tail = split_head_dim(head_dim, dtype)
        assert head_dim <= main + tail <= max(16, 2 * head_dim)
        assert all(part & (part - 1) == 0 and (part == 0 or part >= 16) for part in (main, tail))


@pytest.mark.parametrize("shape", [(0, 2, 64), (3, 0, 64)])
def test_empty_inputs(kernel_device, shape, backend):
    empty = torch.empty(shape, device=kernel_device)
    with backend():
        assert flash_attention_varlen(empty, empty, empty, Segments([0, shape[0]])).shape == shape


def test_offsets_beyond_32_bits(distant_storage, device):
    stride, head_dim = 2**30 + 64, 16  # the third row begins after element 2³¹
    segments = Segments([1, 2])
    near = make_projection(segments, head_dim, torch.float32, device, heads=1)
    storage = distant_storage(3 * stride)
    q, k, v = (storage.as_strided((3, 1, head_dim), (stride, head_dim, 1), part * head_dim) for part in range(3))
    for tensor, source in zip((q, k, v), near, strict=True):
        tensor.copy_(source)
    expected = flash_attention_varlen(*near, segments)
    assert torch.equal(flash_attention_varlen(q, k, v, segments), expected)
    flash_attention_varlen(q, k, v, segments, out=v)
    assert torch.equal(v, expected)


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
        ({"segments": [4]}, TypeError, "segments must be Segments, got list"),
        ({"segments": Segments([3])}, ValueError, r"must cover the 4 rows of q, got Segments\(\[3\]\) with 3"),
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
    q, k, v = make_projection(segments, head_dim, dtype, heads=4, device=kernel_device)
    out = flash_attention_varlen(q, k, v, segments)
    assert relative_error(out, attention_fp64(q, k, v, segments)) <= TOLERANCE[dtype]
    for index, length in enumerate(segments.lengths):
        rows = slice(segments.cu_seqlens[index].item(), segments.cu_seqlens[index].item() + length)
        assert torch.equal(out[rows], flash_attention_varlen(q[rows], k[rows], v[rows], Segments([length])))
