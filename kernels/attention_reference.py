"""Attention within segments on a CPU: the reference of :mod:`.flash_attention`, and its CPU path."""

import torch

from . import cpu
from .segments import Segments

__all__ = ["flash_attention_varlen_reference"]

LENGTH_FOR_PRODUCTS = 512
"""Rows of a segment from which separate products are worth their calls, where they are worth it at all."""
_SCORES_BYTES = 8 * 2**20


def flash_attention_varlen_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """The CPU product: torch's fused attention, or two products and a softmax where its own products are slow.

    Which of the two a segment takes depends on the CPU and the segment's length, so neighbours never change its bits.
    Fused, one call takes each run of equal neighbouring segments: the rows of such a run reshape to
    ``[count, H, length, head_dim]`` without a copy, and torch gives every member the bits it would get alone.
    """
    by_products = q.device.type == "cpu" and cpu.fused_attention_is_slow()
    for run in segments.groups():
        if by_products and run.length >= LENGTH_FOR_PRODUCTS:
            for start in range(run.start, run.stop, run.length):
                rows = slice(start, start + run.length)
                _attend_by_products(q[rows], k[rows], v[rows], scale, out[rows])
            continue
        query, key, value, target = (
            tensor[run.start : run.stop].view(run.count, run.length, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q, k, v, out)
        )
        target.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale))
    return out


def _attend_by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Attention of one segment, head by head and some queries at a time, all keys at once.

    Scores and softmax are fp32, as in the fused form; only the weights are rounded, before they meet the values.
    """
    length, heads, _ = q.shape
    # As many scores as stay in cache; a function of the length alone, for the sake of the bits.
    step = max(32, _SCORES_BYTES // (4 * length) // 32 * 32)
    compute = cpu.compute_dtype(v.dtype)
    for head in range(heads):
        # oneDNN takes whole, adjacent rows; a copy also keeps the scaling out of the caller's queries.
        query = torch.mul(q[:, head].to(torch.float32), scale)
        key = k[:, head].to(torch.float32).contiguous()
        value = v[:, head].to(compute).t().contiguous()
        for chunk in cpu.row_chunks(length, step, cpu.fewest_rows(compute)):
            weights = torch.softmax(cpu.product(query[chunk], key, None), dim=1)
            out[chunk, head] = cpu.product(weights.to(compute), value, None)
