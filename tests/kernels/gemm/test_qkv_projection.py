"""Projection to q, k and v with the rotation: fp64, the two operations it replaces, weight layout, padding."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.gemm import qkv_projection as qkv_projection_module
from tritontower.kernels.gemm.linear import LinearConfig, linear
from tritontower.kernels.gemm.qkv_projection import qkv_projection, reorder_heads
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime.checks import align_up
from tritontower.kernels.runtime.dispatch import runs_kernel
from tritontower.kernels.runtime.valid_rows import ValidRows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)


def inputs(rows, heads, head_dim, inner, dtype, device="cpu", seed=0):
    """x, weight and bias in the published order, cosines and sines; the sums are of order one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(3 * heads * head_dim, inner, generator=generator) / inner**0.5
    bias = torch.randn(3 * heads * head_dim, generator=generator)
    angles = torch.randn(rows, head_dim // 2, generator=generator) * 3
    tables = [angles.cos().to(device), angles.sin().to(device)]
    return [tensor.to(device, dtype) for tensor in (x, weight, bias)] + tables


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


@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 3)])
@pytest.mark.usefixtures("poisoned_empty")
def test_few_rows_split_and_then_rotate(kernel_device, dtype, split):
    x, weight, bias, cosines, sines = inputs(5, 7, 18, 200, dtype, kernel_device)
    how = {"heads": 7, "head_dim": 18, "padded_head_dim": 20}
    weight_, bias_ = (reorder_heads(tensor, **how, pairs=True) for tensor in (weight, bias))
    config = replace(SMALL, split=split)
    y = qkv_projection(x, weight_, bias_, cosines, sines, **how, config=config)
    again = qkv_projection(x, weight_, bias_, cosines, sines, **how, config=config)
    assert torch.equal(y, again)
    want = expected(x, weight, bias, cosines, sines, 7, 18)
    assert relative_error(published_order(y, 7, 18, 20), want) <= tolerance(dtype, want.numel())


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
    y = qkv_projection(x, weight, bias, None, None, heads=2, head_dim=5, config=SMALL)
    assert torch.equal(y, linear(x, weight, bias, config=SMALL))


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


def test_heads_of_an_odd_width_are_scaled(device):
    x, weight, bias, _, _ = inputs(37, 2, 5, 64, torch.float32, device)
    how = {"heads": 2, "head_dim": 5, "config": SMALL}
    y = qkv_projection(x, weight, bias, None, None, **how, query_scale=4.0)
    plain = linear(x, weight, bias, config=SMALL)
    assert torch.equal(y, torch.cat((4 * plain[:, :10], plain[:, 10:]), 1))


@pytest.mark.parametrize(("operands", "split"), [("pointers", 2), ("descriptors", 1)])
def test_rows_may_be_strided(device, operands, split):
    x, weight, _, cosines, sines = inputs(37, 2, 20, 64, torch.float32, device)
    want = expected(x, weight, None, cosines, sines, 2, 20)
    how = {"heads": 2, "head_dim": 20}
    weight = reorder_heads(weight, **how, pairs=True)
    x, weight, cosines, sines = (
        torch.nn.functional.pad(tensor, (0, 4), value=float("nan"))[:, : tensor.shape[1]]
        for tensor in (x, weight, cosines, sines)
    )
    storage = torch.full((37, 131), 7.0, device=device)
    out = storage[:, 5:125]
    config = replace(SMALL, operands=operands, split=split)
    assert qkv_projection(x, weight, None, cosines, sines, **how, out=out, config=config) is out
    assert relative_error(published_order(out, 2, 20), want) <= TOLERANCE[torch.float32]
    assert (storage[:, :5] == 7).all()
    assert (storage[:, 125:] == 7).all()


def test_passes_give_the_same_bits(kernel_device):
    x, weight, bias, cosines, sines = inputs(37, 3, 20, 64, torch.bfloat16, kernel_device)
    config = replace(SMALL, block_columns=64)
    once, *others = (
        qkv_projection(x, weight, bias, cosines, sines, heads=3, head_dim=20, config=replace(config, passes=passes))
        for passes in (1, 2, 4)
    )
    assert all(torch.equal(once, other) for other in others)


@pytest.mark.parametrize("split", [1, 2])
def test_descriptors_give_the_same_bits(kernel_device, split):
    x, weight, bias, cosines, sines = inputs(70, 2, 20, 72, torch.bfloat16, kernel_device)
    how = {"heads": 2, "head_dim": 20}
    first, second = (
        qkv_projection(x, weight, bias, cosines, sines, **how, config=replace(SMALL, split=split, operands=operands))
        for operands in ("pointers", "descriptors")
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(("count", "split"), [(0, 2), (33, 1), (33, 2), (64, 1), (70, 2)])
@pytest.mark.usefixtures("poisoned_empty")
def test_valid_rows_are_exact_and_padding_tiles_zero(kernel_device, count, split):
    x, weight, bias, cosines, sines = inputs(70, 2, 20, 64, torch.bfloat16, kernel_device)
    how = {"heads": 2, "head_dim": 20, "config": replace(SMALL, split=split)}
    whole = qkv_projection(x, weight, bias, cosines, sines, **how)
    valid_rows = ValidRows(70, torch.tensor([count], dtype=torch.int32, device=kernel_device))
    y = qkv_projection(x, weight, bias, cosines, sines, **how, valid_rows=valid_rows)
    assert torch.equal(y[:count], whole[:count])
    assert torch.isfinite(y).all()
    assert not y[align_up(count, 32) :].any()


def test_configuration_is_selected_for_the_planned_rows(kernel_device, monkeypatch):
    chosen = []

    def choose(*sizes, head_dim, dtype, device):
        chosen.append((*sizes, head_dim, dtype))
        return SMALL

    monkeypatch.setattr(qkv_projection_module, "choose_config", choose)
    x, weight, bias, cosines, sines = inputs(7, 2, 20, 64, torch.float32, kernel_device)
    how = {"heads": 2, "head_dim": 20}
    want = qkv_projection(x, weight, bias, cosines, sines, **how, config=SMALL)
    assert torch.equal(qkv_projection(x, weight, bias, cosines, sines, **how, valid_rows=ValidRows(512)), want)
    qkv_projection(x, weight, bias, cosines, sines, **how)
    assert chosen == [(rows, 120, 64, 20, torch.float32) for rows in (512, 7)]


@pytest.mark.parametrize(("dtype", "split"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_rows_do_not_depend_on_each_other(device, dtype, split):
    x, weight, bias, cosines, sines = inputs(70, 2, 20, 77, dtype, device)

    def run(rows):
        how = {"heads": 2, "head_dim": 20, "config": replace(SMALL, split=split)}
        return qkv_projection(x[rows], weight, bias, cosines[rows], sines[rows], **how)

    batch = run(slice(None))
    for start, stop in ((0, 1), (31, 33), (69, 70)):
        assert torch.equal(run(slice(start, stop)), batch[start:stop])


def test_rows_beyond_32_bit_offsets(kernel_device):
    # The third row begins after element 2³¹ of a sparse file: only the touched pages exist.
    stride, inner = 2**30 + 64, 64
    near, weight, bias, cosines, sines = inputs(3, 2, 20, inner, torch.bfloat16, device=kernel_device)
    want = expected(near, weight, bias, cosines, sines, 2, 20)
    weight, bias = (reorder_heads(tensor, heads=2, head_dim=20, pairs=True) for tensor in (weight, bias))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sparse")
        with path.open("wb") as file:
            file.truncate(3 * stride * 2)
        if kernel_device.type == "cuda":
            storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=kernel_device)
        else:
            storage = torch.from_file(str(path), shared=True, size=3 * stride, dtype=torch.bfloat16)
        x, out = (storage.as_strided((3, width), (stride, 1), offset) for width, offset in ((inner, 0), (120, 64)))
        x.copy_(near)
        for split in (1, 2):
            config = replace(SMALL, split=split)
            qkv_projection(x, weight, bias, cosines, sines, heads=2, head_dim=20, out=out, config=config)
            assert relative_error(published_order(out, 2, 20), want) <= TOLERANCE[torch.bfloat16]
        del storage, x, out


def test_no_rows(device):
    x, weight, bias, cosines, sines = inputs(0, 2, 20, 64, torch.float32, device)
    assert qkv_projection(x, weight, bias, cosines, sines, heads=2, head_dim=20).shape == (0, 120)


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 8).int()}, TypeError, "x must be float32.*got torch.int32"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(24, 0)}, ValueError, "K at least 1"),
        ({"weight": torch.zeros(18, 8)}, ValueError, r"weight must have shape \(24, 8\), got \(18, 8\)"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias must have shape \(24,\), got \(23,\)"),
        ({"cosines": None}, ValueError, "cosines and sines must both be given"),
        ({"sines": torch.zeros(3, 4)}, ValueError, r"sines must have shape \(3, 2\), got \(3, 4\)"),
        ({"sines": torch.zeros(3, 2).double()}, TypeError, "sines must be torch.float32.*got torch.float64"),
        ({"heads": 0}, ValueError, "heads and head_dim must be at least 1.*got 0, 4 and 4"),
        ({"query_scale": 0.0}, ValueError, "query_scale must be a positive, finite fp32 number, got 0.0"),
        ({"padded_head_dim": 2}, ValueError, "padded_head_dim at least head_dim, got 2, 4 and 2"),
        ({"head_dim": 3, "padded_head_dim": 4}, ValueError, "must be even for a rotation"),
        ({"out": torch.zeros(3, 25)}, ValueError, r"out must have shape \(3, 24\), got \(3, 25\)"),
        ({"valid_rows": ValidRows(3, torch.zeros(1))}, TypeError, "valid_rows.count must be torch.int32"),
    ],
)
def test_invalid_arguments_are_rejected(change, error, message):
    tables = {"cosines": torch.zeros(3, 2), "sines": torch.zeros(3, 2)}
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(24, 8), "bias": torch.zeros(24), **tables}
    arguments |= {"heads": 2, "head_dim": 4} | change
    tensors = [arguments.pop(name) for name in ("x", "weight", "bias", "cosines", "sines")]
    with pytest.raises(error, match=message):
        qkv_projection(*tensors, **arguments)
