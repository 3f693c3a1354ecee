"""Attention by its definition, and inputs as a tower's projection returns them."""

import torch

from tritontower.kernels.runtime.segments import Segments

Tensors = tuple[torch.Tensor, ...]


def attention_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float | None = None
) -> torch.Tensor:
    """Computes attention in fp64, one segment at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=torch.float64)
    start = 0
    for length in segments.lengths:
        query, key, value = (tensor[start : start + length].cpu().double().transpose(0, 1) for tensor in (q, k, v))
        out[start : start + length] = (torch.softmax(query @ key.mT * scale, dim=-1) @ value).transpose(0, 1)
        start += length
    return out


def make_projection(
    segments: Segments,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    heads: int = 2,
    width: int | None = None,
    seed: int = 0,
) -> Tensors:
    """Views of one ``[T, 3, H, width]`` tensor; padded heads have ones and zeros, and NaN in the queries, as padding."""
    generator = torch.Generator().manual_seed(seed)
    width = width or head_dim
    qkv = torch.randn(segments.total, 3, heads, width, generator=generator).to(device, dtype)
    if width > head_dim:
        qkv[:, 1:, :, head_dim:] = 0
        qkv[:, 1:, :, head_dim] = 1
        qkv[:, 0, :, head_dim:] = float("nan")
    return qkv.unbind(1)
