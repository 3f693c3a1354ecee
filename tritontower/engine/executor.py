"""Runs a layer graph over a packed batch, out of one arena.

Every node becomes one step of :mod:`tritontower.engine.ops`, bound to its weights beforehand; the values it reads and
writes are views into the arena that :mod:`tritontower.graph.memory_plan` laid out.

On a CPU a pass has just the rows of its batch.  On a GPU it is *planned*: rounded up to a size that many batches share,
so that every batch of that size is the same launches, which are captured and replayed (:mod:`tritontower.engine.cuda_graphs`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Node, Value, Workload
from tritontower.graph.memory_plan import MemoryPlan, plan_memory

from .cuda_graphs import CaptureBackend, CudaCapture
from .graph_cache import CaptureLimits, CudaGraphCache, Observer
from .ops import BINDINGS, BatchMetadata, Step, Tensors, bind_weight
from .static_buffers import DTYPES

__all__ = ["Executor", "Observer"]


class Executor:
    """A graph with its weights, ready to run.

    Args:
        graph: what to run.
        sources: name → tensor as :func:`tritontower.engine.weight_loader.read_weights` holds it, or canonical tensor, all of one dtype
            and on one device.
        cuda_graphs: on a GPU, whether passes are captured and replayed; or what captures them, and then passes are
            planned ones on any device.
        limits: how much captured passes may hold.

    Attributes:
        graph: what runs.
        weights: its weights as nodes take them, by name.
        dtype, device: of the weights, and so of every pass.

    Raises:
        KeyError: a tensor that the graph is made from is missing.
    """

    def __init__(
        self,
        graph: Graph,
        sources: Mapping[str, torch.Tensor],
        *,
        cuda_graphs: bool | CaptureBackend = True,
        limits: CaptureLimits | None = None,
    ) -> None:
        self.graph = graph
        self.weights: Tensors = {name: bind_weight(weight, sources) for name, weight in graph.weights.items()}
        first = next(iter(self.weights.values()))
        self.dtype, self.device = first.dtype, first.device
        self._steps: list[tuple[Node, Step]] = [(node, BINDINGS[node.kind](node, self.weights)) for node in graph.nodes]
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._plan: MemoryPlan | None = None
        self._views: Tensors = {}
        self._lock = Lock()
        self._finished: torch.cuda.Event | None = None
        self.graph_cache: CudaGraphCache | None = None
        if self.device.type == "cuda" or not isinstance(cuda_graphs, bool):
            backend: CaptureBackend | None = None
            if cuda_graphs is not False:
                backend = CudaCapture(self.device) if isinstance(cuda_graphs, bool) else cuda_graphs
            self.graph_cache = CudaGraphCache(
                graph, self._steps, self.dtype, self.device, backend, limits or CaptureLimits()
            )
        if self.device.type == "cuda":
            # The first pass may come on another stream than the one on which the weights are still being made.
            with torch.cuda.device(self.device):
                self._finished = torch.cuda.Event()
                self._finished.record()

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
            batch: what to run on, on the CPU or on the executor's device.
            observer: called after every node.  Nothing is replayed then.

        Returns:
            Name → tensor of the graph's outputs, freshly allocated: they belong to the caller.
        """
        graph, workload = self.graph, batch.workload
        outputs = {name: self._allocate(graph.values[name], workload) for name in graph.outputs}
        if workload.patches == 0:
            return outputs
        bucket = None if self.graph_cache is None else self.graph_cache.bucket(batch)
        # The arena serves one pass at a time; Triton launches on the current GPU, wherever the tensors are.
        with self._lock, self._on_device():
            if self.graph_cache is not None and bucket is not None:
                self.graph_cache.run(bucket, batch, outputs, observer)
                return outputs
            batch = batch.to(self.device)
            tensors = {**self._arena_views(workload), **outputs}
            sources = batch.tensors
            tensors |= {name: sources[name] for name in graph.inputs}
            facts = BatchMetadata(
                batch.attention.segments, batch.attention.windows, batch.attention.tiles, batch.attention.side
            )
            for node, step in self._steps:
                step(tensors, facts)
                if observer is not None:
                    observer(node, tensors)
        return outputs

    @torch.inference_mode()
    def warm_up(self, batch: PackedBatch) -> bool:
        """One pass, after which passes of its size are replayed if that is possible; whether they are."""
        bucket = None if self.graph_cache is None or not batch.workload.patches else self.graph_cache.bucket(batch)
        if self.graph_cache is None or bucket is None:
            return False
        outputs = {name: self._allocate(self.graph.values[name], batch.workload) for name in self.graph.outputs}
        with self._lock, self._on_device():
            return self.graph_cache.warm_up(bucket, batch, outputs)

    @property
    def captured(self) -> int:
        """How many sizes of passes are captured."""
        if self.graph_cache is None:
            return 0
        with self._lock:
            return self.graph_cache.captured

    @property
    def captured_bytes(self) -> int:
        """Bytes of device memory that captured passes hold."""
        if self.graph_cache is None:
            return 0
        with self._lock:
            return self.graph_cache.captured_bytes

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena of forward passes of exact size."""
        return self._arena.numel()

    def release(self) -> None:
        """Gives the arena and all captured passes back; the next pass allocates a new arena."""
        with self._lock:
            if self._finished is not None:
                # A graph must not go while it is replayed.
                self._finished.synchronize()
            self._arena = self._arena.new_empty(0)
            self._plan, self._views = None, {}
            if self.graph_cache is not None:
                self.graph_cache.release()

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
                if self.graph_cache is not None:
                    self.graph_cache.memory.record_stream(stream)
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
            rows, dtype = value.held_rows(workload), DTYPES.get(value.dtype, self.dtype)
            flat = self._arena[offset : offset + rows * value.width * dtype.itemsize].view(dtype)
            views[name] = flat.view(rows, value.width)
        self._plan, self._views = plan, views
        return views
