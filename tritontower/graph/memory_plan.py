"""Where every value of a pass lives: one arena, laid out before anything runs.

A value lives from the node that writes it to the last node that reads it.  Values whose lives overlap get disjoint
ranges of the arena; the rest share.  Placing the largest first, each at the lowest offset where it fits, is the
greedy-by-size rule of Pisarchyk and Lee (arXiv 2001.03288), and within a few percent of the best there is.

Some results take the place of what they are computed from: rotated queries and keys, and a sum behind a residual that
nothing reads later.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .ir import Graph, Workload
from .workspace import workspace_bytes

__all__ = ["MemoryPlan", "memory_owners", "plan_memory"]

ALIGNMENT = 256
"""Bytes; what CUDA's own allocator gives, and more than any vector load needs."""


@dataclass(frozen=True)
class MemoryPlan:
    """The layout of one pass, in bytes."""

    workload: Workload
    offsets: Mapping[str, int]
    """Value → where it begins in the arena."""
    arena_bytes: int
    input_bytes: int
    """Pixels and positions, held by the batch while the pass runs."""
    output_bytes: int
    """Results, which outlive the pass and belong to the caller."""
    workspace_bytes: int = 0
    """What torch's operations take for themselves on a CPU, at most; kernels take nothing."""

    @property
    def peak_bytes(self) -> int:
        """Everything that a pass holds at once beside the weights."""
        return self.arena_bytes + self.input_bytes + self.output_bytes + self.workspace_bytes


def plan_memory(graph: Graph, workload: Workload, itemsize: int, *, cpu_dtype: torch.dtype | None = None) -> MemoryPlan:
    """Lays out the values of ``graph``.

    Args:
        graph: what will run.
        workload: for how many rows.
        itemsize: bytes of one activation.
        cpu_dtype: the activations' dtype where torch's own operations are to run the graph on a CPU: the plan then counts
            what those take for themselves, in an otherwise equal layout.
    """
    sizes = {name: _aligned(value.size(workload, itemsize)) for name, value in graph.values.items()}
    outside = (*graph.inputs, *graph.outputs)
    offsets, arena = _place(
        {name: size for name, size in sizes.items() if name not in outside}, _lifetimes(graph), memory_owners(graph)
    )
    return MemoryPlan(
        workload=workload,
        offsets=offsets,
        arena_bytes=arena,
        input_bytes=sum(sizes[name] for name in graph.inputs),
        output_bytes=sum(sizes[name] for name in graph.outputs),
        workspace_bytes=0 if cpu_dtype is None else workspace_bytes(graph, workload, cpu_dtype),
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def memory_owners(graph: Graph) -> dict[str, str]:
    """Value → the value whose memory it lives in; they differ where a result takes the place of what a node read."""
    owners = {name: name for name in graph.values}
    last_read = {name: step for step, node in enumerate(graph.nodes) for name in node.inputs}
    for step, node in enumerate(graph.nodes):
        if node.in_place:
            owners[node.outputs[0]] = owners[node.inputs[0]]
        residual = node.residual
        if residual is None or node.outputs[0] in graph.outputs or last_read[residual] > step:
            continue
        # A sum may be written where its residual was; what the batch brings and what the caller gets is not the arena's.
        if residual not in (*graph.inputs, *graph.outputs, node.inputs[0]):
            owners[node.outputs[0]] = owners[residual]
    return owners


def _lifetimes(graph: Graph) -> dict[str, tuple[int, int]]:
    """Owner → the first and last step at which its memory is in use."""
    owners = memory_owners(graph)
    lifetimes: dict[str, tuple[int, int]] = {}
    for step, node in enumerate(graph.nodes):
        for name in (*node.inputs, *node.outputs, *node.scratch):
            first, _ = lifetimes.get(owners[name], (step, step))
            lifetimes[owners[name]] = (first, step)
    return lifetimes


def _place(
    sizes: Mapping[str, int], lifetimes: Mapping[str, tuple[int, int]], owners: Mapping[str, str]
) -> tuple[dict[str, int], int]:
    placed: list[tuple[int, int, int, int]] = []
    offsets: dict[str, int] = {}
    for name in sorted((name for name in sizes if owners[name] == name), key=lambda name: -sizes[name]):
        first, last = lifetimes[name]
        offset = 0
        # `placed` is kept in the order of offsets, so the first gap that is wide enough is the lowest.
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
