"""Operation of a task: tensors of its shapes, a launch with a given configuration, and the expected result.

The same code launches on a GPU, where it is timed and checked, in Triton's interpreter, and in the AOT compiler
(:mod:`.compile.aot_compile`), where it is compiled only.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tritontower.benchmarks.cases import RandomTensors
from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.attention.common import FlashAttentionConfig
from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.gemm.patch_projection import patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection
from tritontower.kernels.rowwise.norm import NormConfig, norm
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.registry import make_config
from tritontower.kernels.runtime.segments import Segments

from .tasks import Task

CONFIGS: dict[str, type[Any]] = {
    "attention.attention": FlashAttentionConfig,
    "gemm.linear": LinearConfig,
    "rowwise.norm": NormConfig,
    "gemm.patch_projection": LinearConfig,
    "gemm.qkv_projection": LinearConfig,
}
"""Kernel → the class of its configurations."""

HARD_SCORES = 40.0
"""Factor of the scores in the second check of attention: the softmax then nearly selects a single key."""


@dataclass(frozen=True)
class Operation:
    """A call of a kernel's wrapper without its configuration."""

    kernel: str
    function: Callable[..., Any]
    tensors: Mapping[str, torch.Tensor | None]
    out: torch.Tensor
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, values: Mapping[str, Any]) -> torch.Tensor:
        """Launches with the fields of a configuration and returns the output."""
        config = make_config(CONFIGS[self.kernel], values)
        if config is None:
            raise ValueError(f"values must be the fields of a configuration of {self.kernel}, got {dict(values)}")
        self.function(**self.tensors, **self.options, out=self.out, config=config)
        return self.out

    def expected(self) -> torch.Tensor:
        """Computes the result from the same tensors with the kernel's torch reference in fp32."""
        floats = {
            name: tensor.float() if tensor is not None and tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }
        out = torch.empty_like(self.out, dtype=torch.float32)
        with dispatch.use("reference"):
            self.function(**floats, **self.options, out=out)
        return out


def prepare(task: Task, device: torch.device, *, hard: bool = False) -> Operation:
    """Makes the operation of ``task``; ``hard`` inputs have large scores and segments of odd lengths."""
    make = RandomTensors(device, getattr(torch, task.dtype))
    if task.kernel == "attention.attention":
        return _attention(task, make, hard)
    return _MAKERS[task.kernel](task, make)


def _aligned(make: RandomTensors, rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
    """Makes rows that start at multiples of 16 elements, as in a tower."""
    return make.normal(rows, width + -width % 16, scale=scale)[:, :width]


def _linear(task: Task, make: RandomTensors) -> Operation:
    rows, columns, inner = task.get("rows"), task.get("columns"), task.get("inner")
    weight = _aligned(make, columns * (2 if task.is_gated else 1), inner, inner**-0.5)
    tensors = {
        "x": _aligned(make, rows, inner),
        "weight": weight,
        "bias": make.normal(weight.shape[0]) if task.get("bias") else None,
        "residual": make.normal(rows, columns) if task.get("residual") else None,
    }
    return Operation(task.kernel, linear, tensors, make.normal(rows, columns), {"activation": task.get("activation")})


def _qkv_projection(task: Task, make: RandomTensors) -> Operation:
    rows, columns, inner = task.get("rows"), task.get("columns"), task.get("inner")
    angles = (
        make.normal(rows, task.get("head_dim") // 2, scale=3.0, dtype=torch.float32) if task.get("rotated") else None
    )
    tensors = {
        "x": _aligned(make, rows, inner),
        "weight": _aligned(make, columns, inner, inner**-0.5),
        "bias": make.normal(columns) if task.get("bias") else None,
        "cosines": None if angles is None else angles.cos(),
        "sines": None if angles is None else angles.sin(),
    }
    options = {name: task.get(name) for name in ("heads", "head_dim", "padded_head_dim", "query_scale")}
    return Operation(task.kernel, qkv_projection, tensors, make.normal(rows, columns), options)


def _patch_projection(task: Task, make: RandomTensors) -> Operation:
    rows, columns, inner = task.get("rows"), task.get("columns"), task.get("inner")
    pixels, padded = getattr(torch, task.get("pixels")), inner + -inner % 16
    is_raw = pixels == torch.uint8
    # The kernel rounds pixels to the weight's dtype; the fp32 reference would not, so they are rounded here.
    patches = make.integers(256, rows, padded, dtype=pixels) if is_raw else make.normal(rows, padded).to(pixels)
    tensors = {
        "patches": patches[:, :inner],
        "weight": _aligned(make, columns, inner, inner**-0.5),
        "bias": make.normal(columns) if task.get("bias") else None,
    }
    if task.get("positions"):
        tensors["position_table"] = make.normal(7, columns)
        tensors["position_index"] = torch.arange(rows, dtype=torch.int32, device=make.device) % 7
    return Operation(task.kernel, patch_projection, tensors, make.normal(rows, columns))


def _attention(task: Task, make: RandomTensors, hard: bool) -> Operation:
    heads, head_dim, width = task.get("heads"), task.get("head_dim"), task.get("width")
    longest = task.get("longest")
    lengths = [longest] * max(1, task.get("rows") // longest)
    if hard:
        # Lengths that no block size divides, and the shortest one; none exceeds the promised bound.
        lengths = [max(1, each) for each in (longest, longest - 1, longest // 2 + 3, 1) if each <= longest]
    total = sum(lengths)
    qkv = make.normal(total, 3, heads, width)
    scale = head_dim**-0.5
    options: dict[str, Any] = {"segments": Segments.from_lengths(lengths), "length_bound": task.get("bounded") or None}
    qkv[:, 0] *= (HARD_SCORES if hard else 1.0) * (scale * math.log2(math.e) if task.get("queries_scaled") else 1.0)
    if width > head_dim:
        options["columns"] = head_dim
        qkv[..., head_dim:] = 0
        qkv[:, 1:, :, head_dim] = 1
    options |= {"queries_scaled": True} if task.get("queries_scaled") else {"scale": scale}
    tensors = dict(zip("qkv", qkv.unbind(1), strict=True))
    return Operation(task.kernel, flash_attention_varlen, tensors, make.normal(total, heads, head_dim), options)


def _norm(task: Task, make: RandomTensors) -> Operation:
    rows, width, kind = task.get("rows"), task.get("width"), task.get("kind")
    tensors = {
        "x": make.normal(rows, width),
        "weight": make.normal(width),
        "bias": make.normal(width) if kind == "layer_norm" else None,
    }
    if task.get("residual"):
        tensors |= {"residual": make.normal(rows, width), "residual_out": make.normal(rows, width)}
    options = {"kind": kind, "eps": 1e-6, "rounding": task.get("rounding")}
    return Operation(task.kernel, norm, tensors, make.normal(rows, width), options)


_MAKERS: dict[str, Callable[[Task, RandomTensors], Operation]] = {
    "gemm.linear": _linear,
    "rowwise.norm": _norm,
    "gemm.patch_projection": _patch_projection,
    "gemm.qkv_projection": _qkv_projection,
}
