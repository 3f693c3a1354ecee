"""What only the CPU path has: packed weights, and attention whose weights come out of a product as exponentials."""

import math

import numpy as np
import pytest
import torch
from support.numbers import relative_error
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.engine import onednn_weights
from tritontower.engine.executor import Executor
from tritontower.engine.onednn_weights import prepack_weights
from tritontower.kernels.attention import torch_reference
from tritontower.kernels.attention.torch_reference import flash_attention_varlen_reference
from tritontower.kernels.gemm import cpu
from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.torch_reference import linear_reference
from tritontower.kernels.runtime.dispatch import use
from tritontower.kernels.runtime.segments import Segments

BF16 = torch.bfloat16
HEAD_DIMS = (64, 72, 80, 88, 104, 128)

needs_exponentials = pytest.mark.skipif(
    not (cpu.has_onednn_exponential(BF16)), reason="oneDNN has no bf16 product with a sigmoid on this CPU"
)
needs_packing = pytest.mark.skipif(
    not (cpu.can_prepack(BF16) and cpu.can_prepack(torch.float32)),
    reason="oneDNN packs no bf16 weights on this CPU, or no fp32 ones in this torch",
)


@pytest.fixture
def exponentials(monkeypatch):
    """Attention takes the path of CPUs by AMD, whoever made this one, for segments of every length."""
    monkeypatch.setattr(cpu, "is_fused_attention_slow", lambda: True)
    monkeypatch.setattr(torch_reference, "LENGTH_FOR_EXPONENTIALS", 1)


@pytest.fixture
def repairs(monkeypatch):
    """The shapes of the heads that had to be computed in fp32."""
    shapes = []
    by_products = torch_reference._attend_by_products

    def counted(q, k, v, scale, out):
        shapes.append(tuple(q.shape))
        by_products(q, k, v, scale, out)

    monkeypatch.setattr(torch_reference, "_attend_by_products", counted)
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
    """torch's own attention, in bf16 as well: what transformers would give."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def allowed(q, k, v):
    """What the fused form errs, what rounding the scaled queries costs, and two roundings of values, all independent."""
    truth = exact(q, k, v)
    scale = q.shape[2] ** -0.5
    rounded = exact((q.double() * scale).to(BF16).double() / scale, k, v)
    return 1.1 * math.hypot(relative_error(fused(q, k, v), truth), relative_error(rounded, truth), 0.0024)


@needs_exponentials
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", [1, 2, 17, 64, 257, 700])
def test_exponentials_against_fp64(exponentials, repairs, head_dim, length):
    q, k, v = random_qkv(length, 3, head_dim)
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not repairs


@needs_exponentials
@pytest.mark.parametrize("length", [1003, 2500, 5000])
def test_exponentials_of_long_segments(exponentials, repairs, length):
    q, k, v = random_qkv(length, 1, 80, spread=2.0)
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not repairs


@needs_exponentials
@pytest.mark.parametrize("spread", [3.0, 5.0])
def test_large_scores(exponentials, spread):
    # Scores of ± 40 and ± 100: a few keys have all the weight, and what rounds a score shows in full.
    q, k, v = random_qkv(400, 4, 64, spread=spread)
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)


@needs_exponentials
def test_a_large_common_part_of_the_keys_cancels(exponentials, repairs):
    # Scores around 500 that differ by a few: bf16 scores would be off by one or two.
    q, k, v = (tensor.float() for tensor in random_qkv(300, 2, 64))
    q[..., 0], k[..., 0] = 64.0, 64.0
    q, k, v = (tensor.to(BF16) for tensor in (q, k, v))
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not repairs


@needs_exponentials
@pytest.mark.parametrize("height", [30.0, 60.0, 300.0])
def test_a_dominating_key_that_is_not_sampled(exponentials, repairs, height):
    q, k, v = random_qkv(400, 2, 64, spread=0.1)
    # Key 1 lies between the samples (every sixth); every query of head 0 scores `height` with it, next to nothing elsewhere.
    q[:, 0, 0], k[:, 0, 0] = 8.0, 0.0
    k[1, 0, 0] = height
    result = attend(q, k, v)
    torch.testing.assert_close(result[:, 0], v[1, 0].expand(400, 64), rtol=1e-2, atol=1e-3)
    assert relative_error(result, exact(q, k, v)) <= allowed(q, k, v)
    # Within the range of the shift the product is enough; beyond it the head, and no other, is computed again.
    assert repairs == ([] if height <= 30 else [(400, 1, 64)])


@needs_exponentials
def test_a_sampled_key_far_above_the_rest_loses_nothing_that_counts(exponentials, repairs):
    q, k, v = random_qkv(400, 1, 64, spread=0.1)
    q[:, 0, 0], k[:, 0, 0] = 8.0, 0.0
    k[0, 0, 0] = 200.0
    assert relative_error(attend(q, k, v), exact(q, k, v)) <= allowed(q, k, v)
    assert not repairs


@needs_exponentials
def test_values_that_are_not_finite_stay_where_they_belong(exponentials):
    q, k, v = random_qkv(600, 2, 64)
    clean = attend(q, k, v, [300, 300])
    q[350, 1, 3] = math.nan
    result = attend(q, k, v, [300, 300])
    assert result[350, 1].isnan().all()
    assert torch.equal(result[:300], clean[:300])
    assert torch.equal(result[300:, 0], clean[300:, 0])
    kept = [row for row in range(300, 600) if row != 350]
    assert relative_error(result[kept, 1], clean[kept, 1]) <= 0.01


@needs_exponentials
@pytest.mark.parametrize("budget", [None, 1])
def test_neighbors_do_not_change_bits(exponentials, monkeypatch, budget):
    if budget:
        monkeypatch.setattr(torch_reference, "_WEIGHTS_BYTES", budget)
        monkeypatch.setattr(torch_reference, "_HEADS_BYTES", budget)
    lengths = [5, 257, 257, 1, 130, 64, 257]
    q, k, v = random_qkv(sum(lengths), 3, 72)
    together = attend(q, k, v, lengths)
    alone = [attend(*parts) for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
    assert torch.equal(together, torch.cat(alone))


@needs_exponentials
def test_strided_views_of_one_projection(exponentials):
    q, k, v = random_qkv(210, 4, 80)
    assert not q.is_contiguous()
    assert torch.equal(attend(q, k, v), attend(q.contiguous(), k.contiguous(), v.contiguous()))


def test_only_bf16_takes_exponentials():
    assert not cpu.has_onednn_exponential(torch.float32)
    assert not cpu.has_onednn_exponential(torch.float16)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 2, 3, 64, 257])
@pytest.mark.parametrize(("columns", "inner"), [(96, 64), (130, 75), (1280, 3420)])
@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu", "silu_gated"])
def test_packed_weights_give_the_bits_of_plain_ones(dtype, rows, columns, inner, activation):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))
    )
    residual = torch.randn(rows, columns // (2 if activation == "silu_gated" else 1), generator=generator).to(dtype)
    packed = cpu.prepack(weight, gated=activation == "silu_gated")
    assert isinstance(packed, cpu.PrepackedWeight)
    assert (packed.shape, packed.dtype, packed.device) == (weight.shape, weight.dtype, weight.device)
    for added in (None, residual):
        plain = linear_reference(x, weight, bias, activation, added)
        assert torch.equal(linear_reference(x, packed, bias, activation, added), plain)


@needs_packing
def test_packed_weights_refuse_everything_else():
    weight = torch.randn(64, 32)
    packed = cpu.prepack(weight)
    assert "64, 32" in repr(packed)
    with pytest.raises(TypeError, match="prepacked"):
        torch.matmul(torch.randn(3, 64), packed)
    with pytest.raises(ValueError, match="gated=True"):
        linear_reference(torch.randn(3, 32), packed, None, "silu_gated")
    with pytest.raises(ValueError, match="gated=True"):
        linear_reference(torch.randn(3, 32), cpu.prepack(weight, gated=True))


def test_a_dtype_that_onednn_cannot_pack_stays_plain(monkeypatch):
    monkeypatch.setattr(cpu, "can_prepack", lambda dtype: False)
    weight = torch.randn(64, 32)
    assert cpu.prepack(weight) is weight


@needs_packing
def test_the_public_product_takes_packed_weights(monkeypatch):
    monkeypatch.setattr("tritontower.kernels.gemm.linear.runs_kernel", lambda x: False)
    x, weight = torch.randn(5, 48), torch.randn(32, 48)
    assert torch.equal(linear(x, cpu.prepack(weight)), linear(x, weight))


@needs_packing
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_tower_of_packed_weights_gives_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn_weights, "INTERPRETED", False)
    with use("reference"):
        tower = VisionTower.from_pretrained(case.save(tmp_path / "model"), device="cpu")
        batch = tower.preprocess(np.full((90, 70, 3), 128, np.uint8))
        plain = tower.read_weights()
        packed = dict(plain)
        prepack_weights([tower.graph], packed)
        kinds = {
            node.kind for node in tower.graph.nodes for name in node.weights.values() if is_packed(name, tower, packed)
        }
        assert {"linear", "mlp"} <= kinds <= {"linear", "mlp", "projector"}
        expected = Executor(tower.graph, plain).run(batch)
        found = Executor(tower.graph, packed).run(batch)
        assert all(torch.equal(found[name], rows) for name, rows in expected.items())
        loaded = tower.load().run(batch)
        assert all(torch.equal(loaded[name], rows) for name, rows in expected.items())


def is_packed(name, tower, sources):
    return isinstance(sources[tower.graph.weights[name].held_name], cpu.PrepackedWeight)


def test_the_interpreter_keeps_plain_weights(tmp_path):
    tower = VisionTower.from_pretrained(all_cases()[0].save(tmp_path / "model"), device="cpu")
    weights = tower.read_weights()
    prepack_weights([tower.graph], weights)
    assert not any(isinstance(weight, cpu.PrepackedWeight) for weight in weights.values())
