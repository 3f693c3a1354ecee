"""Times narrow tensor-core matmuls: chains of matmuls with the shapes inside attention, and nothing else in the loop.

    python -m bench.dot16 --output dot16.json

A head of 80 columns is multiplied as 64 + 16.  If a matmul with 16 columns takes as long as one with 64, the split gains
nothing over padding to 128; if it takes a quarter of that, the split costs nothing.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tritontower.benchmarks.documents import Report
from tritontower.benchmarks.measuring import time_on_device
from tritontower.cli.options import output_file
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime.device_functions import dot

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
"""Name → rows, columns and K of one matmul."""

PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _chain(left_ptr, right_ptr, out_ptr, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    left = tl.load(left_ptr + row[:, None] * INNER + inner[None, :])
    right = tl.load(right_ptr + inner[:, None] * COLUMNS + column[None, :])
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(steps):
        total = dot(left, right, total)
    place = tl.program_id(0) * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :]
    tl.store(out_ptr + place, total)


def measure_dot(
    shape: tuple[int, int, int], device: torch.device, *, steps: int = 4096, num_warps: int = 4
) -> dict[str, Any]:
    """Times one matmul in a chain of ``steps`` on every processor of the device."""
    rows, columns, inner = shape
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    programs = PROGRAMS_PER_PROCESSOR * processors
    left = torch.full((rows, inner), 2.0**-6, dtype=torch.bfloat16, device=device)
    right = torch.ones(inner, columns, dtype=torch.bfloat16, device=device)
    out = torch.empty(programs, rows, columns, device=device)

    def call() -> None:
        _chain[(programs,)](left, right, out, steps, ROWS=rows, COLUMNS=columns, INNER=inner, num_warps=num_warps)

    if not dispatch.runs_kernel(left):
        raise ValueError("dot16 needs a GPU or the interpreter; set TRITON_INTERPRET=1")
    timing = time_on_device(call, device=device)
    expected = steps * inner * 2.0**-6
    distance = float((out - expected).abs().max()) / expected
    flops = 2 * rows * columns * inner * steps * programs
    return {
        "status": "ok" if distance <= 1e-6 else "failed",
        "shape": list(shape),
        "distance": distance,
        "seconds": timing.median,
        "spread": timing.spread,
        "method": timing.method,
        # The programs on a processor take turns, so one matmul costs its share of the whole.
        "nanoseconds_per_matmul": timing.median / steps / PROGRAMS_PER_PROCESSOR * 1e9,
        "tflops": flops / timing.median / 1e12,
    }


def main(words: Sequence[str] | None = None) -> int:
    """Times every shape with 4 and 8 warps; returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write the report here, as JSON")
    arguments = parser.parse_args(words)
    device = torch.device("cuda")
    report = Report("dot16", device=device, path=arguments.output)
    for (name, shape), warps in itertools.product(SHAPES.items(), (4, 8)):
        row = {"case": f"{name}, {warps} warps", **measure_dot(shape, device, num_warps=warps)}
        report.add(row)
        print(f"{row['case']}: {row['nanoseconds_per_matmul']:.0f} ns, {row['tflops']:.0f} TFLOP/s", flush=True)
    report.finish()
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
