"""Memory plan of a forward pass: one arena, laid out before anything runs.

A value lives from the node that writes it to the last node that reads it.  Values whose lifetimes overlap get disjoint
ranges of the arena; others share memory.  The largest value is placed first, each at the lowest offset where it fits: the
greedy-by-size rule of Pisarchyk and Lee (arXiv 2001.03288), within a few percent of the optimum.

Some results overwrite an input: rotated queries and keys, and a sum whose residual is not read later.

A kernel allocates nothing.  Most torch operations that replace kernels on a CPU return new tensors; for them the plan adds
the largest workspace of any node.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tritontower.kernels.attention.torch_reference import attention_workspace_bytes
from tritontower.kernels.gemm.patch_projection import patch_projection_workspace_bytes
from tritontower.kernels.gemm.torch_reference import linear_workspace_bytes
from tritontower.kernels.runtime.checks import align_up

from .ir import Graph, Node, Workload

ALIGNMENT = 256
"""Bytes; the alignment of CUDA's allocator, and more than any vector load needs."""
SMALL_WORKSPACE_BYTES = 768 * 2**10
"""Upper bound for nodes without a formula (norms, rotations, …), at any size: the largest measured was 656 KiB."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one forward pass beside the weights, in bytes.

    ``offsets`` are those of values in the arena; ``workspace_bytes`` bounds what torch operations allocate on a CPU.
    """

    workload: Workload
    offsets: Mapping[str, int]
    arena_bytes: int
    input_bytes: int
    output_bytes: int
    workspace_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return self.arena_bytes + self.input_bytes + self.output_bytes + self.workspace_bytes


def plan_memory(graph: Graph, workload: Workload, itemsize: int, *, cpu_dtype: torch.dtype | None = None) -> MemoryPlan:
    """Plans the memory of ``graph``; ``cpu_dtype``: dtype of the activations if torch operations run it on a CPU."""
    sizes = {name: align_up(value.size(workload, itemsize), ALIGNMENT) for name, value in graph.values.items()}
    outside = (*graph.inputs, *graph.outputs)
    offsets, arena = _place({name: size for name, size in sizes.items() if name not in outside}, graph)
    workspace = 0
    if cpu_dtype is not None:
        by_node = (_estimate_workspace(graph, node, workload, cpu_dtype) for node in graph.nodes)
        workspace = max(by_node, default=0) + SMALL_WORKSPACE_BYTES
    return MemoryPlan(
        workload=workload,
        offsets=offsets,
        arena_bytes=arena,
        input_bytes=sum(sizes[name] for name in graph.inputs),
        output_bytes=sum(sizes[name] for name in graph.outputs),
        workspace_bytes=workspace,
    )


def find_memory_owners(graph: Graph) -> dict[str, str]:
    """Returns value → the value whose memory it uses: itself, or an input that it overwrites."""
    owners = {name: name for name in graph.values}
    last_read = {name: step for step, node in enumerate(graph.nodes) for name in node.inputs}
    for step, node in enumerate(graph.nodes):
        if node.is_in_place:
            owners[node.outputs[0]] = owners[node.inputs[0]]
        residual = node.residual
        if residual is None or node.outputs[0] in graph.outputs or last_read[residual] > step:
            continue
        # A sum may overwrite its residual; inputs of the batch and outputs are not in the arena.
        if residual not in (*graph.inputs, *graph.outputs, node.inputs[0]):
            owners[node.outputs[0]] = owners[residual]
    return owners


def _place(sizes: Mapping[str, int], graph: Graph) -> tuple[dict[str, int], int]:
    """Returns the offset of each value and the size of the arena."""
    owners = find_memory_owners(graph)
    lifetimes: dict[str, tuple[int, int]] = {}  # owner → first and last step of its use
    for step, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs, *node.scratch):
            first, _ = lifetimes.get(owners[name], (step, step))
            lifetimes[owners[name]] = (first, step)
    placed: list[tuple[int, int, int, int]] = []
    offsets: dict[str, int] = {}
    for name in sorted((name for name in sizes if owners[name] == name), key=lambda name: -sizes[name]):
        first, last = lifetimes[name]
        offset = 0
        # `placed` is sorted by offset, so the first gap that is wide enough is the lowest.
        for other_offset, other_end, other_first, other_last in placed:
            if other_last < first or last < other_first:
                continue
            if offset + sizes[name] <= other_offset:
                break
            offset = max(offset, other_end)
        offsets[name] = offset
        placed.append((offset, offset + sizes[name], first, last))
        placed.sort()
    offsets |= {name: offsets[owners[name]] for name in sizes if owners[name] != name}
    return offsets, max((end for _, end, _, _ in placed), default=0)


def _estimate_workspace(graph: Graph, node: Node, workload: Workload, dtype: torch.dtype) -> int:
    """Returns the workspace of the torch reference of ``node``; all segments are assumed to have one length."""
    attributes, rows = node.attributes, workload.rows(node.rows)

    def linear(role: str, rows: int, activation: str | None) -> int:
        width, inner = graph.weights[node.weights[role]].shape
        return linear_workspace_bytes(rows, width, inner, activation, dtype)

    if node.kind == "attention":
        scores = workload.window_scores if attributes["windows"] else workload.scores
        length = round(scores / max(1, workload.patches))
        return attention_workspace_bytes(workload.patches, length, attributes["heads"], attributes["head_dim"], dtype)
    if node.kind == "patch_projection":
        width, inner = graph.weights[node.weights["weight"]].shape
        return patch_projection_workspace_bytes(rows, width, inner, dtype, placed=len(node.inputs) > 1)
    if node.kind == "linear":
        return linear("weight", rows, attributes["activation"])
    if node.kind in ("mlp", "projector"):
        rows = graph.values[node.scratch[0]].held_rows(workload)
        return max(linear("weight_1", rows, attributes["activation"]), linear("weight_2", rows, None))
    return 0
