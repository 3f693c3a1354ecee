"""The graph for pixels that are bytes: rescaling and normalization are in the weights of the patch projection.

A quarter of what fp32 pixels take is prepared and moved to the device, and normalized pixels are never rounded to 16 bits;
the weights are, once more.  Only the patch projection has weights of its own; everything else is shared with the graph
for normalized pixels.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from tritontower.batch.normalization import PixelNormalization
from tritontower.graph.ir import Graph, Node, Weight

__all__ = ["fold_pixel_weights", "make_uint8_graph"]


def make_uint8_graph(graph: Graph, *, class_token: bool) -> Graph:
    """``graph`` for bytes where it takes normalized pixels; :func:`fold_pixel_weights` makes the weights.

    ``(s · byte − m) @ Wᵀ = (byte − 128) @ (s W)ᵀ + (128 s − m) @ Wᵀ``.  The last term, the same for every patch, goes into
    the bias.  The row of a class token is no patch, and its pixels count zero: in a tower that has one, the term goes into
    the rows of the position table that belong to patches, and the class token's row keeps its bits.

    Args:
        graph: its patch projection has the positions in its epilogue, if there is a class token.
        class_token: whether the first row of each tile, and of the position table, is the class token's.

    Raises:
        ValueError: a class token, and a patch projection without positions.
    """
    node = _projection(graph)
    constant = _constant_role(node, class_token)
    weight = graph.weights[node.weights["weight"]]
    shapes = {"weight": weight.shape, constant: weight.shape[:1]}
    if class_token:
        shapes[constant] = graph.weights[node.weights[constant]].shape
    made = {role: Weight(_name(role), shape, _name(role), shape) for role, shape in shapes.items()}
    folded = replace(node, weights={**node.weights, **{role: weight.name for role, weight in made.items()}})
    nodes = [folded if each is node else each for each in graph.nodes]
    return graph.with_nodes(nodes, [replace(graph.values[node.inputs[0]], dtype="uint8")], made.values())


def fold_pixel_weights(
    graph: Graph, sources: Mapping[str, torch.Tensor], rescaling: PixelNormalization, *, class_token: bool
) -> dict[str, torch.Tensor]:
    """What :func:`make_uint8_graph` of ``graph`` needs beside the tensors of ``graph`` itself.

    Args:
        graph: the graph for normalized pixels.
        sources: name → tensor, as the graph's executor takes them.
        rescaling: what becomes of a byte.
        class_token: as there.

    Returns:
        Name → tensor, of the dtype and on the device of ``sources``, each rounded once.

    Raises:
        ValueError: as there.
    """
    node = _projection(graph)
    role = _constant_role(node, class_token)
    weight = graph.weights[node.weights["weight"]]
    held = sources[weight.held_name]
    # A still image's frames are one: their weights are added before anything is rounded.
    whole = held.float().sum(2) if weight.transform == "fold_temporal" else held.float()
    folded, constant = rescaling.folded(whole.flatten(1))
    if role in node.weights:
        added = sources[graph.weights[node.weights[role]].held_name].float()
        constant = torch.cat((added[:1], added[1:] + constant)) if class_token else added + constant
    return {_name("weight"): folded.to(held.dtype), _name(role): constant.to(held.dtype)}


def _projection(graph: Graph) -> Node:
    (node,) = (node for node in graph.nodes if node.kind == "patch_projection")
    return node


def _constant_role(node: Node, class_token: bool) -> str:
    """The weight into which goes what is added to every patch."""
    if class_token and "position_table" not in node.weights:
        raise ValueError(f"node {node.name} adds no positions: nothing tells a class token's row from a patch's")
    return "position_table" if class_token else "bias"


def _name(role: str) -> str:
    # What no canonical tensor is called.
    return f"patch_projection.{role}:bytes"
