"""What narrow tensor-core products cost: chains of products of the shapes inside attention, nothing else in the loop.

A head of 80 columns is multiplied as 64 + 16.  If a product of 16 columns takes as long as one of 64, padding to 128 loses
less than it seems; if it takes a quarter of it, nothing is lost by the split.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from tritontower.benchmarks.measuring import time_on_device
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.device_functions import dot

__all__ = ["SHAPES", "measure_dot"]

SHAPES = {
    "scores, 64 of the head": (128, 128, 64),
    "scores, 16 of the head": (128, 128, 16),
    "scores, 128 of the head": (128, 128, 128),
    "values, 64 of the head": (128, 64, 128),
    "values, 16 of the head": (128, 16, 128),
    "values, 128 of the head": (128, 128, 128),
    "scores of 64 keys, 64 of the head": (128, 64, 64),
    "scores of 64 keys, 16 of the head": (128, 64, 16),
    "values of 64 keys, 64 of the head": (128, 64, 64),
    "values of 64 keys, 16 of the head": (128, 16, 64),
}
"""Name → rows, columns and inner length of one product."""

PROGRAMS_A_PROCESSOR = 2


@triton.jit
def _chain(LEFT, RIGHT, OUT, products, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    left = tl.load(LEFT + row[:, None] * INNER + inner[None, :])
    right = tl.load(RIGHT + inner[:, None] * COLUMNS + column[None, :])
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(products):
        total = dot(left, right, total)
    place = tl.program_id(0) * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    tl.store(OUT + place, total)


def measure_dot(
    shape: tuple[int, int, int], device: torch.device, *, products: int = 4096, num_warps: int = 4
) -> dict[str, Any]:
    """Time and rate of one product in a chain of ``products`` on every processor of the device."""
    rows, columns, inner = shape
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    programs = PROGRAMS_A_PROCESSOR * processors
    left = torch.full((rows, inner), 2.0**-6, dtype=torch.bfloat16, device=device)
    right = torch.ones(inner, columns, dtype=torch.bfloat16, device=device)
    out = torch.empty(programs, rows, columns, device=device)

    def call() -> None:
        _chain[(programs,)](left, right, out, products, ROWS=rows, COLUMNS=columns, INNER=inner, num_warps=num_warps)

    if not dispatch.runs_kernel(left):
        raise ValueError("a product of the tensor cores needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)")
    timing = time_on_device(call, device=device)
    expected = products * inner * 2.0**-6
    distance = float((out - expected).abs().max()) / expected
    flops = 2 * rows * columns * inner * products * programs
    return {
        "status": "ok" if distance <= 1e-6 else "failed",
        "shape": list(shape),
        "distance": distance,
        "seconds": timing.median,
        "spread": timing.spread,
        "method": timing.method,
        # The programs of a processor take turns, so a product of one costs its share of the whole.
        "nanoseconds_a_product": timing.median / products / PROGRAMS_A_PROCESSOR * 1e9,
        "tflops": flops / timing.median / 1e12,
    }
