"""A tower's products of rows by weights and nothing else: what no pass on the same library gets below, but for noise.

No attention, norm, activation, bias or residual, and no copy: each product reads rows that are there and writes rows that
nobody reads.  Products of one shape share their operands, so even a cache is kinder to them than to a tower.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from tritontower.graph.cost import list_matmuls
from tritontower.graph.ir import Graph, Workload
from tritontower.kernels.gemm.cpu import PrepackedWeight, compute_dtype, matmul, prepack

__all__ = ["products_alone"]


def products_alone(
    graph: Graph, workload: Workload, *, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """A call that makes the products of one pass, by the vendor's library: cuBLAS or its like on a GPU, oneDNN on a CPU.

    Args:
        graph: of the tower.
        workload: of the pass.
        device: where.
        dtype: of rows and weights.
    """
    shapes = Counter(shape for node in graph.nodes for shape in list_matmuls(graph, node, workload) if shape[0])
    calls = [(_product(*shape, device, dtype), times) for shape, times in shapes.items()]

    def call() -> None:
        for once, times in calls:
            for _ in range(times):
                once()

    return call


def _product(rows: int, columns: int, inner: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    kept = compute_dtype(dtype) if device.type == "cpu" else dtype
    x, weight = (torch.randn(count, inner, device=device, dtype=kept) for count in (rows, columns))
    packed = prepack(weight)
    if isinstance(packed, PrepackedWeight):
        (weight,) = packed.parts
    return partial(matmul if device.type == "cpu" else torch.nn.functional.linear, x, weight, None)
