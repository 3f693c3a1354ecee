"""Limits of a machine: published figures, and what a large matmul and a large copy reach today.

Published figures are for dense 16-bit matmuls at the boost clock and the full memory rate; no kernel reaches them.  Measured
ones are those of the vendor's library at today's clocks.
"""

from dataclasses import dataclass

import torch

from .measuring import time_on_device


@dataclass(frozen=True)
class Roofline:
    """Compute and memory limits of a machine, with their source."""

    flops: float
    """Operations per second of 16-bit matmuls (of the measured dtype, if measured)."""
    bytes: float
    """Bytes per second to and from memory."""
    source: str

    def share(self, flops: int, moved: int, seconds: float) -> float:
        """Share of the roofline that was reached; above 1 where the data stay in a cache."""
        return max(flops / self.flops, moved / self.bytes) / seconds if seconds else 0.0


PUBLISHED: tuple[tuple[str, float, float, str], ...] = (
    ("H200", 989.4, 4800, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    ("H100 PCIe", 756, 2000, "NVIDIA H100 Tensor Core GPU datasheet (PCIe)"),
    ("H100 NVL", 835, 3900, "NVIDIA H100 NVL product brief"),
    ("H100", 989.4, 3350, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
    ("A100-SXM4-80GB", 312, 2039, "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)"),
    ("A100 80GB PCIe", 312, 1935, "NVIDIA A100 Tensor Core GPU datasheet (80 GB PCIe)"),
    ("A100", 312, 1555, "NVIDIA A100 Tensor Core GPU datasheet (40 GB)"),
    ("L40S", 362, 864, "NVIDIA L40S datasheet"),
    ("RTX 4090", 165.2, 1008, "NVIDIA Ada GPU architecture whitepaper (fp32 accumulation)"),
    ("MI300X", 1307.4, 5300, "AMD Instinct MI300X datasheet"),
)
"""Part of the device name, TFLOP/s (bf16, dense), GB/s, source; the first match counts."""


def published_roofline(name: str) -> Roofline | None:
    """Published limits of a device; ``None`` if the table lacks it."""
    return next(
        (Roofline(tflops * 1e12, rate * 1e9, source) for part, tflops, rate, source in PUBLISHED if part in name), None
    )


def measured_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures the vendor library's matmul of two large square matrices, and a copy within device memory."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1536
    copied_bytes = 2 * 2**30 if on_gpu else 256 * 2**20
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    matmul = time_on_device(lambda: torch.mm(left, right, out=result), device=device, budget_seconds=1.0)
    source = torch.zeros(copied_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = time_on_device(lambda: target.copy_(source), device=device, budget_seconds=0.5)
    name = f"measured: {side}³ matmul in {str(dtype).removeprefix('torch.')}, copy of {copied_bytes / 2**20:,.0f} MiB"
    # A copy reads every byte and writes it.
    return Roofline(2 * side**3 / matmul.median, 2 * copied_bytes / copy.median, name)
