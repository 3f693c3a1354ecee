"""What torch's own operations take for themselves while a pass runs on a CPU, beside the plan's arena.

A kernel writes where it is told to and takes nothing.  Most of torch's operations that stand in for kernels on a CPU return
new tensors instead: the references in :mod:`tritontower.kernels` hand them a cacheful of rows at a time, but a cacheful
is megabytes, and the fused attention's result is as large as what it is copied into.  Here the largest of these temporaries
is worked out from the same constants, node by node.  Norms, rotations and what else takes little are not: for them there is
a constant, which only a small pass feels.
"""

import torch

from tritontower.kernels.attention.torch_reference import (
    _HEADS_BYTES,
    _SCORES_BYTES,
    _WEIGHTS_BYTES,
    LENGTH_FOR_EXPONENTIALS,
    LENGTH_FOR_PRODUCTS,
)
from tritontower.kernels.gemm import cpu
from tritontower.kernels.gemm.patch_projection import _CHUNK_ROWS
from tritontower.kernels.gemm.torch_reference import _CHUNK_BYTES
from tritontower.kernels.rowwise.activations import _CHUNK as _ACTIVATION_CHUNK

from .ir import Graph, Node, Workload

__all__ = ["SMALL_WORKSPACE_BYTES", "workspace_bytes"]

SMALL_WORKSPACE_BYTES = 768 * 2**10
"""What is not worked out node by node takes less, at any size of a pass: 656 KiB was the most that was measured."""


def workspace_bytes(graph: Graph, workload: Workload, dtype: torch.dtype) -> int:
    """The most that any node of ``graph`` takes for itself, in bytes.

    Args:
        graph: what torch's operations run.
        workload: for how many rows; segments are taken to be of one length.
        dtype: of the activations.
    """
    return max((_of_node(graph, node, workload, dtype) for node in graph.nodes), default=0) + SMALL_WORKSPACE_BYTES


def _of_node(graph: Graph, node: Node, workload: Workload, dtype: torch.dtype) -> int:
    rows = workload.rows(node.rows)
    if node.kind == "attention":
        return _attention(node, workload, dtype)
    if node.kind == "patch_projection":
        rows = min(rows, _CHUNK_ROWS)
        pixels = 0 if dtype == torch.float32 else rows * graph.values[node.inputs[0]].width * dtype.itemsize
        placed = rows * graph.values[node.outputs[0]].width * dtype.itemsize if len(node.inputs) > 1 else 0
        return pixels + placed + _product(graph, node, "", rows, None, dtype)
    if node.kind == "linear":
        return _product(graph, node, "", rows, node.attributes["activation"], dtype)
    if node.kind in ("mlp", "projector"):
        rows = graph.values[node.scratch[0]].held_rows(workload)
        first = _product(graph, node, "_1", rows, node.attributes["activation"], dtype)
        return max(first, _product(graph, node, "_2", rows, None, dtype))
    return 0


def _product(graph: Graph, node: Node, role: str, rows: int, activation: str | None, dtype: torch.dtype) -> int:
    """Of :func:`tritontower.kernels.gemm.torch_reference.linear_reference`."""
    width, inner = graph.weights[node.weights[f"weight{role}"]].shape
    compute = cpu.compute_dtype(dtype)
    step = max(1, _CHUNK_BYTES // (width * compute.itemsize))
    run, before = min(rows, step), min(max(0, rows - step), step)
    gated = activation == "silu_gated"
    columns = width // 2 if gated else width
    # The result of one run lives until that of the next is there; a gate lives beside the result that it is multiplied into.
    taken = (run * width + before * columns) * compute.itemsize
    if activation == "quick_gelu":
        taken += min(run * columns, _ACTIVATION_CHUNK * torch.get_num_threads()) * torch.float32.itemsize
    if compute != dtype:
        taken += (run * (inner + columns) + width * inner) * compute.itemsize
    return taken


def _attention(node: Node, workload: Workload, dtype: torch.dtype) -> int:
    """Of :func:`tritontower.kernels.attention.torch_reference.flash_attention_varlen_reference`."""
    scores = workload.window_scores if node.attributes["windows"] else workload.scores
    length = round(scores / max(1, workload.patches))
    heads, head_dim = int(node.attributes["heads"]), int(node.attributes["head_dim"])
    exponentials = cpu.has_onednn_exponential(dtype)
    least = LENGTH_FOR_EXPONENTIALS if exponentials else LENGTH_FOR_PRODUCTS
    if not (cpu.is_fused_attention_slow() and length >= least):
        return workload.patches * heads * head_dim * dtype.itemsize
    if exponentials:
        return _exponentials(length, heads, head_dim, dtype)
    run = min(length, max(32, _SCORES_BYTES // (4 * length) // 32 * 32))
    compute = cpu.compute_dtype(dtype)
    # Scores, their softmax and the softmax before that; and q, k and v of one head.
    return 3 * run * length * 4 + length * head_dim * (4 + 4 + compute.itemsize)


def _exponentials(length: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of attention by products with the exponential in them: some heads together, some of one head's queries at a time."""
    size, shares = dtype.itemsize, 16 - head_dim % 16
    group = min(heads, max(1, _HEADS_BYTES // (size * length * (3 * head_dim + shares + 4))))
    queries_keys = 2 * group * length * (head_dim + 2) * size
    held = queries_keys + 2 * group * length * (head_dim + shares) * size
    weights = min(length, max(64, _WEIGHTS_BYTES // (size * length) // 32 * 32)) * length * size
    # Beside what the group holds and the last weights: the next weights, the result in fp32 and what is divided for it, or
    # the next group's queries and keys.
    return held + weights + max(weights, 2 * group * length * head_dim * 4, queries_keys if group < heads else 0)
