"""One query's attention to each segment: both backends against fp64 and against the pooling head of transformers."""

import pytest
import torch
from support.numbers import TOLERANCE, normal, relative_error
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from tritontower.kernels.attention import pooling_head
from tritontower.kernels.attention.pooling_head import AttentionPoolingConfig, attention_pooling
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.segments import Segments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RAGGED = Segments([1, 64, 77, 196, 63])


def inputs(segments, heads, head_dim, dtype, device="cpu", seed=0):
    """A query, and keys and values as a projection leaves them."""
    query = normal(heads, head_dim, dtype=dtype, device=device, seed=seed + 1)
    return query, normal(segments.total, 2, heads, head_dim, dtype=dtype, device=device, seed=seed)


def expected(query, kv, segments, scale=None):
    """Attention by its definition, in fp64."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    pooled = []
    for rows in kv.cpu().double().split(segments.lengths):
        scores = torch.einsum("hd,lhd->hl", query.cpu().double(), rows[:, 0]) * scale
        pooled.append(torch.einsum("hl,lhd->hd", scores.softmax(1), rows[:, 1]))
    return torch.stack(pooled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 20, 64, 72, 128])
@pytest.mark.usefixtures("poisoned_empty")
def test_pooling_matches_fp64(device, monkeypatch, head_dim, dtype):
    monkeypatch.setattr(pooling_head, "CHUNK", 2 * 77 * 72 * 2)  # the reference computes one or two heads at a time
    query, kv = inputs(RAGGED, 3, head_dim, dtype, device)
    pooled = attention_pooling(query, kv, RAGGED)
    assert pooled.is_contiguous()
    assert relative_error(pooled, expected(query, kv, RAGGED)) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (16, 72)])
def test_many_images(kernel_device, heads, head_dim, dtype):
    segments = Segments([196] * 100 + [4096, 729, 1])
    query, kv = inputs(segments, heads, head_dim, dtype, kernel_device)
    assert relative_error(attention_pooling(query, kv, segments), expected(query, kv, segments)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 16)])
def test_pooling_equals_transformers(device, width, heads):
    config = SiglipVisionConfig(hidden_size=width, intermediate_size=16, num_attention_heads=heads)
    torch.manual_seed(0)
    head = SiglipMultiheadAttentionPoolingHead(config).eval()
    lengths = [49, 49, 10]
    hidden = normal(sum(lengths), width)
    attention = head.attention
    with torch.no_grad():
        torch.nn.init.normal_(attention.in_proj_bias)
        ask, tell = attention.in_proj_weight.split([width, 2 * width])
        ask_bias, tell_bias = attention.in_proj_bias.split([width, 2 * width])
        query = (head.probe[0, 0] @ ask.t() + ask_bias).view(heads, -1)
        kv = (hidden @ tell.t() + tell_bias).view(-1, 2, heads, width // heads)
        pooled = attention_pooling(query.to(device), kv.to(device), Segments(lengths)).cpu()
        pooled = attention.out_proj(pooled.flatten(1))
        want = [attention(head.probe, rows[None], rows[None])[0][0, 0] for rows in hidden.split(lengths)]
    assert relative_error(pooled, torch.stack(want)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["large", "equal", "one huge", "all very negative"])
def test_adversarial_scores(device, case, dtype):
    """Scores of thousands, equal scores, one key that takes all the weight, and a maximum far below zero."""
    segments = Segments([1, 77, 130])
    query, kv = inputs(segments, 2, 64, dtype, device, seed=7)
    if case == "large":
        query, kv[:, 0] = query * 60, kv[:, 0] * 60
    elif case == "equal":
        kv[:, 0] = kv[0, 0]
    elif case == "one huge":
        kv[70, 0] = query * 100
    else:
        query = query.abs() + 1
        kv[:, 0] -= query * 8
    pooled = attention_pooling(query, kv, segments)
    # Scores of magnitude S carry an absolute error of about S · 2⁻²⁴ in fp32, which the exponential makes relative.
    largest = (query.float() * kv[:, 0].float()).sum(-1).abs().max().item() * 64**-0.5
    assert relative_error(pooled, expected(query, kv, segments)) <= TOLERANCE[dtype] + largest * 2.0**-23


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_not_rounded(device, dtype):
    """257 equal weights of 1/257, which 16 bits do not hold, of values that all are 1."""
    kv = torch.zeros(257, 2, 1, 16, dtype=dtype, device=device)
    kv[:, 1] = 1 + torch.finfo(dtype).eps
    pooled = attention_pooling(torch.ones(1, 16, dtype=dtype, device=device), kv, Segments([257]))
    assert torch.equal(pooled, kv[:1, 1])


@pytest.mark.parametrize("head_dim", [40, 72, 104])
def test_only_the_segments_own_elements_are_read(device, head_dim):
    """NaN surrounds every head and the rows; reading one would show in the result."""
    buffer = torch.full((RAGGED.total + 100, 2, 3, 160), float("nan"), dtype=torch.float16, device=device)
    kv = buffer[50 : 50 + RAGGED.total, :, :2, 8 : 8 + head_dim]
    asked = torch.full((3, 160), float("nan"), dtype=torch.float16, device=device)
    query = asked[:2, 8 : 8 + head_dim]
    query.copy_(normal(2, head_dim))
    kv.copy_(normal(*kv.shape, seed=1))
    pooled = attention_pooling(query, kv, RAGGED)
    assert relative_error(pooled, expected(query, kv, RAGGED)) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_and_written(device, dtype):
    """Keys and values as parts of a fused projection, parts apart, tokens innermost but one; out between gaps."""
    heads, head_dim = 3, 72
    query, kv = inputs(RAGGED, heads, head_dim, dtype, device)
    want = attention_pooling(query, kv, RAGGED)
    fused = normal(RAGGED.total, 3, heads, head_dim, dtype=dtype, device=device, seed=5)
    fused[:, 1:] = kv
    apart = torch.empty(2, heads, RAGGED.total, head_dim, dtype=dtype, device=device).permute(2, 0, 1, 3).copy_(kv)
    wide = torch.full((RAGGED.count, 5, 96), 7.0, dtype=dtype, device=device)
    out = wide[:, 1:4, 8:80]
    for view in (fused[:, 1:], apart):
        assert view.stride() != kv.stride()
        assert attention_pooling(query, view, RAGGED, out=out) is out
        assert torch.equal(out, want)
    out.fill_(7.0)
    assert bool((wide == 7.0).all())


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy warns of the neighbors' NaN
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 64, 100])
def test_a_segment_does_not_depend_on_its_neighbors(device, length, dtype):
    """Alone, first, last, and between longer segments and NaN: the same bits."""
    lengths = [length, 64, length, 7, 130, 1, length]
    segments = Segments(lengths)
    query, kv = inputs(segments, 2, 72, dtype, device)
    parts = kv.split(lengths)
    for place in (2, 6):
        parts[place].copy_(parts[0])
    parts[4].fill_(float("nan"))
    alone = attention_pooling(query, parts[0].clone(), Segments([length]))[0]
    pooled = attention_pooling(query, kv, segments)
    assert bool(torch.isfinite(alone).all())
    for place in (0, 2, 6):
        assert torch.equal(pooled[place], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_does_not_depend_on_the_others(kernel_device, dtype):
    query, kv = inputs(RAGGED, 3, 72, dtype, kernel_device)
    pooled = attention_pooling(query, kv, RAGGED)
    alone = [attention_pooling(query[head, None], kv[:, :, head, None], RAGGED) for head in range(3)]
    assert torch.equal(torch.cat(alone, dim=1), pooled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_kernel_differ_by_less_than_a_rounding(kernel_device, dtype):
    segments = Segments([196, 77, 300])
    query, kv = inputs(segments, 4, 72, dtype, kernel_device)
    kernel = attention_pooling(query, kv, segments)
    with dispatch.use("reference"):
        reference = attention_pooling(query.cpu(), kv.cpu(), segments)
    assert relative_error(kernel, reference) <= TOLERANCE[dtype] / 4


@pytest.mark.parametrize(
    "config", [AttentionPoolingConfig(16, 4), AttentionPoolingConfig(128, 8), AttentionPoolingConfig(512, 4)]
)
def test_explicit_configurations(kernel_device, config):
    query, kv = inputs(RAGGED, 2, 72, torch.float32, kernel_device)
    pooled = attention_pooling(query, kv, RAGGED, config=config)
    assert relative_error(pooled, expected(query, kv, RAGGED)) <= TOLERANCE[torch.float32]


def test_offsets_beyond_32_bits(distant_storage):
    # The third row begins beyond element 2³¹.
    stride, head_dim = 2**30 + 64, 64
    storage, three = distant_storage(3 * stride), Segments([1, 1, 1])
    query, near = inputs(three, 1, head_dim, torch.float32, storage.device)
    far = storage.as_strided(near.shape, (stride, head_dim, head_dim, 1))
    far.copy_(near)
    # A first row, a row of a block, and a whole block that lie far away.
    for segments in (Segments([2, 1]), Segments([3])):
        for config in (None, AttentionPoolingConfig(block_keys=2, num_warps=4)):
            pooled = attention_pooling(query, far, segments, config=config)
            assert torch.equal(pooled, attention_pooling(query, near, segments, config=config))
    out = storage.as_strided((3, 1, head_dim), (stride, head_dim, 1))
    attention_pooling(query, near, three, out=out)
    # One row each, and a weight of 1: the values themselves.
    assert torch.equal(out, near[:, 1])


def test_nothing_to_do(device):
    query, kv = inputs(RAGGED, 2, 16, torch.float32, device)
    assert attention_pooling(query, kv[:0], Segments([])).shape == (0, 2, 16)
    assert attention_pooling(query[:0], kv[:, :, :0], RAGGED).shape == (RAGGED.count, 0, 16)


QUERY, KV = torch.zeros(2, 8), torch.zeros(5, 2, 2, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"segments": [5]}, TypeError, "segments must be Segments, got list"),
        ({"segments": Segments([4])}, ValueError, r"kv must have shape \(4, 2, 2, 8\), got \(5, 2, 2, 8\)"),
        ({"segments": Segments([2, 0, 3])}, ValueError, "segments must not be empty, got .* segment 1 of 0 rows"),
        ({"query": QUERY.double()}, TypeError, "query must be float32, .* got torch.float64"),
        ({"query": QUERY[0]}, ValueError, r"query must be \[heads, head_dim\] .* got \(8,\)"),
        ({"query": torch.zeros(2, 136)}, ValueError, "head_dim from 1 to 128, got .*136"),
        ({"query": torch.zeros(8, 2).t()}, ValueError, "query must have last stride 1"),
        ({"kv": KV.half()}, TypeError, "kv must be torch.float32"),
        ({"kv": KV[:, :1]}, ValueError, r"kv must have shape .* got \(5, 1, 2, 8\)"),
        ({"kv": torch.zeros(5, 2, 8, 2).transpose(2, 3)}, ValueError, "kv must have last stride 1"),
        ({"scale": 0.0}, ValueError, "scale must be a positive, finite fp32 number, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be a positive, .* got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be a positive, .* got inf"),
        ({"out": torch.zeros(2, 2, 8)}, ValueError, r"out must have shape \(1, 2, 8\), got \(2, 2, 8\)"),
        ({"out": torch.zeros(1, 2, 8).half()}, TypeError, "out must be torch.float32"),
        ({"out": torch.zeros(1, 8, 2).transpose(1, 2)}, ValueError, "out must have last stride 1"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        attention_pooling(**({"query": QUERY, "kv": KV, "segments": Segments([5])} | changes))
