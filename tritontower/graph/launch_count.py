"""Counts the launches of a layer graph from the kernels' own choice of configurations, without running it.

Counted are launches of Triton kernels, and calls of torch libraries (a matmul by cuBLAS, a gather or copy by torch), each as
one.  A matmul of few rows that splits K takes two launches, for the parts and their sum.  An MLP launches its matmuls once per
chunk of rows.

Copies of the batch to the device are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.kernels.gemm import linear, qkv_projection
from tritontower.kernels.gemm.linear_config import GATED, count_parts
from tritontower.kernels.gemm.vendor import can_use_vendor_gemm
from tritontower.kernels.runtime.checks import ceil_div
from tritontower.kernels.runtime.config import nearest_architecture

from .ir import Graph, Node, Workload


@dataclass(frozen=True)
class Launches:
    """Launches of Triton kernels and calls of torch libraries; both add."""

    kernels: int = 0
    library: int = 0

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.kernels + self.library

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(self.kernels + other.kernels, self.library + other.library)

    def __mul__(self, times: int) -> "Launches":
        return Launches(self.kernels * times, self.library * times)


@dataclass(frozen=True)
class GraphLaunches:
    """Launches of one forward pass, by node name and by block number."""

    nodes: Mapping[str, Launches]
    blocks: Mapping[int, Launches]

    @property
    def total(self) -> Launches:
        """Launches of the forward pass."""
        return sum(self.nodes.values(), Launches())

    @property
    def per_block(self) -> Launches:
        """Launches of the block that has the most."""
        return max(self.blocks.values(), key=lambda launches: launches.total, default=Launches())


def count_launches(
    graph: Graph, workload: Workload, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
) -> GraphLaunches:
    """Counts the launches of every node.

    ``device`` is the device whose tuned or default configurations apply, or the name of an architecture such as ``"sm_90"``,
    whose defaults apply.  ``None``: every matmul is one launch, as with many rows.
    """
    counter = _Counter(graph, workload, dtype, device)
    nodes = {node.name: counter.count(node) for node in graph.nodes}
    blocks: dict[int, Launches] = {}
    for node in graph.nodes:
        if node.block is not None:
            blocks[node.block] = blocks.get(node.block, Launches()) + nodes[node.name]
    return GraphLaunches(nodes, blocks)


@dataclass(frozen=True)
class _Counter:
    graph: Graph
    workload: Workload
    dtype: torch.dtype
    device: torch.device | str | None

    def count(self, node: Node) -> Launches:
        attributes = node.attributes
        if node.kind in ("linear", "qkv_projection"):
            return self._count_matmul(node, "", attributes.get("activation"), residual=node.residual is not None)
        if node.kind in ("mlp", "projector"):
            both = self._count_matmul(node, "_1", attributes["activation"], residual=False)
            both += self._count_matmul(node, "_2", None, residual=node.residual is not None)
            if node.kind == "mlp":
                rows = self.workload.rows(node.rows)
                return both * ceil_div(rows, self.graph.values[node.scratch[0]].most_rows or max(rows, 1))
            # Without a norm, which gathers as it reads, torch gathers the selected rows.
            return both + (Launches(1) if "norm_weight" in node.weights else Launches(library=len(node.inputs) - 1))
        if node.kind == "select":
            features = attributes["features"]
            return Launches(features) if len(node.inputs) > features else Launches(library=features)
        return Launches(1)

    def _count_matmul(self, node: Node, role: str, activation: str | None, *, residual: bool) -> Launches:
        rows, attributes = self.workload.rows(node.rows), node.attributes
        if self.device is None or rows == 0:
            return Launches(1)
        columns, inner = self.graph.weights[node.weights[f"weight{role}"]].shape
        is_plain = True
        if node.kind == "qkv_projection":
            is_plain = len(node.inputs) == 1 and attributes["query_scale"] == 1
            tuned = {"head_dim": attributes["head_dim"]}
            config = self._configure(qkv_projection, rows, columns, inner, tuned=tuned)
        else:
            columns //= 2 if activation in GATED else 1
            tuned = {"residual": residual}
            config = self._configure(linear, rows, columns, inner, activation=activation, tuned=tuned)
        if not (is_plain and config.vendor and can_use_vendor_gemm(torch.empty(0, dtype=self.dtype), activation)):
            return Launches(1 if count_parts(inner, config) == 1 else 2)
        # A vendor GEMM, and a kernel for each part of the epilogue that it does not support.
        has_bias = f"bias{role}" in node.weights
        if residual and not has_bias and activation is None:
            return Launches(library=1)
        on_gpu = isinstance(self.device, str) or self.device.type == "cuda"
        is_fused = activation is None or (has_bias and on_gpu and activation == "gelu_tanh")
        return Launches(kernels=(not is_fused) + residual, library=1)

    def _configure(self, module: Any, *shape: int, tuned: Mapping[str, Any], **options: Any) -> Any:
        """Returns the configuration of a launch; ``tuned``: what only the search among tuned ones needs."""
        if isinstance(self.device, str):
            architecture = nearest_architecture(self.device)
            return module.default_config(*shape, dtype=self.dtype, architecture=architecture, **options)
        return module.choose_config(*shape, dtype=self.dtype, device=self.device, **options, **tuned)
