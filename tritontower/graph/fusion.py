"""Graph passes: functions ``Graph → Graph`` that leave fewer nodes and the same numbers.

A pass matches node kinds, never models.  Passes that reorder weights are in :mod:`.layout_passes`.  Each pass only removes
rounding: a value that the plain graph rounds between two nodes stays in fp32 in a fused node.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from tritontower.kernels.runtime.dispatch import backend_on

from .ir import Graph, Node, Value, Weight
from .layout_passes import fuse_rotation_into_qkv, interleave_gated, pad_heads

Pass = Callable[[Graph], Graph]
Fuse = Callable[[Node, Node], Node | None]

CHUNK_ROWS = 16384
"""Rows of an MLP that kernels process at a time; fewer would leave the largest GPU a half-empty last wave of tiles."""
CPU_CHUNK_ROWS = 2048
"""The same on a CPU, whose matmuls process a cacheful of rows at a time anyway."""


def fuse_activations(graph: Graph) -> Graph:
    """Fuses ``linear`` → ``activation``: the epilogue applies it, before the largest value of a block is stored."""

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "linear" or second.kind != "activation" or first.attributes["activation"] is not None:
            return None
        return replace(first, outputs=second.outputs, attributes={**first.attributes, **second.attributes})

    return _merge_pairs(graph, fused)


def fuse_residual_into_linear(graph: Graph) -> Graph:
    """Fuses ``linear`` → ``add``: the epilogue adds the residual before its one rounding."""

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "linear" or second.kind != "add" or len(first.inputs) > 1:
            return None
        (residual,) = (name for name in second.inputs if name != first.outputs[0])
        return replace(first, inputs=(*first.inputs, residual), outputs=second.outputs)

    return _merge_pairs(graph, fused)


def fuse_residual_into_norm(graph: Graph) -> Graph:
    """Fuses ``add`` → ``norm`` into a ``norm`` that also writes the rounded sum, which the next residual needs."""
    nodes = list(graph.nodes)
    for add in [node for node in nodes if node.kind == "add"]:
        readers = [node for node in nodes if add.outputs[0] in node.inputs]
        norm = next((node for node in readers if node.kind == "norm" and node.inputs == add.outputs), None)
        # If only the norm reads the sum, there is no second output to write.
        if norm is None or readers[0] is not norm or len(readers) == 1:
            continue
        nodes[nodes.index(norm)] = replace(norm, inputs=add.inputs, outputs=(*norm.outputs, *add.outputs))
        nodes.remove(add)
    return graph.with_nodes(nodes)


def fuse_positions(graph: Graph) -> Graph:
    """Fuses ``patch_projection`` → ``add_positions``, unless a position is a weighted sum of several rows."""

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "patch_projection" or second.kind != "add_positions" or len(second.inputs) > 2:
            return None
        inputs = (*first.inputs, *second.inputs[1:])
        return replace(first, inputs=inputs, outputs=second.outputs, weights={**first.weights, **second.weights})

    return _merge_pairs(graph, fused)


def fuse_selection(graph: Graph) -> Graph:
    """Fuses ``select`` → ``projector``: the projector gathers the selected rows.

    If the projector has a norm, the norm gathers as it reads, and the selected rows never reach memory.
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
    """Specializes the graph for still images, where all frames of a patch are the same frame.

    ``[frame, frame] @ [W₀, W₁]ᵀ = frame @ (W₀ + W₁)ᵀ``: the inner dimension of the patch projection and the pixels shrink by
    the number of frames (1176 → 588 for Qwen2-VL).  A tower whose patches span one frame is returned unchanged.
    """
    nodes = list(graph.nodes)
    for node in [node for node in nodes if node.kind == "patch_projection"]:
        weight, pixels = graph.weights[node.weights["weight"]], graph.values[node.inputs[0]]
        temporal = weight.source_shape[2]
        if temporal == 1 or weight.transform == "fold_temporal":
            continue
        inner, name = pixels.width // temporal, f"{weight.name}.folded"
        folded = Weight(name, (weight.shape[0], inner), weight.source, weight.source_shape, "fold_temporal")
        nodes = [
            each if each is not node else replace(node, weights={**node.weights, "weight": name}) for each in nodes
        ]
        return graph.with_nodes(nodes, [replace(pixels, width=inner)], [folded])
    return graph


def chunk_mlp(graph: Graph, rows: int = CHUNK_ROWS) -> Graph:
    """Fuses ``linear`` with an activation → ``linear`` into one ``mlp`` that processes ``rows`` rows at a time.

    The value between the two matmuls, four times as wide as the rows, then no longer grows with the batch.  The launch
    configurations are those of all rows, so the bits of a row do not depend on the chunks.
    """
    values: list[Value] = []

    def fused(first: Node, second: Node) -> Node | None:
        if first.kind != "linear" or second.kind != "linear" or second.attributes["activation"] is not None:
            return None
        if first.attributes["activation"] is None or len(first.inputs) > 1 or second.inputs[0] != first.outputs[0]:
            return None
        if first.attributes["joined"] != 1 or second.attributes["joined"] != 1:
            return None
        values.append(replace(graph.values[first.outputs[0]], most_rows=rows))
        return replace(
            second,
            name=second.name.replace("mlp_down", "mlp"),
            kind="mlp",
            inputs=(*first.inputs, *second.inputs[1:]),
            weights={
                f"{role}_{n}": name for n, node in ((1, first), (2, second)) for role, name in node.weights.items()
            },
            attributes={"activation": first.attributes["activation"]},
            scratch=first.outputs,
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
"""Passes of every graph, before :func:`chunk_mlp`.

A residual is added in a matmul's epilogue if possible: that moves one value less than adding it in a norm.
"""

KERNEL_PASSES: tuple[Pass, ...] = (fuse_rotation_into_qkv, pad_heads, interleave_gated)
"""Passes after these for graphs that run on kernels."""


def fuse(graph: Graph, passes: Sequence[Pass] = DEFAULT_PASSES) -> Graph:
    """Applies ``passes`` in order."""
    for apply in passes:
        graph = apply(graph)
    return graph


def select_passes(device: torch.device) -> tuple[Pass, ...]:
    """Returns the passes for a graph that runs on ``device``; only kernels profit from reordered weights."""
    if backend_on(device) == "reference":
        return (*DEFAULT_PASSES, partial(chunk_mlp, rows=CPU_CHUNK_ROWS))
    return (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)


def _merge_pairs(graph: Graph, fused: Fuse) -> Graph:
    """Replaces a node and the only reader of its only output by ``fused(node, reader)``, unless that is ``None``.

    The fused node takes the reader's place in the order, after all inputs of the reader.
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
        # A reader absorbs one node: a sum of two matmuls keeps the second one.
        merged = None if following[0].name in replaced else fused(node, following[0])
        if merged is not None:
            replaced[following[0].name] = merged
            dropped.add(node.name)
    return graph.with_nodes([replaced.get(node.name, node) for node in graph.nodes if node.name not in dropped])
