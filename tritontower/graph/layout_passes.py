"""Graph passes that reorder weights, so that a kernel saves a step of its own; the numbers stay the same.

The reordered weights replace the canonical ones in memory (:mod:`.weight_layout`).
"""

import math
from dataclasses import replace

from .ir import Graph, Node, Value, Weight
from .weight_layout import HeadOrder, InterleavedGates

PADDED_HEADS = {72: 80}
"""Head dimension → padded head dimension.

Tensor cores process 72 columns as 80 anyway.  In memory, the 8 more columns align every head's row to 16-byte loads, and a
column of ones lets the matmul with the values sum up the softmax.
"""


def fuse_rotation_into_qkv(graph: Graph) -> Graph:
    """Fuses ``linear`` → ``rope`` into a ``qkv_projection`` that rotates queries and keys in its epilogue.

    The weight's rows are reordered so that the two columns that a rotation mixes are adjacent instead of half a head
    apart.  Queries and keys are reordered alike, so their scores are the same; values keep their order.  q, k and v reach
    memory once, rotated, and the rotation is computed in fp32 before the one rounding.
    """
    nodes, weights = list(graph.nodes), list[Weight]()
    for rope in [node for node in nodes if node.kind == "rope"]:
        linear = _find_writer(graph, rope.inputs[0])
        if linear is None or not _is_plain_linear(graph, linear):
            continue
        order = HeadOrder(rope.attributes["heads"], rope.attributes["head_dim"], pairs=True)
        projection = _make_qkv_projection(graph, linear, order, weights)
        tables = rope.inputs[1:]
        nodes[nodes.index(rope)] = replace(projection, inputs=(*linear.inputs, *tables), outputs=rope.outputs)
        nodes.remove(linear)
    return graph.with_nodes(nodes, weights=weights)


def pad_heads(graph: Graph) -> Graph:
    """Pads heads according to :data:`PADDED_HEADS` where an ``attention`` node reads the output of a matmul.

    The matmul's bias sets the first padding column of k and v to one; the others are zero.  The output of the attention
    has no padding.  A matmul without bias cannot write the ones and is left as it is.

    The matmul also scales the queries (``query_scale``) before its one rounding, so that the attention kernel gets scores
    as powers of two (``queries_scaled``).  For padded heads this removes the last multiplication from its loop.
    """
    nodes, values, weights = list(graph.nodes), list[Value](), list[Weight]()
    for attention in [node for node in nodes if node.kind == "attention"]:
        heads, head_dim = attention.attributes["heads"], attention.attributes["head_dim"]
        padded, matmul = PADDED_HEADS.get(head_dim), _find_writer(graph, attention.inputs[0])
        if padded is None or matmul is None or "bias" not in matmul.weights:
            continue
        if not (matmul.kind == "qkv_projection" or _is_plain_linear(graph, matmul)):
            continue
        order = HeadOrder(heads, head_dim, padded, pairs=matmul.kind == "qkv_projection" and len(matmul.inputs) > 1)
        (unpadded,) = matmul.outputs
        qkv = Value(f"{unpadded}.padded", graph.values[unpadded].rows, 3 * heads * padded)
        values.append(qkv)
        projection = _make_qkv_projection(graph, matmul, order, weights, head_dim**-0.5 * math.log2(math.e))
        nodes[nodes.index(matmul)] = replace(projection, outputs=(qkv.name,))
        attributes = {**attention.attributes, "padded_head_dim": padded, "queries_scaled": True}
        nodes[nodes.index(attention)] = replace(attention, inputs=(qkv.name,), attributes=attributes)
    return graph.with_nodes(nodes, values, weights)


def interleave_gated(graph: Graph) -> Graph:
    """Interleaves gate and up rows of gated MLPs, so that one weight tile holds both halves of its results."""
    nodes, weights = list(graph.nodes), list[Weight]()
    for position, node in enumerate(nodes):
        if node.attributes.get("activation") != "silu_gated":
            continue
        gated = {role: name for role, name in node.weights.items() if role in ("weight", "bias", "weight_1", "bias_1")}
        reordered = {role: graph.weights[name].with_layout(InterleavedGates()) for role, name in gated.items()}
        weights += reordered.values()
        nodes[position] = replace(
            node,
            weights={**node.weights, **{role: weight.name for role, weight in reordered.items()}},
            attributes={**node.attributes, "activation": "silu_gated_interleaved"},
        )
    return graph.with_nodes(nodes, weights=weights)


def _find_writer(graph: Graph, value: str) -> Node | None:
    """Returns the node that writes ``value``, or ``None`` unless exactly one node reads it."""
    if sum(value in node.inputs for node in graph.nodes) != 1 or value in graph.outputs:
        return None
    return next((node for node in graph.nodes if value in node.outputs), None)


def _is_plain_linear(graph: Graph, node: Node) -> bool:
    if node.kind != "linear" or node.attributes["activation"] is not None or node.attributes["joined"] != 1:
        return False
    return len(node.inputs) == 1 and all(graph.weights[name].weight_layout is None for name in node.weights.values())


def _make_qkv_projection(
    graph: Graph, matmul: Node, order: HeadOrder, weights: list[Weight], query_scale: float = 1.0
) -> Node:
    """Returns the matmul as a ``qkv_projection`` with heads in ``order``; appends its weights to ``weights``."""
    has_padding = order.padded_head_dim is not None
    reordered = {
        role: graph.weights[name].with_layout(replace(order, ones=role == "bias" and has_padding))
        for role, name in matmul.weights.items()
    }
    weights += reordered.values()
    attributes = {
        "heads": order.heads,
        "head_dim": order.head_dim,
        "padded_head_dim": order.padded_head_dim,
        "query_scale": query_scale,
    }
    names = {role: weight.name for role, weight in reordered.items()}
    return replace(matmul, kind="qkv_projection", weights=names, attributes=attributes)
