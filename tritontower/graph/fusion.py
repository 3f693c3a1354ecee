"""CudaGraphCache over the layer graph: each takes a graph and returns one with fewer nodes and the same numbers.

A pass knows node kinds, never models.  Those that put weights in another order are in
:mod:`tritontower.graph.layout_passes`.  Each moves rounding points only towards fewer of them: what the plain graph rounds
between two nodes, a fused node keeps in fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from tritontower.kernels.runtime.dispatch import backend_on

from .ir import Graph, Node, Value, Weight
from .layout_passes import fuse_rotation_into_qkv, interleave_gated, pad_heads

__all__ = [
    "CHUNK_ROWS",
    "CPU_CHUNK_ROWS",
    "DEFAULT_PASSES",
    "KERNEL_PASSES",
    "Pass",
    "chunk_mlp",
    "fold_still_images",
    "fuse",
    "fuse_activations",
    "fuse_positions",
    "fuse_residual_into_linear",
    "fuse_residual_into_norm",
    "fuse_selection",
    "select_passes",
]

Pass = Callable[[Graph], Graph]

CHUNK_ROWS = 16384
"""Rows of an MLP that kernels work on at a time: fewer would leave the largest GPU a half-empty last round of tiles."""
CPU_CHUNK_ROWS = 2048
"""The same on a CPU, where fewer cost no time: the products go through them a cacheful at a time anyway."""


def fuse_activations(graph: Graph) -> Graph:
    """``linear`` → ``activation`` becomes a ``linear`` with the activation in its epilogue.

    The rows before the activation then never reach memory: for an MLP four times as wide as the tower that is the
    largest value of the block, written once and read once less.
    """

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "linear" or second.kind != "activation" or first.attributes["activation"] is not None:
            return None
        return replace(first, outputs=second.outputs, attributes={**first.attributes, **second.attributes})

    return _merge_pairs(graph, fused)


def fuse_residual_into_linear(graph: Graph) -> Graph:
    """``linear`` → ``add`` becomes a ``linear`` that adds the residual in its epilogue, before its one rounding."""

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "linear" or second.kind != "add" or len(first.inputs) > 1:
            return None
        (residual,) = (name for name in second.inputs if name != first.outputs[0])
        return replace(first, inputs=(*first.inputs, residual), outputs=second.outputs)

    return _merge_pairs(graph, fused)


def fuse_residual_into_norm(graph: Graph) -> Graph:
    """``add`` → ``norm`` becomes a ``norm`` that also writes the sum, which the next residual needs.

    The sum is rounded as the ``add`` rounded it, and that rounded sum is what is normalized.
    """
    nodes = list(graph.nodes)
    for add in [node for node in nodes if node.kind == "add"]:
        readers = [node for node in nodes if add.outputs[0] in node.inputs]
        norm = next((node for node in readers if node.kind == "norm" and node.inputs == add.outputs), None)
        # Where nothing but the norm reads the sum, there is nothing to write beside it.
        if norm is None or readers[0] is not norm or len(readers) == 1:
            continue
        fused = replace(norm, inputs=add.inputs, outputs=(*norm.outputs, *add.outputs))
        nodes[nodes.index(norm)] = fused
        nodes.remove(add)
    return graph.with_nodes(nodes)


def fuse_positions(graph: Graph) -> Graph:
    """``patch_projection`` → ``add_positions`` becomes a projection that adds the table's row in its epilogue.

    Only where a position is one row of the table; a weighted sum of several stays a node of its own.
    """

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "patch_projection" or second.kind != "add_positions" or len(second.inputs) > 2:
            return None
        inputs = (*first.inputs, *second.inputs[1:])
        return replace(first, inputs=inputs, outputs=second.outputs, weights={**first.weights, **second.weights})

    return _merge_pairs(graph, fused)


def fuse_selection(graph: Graph) -> Graph:
    """``select`` → ``projector`` becomes a projector that reads the selected rows where they are.

    With a norm in front of the products, the norm gathers as it reads, and the selected rows never reach memory.
    """

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "select" or second.kind != "projector" or len(first.inputs) != 2 or len(second.inputs) > 1:
            return None
        if second.attributes["over_token"] or first.attributes["features"] != 1:
            return None
        scratch = second.scratch if len(second.scratch) > 1 else (*second.scratch, *first.outputs)
        return replace(second, inputs=first.inputs, scratch=scratch)

    return _merge_pairs(graph, fused)


def fold_still_images(graph: Graph) -> Graph:
    """The graph for still images: all the frames that a patch spans are the same frame.

    ``[frame, frame] @ [W₀, W₁]ᵀ = frame @ (W₀ + W₁)ᵀ``: the projection's inner dimension shrinks by the number of
    frames (1176 → 588 for Qwen2-VL), and so do the pixels that are prepared, moved and read.  A tower whose patches
    span one frame is returned as it is.
    """
    nodes, weights, values = list(graph.nodes), dict(graph.weights), dict(graph.values)
    for position, node in enumerate(nodes):
        if node.kind != "patch_projection":
            continue
        weight, pixels = weights[node.weights["weight"]], values[node.inputs[0]]
        temporal = weight.source_shape[2]
        if temporal == 1 or weight.transform == "fold_temporal":
            continue
        inner = pixels.width // temporal
        folded = Weight(
            f"{weight.name}.folded", (weight.shape[0], inner), weight.source, weight.source_shape, "fold_temporal"
        )
        del weights[weight.name]
        weights[folded.name] = folded
        values[pixels.name] = Value(pixels.name, pixels.rows, inner, pixels.dtype)
        nodes[position] = replace(node, weights={**node.weights, "weight": folded.name})
    return replace(graph, nodes=tuple(nodes), weights=weights, values=values)


def chunk_mlp(graph: Graph, rows: int = CHUNK_ROWS) -> Graph:
    """``linear`` with an activation → ``linear`` becomes one ``mlp`` that works through the rows run by run.

    What stands between the two products is four times as wide as the rows: held for ``rows`` rows at most, it no longer
    grows with the pack.  The products are the same, planned for all rows: no row's bits depend on the runs.
    """
    values: list[Value] = []

    def fused(first: Node, second: Node) -> Node | None:
        kinds = (first.kind, second.kind)
        if kinds != ("linear", "linear") or first.attributes["activation"] is None or len(first.inputs) > 1:
            return None
        if first.attributes["joined"] != 1 or second.attributes["joined"] != 1 or second.inputs[0] != first.outputs[0]:
            return None
        if second.attributes["activation"] is not None:
            return None
        values.append(replace(graph.values[first.outputs[0]], most_rows=rows))
        roles = {
            f"{role}_{number}": name
            for number, node in enumerate((first, second), 1)
            for role, name in node.weights.items()
        }
        return Node(
            name=second.name.replace("mlp_down", "mlp"),
            kind="mlp",
            inputs=(*first.inputs, *second.inputs[1:]),
            outputs=second.outputs,
            weights=roles,
            attributes={"activation": first.attributes["activation"]},
            scratch=first.outputs,
            block=second.block,
            rows=second.rows,
        )

    merged = _merge_pairs(graph, fused)
    return merged.with_nodes(merged.nodes, values)


DEFAULT_PASSES: tuple[Pass, ...] = (
    fuse_positions,
    fuse_activations,
    fuse_residual_into_linear,
    fuse_residual_into_norm,
    fuse_selection,
)
"""What every graph goes through, before :func:`chunk_mlp`.  The residual goes into the product's epilogue wherever a
product writes it, which moves one value less than adding it in the norm; the norm takes the additions that are left."""


KERNEL_PASSES: tuple[Pass, ...] = (fuse_rotation_into_qkv, pad_heads, interleave_gated)
"""What a graph goes through behind them where kernels run."""


def fuse(graph: Graph, passes: Sequence[Pass] = DEFAULT_PASSES) -> Graph:
    """``graph`` after ``passes``, in order."""
    for apply in passes:
        graph = apply(graph)
    return graph


def select_passes(device: torch.device) -> tuple[Pass, ...]:
    """The passes for a graph that runs on ``device``.

    What arranges weights for the kernels is for where kernels run: the plain torch of a CPU would only pay for it.
    """
    if backend_on(device) == "reference":
        return (*DEFAULT_PASSES, partial(chunk_mlp, rows=CPU_CHUNK_ROWS))
    return (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)


def _merge_pairs(graph: Graph, fused: Callable[[Node, Node], Node | None]) -> Graph:
    """Replaces a node and the only reader of its only output by ``fused(node, reader)``, where that is a node.

    The fused node stands where the reader stood, so that everything the reader waited for is there.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    replaced: dict[str, Node] = {}
    dropped: set[str] = set()
    for node in graph.nodes:
        following = readers.get(node.outputs[0], [])
        if len(node.outputs) > 1 or len(following) != 1 or node.outputs[0] in graph.outputs:
            continue
        # A reader takes one node in; a sum of two products keeps the second as it is.
        merged = None if following[0].name in replaced else fused(node, following[0])
        if merged is not None:
            replaced[following[0].name] = merged
            dropped.add(node.name)
    return graph.with_nodes([replaced.get(node.name, node) for node in graph.nodes if node.name not in dropped])
