"""Kernel calls that tests and benchmarks share.

A :class:`Case` is one call of a public operation: its tensors, its result in fp64 for chosen rows, torch's equivalents, and
its FLOPs and bytes.  :func:`check` compares the result with fp64; a case that fails is never timed.  The shapes are in
:mod:`.shapes`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional

from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.gemm.linear import linear, prepare_gates
from tritontower.kernels.gemm.patch_projection import patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection, reorder_heads
from tritontower.kernels.rowwise.gather import gather_rows
from tritontower.kernels.rowwise.norm import norm
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime.dispatch import runs_kernel
from tritontower.kernels.runtime.segments import Segments

from .shapes import SIZES, Grid

TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Largest relative distance from fp64 of a result that was rounded once: half a unit in the last place."""

CHECKED_ROWS = 256
"""Rows of a result that are compared with fp64: all, or the first, the last and random ones."""

Tensor = torch.Tensor
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A case with its tensors."""

    call: Callable[[], object]
    """Runs the operation into preallocated memory; an in-place operation gives meaningless values when called again."""
    result: Call
    """The result of the first call, ``[rows, …]``."""
    expected: Callable[[Tensor], Tensor]
    """Row numbers → these rows in fp64."""
    baselines: Mapping[str, Call]
    """torch's equivalents by name; they round differently and are not compared."""
    flops: int
    bytes: int
    """Minimum bytes read and written."""
    roundings: int = 1
    """Roundings of a value on its way to the result."""
    others: Mapping[str, Call] = field(default_factory=dict)
    """Calls that are timed but are no baselines: a part of the work, or the same by other kernels of this project."""


@dataclass(frozen=True)
class Case:
    """One call of one operation."""

    kernel: str
    label: str
    dtype: torch.dtype
    sizes: Mapping[str, Any]
    config: Any = field(default=None)
    """An explicit launch configuration; ``None`` for the default."""

    def prepare(self, device: torch.device) -> Prepared:
        """Makes the tensors, the same in every run."""
        return _BUILDERS[self.kernel](RandomTensors(device, self.dtype), self)

    def launched(self, config: Any, label: str) -> "Case":
        """The same call with an explicit configuration."""
        return replace(self, config=config, label=f"{self.label}, {label}")


class Outcome(NamedTuple):
    """Result of :func:`check`."""

    distance: float
    limit: float

    @property
    def passed(self) -> bool:
        """True if the result is within the limit."""
        return self.distance <= self.limit


def check(case: Case, prepared: Prepared, device: torch.device, *, most_rows: int = CHECKED_ROWS) -> Outcome:
    """Runs the case once and compares rows of the result with fp64; a non-finite result is infinitely far."""
    prepared.call()
    result = prepared.result()
    rows = _some_rows(result.shape[0], most_rows).to(device)
    actual, expected = result[rows].double(), prepared.expected(rows)
    if not bool(torch.isfinite(result).all()):
        return Outcome(math.inf, TOLERANCE[case.dtype])
    scale = float(expected.norm())
    distance = float((actual - expected.reshape(actual.shape)).norm())
    # A CPU's reference rounds once more where transformers does.
    return Outcome(distance / scale if scale else distance, 1.5 * prepared.roundings * TOLERANCE[case.dtype])


def cases(grid: Grid, dtype: torch.dtype = torch.bfloat16, kernels: Sequence[str] | None = None) -> Iterator[Case]:
    """The cases of a grid, kernel by kernel."""
    for kernel in kernels or SIZES:
        for label, sizes in SIZES[kernel](grid):
            yield Case(kernel, label, dtype, sizes)


class RandomTensors:
    """Random tensors from one seed, created on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers with a deviation of ``scale``."""
        numbers = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return numbers.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Whole numbers from 0 to below ``high``."""
        return torch.randint(0, high, shape, generator=self._generator, device=self.device).to(dtype)

    def empty(self, *shape: int) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _some_rows(count: int, most: int) -> Tensor:
    if count <= most:
        return torch.arange(count)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(count))[: most - 2]
    return torch.cat([torch.tensor([0, count - 1]), chosen])


def _size_in_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _attention(make: RandomTensors, case: Case) -> Prepared:
    """Sizes: ``heads``, ``head_dim``, ``lengths``; and, if wanted, ``padded``, ``length_bound`` and ``boost``.

    ``boost`` multiplies the queries, so that a softmax offset taken from a part of the scores overflows.
    """
    heads, head_dim, lengths = (case.sizes[name] for name in ("heads", "head_dim", "lengths"))
    padded = case.sizes.get("padded", head_dim)
    segments = Segments.from_lengths(lengths)
    held = make.normal(segments.total, 3, heads, padded)
    held[:, 0] *= case.sizes.get("boost", 1)
    scale = head_dim**-0.5
    options: dict[str, Any] = {} if case.config is None else {"config": case.config}
    if "length_bound" in case.sizes:
        options["length_bound"] = case.sizes["length_bound"]
    if padded > head_dim:
        held[:, 1:, :, head_dim:] = 0
        held[:, 1:, :, head_dim] = 1
        # As the projection that pads them writes them.
        held[:, 0] *= scale * math.log2(math.e)
        scale = math.log(2)
        options |= {"columns": head_dim, "queries_scaled": True}
    given = held.unbind(1)
    q, k, v = (tensor[..., :head_dim] for tensor in given)
    out = make.empty(segments.total, heads, head_dim)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    scores = sum(length * length for length in lengths)

    def expected(rows: Tensor) -> Tensor:
        segment = torch.searchsorted(starts, rows.cpu(), right=True) - 1
        result = torch.empty(len(rows), heads, head_dim, dtype=torch.float64, device=rows.device)
        for number in segment.unique().tolist():
            keys = slice(int(starts[number]), int(starts[number + 1]))
            mine = (segment == number).nonzero().squeeze(1).to(rows.device)
            query = q[rows[mine]].double()
            weights = torch.einsum("qhd,khd->hqk", query, k[keys].double()) * scale
            result[mine] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v[keys].double())
        return result

    return Prepared(
        call=lambda: flash_attention_varlen(given[0], given[1], given[2], segments, out=out, **options),
        result=lambda: out,
        expected=expected,
        baselines=_attention_baselines(q, k, v, lengths),
        flops=4 * scores * heads * head_dim,
        bytes=_size_in_bytes(q, k, v, out),
    )


def _attention_baselines(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> dict[str, Call]:
    present = [length for length in lengths if length]

    def alike() -> Tensor:
        parts = (tensor.unflatten(0, (len(present), present[0])).transpose(1, 2) for tensor in (q, k, v))
        return functional.scaled_dot_product_attention(*parts)

    def one_by_one() -> Tensor:
        split = zip(*(tensor.transpose(0, 1).split(present, dim=1) for tensor in (q, k, v)), strict=True)
        parts = [functional.scaled_dot_product_attention(*(x.unsqueeze(0) for x in part)) for part in split]
        return torch.cat(parts, dim=2)

    baselines: dict[str, Call] = {"torch sdpa": alike if len(set(present)) == 1 else one_by_one}
    if q.is_cuda and q.dtype != torch.float32:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # torch before 2.10
            return baselines
        bounds = torch.tensor([0, *itertools.accumulate(present)], dtype=torch.int32, device=q.device)
        longest = max(present)
        baselines["torch varlen"] = lambda: cast("Tensor", varlen_attn(q, k, v, bounds, bounds, longest, longest))
    return baselines


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "silu_gated":
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _linear(make: RandomTensors, case: Case) -> Prepared:
    rows, columns, inner, activation = (case.sizes[name] for name in ("rows", "columns", "inner", "activation"))
    width = 2 * columns if activation == "silu_gated" else columns
    x, weight = make.normal(rows, inner), make.normal(width, inner, scale=inner**-0.5)
    bias = make.normal(width)
    residual = make.normal(rows, columns) if case.sizes["residual"] else None
    out = make.empty(rows, columns)
    # Towers interleave gated weights once, where kernels run.
    held, held_bias, kind = prepare_gates(weight, bias, activation) if runs_kernel(x) else (weight, bias, activation)

    def expected(chosen: Tensor) -> Tensor:
        y = _activated(functional.linear(x[chosen].double(), weight.double(), bias.double()), activation)
        return y if residual is None else y + residual[chosen].double()

    def by_torch() -> Tensor:
        y = _activated(functional.linear(x, weight, bias), activation)
        return y if residual is None else y + residual

    return Prepared(
        call=lambda: linear(x, held, held_bias, activation=kind, residual=residual, out=out, config=case.config),
        result=lambda: out,
        expected=expected,
        baselines={"torch linear": by_torch},
        flops=2 * rows * width * inner,
        bytes=_size_in_bytes(x, weight, bias, residual, out),
        others={"torch matmul only": lambda: functional.linear(x, weight, bias)},
    )


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The rotation in the halves' order; ``[rows, heads, head_dim]``, angles ``[rows, head_dim / 2]``."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def _angles(make: RandomTensors, rows: int, half: int) -> tuple[Tensor, Tensor]:
    angles = make.normal(rows, half, scale=3.0, dtype=torch.float32)
    return angles.cos(), angles.sin()


def _qkv_projection(make: RandomTensors, case: Case) -> Prepared:
    rows, heads, head_dim, inner = (case.sizes[name] for name in ("rows", "heads", "head_dim", "inner"))
    columns = 3 * heads * head_dim
    x, weight = make.normal(rows, inner), make.normal(columns, inner, scale=inner**-0.5)
    bias = make.normal(columns)
    cosines, sines = _angles(make, rows, head_dim // 2)
    arranged = [
        reorder_heads(tensor, heads=heads, head_dim=head_dim, padded_head_dim=head_dim, pairs=True)
        for tensor in (weight, bias)
    ]
    out = make.empty(rows, columns)
    # New column 2i of a rotated head is old column i, 2i + 1 is old i + head_dim / 2.
    order = torch.arange(head_dim, device=make.device).view(2, -1).T.flatten()

    def by_torch(chosen: Tensor | slice, dtype: torch.dtype) -> Tensor:
        y = functional.linear(x[chosen].to(dtype), weight.to(dtype), bias.to(dtype)).unflatten(1, (3, heads, head_dim))
        q, k, v = y.unbind(1)
        turned = [_rotated(part, cosines[chosen].to(dtype), sines[chosen].to(dtype)) for part in (q, k)]
        return torch.stack([*turned, v], dim=1)

    def expected(chosen: Tensor) -> Tensor:
        q, k, v = by_torch(chosen, torch.float64).unbind(1)
        return torch.stack([q[..., order], k[..., order], v], dim=1).flatten(1)

    def separate() -> Tensor:
        q, k, _ = linear(x, weight, bias, out=out).unflatten(1, (3, heads, head_dim)).unbind(1)
        rope_(q, k, cosines, sines)
        return out

    return Prepared(
        call=lambda: qkv_projection(
            x, arranged[0], arranged[1], cosines, sines, heads=heads, head_dim=head_dim, out=out, config=case.config
        ),
        result=lambda: out,
        expected=expected,
        baselines={"torch linear and rotation": lambda: by_torch(slice(None), x.dtype)},
        flops=2 * rows * columns * inner,
        bytes=_size_in_bytes(x, weight, bias, cosines, sines, out),
        roundings=2,  # a CPU rounds the matmul before it rotates
        others={
            "torch matmul only": lambda: functional.linear(x, weight, bias),
            "linear, then rope": separate,
        },
    )


def _patch_projection(make: RandomTensors, case: Case) -> Prepared:
    rows, columns, inner = (case.sizes[name] for name in ("rows", "columns", "inner"))
    bias, out = make.normal(columns), make.empty(rows, columns)
    raw = case.sizes["pixels"] == "uint8"
    # Raw pixels have a deviation of 74; the kernel multiplies their distance from 128.
    weight = make.normal(columns, inner, scale=inner**-0.5 / (74 if raw else 1))
    pixels = (
        make.integers(256, rows, inner, dtype=torch.uint8) if raw else make.normal(rows, inner, dtype=torch.float32)
    )

    def held(chosen: Tensor | slice) -> Tensor:
        """The pixels as they enter the matmul."""
        return pixels[chosen].to(make.dtype) - (128 if raw else 0)

    def expected(chosen: Tensor) -> Tensor:
        return functional.linear(held(chosen).double(), weight.double(), bias.double())

    return Prepared(
        call=lambda: patch_projection(pixels, weight, bias, out=out, config=case.config),
        result=lambda: out,
        expected=expected,
        baselines={"torch cast and linear": lambda: functional.linear(held(slice(None)), weight, bias)},
        flops=2 * rows * columns * inner,
        bytes=_size_in_bytes(pixels, weight, bias, out),
    )


def _norm(make: RandomTensors, case: Case) -> Prepared:
    rows, width, kind = (case.sizes[name] for name in ("rows", "width", "kind"))
    x, weight = make.normal(rows, width), make.normal(width, scale=0.1) + 1
    bias = make.normal(width) if kind == "layer_norm" else None
    residual = make.normal(rows, width) if case.sizes["residual"] else None
    out, summed = make.empty(rows, width), make.empty(rows, width)
    kept: dict[str, Any] = {} if residual is None else {"residual": residual, "residual_out": summed}

    def normed(y: Tensor, dtype: torch.dtype) -> Tensor:
        if bias is not None:
            return functional.layer_norm(y, (width,), weight.to(dtype), bias.to(dtype), 1e-6)
        return functional.rms_norm(y, (width,), weight.to(dtype), 1e-6)

    def expected(chosen: Tensor) -> Tensor:
        y = x[chosen].double()
        if residual is not None:
            # The sum is kept for later in the dtype of the rows, and the norm is that of what is kept.
            y = (x[chosen] + residual[chosen]).double()
        return normed(y, torch.float64)

    return Prepared(
        call=lambda: norm(x, weight, bias, kind=kind, eps=1e-6, out=out, config=case.config, **kept),
        result=lambda: out,
        expected=expected,
        baselines={"torch": lambda: normed(x if residual is None else x + residual, x.dtype)},
        flops=0,
        bytes=_size_in_bytes(x, out, residual, summed if residual is not None else None),
        roundings=1 if residual is None else 2,
    )


def _rope(make: RandomTensors, case: Case) -> Prepared:
    rows, heads, head_dim = (case.sizes[name] for name in ("rows", "heads", "head_dim"))
    q, k, _ = make.normal(rows, 3, heads, head_dim).unbind(1)
    before = torch.stack([q, k], dim=1)
    cosines, sines = _angles(make, rows, head_dim // 2)

    def expected(chosen: Tensor) -> Tensor:
        turned = before[chosen].double().flatten(1, 2)
        turned = _rotated(turned, cosines[chosen].double(), sines[chosen].double())
        return turned.view(len(chosen), 2, heads, head_dim)

    def by_torch() -> Tensor:
        tables = cosines.to(q.dtype), sines.to(q.dtype)
        return torch.stack([_rotated(q, *tables), _rotated(k, *tables)], dim=1)

    return Prepared(
        call=partial(rope_, q, k, cosines, sines),
        result=lambda: torch.stack([q, k], dim=1),
        expected=expected,
        baselines={"torch": by_torch},
        flops=0,
        bytes=2 * _size_in_bytes(q, k) + _size_in_bytes(cosines, sines),
    )


def _gather(make: RandomTensors, case: Case) -> Prepared:
    rows, width, taps = (case.sizes[name] for name in ("rows", "width", "taps"))
    source, index = make.normal(rows, width), make.integers(rows, rows, taps)
    weights = make.normal(rows, taps, dtype=torch.float32).abs() if taps > 1 else None
    out = make.empty(rows, width)

    def expected(chosen: Tensor) -> Tensor:
        parts = source.double()[index[chosen].long()]
        return parts.sum(1) if weights is None else (parts * weights[chosen].double().unsqueeze(2)).sum(1)

    def by_torch() -> Tensor:
        if weights is None:
            return source.index_select(0, index.view(-1))
        return (source[index.long()] * weights.to(source.dtype).unsqueeze(2)).sum(1)

    return Prepared(
        call=lambda: gather_rows(source, index, weights, out=out, config=case.config),
        result=lambda: out,
        expected=expected,
        baselines={"torch": by_torch},
        flops=0,
        bytes=_size_in_bytes(index, weights, out) + taps * _size_in_bytes(out),
    )


_BUILDERS: Mapping[str, Callable[[RandomTensors, Case], Prepared]] = {
    "attention": _attention,
    "linear": _linear,
    "qkv_projection": _qkv_projection,
    "patch_projection": _patch_projection,
    "norm": _norm,
    "rope": _rope,
    "gather": _gather,
}
