"""What each node of a layer graph costs: floating-point operations and bytes moved, from the graph alone.

Operations count two per multiply–add of the matrix products (projections, linears, attention), as is usual; norms,
activations and rotations are bound by their bytes and count none, and neither do columns that only pad.  Bytes count
every value and weight once per node that touches it, as if no cache held anything between nodes.
"""

from dataclasses import dataclass
from math import prod

from .ir import Graph, Node, Workload

__all__ = ["Cost", "estimate_cost", "estimate_total_cost", "list_matmuls"]

PRODUCTS = ("patch_projection", "linear", "qkv_projection", "mlp", "projector")


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved; costs add."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


def estimate_cost(graph: Graph, node: Node, workload: Workload, itemsize: int) -> Cost:
    """The cost of one node of ``graph``.

    Args:
        graph: where the node stands.
        node: one of its nodes.
        workload: how many rows and attention scores there are.
        itemsize: bytes of one activation and of one weight.
    """
    touched = (*node.inputs, *node.outputs, *node.scratch)
    moved = sum(graph.values[name].moved(workload, itemsize) for name in touched)
    moved += sum(graph.weights[name].parameters * itemsize for name in node.weights.values())
    return Cost(_flops(graph, node, workload), moved)


def estimate_total_cost(graph: Graph, workload: Workload, itemsize: int) -> Cost:
    """The cost of every node of ``graph`` together."""
    return sum((estimate_cost(graph, node, workload, itemsize) for node in graph.nodes), Cost())


def list_matmuls(graph: Graph, node: Node, workload: Workload) -> list[tuple[int, int, int]]:
    """Rows, columns and inner dimension of each product of rows by a weight that ``node`` makes; padding does not count."""
    if node.kind not in PRODUCTS:
        return []
    rows = workload.rows(graph.values[node.outputs[0]].rows)
    shapes = (graph.weights[name].useful_shape for role, name in node.weights.items() if role.startswith("weight"))
    return [(rows, *shape) for shape in shapes if len(shape) == 2]


def _flops(graph: Graph, node: Node, workload: Workload) -> int:
    if node.kind == "attention":
        scores = workload.window_scores if node.attributes["windows"] else workload.scores
    elif node.kind == "attention_pooling":
        scores = workload.patches  # one query a tile
    else:
        return sum(2 * prod(product) for product in list_matmuls(graph, node, workload))
    # Scores and their weighted sum of values: two products of head_dim each, per query–key pair and head.
    return 4 * scores * int(node.attributes["heads"]) * int(node.attributes["head_dim"])
