"""Attention within segments on a CPU: the reference of :mod:`.flash_attention`, and its CPU path.

torch's fused attention multiplies by MKL, which on a CPU by AMD runs at a fraction of oneDNN's speed; there, attention is
made of oneDNN's products instead.  In bf16 the first of them takes the exponential along: oneDNN has none that it
applies to the fp32 sums of a product, but it has ``sigmoid(x) = eˣ / (1 + eˣ)``, which far below zero is ``eˣ``.

    ``w[i, j] = sigmoid(q[i]·k[j] - shift[i])``        ``out[i] = Σ_j w[i, j] v[j] / Σ_j w[i, j]``

Any shift will do that keeps a row's weights between the smallest float and the point where the two functions part, some
eighty powers of e; the largest score with a few of the keys is close enough to the largest of all.  The row sums tell
whether it was: a head for which it was not is computed in fp32 instead.
"""

import torch

from ..gemm import cpu
from ..runtime.segments import Segments

__all__ = ["attention_workspace_bytes", "flash_attention_varlen_reference"]

LENGTH_FOR_PRODUCTS = 512
"""Rows of a segment from which products and a softmax are worth their calls, where they are worth it at all."""
LENGTH_FOR_EXPONENTIALS = 192
"""The same of products with the exponential in them."""
_SCORES_BYTES = 8 * 2**20
_WEIGHTS_BYTES = 4 * 2**20
_HEADS_BYTES = 4 * 2**20  # copies of q, k and v of the heads that are worked on together
_SAMPLED_KEYS = 64
# What the shift is above the largest sampled score, in powers of e, and where a row's sum of weights has to be: with less,
# weights that count might be lost below the smallest float, with more, some might be too large to be exponentials.  The
# sum of a row whose largest score was sampled is at least the lowest; scores may exceed the samples by more than 40.
_SHIFT = 56.0
_LEAST_SUM, _LARGEST_SUM = 1e-26, 1e-4


def flash_attention_varlen_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """The CPU product: torch's fused attention, or products of oneDNN's where those of the fused one are slow.

    Which of them a segment takes depends on the CPU, the dtype and the segment's length, and for a head whose scores lie
    too far apart on the head; neighbors never change its bits.
    Fused, one call takes each run of equal neighboring segments: the rows of such a run reshape to
    ``[count, H, length, head_dim]`` without a copy, and torch gives every member the bits it would get alone.
    """
    by_products = q.device.type == "cpu" and cpu.is_fused_attention_slow()
    by_exponentials = by_products and cpu.has_onednn_exponential(q.dtype)
    for run in segments.groups():
        if by_products and run.length >= (LENGTH_FOR_EXPONENTIALS if by_exponentials else LENGTH_FOR_PRODUCTS):
            attend = _attend_by_exponentials if by_exponentials else _attend_by_products
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
        for chunk in cpu.split_rows(length, step, cpu.min_matmul_rows(compute)):
            weights = torch.softmax(cpu.matmul(query[chunk], key, None), dim=1)
            out[chunk, head] = cpu.matmul(weights.to(compute), value, None)


def _attend_by_exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """Attention of one segment in bf16, its weights coming out of the first product as they go into the second.

    Sums are fp32; rounded to bf16 are the scaled queries, the weights (before they are summed, so that they add up to
    what they are divided by), and the weighted values both before and after that division.
    """
    length, heads, width = q.shape
    # A multiple of 16 columns, the last of which add up the weights, each of its own share of the keys: rounded each by
    # itself, the shares together are closer to the sum than one column that holds it.
    shares = 16 - width % 16
    key_share = torch.arange(length, device="cpu") * shares // length
    sampled = torch.arange(min(length, _SAMPLED_KEYS), device="cpu") * length // min(length, _SAMPLED_KEYS)
    step = max(64, _WEIGHTS_BYTES // (v.element_size() * length) // 32 * 32)
    # Functions of the shape alone, all of them, for the sake of the bits.
    group = max(1, _HEADS_BYTES // (v.element_size() * length * (3 * width + shares + 4)))
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
        fine = ((sums > _LEAST_SUM) & (sums < _LARGEST_SUM)).flatten(1).all(1)
        for head in torch.nonzero(~fine).flatten().tolist():
            one = slice(first + head, first + head + 1)
            _attend_by_products(q[:, one], k[:, one], v[:, one], scale, out[:, one])


def attention_workspace_bytes(rows: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Upper bound of the memory that :func:`flash_attention_varlen_reference` allocates, in bytes.

    Args:
        rows: rows of all segments.
        length: rows of one segment.
        heads: number of heads.
        head_dim: columns of one head.
        dtype: of q, k and v.
    """
    by_exponentials, size = cpu.has_onednn_exponential(dtype), dtype.itemsize
    fewest = LENGTH_FOR_EXPONENTIALS if by_exponentials else LENGTH_FOR_PRODUCTS
    if not (cpu.is_fused_attention_slow() and length >= fewest):
        return rows * heads * head_dim * size
    if not by_exponentials:
        run = min(length, max(32, _SCORES_BYTES // (4 * length) // 32 * 32))
        # Scores, their softmax and the previous softmax; and q, k and v of one head.
        return 3 * run * length * 4 + length * head_dim * (4 + 4 + cpu.compute_dtype(dtype).itemsize)
    shares = 16 - head_dim % 16
    group = min(heads, max(1, _HEADS_BYTES // (size * length * (3 * head_dim + shares + 4))))
    queries_keys = 2 * group * length * (head_dim + 2) * size
    held = queries_keys + 2 * group * length * (head_dim + shares) * size
    weights = min(length, max(64, _WEIGHTS_BYTES // (size * length) // 32 * 32)) * length * size
    # Beside the group's tensors and the last weights: the next weights, the fp32 result and its divisor, or the next
    # group's queries and keys.
    return held + weights + max(weights, 2 * group * length * head_dim * 4, queries_keys if group < heads else 0)
