"""Tolerances of results against fp64, and random inputs."""

import torch

TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
"""Largest acceptable :func:`relative_error` of one operation, by the dtype it stores.

For the 16-bit types this is what one rounding to nearest can cost at worst, half a unit in the last place: 2⁻¹¹ (4.9e-4)
and 2⁻⁸ (3.9e-3).  Everything before the store is fp32 and costs nothing by comparison.  fp32 itself has to leave room for
sums over a few thousand terms.
"""

ROUNDED_ONCE = {
    torch.float32: 2e-6,
    torch.float16: 2.6e-4,
    torch.bfloat16: 2.1e-3,
}
"""The same for results of a thousand elements and more, where roundings average out to 0.42 of the worst.

Tight enough to fail a store that truncates (0.84) and a second rounding on the way (0.6).
"""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in fp64; infinite when anything in ``actual`` is not finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error / scale if scale else error


def tolerance(dtype: torch.dtype, elements: int) -> float:
    """The tighter of the two tables that ``elements`` values are enough for."""
    return (ROUNDED_ONCE if elements >= 1000 else TOLERANCE)[dtype]


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Standard normal values of ``seed``, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
