"""CudaGraphCache that put weights in the order a kernel wants them in, so that it does without a step of its own.

Each is a pass like those of :mod:`tritontower.graph.fusion`, which names them together, and leaves the numbers where they were.
The weights it touches are held in another order from then on (:mod:`tritontower.graph.weight_layout`), instead of the canonical.
"""

import math
from dataclasses import replace

from .ir import Graph, Node, Value, Weight
from .weight_layout import HeadOrder, InterleavedGates

__all__ = ["PADDED_HEADS", "fuse_rotation_into_qkv", "interleave_gated", "pad_heads"]

PADDED_HEADS = {72: 80}
"""Width of a head → what it is padded to.  The tensor cores take 72 columns as 80 anyway; in memory, the eight of them
make every row of a head start where 16 bytes are loaded at once, and a column of ones makes the product with the values
sum up the softmax on the way."""


def fuse_rotation_into_qkv(graph: Graph) -> Graph:
    """``linear`` → ``rope`` becomes a ``qkv_projection`` that rotates queries and keys in its epilogue.

    The two columns that a rotation mixes lie side by side in the product then, instead of half a head apart, because the
    weight's rows do.  Queries and keys are reordered alike, so their scores are the same; values keep their order.  q, k
    and v reach memory once, rotated, and the rotation is computed in fp32 before the one rounding.
    """
    nodes, weights = list(graph.nodes), list[Weight]()
    for rope in [node for node in nodes if node.kind == "rope"]:
        linear = _writer(graph, rope.inputs[0])
        if linear is None or not _is_plain(graph, linear):
            continue
        order = HeadOrder(rope.attributes["heads"], rope.attributes["head_dim"], pairs=True)
        projection = _qkv_projection(graph, linear, order, weights)
        tables = rope.inputs[1:]
        nodes[nodes.index(rope)] = replace(projection, inputs=(*linear.inputs, *tables), outputs=rope.outputs)
        nodes.remove(linear)
    return graph.with_nodes(nodes, weights=weights)


def pad_heads(graph: Graph) -> Graph:
    """Gives heads of 72 columns 8 more (:data:`PADDED_HEADS`), where an ``attention`` reads what a product writes.

    The first column more is one in k and v, by the product's bias; the others are zero.  What the attention writes has
    no padding.  A product without a bias, which could write no ones, is left as it is.

    The product also scales the queries (``query_scale``), before its one rounding, so that their scores reach the
    attention as powers of two (``queries_scaled``): over padded heads its loop has nothing else to do with them.
    """
    nodes, values, weights = list(graph.nodes), list[Value](), list[Weight]()
    for attention in [node for node in nodes if node.kind == "attention"]:
        heads, head_dim = attention.attributes["heads"], attention.attributes["head_dim"]
        padded, product = PADDED_HEADS.get(head_dim), _writer(graph, attention.inputs[0])
        if padded is None or product is None or "bias" not in product.weights:
            continue
        if not (product.kind == "qkv_projection" or _is_plain(graph, product)):
            continue
        order = HeadOrder(heads, head_dim, padded, pairs=product.kind == "qkv_projection" and len(product.inputs) > 1)
        (unpadded,) = product.outputs
        qkv = Value(f"{unpadded}.padded", graph.values[unpadded].rows, 3 * heads * padded)
        values.append(qkv)
        projection = _qkv_projection(graph, product, order, weights, head_dim**-0.5 * math.log2(math.e))
        nodes[nodes.index(product)] = replace(projection, outputs=(qkv.name,))
        attributes = {**attention.attributes, "padded_head_dim": padded, "queries_scaled": True}
        nodes[nodes.index(attention)] = replace(attention, inputs=(qkv.name,), attributes=attributes)
    return graph.with_nodes(nodes, values, weights)


def interleave_gated(graph: Graph) -> Graph:
    """Gated products whose gate and up rows take turns, so that one tile of weights holds both halves of its results."""
    nodes, weights = list(graph.nodes), list[Weight]()
    for position, node in enumerate(nodes):
        if node.attributes.get("activation") != "silu_gated":
            continue
        gated = {role: name for role, name in node.weights.items() if role in ("weight", "bias", "weight_1", "bias_1")}
        arranged = {role: graph.weights[name].arranged(InterleavedGates()) for role, name in gated.items()}
        weights += arranged.values()
        nodes[position] = replace(
            node,
            weights={**node.weights, **{role: weight.name for role, weight in arranged.items()}},
            attributes={**node.attributes, "activation": "silu_gated_interleaved"},
        )
    return graph.with_nodes(nodes, weights=weights)


def _writer(graph: Graph, value: str) -> Node | None:
    """The node that writes ``value``, where nothing but one node reads it."""
    if len(graph.consumers(value)) != 1 or value in graph.outputs:
        return None
    return next((node for node in graph.nodes if value in node.outputs), None)


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether the node is a product and nothing else, over weights that nothing has arranged."""
    if node.kind != "linear" or node.attributes["activation"] is not None or node.attributes["joined"] != 1:
        return False
    return len(node.inputs) == 1 and all(graph.weights[name].weight_layout is None for name in node.weights.values())


def _qkv_projection(
    graph: Graph, product: Node, order: HeadOrder, weights: list[Weight], query_scale: float = 1.0
) -> Node:
    """The product as a ``qkv_projection`` with its heads in ``order``; the weights that it needs go into ``weights``."""
    arranged = {
        role: graph.weights[name].arranged(replace(order, ones=role == "bias" and order.padded_head_dim is not None))
        for role, name in product.weights.items()
    }
    weights += arranged.values()
    attributes = {
        "heads": order.heads,
        "head_dim": order.head_dim,
        "padded_head_dim": order.padded_head_dim,
        "query_scale": query_scale,
    }
    names = {role: weight.name for role, weight in arranged.items()}
    return replace(product, kind="qkv_projection", weights=names, attributes=attributes)
