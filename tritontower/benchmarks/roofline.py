"""The most that a machine could do: what its maker says, and what a large product and a large copy reach today.

The published figures are for dense 16-bit products at the boost clock and for the memory's full rate; no kernel gets
there.  The measured ones are what the vendor's own library reaches on this machine at its present clocks, which is the
fairer yardstick; for a device that is not in the table they are the only one.  On a CPU they say what the machine does
today, and nothing is given as a share of them.
"""

from dataclasses import dataclass

import torch

from .measuring import time_on_device

__all__ = ["PUBLISHED", "Roofline", "measured_roofline", "published_roofline"]


@dataclass(frozen=True)
class Roofline:
    """The two limits of a machine, and whose figures they are."""

    flops: float
    """16-bit operations a second of matrix products (of the measured dtype, if measured)."""
    bytes: float
    """Bytes a second to and from memory."""
    source: str

    def seconds(self, flops: int, moved: int) -> float:
        """The least time that this work can take."""
        return max(flops / self.flops, moved / self.bytes)

    def share(self, flops: int, moved: int, seconds: float) -> float:
        """How much of what is possible was reached; above 1 where a result never leaves a cache.

        On a CPU that is usual, and what a copy reaches there (it reads what it overwrites) is no limit of the memory.
        """
        return self.seconds(flops, moved) / seconds if seconds else 0.0


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
"""Part of the device's name → TFLOP/s (bf16, dense), GB/s, source; the first that fits counts."""


def published_roofline(name: str) -> Roofline | None:
    """What the maker says of the device called ``name``; ``None`` for one that is not in the table."""
    for part, tflops, gigabytes, source in PUBLISHED:
        if part in name:
            return Roofline(tflops * 1e12, gigabytes * 1e9, source)
    return None


def measured_roofline(
    device: torch.device, dtype: torch.dtype, *, side: int | None = None, copied_bytes: int | None = None
) -> Roofline:
    """The vendor library's product of two square matrices, and a copy within the device's memory.

    Args:
        device: where.
        dtype: of the matrices.
        side: rows and columns; 8192 on a GPU, 1536 on a CPU.
        copied_bytes: size of what is copied; 2 GiB on a GPU, 256 MiB on a CPU.
    """
    on_gpu = device.type == "cuda"
    side = side or (8192 if on_gpu else 1536)
    copied_bytes = copied_bytes or (2 * 2**30 if on_gpu else 256 * 2**20)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    product = time_on_device(lambda: torch.mm(left, right, out=result), device=device, budget_seconds=1.0)
    source = torch.zeros(copied_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = time_on_device(lambda: target.copy_(source), device=device, budget_seconds=0.5)
    name = f"measured: {side}³ product in {str(dtype).removeprefix('torch.')}, copy of {copied_bytes / 2**20:,.0f} MiB"
    # A copy reads every byte and writes it.
    return Roofline(2 * side**3 / product.median, 2 * copied_bytes / copy.median, name)
