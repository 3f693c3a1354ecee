"""Rotary embedding in place: both backends against fp64, transformers, and strided views."""

import pytest
import torch
from support.numbers import TOLERANCE, relative_error, tolerance

from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROTATIONS = [(dtype, rotation) for dtype in DTYPES for rotation in dict.fromkeys((torch.float32, dtype))]
"""Stored dtype, and the dtype to which multiplications and sums are rounded."""


def rotated(x, cos, sin):
    """The formula in fp64."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inputs(rows, heads, head_dim, dtype, device="cpu", seed=0):
    """q and k as views of one fused projection, and the tables of random angles."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, 3, heads, head_dim, generator=generator).to(device, dtype)
    angles = torch.rand(rows, head_dim // 2, generator=generator) * 60
    return qkv, angles.cos().to(device), angles.sin().to(device)


@pytest.mark.parametrize(("dtype", "rotation"), ROTATIONS)
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 16, 80), (67, 3, 72), (5, 1, 64), (7, 2, 6), (70, 5, 2)])
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_fp64_and_writes_nothing_else(device, dtype, rotation, rows, heads, head_dim):
    qkv, cos, sin = inputs(rows, heads, head_dim, dtype, device)
    before = qkv.clone()
    rope_(qkv[:, 0], qkv[:, 1], cos, sin, rotation_dtype=rotation)
    # In 16 bits the tables, the multiplications and the sums are rounded: four errors instead of one.
    limit = tolerance(dtype, cos.numel() * heads) * (1 if rotation == torch.float32 else 2)
    for part in range(2):
        assert relative_error(qkv[:, part], rotated(before[:, part], cos, sin)) <= limit
    assert torch.equal(qkv[:, 2], before[:, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_rotation_is_bit_equal_to_qwen_in_transformers(dtype):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    qkv, cos, sin = inputs(150, 16, 80, dtype)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos.repeat(1, 2), sin.repeat(1, 2))
    rope_(qkv[:, 0], qkv[:, 1], cos, sin)
    assert torch.equal(qkv[:, 0], q)
    assert torch.equal(qkv[:, 1], k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rotation_is_bit_equal_to_pixtral_in_transformers(device, dtype):
    from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb

    qkv, cos, sin = inputs(150, 4, 64, dtype, device)
    tables = cos.repeat(1, 2).to(dtype), sin.repeat(1, 2).to(dtype)
    q, k = apply_rotary_pos_emb(qkv[:, 0], qkv[:, 1], *tables, unsqueeze_dim=1)
    rope_(qkv[:, 0], qkv[:, 1], cos, sin, rotation_dtype=dtype)
    assert torch.equal(qkv[:, 0], q)
    assert torch.equal(qkv[:, 1], k)


@pytest.mark.parametrize(("dtype", "rotation"), ROTATIONS)
def test_reference_and_kernel_agree(kernel_device, dtype, rotation):
    qkv, cos, sin = inputs(130, 3, 80, dtype, kernel_device)
    again = qkv.clone()
    rope_(qkv[:, 0], qkv[:, 1], cos, sin, rotation_dtype=rotation)
    with dispatch.use("reference"):
        rope_(again[:, 0], again[:, 1], cos, sin, rotation_dtype=rotation)
    # A compiler may fuse a multiplication and a sum in fp32 only.
    assert relative_error(qkv, again) <= (TOLERANCE[dtype] / 4 if rotation == torch.float32 else 0)


@pytest.mark.parametrize(("dtype", "rotation"), ROTATIONS)
def test_a_row_alone_equals_the_row_in_a_batch(device, dtype, rotation):
    qkv, cos, sin = inputs(99, 4, 72, dtype, device)
    alone = qkv[61:62].clone()
    rope_(qkv[:, 0], qkv[:, 1], cos, sin, rotation_dtype=rotation)
    rope_(alone[:, 0], alone[:, 1], cos[61:62], sin[61:62], rotation_dtype=rotation)
    assert torch.equal(alone[0], qkv[61])


def test_any_row_and_head_stride(device):
    # Heads before rows, q and k apart, and tables that are columns of a wider one.
    qkv, cos, sin = inputs(20, 3, 16, torch.float32, device)
    tables = torch.cat((cos, sin), dim=1)
    q = qkv[:, 0].transpose(0, 1).contiguous().transpose(0, 1)
    k = qkv[:, 1].contiguous()
    rope_(q, k, tables[:, :8], tables[:, 8:])
    rope_(qkv[:, 0], qkv[:, 1], cos, sin)
    assert torch.equal(q, qkv[:, 0])
    assert torch.equal(k, qkv[:, 1])


def test_offsets_beyond_32_bits(distant_storage, device):
    stride = 2**30 + 64  # the third row begins after element 2³¹
    qkv, cos, sin = inputs(3, 2, 8, torch.float32, device)
    storage = distant_storage(3 * stride)
    q = storage.as_strided((3, 2, 8), (stride, 8, 1)).copy_(qkv[:, 0])
    k = storage.as_strided((3, 2, 8), (stride, 8, 1), 16).copy_(qkv[:, 1])
    rope_(q, k, cos, sin)
    rope_(qkv[:, 0], qkv[:, 1], cos, sin)
    assert torch.equal(q, qkv[:, 0])
    assert torch.equal(k, qkv[:, 1])


Q = torch.zeros(4, 2, 8)
TABLE = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": Q.double(), "k": Q.double()}, TypeError, "q must be float32, .* got torch.float64"),
        ({"k": Q.half()}, TypeError, "k must be torch.float32 on cpu, got torch.float16"),
        ({"rotation_dtype": torch.bfloat16}, TypeError, "rotation_dtype must be torch.float32 .* got torch.bfloat16"),
        ({"q": Q[0], "k": Q[0]}, ValueError, r"\(2, 8\)"),
        ({"k": Q[:3]}, ValueError, r"\(3, 2, 8\)"),
        ({"q": Q[..., :7], "k": Q[..., :7]}, ValueError, "hd even"),
        ({"q": Q.transpose(1, 2), "k": Q.transpose(1, 2)}, ValueError, "last stride 1"),
        ({"cos": TABLE.half()}, TypeError, "cos must be torch.float32 on cpu, got torch.float16"),
        ({"sin": torch.zeros(4, 8)}, ValueError, r"sin must have shape \(4, 4\), got \(4, 8\)"),
        ({"cos": TABLE.t()}, ValueError, "cos must have last stride 1"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        rope_(**({"q": Q, "k": Q.clone(), "cos": TABLE, "sin": TABLE} | changes))
