"""A tower's matrix multiplications alone, by the same library: a lower bound for the forward pass.

No attention, norm, activation, bias, residual or copy.  Matmuls of one shape share their operands, so their caches are
warmer than a tower's.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from tritontower.graph.cost import list_matmuls
from tritontower.graph.ir import Graph, Workload
from tritontower.kernels.gemm.cpu import PrepackedWeight, compute_dtype, matmul, prepack


def matmul_only(graph: Graph, workload: Workload, *, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Returns a call that runs the matmuls of one forward pass: by cuBLAS or its like on a GPU, by oneDNN on a CPU."""
    shapes = Counter(shape for node in graph.nodes for shape in list_matmuls(graph, node, workload) if shape[0])
    calls = [(_matmul(*shape, device, dtype), times) for shape, times in shapes.items()]

    def call() -> None:
        for once, times in calls:
            for _ in range(times):
                once()

    return call


def _matmul(rows: int, columns: int, inner: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    kept = compute_dtype(dtype) if device.type == "cpu" else dtype
    x, weight = (torch.randn(count, inner, device=device, dtype=kept) for count in (rows, columns))
    packed = prepack(weight)
    if isinstance(packed, PrepackedWeight):
        (weight,) = packed.parts
    return partial(matmul if device.type == "cpu" else torch.nn.functional.linear, x, weight, None)
