"""Inputs of the matmuls, their results in fp64, and all of the operations in one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.kernels.gemm import linear, patch_projection, qkv_projection
from tritontower.kernels.gemm.linear_config import GATED, LinearConfig

Tensors = dict[str, torch.Tensor]

SMALL = LinearConfig(32, 16, 32, group_rows=2, num_warps=4, num_stages=1)
"""Several tiles in every direction for the shapes of the tests, and a group of row tiles that is not full."""


def linear_inputs(
    rows: int, columns: int, inner: int, dtype: torch.dtype, activation: str | None = None, device: Any = "cpu"
) -> list[torch.Tensor]:
    """x, weight, bias and residual, such that the sums are of order one."""
    generator = torch.Generator().manual_seed(0)
    width = columns * 2 if activation in GATED else columns
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(width, inner, generator=generator) / inner**0.5
    bias = torch.randn(width, generator=generator)
    residual = torch.randn(rows, columns, generator=generator)
    return [tensor.to(device, dtype) for tensor in (x, weight, bias, residual)]


def expected_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in fp64; uint8 x counts from 128, other x are cast to the weights' dtype first."""
    x = x.double() - 128 if x.dtype == torch.uint8 else x.to(weight.dtype).double()
    y = x @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if activation in GATED:
        gate, up = y.chunk(2, dim=1) if activation == "silu_gated" else (y[:, ::2], y[:, 1::2])
        y = torch.nn.functional.silu(gate) * up
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    elif activation is not None:
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual.double()


def make_pixels(rows: int, inner: int, dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
    """Raw bytes or normalized pixels."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (rows, inner), generator=generator, dtype=dtype).to(device)
    return torch.randn(rows, inner, generator=generator).to(device, dtype)


def qkv_inputs(
    rows: int, heads: int, head_dim: int, inner: int, dtype: torch.dtype, device: Any = "cpu"
) -> list[torch.Tensor]:
    """x, weight and bias in the published order, cosines and sines; the sums are of order one."""
    inputs = linear_inputs(rows, 3 * heads * head_dim, inner, dtype, device=device)[:3]
    angles = torch.randn(rows, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 3
    return [*inputs, angles.cos().to(device), angles.sin().to(device)]


@dataclass(frozen=True)
class Operation:
    """A public matmul with the tensors that it takes; those in ``ROWS`` have one row for each row of the result."""

    name: str
    module: Any
    make: Callable[[int, torch.dtype, torch.device], Tensors]
    expected: Callable[[Tensors], torch.Tensor]
    options: Mapping[str, Any]
    """Arguments besides tensors."""

    def run(self, tensors: Tensors, **options: Any) -> torch.Tensor:
        """Calls the operation."""
        result: torch.Tensor = getattr(self.module, self.module.__name__.rsplit(".", 1)[1])(
            **tensors, **self.options, **options
        )
        return result


ROWS = ("x", "patches", "residual", "cosines", "sines", "position_index")


def _linear(activation: str | None) -> Operation:
    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        tensors = linear_inputs(rows, 20, 80, dtype, activation, device)
        return dict(zip(("x", "weight", "bias", "residual"), tensors, strict=True))

    def expected(tensors: Tensors) -> torch.Tensor:
        return expected_linear(**tensors, activation=activation)  # type: ignore[arg-type]

    return Operation(f"linear {activation}", linear, make, expected, {"activation": activation})


def _patch_projection(pixels: torch.dtype) -> Operation:
    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        _, weight, bias, table = linear_inputs(5, 20, 80, dtype, device=device)
        index = torch.arange(rows, dtype=torch.int32, device=device) * 3 % 5
        patches = make_pixels(rows, 80, pixels, device)
        return {"patches": patches, "weight": weight, "bias": bias, "position_table": table, "position_index": index}

    def expected(tensors: Tensors) -> torch.Tensor:
        positions = tensors["position_table"][tensors["position_index"].long()]
        return expected_linear(tensors["patches"], tensors["weight"], tensors["bias"], None, positions)

    return Operation(f"patch_projection {pixels}", patch_projection, make, expected, {})


def _qkv_projection() -> Operation:
    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Tensors:
        tensors = qkv_inputs(rows, 2, 20, 80, dtype, device)
        return dict(zip(("x", "weight", "bias", "cosines", "sines"), tensors, strict=True))

    def expected(tensors: Tensors) -> torch.Tensor:
        # The weight rows of a pair are adjacent.
        y = expected_linear(tensors["x"], tensors["weight"], tensors["bias"]).unflatten(1, (3, 2, 10, 2))
        (first, second), v = y[:, :2].unbind(-1), y[:, 2:]
        cosine, sine = (tensors[name].double()[:, None, None] for name in ("cosines", "sines"))
        rotated = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
        return torch.cat((rotated, v), 1).flatten(1)

    return Operation("qkv_projection", qkv_projection, make, expected, {"heads": 2, "head_dim": 20})


OPERATIONS = (
    _linear("gelu"),
    _linear("silu_gated_interleaved"),
    _patch_projection(torch.float32),
    _patch_projection(torch.uint8),
    _qkv_projection(),
)
