"""Executor: runs one layer graph over packed batches, in memory that is planned in advance.

Each node becomes a step of :mod:`.ops`, bound to its weights in advance.  Values are views of one arena, laid out by
:mod:`tritontower.graph.memory_plan`.

On a CPU a forward pass has exactly the rows of its batch.  On a GPU the rows are rounded up to a *bucket* that many batches
share.  The launches of a bucket are recorded with their arguments in its first pass, and repeated from then on: by a CUDA
graph (:mod:`.graph_cache`), or one after the other (:class:`.LaunchList`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Lock

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.graph.ir import Graph, Node, Workload
from tritontower.graph.memory_plan import MemoryPlan, plan_memory
from tritontower.kernels.gemm.aligned_rows import align_rows
from tritontower.kernels.runtime.dispatch import runs_kernel
from tritontower.kernels.runtime.launch import LaunchList, Workspace

from .cuda_graphs import CudaCapture
from .graph_cache import CaptureLimits, CudaGraphCache
from .ops import BatchMetadata, Step, Tensors, bind_node, bind_weight
from .static_buffers import MemorySlot, StaticBuffers

Observer = Callable[[Node, Tensors], None]
"""Called after every node with all values computed so far; the tensors are overwritten later."""


class Executor:
    """A layer graph with its weights, ready to run.

    ``sources`` is name → tensor as returned by :func:`tritontower.engine.weight_loader.read_weights`, or canonical tensors,
    all of one dtype and on one device.  ``graph_cache`` holds static buffers and CUDA graphs; ``None`` on a CPU.
    """

    def __init__(
        self, graph: Graph, sources: Mapping[str, torch.Tensor], *, cuda_graphs: bool | CaptureLimits = True
    ) -> None:
        self.graph = graph
        self.weights: Tensors = {name: bind_weight(weight, sources) for name, weight in graph.weights.items()}
        first = next(iter(self.weights.values()))
        self.dtype, self.device = first.dtype, first.device
        self.graph_cache: CudaGraphCache | None = None
        self._steps: list[tuple[Node, Step]] = [(node, bind_node(node, self.weights)) for node in graph.nodes]
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._plan: MemoryPlan | None = None
        self._views: Tensors = {}
        self._workspace = Workspace()
        self._lock = Lock()
        self._finished: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            backend = None if cuda_graphs is False else CudaCapture(self.device)
            limits = cuda_graphs if isinstance(cuda_graphs, CaptureLimits) else CaptureLimits()
            self.graph_cache = CudaGraphCache(graph, self.dtype, self.device, backend, limits)
            # The first forward pass may run on another stream than the one that writes the weights.
            with torch.cuda.device(self.device):
                self._finished = torch.cuda.Event()
                self._finished.record()

    @torch.inference_mode()
    def run(self, batch: PackedBatch, observer: Observer | None = None) -> Tensors:
        """Runs one forward pass of a batch on the CPU or on the executor's device.

        Returns name → newly allocated tensor, of each output.  With an observer, no CUDA graph is replayed.
        """
        outputs = self._allocate_outputs(batch.workload)
        if batch.workload.patches == 0:
            return outputs
        cache = self.graph_cache
        bucket = None if cache is None else cache.bucket(batch)
        # One forward pass uses the buffers at a time; Triton launches on the current GPU, wherever the tensors are.
        with self._lock, self._on_device():
            if cache is None or bucket is None:
                buffers = None
                batch = batch.to(self.device)
                sources, attention = batch.tensors, batch.attention
                tensors = {**self._view_arena(batch.workload), **outputs}
                tensors |= {name: sources[name] for name in self.graph.inputs}
                if runs_kernel(batch.pixels):
                    tensors["pixels"] = align_rows(batch.pixels)
                metadata = BatchMetadata(attention.segments, attention.windows, attention.tiles, attention.side)
                observed = tensors
            else:
                buffers = cache.fill(bucket, batch)
                tensors, metadata = buffers.tensors, buffers.metadata
                observed = tensors if observer is None else buffers.slice_valid_rows(batch.workload)
            if buffers is None or observer is not None:
                self._launch(tensors, metadata, None if observer is None else lambda node: observer(node, observed))
            elif buffers.replay is not None:
                buffers.replay()
            elif buffers.launches is not None:
                buffers.launches.run()
            else:
                buffers.launches = self._record(buffers)
            if cache is not None and buffers is not None:
                buffers.copy_outputs(outputs)
                if observer is None and buffers.launches is not None:
                    cache.capture_if_due(buffers, buffers.launches.run, outputs)
        return outputs

    def _record(self, buffers: StaticBuffers) -> LaunchList:
        """Runs the launches over static buffers and returns them."""
        launches = LaunchList(self._workspace)
        if buffers.bucket.backend == "reference":
            # Python decides between calls of the torch references by the lengths of segments: the step is all of them.
            launches.call(partial(self._launch, buffers.tensors, buffers.metadata))
        else:
            with launches.record():
                self._launch(buffers.tensors, buffers.metadata)
        return launches

    def _launch(self, tensors: Tensors, metadata: BatchMetadata, observe: Callable[[Node], None] | None = None) -> None:
        for node, step in self._steps:
            step(tensors, metadata)
            if observe is not None:
                observe(node)

    def warm_up(self, batch: PackedBatch) -> bool:
        """Runs one forward pass and captures its bucket; returns whether the bucket has a CUDA graph."""
        bucket = None if self.graph_cache is None or not batch.workload.patches else self.graph_cache.bucket(batch)
        if self.graph_cache is None or bucket is None:
            return False
        with self._lock:
            self.graph_cache.request_capture(bucket)
        self.run(batch)
        with self._lock:
            return self.graph_cache.has_graph(bucket)

    @property
    def captured(self) -> int:
        """Number of CUDA graphs."""
        with self._lock:
            return 0 if self.graph_cache is None else len(self.graph_cache.captured)

    @property
    def captured_bytes(self) -> int:
        """Device memory of the CUDA graphs."""
        with self._lock:
            return 0 if self.graph_cache is None else self.graph_cache.captured_bytes

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena for batches that are not rounded up."""
        return self._arena.numel()

    def release(self) -> None:
        """Frees the arena, the static buffers and the CUDA graphs; the next forward pass allocates them again."""
        with self._lock:
            if self._finished is not None:
                # A graph must not be freed while it runs.
                self._finished.synchronize()
            self._arena = self._arena.new_empty(0)
            self._plan, self._views = None, {}
            self._workspace = Workspace()
            if self.graph_cache is not None:
                self.graph_cache.release()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Selects the executor's GPU and orders this forward pass after the last one, on whichever stream that ran."""
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
                # The allocator must not reuse this memory before the stream has finished, whoever frees it.
                for block in (self._arena, *self._workspace.blocks):
                    block.record_stream(stream)
                if self.graph_cache is not None:
                    self.graph_cache.memory.record_stream(stream)
                self._finished = torch.cuda.Event()
                self._finished.record(stream)

    def _allocate_outputs(self, workload: Workload) -> Tensors:
        # Results are ordinary tensors: a caller may modify or differentiate them.
        with torch.inference_mode(False):
            values = [self.graph.values[name] for name in self.graph.outputs]
            shapes = {value.name: (workload.rows(value.rows), value.width) for value in values}
            return {name: torch.empty(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}

    def _view_arena(self, workload: Workload) -> Tensors:
        """Returns every inner value as a view of the arena; cached for the next batch of this size."""
        if self._plan is not None and self._plan.workload == workload:
            return self._views
        plan = plan_memory(self.graph, workload, self.dtype.itemsize)
        if self._arena.numel() < plan.arena_bytes:
            # Free the old arena first: both at once would exceed the memory plan.
            self._views, self._plan = {}, None
            self._arena = self._arena.new_empty(0)
            self._arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=self.device)
        views: Tensors = {}
        for name, offset in plan.offsets.items():
            value = self.graph.values[name]
            slot = MemorySlot(offset, value.held_rows(workload), value.width, value.torch_dtype(self.dtype))
            views[name] = slot.view(self._arena)
        self._plan, self._views = plan, views
        return views
