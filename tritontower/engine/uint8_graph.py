"""Layer graph for uint8 pixels: the weights of the patch projection include the pixel normalization.

Preparing and copying uint8 pixels moves a quarter of the bytes of fp32, and normalized pixels are never rounded to 16 bits;
instead, the weights are rounded once more.  Only the patch projection has weights of its own; all others are shared.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from tritontower.batch.normalization import PixelNormalization
from tritontower.graph.ir import Graph, Node, Weight


def make_uint8_graph(graph: Graph, *, class_token: bool) -> Graph:
    """Returns ``graph`` for uint8 pixels; :func:`fold_pixel_weights` computes its weights.

    ``(s · byte − m) @ Wᵀ = (byte − 128) @ (s W)ᵀ + (128 s − m) @ Wᵀ``.  The last term is the same for every patch and is
    added to the bias.  A class token is no patch, and its pixels count as zero: in a tower with one, the term is added to
    the patches' rows of the position table, and the class token's row keeps its bits.  Raises :class:`ValueError` if there
    is a class token, and the patch projection adds no positions.
    """
    node = _find_projection(graph)
    constant = _constant_role(node, class_token)
    weight = graph.weights[node.weights["weight"]]
    shapes = {"weight": weight.shape, constant: weight.shape[:1]}
    if class_token:
        shapes[constant] = graph.weights[node.weights[constant]].shape
    made = {role: Weight(_weight_name(role), shape, _weight_name(role), shape) for role, shape in shapes.items()}
    folded = replace(node, weights={**node.weights, **{role: weight.name for role, weight in made.items()}})
    nodes = [folded if each is node else each for each in graph.nodes]
    return graph.with_nodes(nodes, [replace(graph.values[node.inputs[0]], dtype="uint8")], made.values())


def fold_pixel_weights(
    graph: Graph, sources: Mapping[str, torch.Tensor], normalization: PixelNormalization, *, class_token: bool
) -> dict[str, torch.Tensor]:
    """Computes the weights that :func:`make_uint8_graph` adds to ``graph``, each rounded once to the sources' dtype."""
    node = _find_projection(graph)
    role = _constant_role(node, class_token)
    weight = graph.weights[node.weights["weight"]]
    held = sources[weight.held_name]
    # The frames of a still image are equal: their weights are added before any rounding.
    whole = held.float().sum(2) if weight.transform == "fold_temporal" else held.float()
    folded, constant = normalization.fold(whole.flatten(1))
    if role in node.weights:
        added = sources[graph.weights[node.weights[role]].held_name].float()
        constant = torch.cat((added[:1], added[1:] + constant)) if class_token else added + constant
    return {_weight_name("weight"): folded.to(held.dtype), _weight_name(role): constant.to(held.dtype)}


def _find_projection(graph: Graph) -> Node:
    (node,) = (node for node in graph.nodes if node.kind == "patch_projection")
    return node


def _constant_role(node: Node, class_token: bool) -> str:
    """Returns the weight that the constant term is added to."""
    if class_token and "position_table" not in node.weights:
        reason = "its row would be normalized"
        raise ValueError(f"node {node.name} must add positions if there is a class token, got none: {reason}")
    return "position_table" if class_token else "bias"


def _weight_name(role: str) -> str:
    # No canonical tensor has this name.
    return f"patch_projection.{role}:bytes"
