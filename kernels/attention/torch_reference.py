"""Attention within segments in PyTorch: the reference of :mod:`.attention`, and its CPU path.

torch's fused attention multiplies by MKL.  MKL has no fast 16-bit matmul on AMD's CPUs, so the inputs are converted to
fp32, which also leaves one rounding instead of two.  From Zen 5 on, oneDNN multiplies fp32 faster than MKL, and long
segments are computed by its matmuls.
"""

import torch

from ..gemm import cpu
from ..runtime.segments import Segments

LENGTH_FOR_MATMULS = 512
"""Shortest segment for which separate matmuls and a softmax are faster, if fused attention is slow."""
SCORES_BYTES = 8 * 2**20
HEADS_BYTES = 16 * 2**20
"""Limit of the fp32 copies of q, k, v and the output of the heads that are computed together."""


def flash_attention_varlen_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Computes torch's fused attention, or oneDNN matmuls on CPUs where the fused one is slow.

    The choice depends on the CPU, the dtype and the segment's length; neighbors never change a segment's bits.  One fused
    call computes each run of equal neighboring segments: its rows reshape to ``[count, H, length, head_dim]``, and torch
    gives every segment the bits that it would have alone.
    """
    compute = cpu.attention_dtype(q.dtype) if q.device.type == "cpu" else q.dtype
    converts = compute != q.dtype
    by_matmuls = converts and cpu.is_fused_attention_slow()
    _, heads, width = q.shape
    for run in segments.groups():
        if by_matmuls and run.length >= LENGTH_FOR_MATMULS:
            for start in range(run.start, run.stop, run.length):
                rows = slice(start, start + run.length)
                attend_by_matmuls(q[rows], k[rows], v[rows], scale, out[rows])
            continue
        views = [
            tensor[run.start : run.stop].view(run.count, run.length, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q, k, v, out)
        ]
        group = _heads_at_once(run.stop - run.start, width) if converts else heads
        for first in range(0, heads, group):
            query, key, value, target = (view[:, first : first + group] for view in views)
            query, key, value = query.to(compute), key.to(compute), value.to(compute)
            target.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale))
    return out


def _heads_at_once(rows: int, head_dim: int) -> int:
    return max(1, HEADS_BYTES // max(1, 4 * 4 * rows * head_dim))


def attend_by_matmuls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Computes one segment in fp32 head by head, some queries at a time, all keys at once."""
    length, heads, _ = q.shape
    # As many scores as stay in cache.  The length alone decides, so that the bits depend on nothing else.
    step = max(32, SCORES_BYTES // (4 * length) // 32 * 32)
    for head in range(heads):
        # oneDNN needs contiguous rows; the copy also keeps the caller's queries unscaled.
        query = torch.mul(q[:, head].to(torch.float32), scale)
        key = k[:, head].to(torch.float32).contiguous()
        value = v[:, head].to(torch.float32).t().contiguous()
        for chunk in cpu.split_rows(length, step, cpu.min_matmul_rows(torch.float32)):
            weights = torch.softmax(cpu.matmul(query[chunk], key, None), dim=1)
            out[chunk, head] = cpu.matmul(weights, value, None)


def attention_workspace_bytes(rows: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Upper bound of the memory that :func:`flash_attention_varlen_reference` allocates, in bytes.

    ``rows`` counts the rows of all segments, ``length`` those of one.
    """
    if cpu.attention_dtype(dtype) == dtype:
        return rows * heads * head_dim * dtype.itemsize
    if cpu.is_fused_attention_slow() and length >= LENGTH_FOR_MATMULS:
        run = min(length, max(32, SCORES_BYTES // (4 * length) // 32 * 32))
        # Scores, their softmax and the previous softmax; and q, k and v of one head, one of them twice.
        return 4 * (3 * run * length + 4 * length * head_dim)
    return 4 * 4 * rows * head_dim * min(heads, _heads_at_once(rows, head_dim))
