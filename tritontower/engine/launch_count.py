"""Counts the launches of a layer graph by recording them over tensors without memory; nothing is compiled or launched.

Counted are launches of Triton kernels, and calls of torch libraries (a matmul by cuBLAS, a gather or copy by torch), each as
one.  Copies of the batch to the device are not counted.
"""

from functools import partial
from typing import Any

import torch

from tritontower.errors import UsageError
from tritontower.graph.cost import GraphLaunches, Launches
from tritontower.graph.ir import Graph, Workload
from tritontower.kernels.runtime import config as configs
from tritontower.kernels.runtime import dispatch
from tritontower.kernels.runtime._triton import HAS_TRITON
from tritontower.kernels.runtime.launch import LaunchList, Workspace
from tritontower.kernels.runtime.segments import Segments

from .ops import BatchMetadata, bind_node, bind_weight


class _Counter(LaunchList):
    """Records launches and library calls without running them."""

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernels.append(kernel.fn.__name__)

    def call(self, function: Any) -> None:
        self.library_calls += 1


def count_launches(
    graph: Graph, workload: Workload, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> GraphLaunches:
    """Counts the launches of every node.

    ``device`` is the device whose tuned or default configurations apply, or the name of an architecture such as ``"sm_90"``,
    whose defaults apply.  Raises :class:`.UsageError` without Triton.
    """
    if not HAS_TRITON:
        raise UsageError("counting launches needs Triton, which is not installed; run pip install triton on Linux")
    found = {node.name: Launches() for node in graph.nodes}
    if not workload.patches:
        return GraphLaunches(graph, found)
    empty = partial(torch.empty, device="meta")
    sources = {name: empty(shape, dtype=dtype) for name, shape in graph.held_shapes.items()}
    tensors = {
        name: empty(value.held_rows(workload), value.width, dtype=value.torch_dtype(dtype))
        for name, value in graph.values.items()
    }
    attention = [node.attributes for node in graph.nodes if node.kind == "attention"]
    bounds = {attributes["windows"]: attributes["length_bound"] or workload.patches for attributes in attention}
    metadata = BatchMetadata(
        segments=_divide(workload.patches, min(bounds.get(False, 1), workload.scores / workload.patches)),
        windows=_divide(workload.patches, min(bounds.get(True, 1), workload.window_scores / workload.patches)),
        tiles=_divide(workload.patches, workload.patches / max(1, workload.tiles)),
        side=1,
    )
    counter = _Counter(Workspace())
    with torch.inference_mode(), dispatch.use("triton"), configs.assume(device), counter.record():
        weights = {name: bind_weight(weight, sources) for name, weight in graph.weights.items()}
        for node in graph.nodes:
            step = bind_node(node, weights)
            kernels, calls = len(counter.kernels), counter.library_calls
            step(tensors, metadata)
            found[node.name] = Launches(len(counter.kernels) - kernels, counter.library_calls - calls)
    return GraphLaunches(graph, found)


def _divide(rows: int, length: float) -> Segments:
    """Divides rows into segments of about ``length`` rows."""
    longest = max(1, round(length))
    return Segments([longest] * (rows // longest) + [rows % longest] * (rows % longest > 0))
