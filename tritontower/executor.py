"""Runs a layer graph over a packed batch, out of one arena.

Every node becomes one step of :mod:`tritontower.bindings`, bound to its weights beforehand; the values it reads and
writes are views into the arena that :mod:`tritontower.memory` laid out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

import torch

from .batch import PackedBatch
from .bindings import BINDINGS, TRANSFORMS, PassFacts, Step, Tensors
from .graph import Graph, Node, Value, Workload
from .memory import MemoryPlan, plan_memory

__all__ = ["Executor", "Observer"]

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
        weights = {name: TRANSFORMS[weight.transform](sources[weight.source]) for name, weight in graph.weights.items()}
        first = next(iter(weights.values()))
        self.dtype, self.device = first.dtype, first.device
        self._steps: list[tuple[Node, Step]] = [(node, BINDINGS[node.kind](node, weights)) for node in graph.nodes]
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
            facts = PassFacts(batch.segments, batch.windows, batch.views, batch.side)
            for node, step in self._steps:
                step(tensors, facts)
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
