"""Attention within segments in PyTorch: the reference of :mod:`.attention`, and its CPU path.

torch's fused attention uses MKL, which runs at a fraction of oneDNN's speed on AMD CPUs.  There, attention consists of
oneDNN matmuls instead.  In bf16 the first matmul includes the exponential.  oneDNN cannot apply an exponential to the fp32
sums of a matmul, but it can apply ``sigmoid(x) = eˣ / (1 + eˣ)``, which far below zero equals ``eˣ``.

    ``w[i, j] = sigmoid(q[i]·k[j] - shift[i])``        ``out[i] = Σ_j w[i, j] v[j] / Σ_j w[i, j]``

Any shift is valid that keeps a row's weights between the smallest float and the point where the two functions differ, a
range of some eighty powers of e.  The largest score of a few sampled keys is close enough to the largest of all, which
the row sums verify: a head that fails is computed in fp32 instead.
"""

import torch

from ..gemm import cpu
from ..runtime.segments import Segments

LENGTH_FOR_MATMULS = 512
"""Shortest segment for which separate matmuls and a softmax are faster, if fused attention is slow."""
LENGTH_FOR_EXPONENTIALS = 192
"""The same for matmuls that include the exponential."""
SCORES_BYTES = 8 * 2**20
WEIGHTS_BYTES = 4 * 2**20
HEADS_BYTES = 4 * 2**20  # copies of q, k and v of the heads that are computed together
_SAMPLED_KEYS = 64
# The shift above the largest sampled score, in powers of e, and the valid range of a row's sum of weights.  Below it,
# significant weights may have underflowed; above it, some may be too large to equal exponentials.  A row whose largest
# score was sampled has at least the smallest valid sum; scores may exceed the samples by more than 40.
_SHIFT = 56.0
_MIN_SUM, _MAX_SUM = 1e-26, 1e-4


def flash_attention_varlen_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Computes torch's fused attention, or oneDNN matmuls on CPUs where the fused one is slow.

    The choice depends on the CPU, the dtype, the segment's length, and the range of a head's scores; neighbors never
    change a segment's bits.  One fused call computes each run of equal neighboring segments: its rows reshape to
    ``[count, H, length, head_dim]`` without a copy, and torch gives every segment the bits that it would have alone.
    """
    by_matmuls = q.device.type == "cpu" and cpu.is_fused_attention_slow()
    by_exponentials = by_matmuls and cpu.has_onednn_exponential(q.dtype)
    for run in segments.groups():
        if by_matmuls and run.length >= (LENGTH_FOR_EXPONENTIALS if by_exponentials else LENGTH_FOR_MATMULS):
            attend = attend_by_exponentials if by_exponentials else attend_by_matmuls
            for start in range(run.start, run.stop, run.length):
                rows = slice(start, start + run.length)
                attend(q[rows], k[rows], v[rows], scale, out[rows])
            continue
        query, key, value, target = (
            tensor[run.start : run.stop].view(run.count, run.length, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q, k, v, out)
        )
        target.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale))
    return out


def attend_by_matmuls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Computes one segment head by head, some queries at a time, all keys at once.

    Scores and softmax are fp32, as in the fused form; only the weights are rounded, before the matmul with the values.
    """
    length, heads, _ = q.shape
    # As many scores as stay in cache.  The length alone decides, so that the bits depend on nothing else.
    step = max(32, SCORES_BYTES // (4 * length) // 32 * 32)
    compute = cpu.compute_dtype(v.dtype)
    for head in range(heads):
        # oneDNN needs contiguous rows; the copy also keeps the caller's queries unscaled.
        query = torch.mul(q[:, head].to(torch.float32), scale)
        key = k[:, head].to(torch.float32).contiguous()
        value = v[:, head].to(compute).t().contiguous()
        for chunk in cpu.split_rows(length, step, cpu.min_matmul_rows(compute)):
            weights = torch.softmax(cpu.matmul(query[chunk], key, None), dim=1)
            out[chunk, head] = cpu.matmul(weights.to(compute), value, None)


def attend_by_exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Computes one segment in bf16; the first matmul returns the weights as the second one needs them.

    Sums are fp32.  Rounded to bf16 are the scaled queries, the weights (before they are summed, so that they add up to
    their divisor), and the weighted values before and after the division.
    """
    length, heads, width = q.shape
    # A multiple of 16 columns.  The last ones sum the weights, each of its own share of the keys: the separately rounded
    # shares are together closer to the sum than one column would be.
    shares = 16 - width % 16
    key_share = torch.arange(length, device="cpu") * shares // length
    sampled = torch.arange(min(length, _SAMPLED_KEYS), device="cpu") * length // min(length, _SAMPLED_KEYS)
    step = max(64, WEIGHTS_BYTES // (v.element_size() * length) // 32 * 32)
    # The shape alone decides the group too, so that the bits depend on nothing else.
    group = max(1, HEADS_BYTES // (v.element_size() * length * (3 * width + shares + 4)))
    for first in range(0, heads, group):
        part = slice(first, min(first + group, heads))
        count = part.stop - part.start
        queries, keys = q.new_zeros(count, length, width + 2), k.new_ones(count, length, width + 2)
        values = v.new_zeros(count, length, width + shares)
        torch.mul(q[:, part].transpose(0, 1), scale, out=queries[..., :width])
        keys[..., :width] = k[:, part].transpose(0, 1)
        values[..., :width] = v[:, part].transpose(0, 1)
        values[:, torch.arange(length, device="cpu"), width + key_share] = 1
        largest = torch.bmm(queries, keys[:, sampled].transpose(1, 2)).amax(2)
        queries[..., width] = -(largest + _SHIFT)
        mixed = torch.empty_like(values)
        for head in range(count):
            for chunk in cpu.split_rows(length, step, cpu.min_matmul_rows(v.dtype)):
                weights = cpu.matmul(queries[head, chunk], keys[head], None, "sigmoid")
                torch.mm(weights, values[head], out=mixed[head, chunk])
        sums = mixed[..., width:].sum(2, keepdim=True, dtype=torch.float32)
        out[:, part] = (mixed[..., :width] / sums).transpose(0, 1)
        is_valid = ((sums > _MIN_SUM) & (sums < _MAX_SUM)).flatten(1).all(1)
        for head in torch.nonzero(~is_valid).flatten().tolist():
            one = slice(first + head, first + head + 1)
            attend_by_matmuls(q[:, one], k[:, one], v[:, one], scale, out[:, one])


def attention_workspace_bytes(rows: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Upper bound of the memory that :func:`flash_attention_varlen_reference` allocates, in bytes.

    ``rows`` counts the rows of all segments, ``length`` those of one.
    """
    by_exponentials, size = cpu.has_onednn_exponential(dtype), dtype.itemsize
    fewest = LENGTH_FOR_EXPONENTIALS if by_exponentials else LENGTH_FOR_MATMULS
    if not (cpu.is_fused_attention_slow() and length >= fewest):
        return rows * heads * head_dim * size
    if not by_exponentials:
        run = min(length, max(32, SCORES_BYTES // (4 * length) // 32 * 32))
        # Scores, their softmax and the previous softmax; and q, k and v of one head.
        return 3 * run * length * 4 + length * head_dim * (4 + 4 + cpu.compute_dtype(dtype).itemsize)
    shares = 16 - head_dim % 16
    group = min(heads, max(1, HEADS_BYTES // (size * length * (3 * head_dim + shares + 4))))
    queries_keys = 2 * group * length * (head_dim + 2) * size
    held = queries_keys + 2 * group * length * (head_dim + shares) * size
    weights = min(length, max(64, WEIGHTS_BYTES // (size * length) // 32 * 32)) * length * size
    # Beside the group's tensors and the last weights: the next weights, the fp32 result and its divisor, or the next
    # group's queries and keys.
    return held + weights + max(weights, 2 * group * length * head_dim * 4, queries_keys if group < heads else 0)
