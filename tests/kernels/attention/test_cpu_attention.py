"""Attention of the CPU reference by matmuls whose epilogue is the exponential, compared with fp64."""

import math

import pytest
import torch
from support.numbers import relative_error

from tritontower.kernels.attention import torch_reference
from tritontower.kernels.attention.torch_reference import flash_attention_varlen_reference
from tritontower.kernels.gemm import cpu
from tritontower.kernels.runtime.segments import Segments

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not cpu.has_onednn_exponential(BF16), reason="oneDNN has no bf16 matmul with a sigmoid on this CPU"
)


@pytest.fixture
def exponentials(monkeypatch):
    """Selects the path of AMD's CPUs, for segments of every length."""
    monkeypatch.setattr(cpu, "is_fused_attention_slow", lambda: True)
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_EXPONENTIALS", 1)


@pytest.fixture
def recomputed(monkeypatch):
    """Shapes of the heads that were recomputed in fp32."""
    shapes = []
    attend = torch_reference.attend_by_matmuls

    def counted(q, k, v, scale, out):
        shapes.append(tuple(q.shape))
        attend(q, k, v, scale, out)

    monkeypatch.setattr(torch_reference, "attend_by_matmuls", counted)
    return shapes


def random_qkv(rows, heads, head_dim, *, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, 3, heads, head_dim, generator=generator)
    qkv[:, :2] *= spread
    return qkv.to(BF16).unbind(1)


def attend(q, k, v, lengths=None):
    segments = Segments(lengths or [len(q)])
    scale = q.shape[2] ** -0.5
    return flash_attention_varlen_reference(q, k, v, segments, scale=scale, out=torch.full_like(v, math.nan))


def exact(q, k, v):
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[2] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())


def fused(q, k, v):
    """torch's own attention in bf16, as in transformers."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def allowed(q, k, v):
    """Error of the fused form, of rounding the scaled queries, and of two roundings of values, all independent."""
    truth = exact(q, k, v)
    scale = q.shape[2] ** -0.5
    rounded = exact((q.double() * scale).to(BF16).double() / scale, k, v)
    return 1.1 * math.hypot(relative_error(fused(q, k, v), truth), relative_error(rounded, truth), 0.0024)


# One and two rows, odd lengths, whole blocks, several chunks of queries; each head_dim of the towers.
@pytest.mark.parametrize(
    ("head_dim", "length"), [(64, 1), (72, 2), (80, 17), (88, 64), (104, 257), (128, 700), (72, 257), (80, 2500)]
)
def test_matches_fp64(exponentials, recomputed, head_dim, length):
    q, k, v = random_qkv(length, 3, head_dim)
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not recomputed


@pytest.mark.parametrize("spread", [3.0, 5.0])
def test_large_scores(exponentials, spread):
    # Scores of ± 40 and ± 100: a few keys have all the weight, so a rounded score would be visible.
    q, k, v = random_qkv(400, 4, 64, spread=spread)
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)


def test_a_large_common_part_of_the_keys_cancels(exponentials, recomputed):
    # Scores around 500 that differ by a few: bf16 scores would be off by one or two.
    q, k, v = (tensor.float() for tensor in random_qkv(300, 2, 64))
    q[..., 0], k[..., 0] = 64.0, 64.0
    q, k, v = (tensor.to(BF16) for tensor in (q, k, v))
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not recomputed


@pytest.mark.parametrize("height", [30.0, 60.0, 300.0])
def test_a_dominating_key_that_is_not_sampled(exponentials, recomputed, height):
    q, k, v = random_qkv(400, 2, 64, spread=0.1)
    # Key 1 lies between the samples (every sixth); every query of head 0 scores `height` with it, next to nothing elsewhere.
    q[:, 0, 0], k[:, 0, 0] = 8.0, 0.0
    k[1, 0, 0] = height
    result = attend(q, k, v)
    torch.testing.assert_close(result[:, 0], v[1, 0].expand(400, 64), rtol=1e-2, atol=1e-3)
    assert relative_error(result, exact(q, k, v)) <= allowed(q, k, v)
    # Within the range of the shift the result is exact; beyond it only this head is recomputed.
    assert recomputed == ([] if height <= 30 else [(400, 1, 64)])


def test_a_sampled_key_far_above_the_rest(exponentials, recomputed):
    q, k, v = random_qkv(400, 1, 64, spread=0.1)
    q[:, 0, 0], k[:, 0, 0] = 8.0, 0.0
    k[0, 0, 0] = 200.0
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not recomputed


def test_nan_stays_in_its_row_and_head(exponentials):
    q, k, v = random_qkv(600, 2, 64)
    clean = attend(q, k, v, [300, 300])
    q[350, 1, 3] = math.nan
    result = attend(q, k, v, [300, 300])
    assert result[350, 1].isnan().all()
    assert torch.equal(result[:300], clean[:300])
    assert torch.equal(result[300:, 0], clean[300:, 0])
    kept = [row for row in range(300, 600) if row != 350]
    assert relative_error(result[kept, 1], clean[kept, 1]) <= 0.01


@pytest.mark.parametrize("budget", [None, 1])
def test_segments_do_not_depend_on_each_other(exponentials, monkeypatch, budget):
    if budget:
        monkeypatch.setattr(torch_reference, "WEIGHTS_BYTES", budget)
        monkeypatch.setattr(torch_reference, "HEADS_BYTES", budget)
    lengths = [5, 257, 257, 1, 130, 64, 257]
    q, k, v = random_qkv(sum(lengths), 3, 72)
    together = attend(q, k, v, lengths)
    alone = [attend(*parts) for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_strided_views_of_one_projection(exponentials):
    q, k, v = random_qkv(210, 4, 80)
    assert not q.is_contiguous()
    assert torch.equal(attend(q, k, v), attend(q.contiguous(), k.contiguous(), v.contiguous()))
