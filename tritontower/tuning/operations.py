"""The operation behind a task: tensors of its shapes, a launch with a given configuration, and what should come out.

The same code launches on a GPU, where it is timed and checked, in Triton's interpreter, and where there is no device at
all (:mod:`.compile_result`), where it is only compiled.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.attention.common import FlashAttentionConfig
from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.gemm.patch_projection import patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection
from tritontower.kernels.rowwise.norm import NormConfig, norm
from tritontower.kernels.runtime.registry import make_config
from tritontower.kernels.runtime.segments import Segments

from .tasks import Task

__all__ = ["CONFIGS", "Operation", "prepare"]

CONFIGS: dict[str, type[Any]] = {
    "attention.attention": FlashAttentionConfig,
    "gemm.linear": LinearConfig,
    "rowwise.norm": NormConfig,
    "gemm.patch_projection": LinearConfig,
    "gemm.qkv_projection": LinearConfig,
}
"""Kernel → the class of its configurations."""

HARD_SCORES = 40.0
"""How much larger than usual the scores of the second check of attention are: a softmax that is nearly a choice of one."""


@dataclass(frozen=True)
class Operation:
    """A launch that waits for its configuration."""

    run: Callable[[Mapping[str, Any]], torch.Tensor]
    """Launches with the fields of a configuration and returns what was written."""
    expected: Callable[[], torch.Tensor]
    """What should come out, worked out in fp32 from the same tensors."""


def prepare(task: Task, device: torch.device, *, filled: bool = True, hard: bool = False) -> Operation:
    """The operation of ``task`` on ``device``.

    Args:
        task: one of the kernels of :data:`CONFIGS`.
        device: where its tensors lie.
        filled: with numbers; otherwise they are left as they are, for launches that nobody looks at.
        hard: with the numbers that are hardest to get right: large scores, segments of odd lengths.
    """
    make = _Tensors(device, getattr(torch, task.dtype), filled)
    return _MAKERS[task.kernel](task, make, hard)


@dataclass
class _Tensors:
    device: torch.device
    dtype: torch.dtype
    filled: bool
    seed: int = 0

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        wanted = dtype or self.dtype
        if not self.filled:
            return torch.empty(shape, dtype=wanted, device=self.device)
        self.seed += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        how: dict[str, Any] = {"generator": generator, "device": self.device}
        if wanted == torch.uint8:
            return torch.randint(0, 256, shape, dtype=torch.uint8, **how)
        return (torch.randn(shape, **how) * scale).to(wanted)

    def padded(self, rows: int, width: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows that start at multiples of 16 elements, as a tower holds them."""
        return self(rows, width + -width % 16, scale=scale, dtype=dtype)[:, :width]


def _configured(task: Task, fields: Mapping[str, Any]) -> Any:
    config = make_config(CONFIGS[task.kernel], fields)
    if config is None:
        raise ValueError(f"{dict(fields)} are not the fields of a configuration of {task.kernel}")
    return config


def _product(task: Task, make: _Tensors, hard: bool) -> Operation:
    rows = task.fact("rows")
    columns, inner, activation = task.fact("columns"), task.fact("inner"), task.fact("activation")
    gated = activation is not None and "gated" in activation
    x, weight = make.padded(rows, inner), make.padded(columns * (2 if gated else 1), inner, inner**-0.5)
    bias = make(weight.shape[0]) if task.fact("bias") else None
    residual = make(rows, columns) if task.fact("residual") else None
    out = make(rows, columns)

    def run(fields: Mapping[str, Any]) -> torch.Tensor:
        config = _configured(task, fields)
        return linear(x, weight, bias, activation=activation, residual=residual, out=out, config=config)

    def expected() -> torch.Tensor:
        y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        if activation == "silu_gated":
            gate, up = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        elif activation == "silu_gated_interleaved":
            y = torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]
        elif activation is not None:
            y = _ACTIVATIONS[activation](y)
        return y if residual is None else y + residual.float()

    return Operation(run, expected)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def _heads(task: Task, make: _Tensors, hard: bool) -> Operation:
    rows = task.fact("rows")
    shape = {name: task.fact(name) for name in ("heads", "head_dim", "padded_head_dim", "query_scale")}
    heads, head_dim, padded, query_scale = shape.values()
    columns, inner = task.fact("columns"), task.fact("inner")
    x, weight = make.padded(rows, inner), make.padded(columns, inner, inner**-0.5)
    bias = make(columns) if task.fact("bias") else None
    cosines = sines = None
    if task.fact("rotated"):
        angles = make(rows, head_dim // 2, scale=3.0, dtype=torch.float32)
        cosines, sines = angles.cos(), angles.sin()
    out = make(rows, columns)

    def run(fields: Mapping[str, Any]) -> torch.Tensor:
        return qkv_projection(x, weight, bias, cosines, sines, **shape, out=out, config=_configured(task, fields))

    def expected() -> torch.Tensor:
        y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        y[:, : columns // 3] *= query_scale
        if cosines is None or sines is None:
            return y
        y = y.view(rows, 3, heads, padded or head_dim)
        pairs = y[:, :2, :, :head_dim].unflatten(-1, (-1, 2))
        cos, sin = cosines[:, None, None], sines[:, None, None]
        first, second = pairs[..., 0], pairs[..., 1]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        y = y.clone()
        y[:, :2, :, :head_dim] = turned
        return y.view(rows, columns)

    return Operation(run, expected)


def _patches(task: Task, make: _Tensors, hard: bool) -> Operation:
    rows = task.fact("rows")
    columns, inner, pixels = task.fact("columns"), task.fact("inner"), getattr(torch, task.fact("pixels"))
    x, weight = make.padded(rows, inner, dtype=pixels), make.padded(columns, inner, inner**-0.5)
    bias = make(columns) if task.fact("bias") else None
    places: dict[str, Any] = {}
    if task.fact("positions"):
        index = torch.arange(rows, dtype=torch.int32, device=make.device) % 7
        places = {"position_table": make(7, columns), "position_index": index}
    out = make(rows, columns)

    def run(fields: Mapping[str, Any]) -> torch.Tensor:
        return patch_projection(x, weight, bias, **places, out=out, config=_configured(task, fields))

    def expected() -> torch.Tensor:
        shifted = x.float() - 128 if pixels == torch.uint8 else x.to(weight.dtype).float()
        y = torch.nn.functional.linear(shifted, weight.float(), None if bias is None else bias.float())
        return y + places["position_table"].float()[places["position_index"].long()] if places else y

    return Operation(run, expected)


def _attention(task: Task, make: _Tensors, hard: bool) -> Operation:
    heads, head_dim, width = task.fact("heads"), task.fact("head_dim"), task.fact("width")
    length, bound = task.fact("longest"), task.fact("bounded")
    total = max(length, task.fact("rows") // length * length)
    lengths = [length] * (total // length)
    if hard:
        # Lengths that divide into no blocks, and the shortest there are; none longer than what is promised.
        lengths = [max(1, each) for each in (length, length - 1, length // 2 + 3, 1) if each <= length]
    segments = Segments.from_lengths(lengths)
    total = sum(lengths)
    qkv = make(total, 3, heads, width)
    if hard and make.filled:
        qkv[:, 0] *= HARD_SCORES
    if width > head_dim and make.filled:
        qkv[..., head_dim:] = 0
        qkv[:, 1:, :, head_dim] = 1
    q, k, v = qkv.unbind(1)
    out = make(total, heads, head_dim)
    options: dict[str, Any] = {"length_bound": bound or None}
    if width > head_dim:
        options["columns"] = head_dim
    scale = head_dim**-0.5
    if task.fact("queries_scaled"):
        if make.filled:
            qkv[:, 0] *= scale * math.log2(math.e)
        scale, options["queries_scaled"] = math.log(2), True
    else:
        options["scale"] = scale

    def run(fields: Mapping[str, Any]) -> torch.Tensor:
        return flash_attention_varlen(q, k, v, segments, **options, out=out, config=_configured(task, fields))

    def expected() -> torch.Tensor:
        parts = []
        for part in qkv[..., :head_dim].split(lengths):
            query, key, value = (each.transpose(0, 1).float() for each in part.unbind(1))
            # Head by head: the scores of all heads of a long segment would fill the memory.
            mixed = [torch.softmax(query[head] @ key[head].T * scale, -1) @ value[head] for head in range(heads)]
            parts.append(torch.stack(mixed, 1))
        return torch.cat(parts)

    return Operation(run, expected)


def _norm(task: Task, make: _Tensors, hard: bool) -> Operation:
    rows = task.fact("rows")
    width, kind, rounding = task.fact("width"), task.fact("kind"), task.fact("rounding")
    x, weight = make(rows, width), make(width)
    bias = make(width) if kind == "layer_norm" else None
    residual = make(rows, width) if task.fact("residual") else None
    residual_out = None if residual is None else make(rows, width)
    out = make(rows, width)

    def run(fields: Mapping[str, Any]) -> torch.Tensor:
        options: dict[str, Any] = {"residual": residual, "residual_out": residual_out, "out": out}
        norm(x, weight, bias, kind=kind, eps=1e-6, rounding=rounding, **options, config=_configured(task, fields))
        return out

    def expected() -> torch.Tensor:
        rows_in = x if residual is None else x + residual
        values, scale = rows_in.float(), weight.float()
        if kind == "layer_norm":
            values = values - values.mean(1, keepdim=True)
        values = values * torch.rsqrt(values.square().mean(1, keepdim=True) + 1e-6)
        if rounding == "before_weight":
            values = values.to(x.dtype).float()
        values = values * (scale + 1 if kind == "gemma_rms_norm" else scale)
        return values if bias is None else values + bias.float()

    return Operation(run, expected)


_MAKERS: dict[str, Callable[[Task, _Tensors, bool], Operation]] = {
    "attention.attention": _attention,
    "gemm.linear": _product,
    "rowwise.norm": _norm,
    "gemm.patch_projection": _patches,
    "gemm.qkv_projection": _heads,
}
