"""Runs a layer graph over a packed batch, out of one arena.

Every node becomes one call of one operation of :mod:`tritontower.kernels`, bound to its weights beforehand; the values
it reads and writes are views into the arena that :mod:`tritontower.memory` laid out.  Which backend a call takes (a
compiled kernel, the interpreter, torch) is decided by the tensors' device, in :mod:`tritontower.kernels.dispatch`, and
nowhere here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

from .batch import PackedBatch
from .graph import Graph, Node, NodeKind, Value, Workload
from .kernels.attention_pooling import attention_pooling
from .kernels.elementwise import activation, add
from .kernels.flash_attention import flash_attention_varlen
from .kernels.gather import gather_rows
from .kernels.linear import linear
from .kernels.norm import norm
from .kernels.patch_projection import fold_temporal, patch_projection
from .kernels.pooling import mean_rows
from .kernels.positions import axial_frequencies, rotary_table
from .kernels.projector import projector_mlp
from .kernels.rope import rope_
from .memory import MemoryPlan, plan_memory

__all__ = ["Executor", "Observer"]

Tensors = dict[str, torch.Tensor]
Step = Callable[[Tensors, PackedBatch], None]
Observer = Callable[[Node, Tensors], None]
"""Called after every node, with the node and everything computed so far; the tensors are overwritten later."""

DTYPES = {"float32": torch.float32, "int32": torch.int32}


class Executor:
    """A graph with its weights, ready to run.

    Args:
        graph: what to run.
        sources: name → canonical tensor, all of one dtype and on one device.

    Raises:
        KeyError: a tensor that the graph is made from is missing.
    """

    def __init__(self, graph: Graph, sources: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        weights = {
            name: _TRANSFORMS[weight.transform](sources[weight.source]) for name, weight in graph.weights.items()
        }
        first = next(iter(weights.values()))
        self.dtype, self.device = first.dtype, first.device
        self._steps: list[tuple[Node, Step]] = [(node, _BINDINGS[node.kind](node, weights)) for node in graph.nodes]
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._plan: MemoryPlan | None = None
        self._views: Tensors = {}
        self._lock = Lock()
        self._finished: torch.cuda.Event | None = None

    def plan(self, workload: Workload) -> MemoryPlan:
        """The memory layout of a pass over ``workload``."""
        plan = self._plan
        if plan is None or plan.workload != workload:
            return plan_memory(self.graph, workload, self.dtype.itemsize)
        return plan

    @torch.inference_mode()
    def run(self, batch: PackedBatch, observer: Observer | None = None) -> Tensors:
        """One pass.

        Args:
            batch: what to run on, already on the executor's device.
            observer: called after every node.

        Returns:
            Name → tensor of the graph's outputs, freshly allocated: they belong to the caller.
        """
        graph, workload = self.graph, batch.workload
        outputs = {name: self._allocate(graph.values[name], workload) for name in graph.outputs}
        if workload.patches == 0:
            return outputs
        # The arena serves one pass at a time; Triton launches on the current GPU, wherever the tensors are.
        with self._lock, self._on_device():
            tensors = {**self._arena_views(workload), **outputs}
            tensors |= {name: getattr(batch, name) for name in graph.inputs}
            for node, step in self._steps:
                step(tensors, batch)
                if observer is not None:
                    observer(node, tensors)
        return outputs

    def release(self) -> None:
        """Gives the arena back; the next pass allocates a new one."""
        with self._lock:
            self._arena = self._arena.new_empty(0)
            self._plan, self._views = None, {}

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Makes the executor's GPU the current one, and this pass wait for the last, whichever stream that ran on."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._finished is not None:
                stream.wait_event(self._finished)
            try:
                yield
            finally:
                # Whoever frees the arena, the allocator has to wait for this stream too.
                self._arena.record_stream(stream)
                self._finished = torch.cuda.Event()
                self._finished.record()

    def _allocate(self, value: Value, workload: Workload) -> torch.Tensor:
        dtype = DTYPES.get(value.dtype, self.dtype)
        # An ordinary tensor, not one of inference mode, which its owner could neither change nor train behind.
        with torch.inference_mode(False):
            return torch.empty(workload.rows(value.rows), value.width, dtype=dtype, device=self.device)

    def _arena_views(self, workload: Workload) -> Tensors:
        """Every value inside the pass as a view of the arena; kept for the next pass of the same size."""
        plan = self.plan(workload)
        if plan is self._plan:
            return self._views
        if self._arena.numel() < plan.arena_bytes:
            # Drop the old arena first: two of them at once would break the promised peak.
            self._views, self._plan = {}, None
            self._arena = self._arena.new_empty(0)
            self._arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=self.device)
        views: Tensors = {}
        for name, offset in plan.offsets.items():
            value = self.graph.values[name]
            rows, dtype = workload.rows(value.rows), DTYPES.get(value.dtype, self.dtype)
            flat = self._arena[offset : offset + rows * value.width * dtype.itemsize].view(dtype)
            views[name] = flat.view(rows, value.width)
        self._plan, self._views = plan, views
        return views


_TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_is": lambda source: source,
    "flatten": lambda source: source.flatten(1),
    "fold_temporal": fold_temporal,
}


# -- one binding per node kind: a node and the weights → a step -------------------------------------------------------

Weights = Mapping[str, torch.Tensor]


def _bind_patch_projection(node: Node, weights: Weights) -> Step:
    pixels, *index = node.inputs
    (rows,) = node.outputs
    weight, bias, table = _roles(node, weights, "weight", "bias", "position_table")

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        places: dict[str, Any] = {}
        if index:
            places = {"position_table": table, "position_index": tensors[index[0]].squeeze(1)}
        patch_projection(tensors[pixels], weight, bias, **places, out=tensors[rows])

    return step


def _bind_add_positions(node: Node, weights: Weights) -> Step:
    rows, index, *share = node.inputs
    (result,) = node.outputs
    (table,) = _roles(node, weights, "position_table")

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        counted = tensors[share[0]] if share else None
        gather_rows(table, tensors[index], counted, residual=tensors[rows], out=tensors[result])

    return step


def _bind_rotary_table(node: Node, weights: Weights) -> Step:
    (positions,), (cosines, sines) = node.inputs, node.outputs
    attributes = node.attributes
    frequencies = axial_frequencies(attributes["head_dim"], attributes["theta"], attributes["layout"])

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        table = {"out_cos": tensors[cosines], "out_sin": tensors[sines]}
        rotary_table(tensors[positions], frequencies, side=batch.side, **table)

    return step


def _bind_norm(node: Node, weights: Weights) -> Step:
    rows, *residual = node.inputs
    normed, *summed = node.outputs
    weight, bias = _roles(node, weights, "weight", "bias")
    how = _norm_attributes(node, "kind")

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        added: dict[str, Any] = {}
        if residual:
            added = {"residual": tensors[residual[0]], "residual_out": tensors[summed[0]]}
        norm(tensors[rows], weight, bias, **how, **added, out=tensors[normed])

    return step


def _bind_linear(node: Node, weights: Weights) -> Step:
    rows, *residual = node.inputs
    (result,) = node.outputs
    weight, bias = _roles(node, weights, "weight", "bias")
    kind, joined = node.attributes["activation"], node.attributes["joined"]

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        added = tensors[residual[0]] if residual else None
        linear(_joined(tensors[rows], joined), weight, bias, activation=kind, residual=added, out=tensors[result])

    return step


def _bind_activation(node: Node, weights: Weights) -> Step:
    (rows,), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        activation(tensors[rows], node.attributes["activation"], out=tensors[result])

    return step


def _bind_add(node: Node, weights: Weights) -> Step:
    (first, second), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        add(tensors[first], tensors[second], out=tensors[result])

    return step


def _bind_rope(node: Node, weights: Weights) -> Step:
    qkv, cosines, sines = node.inputs
    shape = (3, node.attributes["heads"], node.attributes["head_dim"])

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        q, k, _ = tensors[qkv].unflatten(1, shape).unbind(1)
        dtype = torch.float32 if node.attributes["rotation"] == "float32" else q.dtype
        rope_(q, k, tensors[cosines], tensors[sines], rotation_dtype=dtype)

    return step


def _bind_attention(node: Node, weights: Weights) -> Step:
    (qkv,), (mixed,) = node.inputs, node.outputs
    heads, head_dim = node.attributes["heads"], node.attributes["head_dim"]

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        q, k, v = tensors[qkv].unflatten(1, (3, heads, head_dim)).unbind(1)
        segments = batch.windows if node.attributes["windows"] and batch.windows is not None else batch.segments
        flash_attention_varlen(q, k, v, segments, out=tensors[mixed].unflatten(1, (heads, head_dim)))

    return step


def _bind_select(node: Node, weights: Weights) -> Step:
    features, index = node.inputs[: node.attributes["features"]], node.inputs[node.attributes["features"] :]
    (result,) = node.outputs

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        columns = tensors[result].tensor_split(len(features), dim=1)
        for feature, out in zip(features, columns, strict=True):
            if index:
                gather_rows(tensors[feature], tensors[index[0]], out=out)
            else:
                out.copy_(tensors[feature])

    return step


def _bind_pool(node: Node, weights: Weights) -> Step:
    (rows,), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        mean_rows(tensors[rows], node.attributes["count"], out=tensors[result])

    return step


def _bind_projector(node: Node, weights: Weights) -> Step:
    rows, *index = node.inputs
    (tokens,), (hidden, *normed) = node.outputs, node.scratch
    norm_weight, norm_bias = _roles(node, weights, "norm_weight", "norm_bias")
    first, first_bias, second, second_bias = _roles(node, weights, "weight_1", "bias_1", "weight_2", "bias_2")
    merge, over_token = node.attributes["merge"], node.attributes["over_token"]
    how: dict[str, Any] = {"merge": 1 if over_token else merge, "activation": node.attributes["activation"]}
    if norm_weight is not None:
        how |= _norm_attributes(node, "norm_kind")

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        where: dict[str, Any] = {"hidden": tensors[hidden], "out": tensors[tokens]}
        if normed:
            where["normed"] = tensors[normed[0]]
        if index:
            where["row_index"] = tensors[index[0]].squeeze(1)
        x = _joined(tensors[rows], merge) if over_token else tensors[rows]
        projector_mlp(x, norm_weight, norm_bias, first, first_bias, second, second_bias, **how, **where)

    return step


def _bind_assemble(node: Node, weights: Weights) -> Step:
    rows, index, share = node.inputs
    (tokens,) = node.outputs
    (newline,) = _roles(node, weights, "newline")

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        counted = tensors[share] if tensors[share].shape[1] > 1 else None
        gather_rows(tensors[rows], tensors[index], counted, fill=newline, out=tensors[tokens])

    return step


def _bind_attention_pooling(node: Node, weights: Weights) -> Step:
    (keys_values,), (mixed,) = node.inputs, node.outputs
    probe, weight, bias = _roles(node, weights, "probe", "weight", "bias")
    heads = (node.attributes["heads"], node.attributes["head_dim"])
    # The query is learned, hence the same in every pass.
    query = linear(probe, weight, bias).view(heads)

    def step(tensors: Tensors, batch: PackedBatch) -> None:
        parts = tensors[keys_values].unflatten(1, (2, *heads))
        attention_pooling(query, parts, batch.views, out=tensors[mixed].unflatten(1, heads))

    return step


def _joined(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` neighbouring rows side by side."""
    return rows if count == 1 else rows.view(-1, count * rows.shape[1])


def _roles(node: Node, weights: Weights, *roles: str) -> list[Any]:
    """The node's weights in these roles; ``None`` for a role that it does not fill."""
    return [weights[node.weights[role]] if role in node.weights else None for role in roles]


def _norm_attributes(node: Node, kind: str) -> dict[str, Any]:
    return {kind: node.attributes["norm"], "eps": node.attributes["eps"], "rounding": node.attributes["rounding"]}


_BINDINGS: dict[NodeKind, Callable[[Node, Weights], Step]] = {
    "patch_projection": _bind_patch_projection,
    "add_positions": _bind_add_positions,
    "rotary_table": _bind_rotary_table,
    "norm": _bind_norm,
    "linear": _bind_linear,
    "activation": _bind_activation,
    "add": _bind_add,
    "rope": _bind_rope,
    "attention": _bind_attention,
    "select": _bind_select,
    "pool": _bind_pool,
    "projector": _bind_projector,
    "assemble": _bind_assemble,
    "attention_pooling": _bind_attention_pooling,
}
