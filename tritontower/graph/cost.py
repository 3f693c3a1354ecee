"""Floating-point operations and bytes moved of each node, from the graph alone; and numbers of launches.

A multiply–add of a matmul or of attention counts as two operations.  Norms, activations and rotations are bound by their
bytes and count none; padding columns count none.  Every value and weight counts once per node that reads or writes it, as
if there were no cache between nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from .ir import Graph, Node, Workload

_MATMULS = ("patch_projection", "linear", "qkv_projection", "mlp", "projector")


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved; costs add."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


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


@dataclass(frozen=True)
class GraphLaunches:
    """Launches of one forward pass, by node name."""

    graph: Graph
    nodes: Mapping[str, Launches]

    @property
    def total(self) -> Launches:
        """Launches of the forward pass."""
        return sum(self.nodes.values(), Launches())

    @property
    def per_block(self) -> int:
        """Launches of the block that has the most; 0 without blocks."""
        blocks: dict[int, int] = {}
        for node in self.graph.nodes:
            if node.block is not None:
                blocks[node.block] = blocks.get(node.block, 0) + self.nodes[node.name].total
        return max(blocks.values(), default=0)


def estimate_cost(graph: Graph, node: Node, workload: Workload, itemsize: int) -> Cost:
    """Returns the cost of one node; ``itemsize``: bytes of an activation or weight."""
    touched = (*node.inputs, *node.outputs, *node.scratch)
    moved = sum(graph.values[name].total_size(workload, itemsize) for name in touched)
    moved += sum(prod(graph.weights[name].shape) * itemsize for name in node.weights.values())
    return Cost(_count_flops(graph, node, workload), moved)


def estimate_total_cost(graph: Graph, workload: Workload, itemsize: int) -> Cost:
    """Returns the cost of all nodes."""
    return sum((estimate_cost(graph, node, workload, itemsize) for node in graph.nodes), Cost())


def list_matmuls(graph: Graph, node: Node, workload: Workload) -> list[tuple[int, int, int]]:
    """Lists (rows, columns, inner dimension) of each matmul of rows by a weight; padding does not count."""
    if node.kind not in _MATMULS:
        return []
    rows = workload.rows(graph.values[node.outputs[0]].rows)
    shapes = (graph.weights[name].useful_shape for role, name in node.weights.items() if role.startswith("weight"))
    return [(rows, *shape) for shape in shapes if len(shape) == 2]


def _count_flops(graph: Graph, node: Node, workload: Workload) -> int:
    if node.kind == "attention":
        scores = workload.window_scores if node.attributes["windows"] else workload.scores
    elif node.kind == "attention_pooling":
        scores = workload.patches  # one query per tile
    else:
        return sum(2 * prod(shape) for shape in list_matmuls(graph, node, workload))
    # Scores and their weighted sum of values: two matmuls over head_dim for each query–key pair and head.
    return 4 * scores * int(node.attributes["heads"]) * int(node.attributes["head_dim"])
