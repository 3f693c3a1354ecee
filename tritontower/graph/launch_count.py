"""How many launches a layer graph takes: counted from the graph, without running it.

What is counted, per node: launches of Triton kernels, and calls into torch's own libraries (a product by cuBLAS, a gather or
copy by torch), each of which counts as one however many kernels it is inside.  A product whose K is cut into parts takes
two launches, one for the parts and one to add them up; whether it is depends on its configuration, which depends on the
rows it is planned for and on the device: few rows need it, whose tiles leave most of a GPU idle.  So does attention, one of
whose variants has a second launch to repair what overflowed.  An MLP takes its products once for every run of rows.

Not counted: what a batch costs before its pass, such as copies to the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tritontower.kernels.attention.attention import FlashAttentionConfig
from tritontower.kernels.attention.attention import choose_config as choose_attention
from tritontower.kernels.attention.attention import default_config as default_attention
from tritontower.kernels.gemm.linear import choose_config as choose_linear
from tritontower.kernels.gemm.linear_config import LinearConfig, parts_of
from tritontower.kernels.gemm.linear_config import default_config as default_linear
from tritontower.kernels.gemm.qkv_projection import choose_config as choose_qkv
from tritontower.kernels.gemm.qkv_projection import default_config as default_qkv
from tritontower.kernels.gemm.vendor import can_use_vendor_gemm
from tritontower.kernels.runtime.config import nearest_architecture

from .ir import Graph, Node, Workload

__all__ = ["GraphLaunches", "Launches", "count_launches"]

Where = torch.device | str
"""A device, whose tuned configurations or defaults apply; or an architecture, whose defaults apply."""


@dataclass(frozen=True)
class Launches:
    """Launches of Triton kernels, and calls into torch's libraries; both add."""

    kernels: int = 0
    library: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.kernels + self.library

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(self.kernels + other.kernels, self.library + other.library)

    def __mul__(self, times: int) -> "Launches":
        return Launches(self.kernels * times, self.library * times)


@dataclass(frozen=True)
class GraphLaunches:
    """The launches of one pass over a graph.

    Attributes:
        nodes: name of each node → its launches.
        blocks: number of each transformer block → its launches.
    """

    nodes: Mapping[str, Launches]
    blocks: Mapping[int, Launches] = field(default_factory=dict)

    @property
    def total(self) -> Launches:
        """Those of the whole pass."""
        return sum(self.nodes.values(), Launches())

    @property
    def per_block(self) -> Launches:
        """Those of the block that takes the most; none where there are no blocks."""
        return max(self.blocks.values(), key=lambda launches: launches.total, default=Launches())


def count_launches(
    graph: Graph, workload: Workload, *, dtype: torch.dtype = torch.bfloat16, device: Where | None = None
) -> GraphLaunches:
    """The launches of every node of ``graph``.

    Args:
        graph: plain or fused.
        workload: how many rows there are, of which the configurations of the products follow.
        dtype: of the activations.
        device: the device, or the name of an architecture such as ``"sm_90"``, whose configurations apply.  ``None``: no
            matmul splits K or goes to a library, as with many rows and no measured table.
    """
    count = _Counter(graph, workload, dtype, device)
    nodes = {node.name: count.of(node) for node in graph.nodes}
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
    device: Where | None

    def of(self, node: Node) -> Launches:
        """The launches of one node."""
        rows = self.workload.rows(node.rows)
        if node.kind == "linear":
            return self._product(node, "", rows, node.attributes["activation"], residual=len(node.inputs) > 1)
        if node.kind == "qkv_projection":
            return self._projection(node, rows)
        if node.kind == "attention":
            return self._attention(node)
        if node.kind == "mlp":
            up = self._product(node, "_1", rows, node.attributes["activation"], residual=False)
            down = self._product(node, "_2", rows, None, residual=len(node.inputs) > 1)
            most = self.graph.values[node.scratch[0]].most_rows or max(rows, 1)
            return (up + down) * -(-rows // most)
        if node.kind == "projector":
            first = self._product(node, "_1", rows, node.attributes["activation"], residual=False)
            return self._front_of_projector(node) + first + self._product(node, "_2", rows, None, residual=False)
        if node.kind == "select":
            features = node.attributes["features"]
            gathered = len(node.inputs) > features
            return Launches(features) if gathered else Launches(library=features)
        # Everything else is one kernel.
        return Launches(1)

    def _front_of_projector(self, node: Node) -> Launches:
        if "norm_weight" in node.weights:
            return Launches(1)
        # Without a norm that gathers as it reads, torch gathers the rows that are selected.
        return Launches(library=1) if len(node.inputs) > 1 else Launches()

    def _product(self, node: Node, role: str, rows: int, activation: str | None, *, residual: bool) -> Launches:
        if self.device is None or rows == 0:
            return Launches(1)
        (columns, inner), bias = self.graph.weights[node.weights[f"weight{role}"]].shape, f"bias{role}" in node.weights
        if activation in ("silu_gated", "silu_gated_interleaved"):
            columns //= 2
        config = _linear_config(
            self.device, rows, columns, inner, dtype=self.dtype, activation=activation, residual=residual
        )
        if config.vendor and can_use_vendor_gemm(torch.empty(0, dtype=self.dtype), activation):
            return self._library_product(activation, bias=bias, residual=residual)
        return Launches(1 if parts_of(inner, config) == 1 else 2)

    def _projection(self, node: Node, rows: int) -> Launches:
        if self.device is None or rows == 0:
            return Launches(1)
        columns, inner = self.graph.weights[node.weights["weight"]].shape
        head_dim = node.attributes["head_dim"]
        config = _qkv_config(self.device, rows, columns, inner, head_dim=head_dim, dtype=self.dtype)
        plain = len(node.inputs) == 1 and node.attributes["query_scale"] == 1
        if config.vendor and plain and can_use_vendor_gemm(torch.empty(0, dtype=self.dtype), None):
            return self._library_product(None, bias="bias" in node.weights, residual=False)
        return Launches(1 if parts_of(inner, config) == 1 else 2)

    def _attention(self, node: Node) -> Launches:
        """One kernel; and one that repairs, behind the one variant that cannot do so itself."""
        if self.device is None or not self.workload.patches:
            return Launches(1)
        windows, attributes = node.attributes["windows"], node.attributes
        scores = self.workload.window_scores if windows else self.workload.scores
        config = _attention_config(
            self.device,
            attributes["head_dim"],
            self.dtype,
            padded=attributes.get("padded_head_dim") is not None,
            longest=round(scores / self.workload.patches),
            length_bound=attributes["length_bound"],
        )
        return Launches(2 if config.variant == "specialized" and self.dtype == torch.bfloat16 else 1)

    def _library_product(self, activation: str | None, *, bias: bool, residual: bool) -> Launches:
        """The library's product, and a kernel for each part of the epilogue that it does not know."""
        if residual and not bias and activation is None:
            return Launches(library=1)
        on_gpu = isinstance(self.device, str) or (self.device is not None and self.device.type == "cuda")
        inside = activation is None or (bias and on_gpu and activation == "gelu_tanh")
        return Launches(kernels=(not inside) + residual, library=1)


# -- configurations ---------------------------------------------------------------------------------------------------


def _linear_config(
    where: Where, rows: int, columns: int, inner: int, *, dtype: torch.dtype, activation: str | None, residual: bool
) -> LinearConfig:
    options: dict[str, Any] = {"dtype": dtype, "activation": activation, "residual": residual}
    if isinstance(where, torch.device):
        return choose_linear(rows, columns, inner, **options, device=where)
    return default_linear(rows, columns, inner, **options, architecture=nearest_architecture(where))


def _qkv_config(
    where: Where, rows: int, columns: int, inner: int, *, head_dim: int, dtype: torch.dtype
) -> LinearConfig:
    if isinstance(where, torch.device):
        return choose_qkv(rows, columns, inner, head_dim=head_dim, dtype=dtype, device=where)
    return default_qkv(rows, columns, inner, dtype=dtype, architecture=nearest_architecture(where))


def _attention_config(
    where: Where, head_dim: int, dtype: torch.dtype, *, padded: bool, longest: int, length_bound: int | None
) -> FlashAttentionConfig:
    if isinstance(where, torch.device):
        return choose_attention(head_dim, dtype, where, padded=padded, longest=longest, length_bound=length_bound)
    architecture = nearest_architecture(where)
    return default_attention(head_dim, dtype, architecture, longest=longest, length_bound=length_bound)
