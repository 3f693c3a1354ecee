"""Projection to q, k and v with the rotation: fp64, the two operations it replaces, weight layout, padding."""

from dataclasses import replace

import pytest
import torch
from support.gemm import SMALL
from support.gemm import qkv_inputs as inputs
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.qkv_projection import qkv_projection, reorder_heads
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime.dispatch import runs_kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(x, weight, bias, cosines, sines, heads, head_dim):
    """q, k and v ``[M, 3, H, hd]`` in fp64 and the published order of columns."""
    qkv = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    qkv = qkv.unflatten(1, (3, heads, head_dim))
    first, second = qkv[:, :2].chunk(2, dim=-1)
    cosine, sine = cosines.double()[:, None, None], sines.double()[:, None, None]
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    return torch.cat((rotated, qkv[:, 2:]), 1)


def published_order(y, heads, head_dim, padded=None):
    """The result as ``[M, 3, H, hd]`` in the published order, without padding."""
    y = y.unflatten(1, (3, heads, padded or head_dim))[..., :head_dim]
    return torch.cat((torch.cat((y[:, :2, :, ::2], y[:, :2, :, 1::2]), -1), y[:, 2:]), 1)


# One row; 77, not a multiple of anything; heads that a tile of 16 columns splits; whole blocks.
@pytest.mark.parametrize(
    ("dtype", "rows", "heads", "head_dim", "padded", "inner"),
    [
        (torch.float32, 1, 1, 4, None, 77),
        (torch.float32, 37, 3, 20, 24, 64),
        (torch.float16, 70, 2, 18, 20, 40),
        (torch.bfloat16, 33, 2, 16, None, 96),
        (torch.bfloat16, 37, 3, 20, 24, 64),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_fp64(device, dtype, rows, heads, head_dim, padded, inner):
    x, weight, bias, cosines, sines = inputs(rows, heads, head_dim, inner, dtype, device)
    how = {"heads": heads, "head_dim": head_dim, "padded_head_dim": padded, "pairs": True}
    y = qkv_projection(
        x,
        reorder_heads(weight, **how),
        reorder_heads(bias, **how, ones=padded is not None),
        cosines,
        sines,
        heads=heads,
        head_dim=head_dim,
        padded_head_dim=padded,
        config=SMALL,
    )
    want = expected(x, weight, bias, cosines, sines, heads, head_dim)
    # The kernel rounds once, the reference also before it rotates.
    allowed = tolerance(dtype, want.numel()) if runs_kernel(x) else 1.5 * TOLERANCE[dtype]
    assert relative_error(published_order(y, heads, head_dim, padded), want) <= allowed
    if padded is not None:
        padding = y.unflatten(1, (3, heads, padded))[..., head_dim:]
        ones = torch.zeros_like(padding)
        ones[:, 1:, :, 0] = 1
        assert torch.equal(padding, ones)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_match_the_separate_operations(device, dtype):
    # q·kᵀ does not depend on the order of columns, and one rounding fewer does not increase the error.
    rows, heads, head_dim, inner = 37, 2, 20, 96
    x, weight, bias, cosines, sines = inputs(rows, heads, head_dim, inner, dtype, device)
    how = {"heads": heads, "head_dim": head_dim}
    weight_, bias_ = (reorder_heads(tensor, **how, pairs=True) for tensor in (weight, bias))
    fused = qkv_projection(x, weight_, bias_, cosines, sines, **how, config=SMALL)
    separate = linear(x, weight, bias, config=SMALL).unflatten(1, (3, heads, head_dim))
    rope_(separate[:, 0], separate[:, 1], cosines, sines)

    def scores(qkv):
        q, k, _ = qkv.double().unbind(1)
        return torch.einsum("qhd,khd->hqk", q, k)

    truth = scores(expected(x, weight, bias, cosines, sines, heads, head_dim))
    error = relative_error(scores(fused.unflatten(1, (3, heads, head_dim))), truth)
    assert error <= 1.02 * relative_error(scores(separate), truth) + 1e-7
    assert torch.equal(fused.unflatten(1, (3, heads, head_dim))[:, 2], separate[:, 2])


def test_without_tables_it_is_a_linear_layer(device):
    x, weight, bias, _, _ = inputs(37, 2, 5, 64, torch.bfloat16, device)
    how = {"heads": 2, "head_dim": 5, "config": SMALL}
    plain = linear(x, weight, bias, config=SMALL)
    assert torch.equal(qkv_projection(x, weight, bias, None, None, **how), plain)
    # A power of two changes no rounding.
    scaled = torch.cat((4 * plain[:, :10], plain[:, 10:]), 1)
    assert torch.equal(qkv_projection(x, weight, bias, None, None, **how, query_scale=4.0), scaled)


@pytest.mark.parametrize(
    ("dtype", "split", "rotated"),
    [
        (torch.float32, 1, True),
        (torch.float32, 2, False),
        (torch.float16, 2, True),
        (torch.bfloat16, 1, False),
        (torch.bfloat16, 2, True),
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_queries_are_scaled(device, dtype, split, rotated):
    heads, head_dim, padded = 3, 18, 20
    x, weight, bias, cosines, sines = inputs(37, heads, head_dim, 72, dtype, device)
    how = {"heads": heads, "head_dim": head_dim, "padded_head_dim": padded}
    weight_, bias_ = (reorder_heads(tensor, **how, pairs=True, ones=tensor.dim() == 1) for tensor in (weight, bias))
    tables = (cosines, sines) if rotated else (None, None)
    config = replace(SMALL, split=split)
    plain = qkv_projection(x, weight_, bias_, *tables, **how, config=config)
    y = qkv_projection(x, weight_, bias_, *tables, **how, config=config, query_scale=0.17)
    columns = heads * padded
    assert torch.equal(y[:, columns:], plain[:, columns:])
    if rotated:
        want = expected(x, weight, bias, cosines, sines, heads, head_dim)[:, 0]
    else:
        want = linear(x.double().cpu().float(), weight.float().cpu(), bias.float().cpu()).double()
        want = want.unflatten(1, (3, heads, head_dim))[:, 0].to(device)
    # The kernel rounds once, the reference also before it rotates and scales.
    allowed = tolerance(dtype, want.numel()) if runs_kernel(x) else 1.5 * TOLERANCE[dtype]
    q = published_order(y, heads, head_dim, padded)[:, 0]
    assert relative_error(q, 0.17 * want) <= allowed
    alone = qkv_projection(
        x[5:6], weight_, bias_, *(table if table is None else table[5:6] for table in tables), **how, config=config,
        query_scale=0.17,
    )  # fmt: skip
    assert torch.equal(alone, y[5:6])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 200, 5000])
@pytest.mark.parametrize(("head_dim", "padded"), [(64, 64), (72, 80), (80, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_towers_shapes_on_a_gpu(kernel_device, dtype, head_dim, padded, rows):
    x, weight, bias, cosines, sines = inputs(rows, 16, head_dim, 1280, dtype, kernel_device)
    how = {"heads": 16, "head_dim": head_dim, "padded_head_dim": padded}
    weight_, bias_ = (reorder_heads(tensor, **how, pairs=True) for tensor in (weight, bias))
    y = qkv_projection(x, weight_, bias_, cosines, sines, **how)
    want = expected(x, weight, bias, cosines, sines, 16, head_dim)
    assert relative_error(published_order(y, 16, head_dim, padded), want) <= tolerance(dtype, want.numel())


def test_reorder_heads_by_hand():
    bias = torch.arange(12.0)
    assert reorder_heads(bias, heads=1, head_dim=4).tolist() == bias.tolist()
    pairs = [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]
    assert reorder_heads(bias, heads=1, head_dim=4, pairs=True).tolist() == pairs
    assert reorder_heads(bias[:, None] * torch.ones(5), heads=1, head_dim=4, pairs=True)[:, 3].tolist() == pairs
    padded = [0, 1, 0, 2, 3, 0, 4, 5, 1, 6, 7, 1, 8, 9, 1, 10, 11, 1]
    assert reorder_heads(bias, heads=2, head_dim=2, padded_head_dim=3, ones=True).tolist() == padded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"tensor must have 18 rows for 3 heads of 2, got shape \(12,\)"),
        ({"head_dim": 4, "heads": 1, "padded_head_dim": 3}, "padded_head_dim must be at least head_dim, 4, got 3"),
        ({"head_dim": 1, "heads": 4, "pairs": True}, "head_dim must be even for pairs, got 1"),
        ({"ones": True}, "must be a bias with padding for ones"),
        ({"tensor": torch.zeros(12, 2), "padded_head_dim": 4, "ones": True}, "must be a bias with padding for ones"),
    ],
)
def test_invalid_heads_are_rejected(change, message):
    arguments = {"tensor": torch.zeros(12), "heads": 2, "head_dim": 2} | change
    with pytest.raises(ValueError, match=message):
        reorder_heads(arguments.pop("tensor"), **arguments)
