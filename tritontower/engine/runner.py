"""ModelRunner: runs the batches of one tower, for still images and videos, float and uint8 pixels, over one set of weights.

Each of these four has its own executor, with its own buffers, CUDA graphs and lock; two of them may run at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from threading import Lock

import torch

from tritontower.batch.normalization import PixelNormalization
from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import UsageError
from tritontower.graph.ir import Graph
from tritontower.graph.memory_plan import MemoryPlan

from .cuda_graphs import empty_cache
from .executor import Executor, Observer
from .graph_cache import CaptureLimits
from .onednn_weights import count_bytes
from .ops import Tensors
from .planning import patches_per_batch
from .tuned_tables import fill_registry
from .uint8_graph import fold_pixel_weights, make_uint8_graph


class ModelRunner:
    """Runs the batches of a tower; its ``graphs`` differ in the number of pixel values per patch.

    ``normalization`` returns how uint8 pixels are normalized, or ``None`` if unknown (uint8 batches are then rejected).  It
    is called lazily: the image processor's files may be missing.
    """

    def __init__(
        self,
        config: TowerConfig,
        graphs: Iterable[Graph],
        sources: Mapping[str, torch.Tensor],
        *,
        normalization: Callable[[], PixelNormalization | None],
        cuda_graphs: bool | CaptureLimits = True,
    ) -> None:
        self._config, self._sources, self._normalization = config, sources, normalization
        self._cuda_graphs = cuda_graphs
        fill_registry(next(iter(sources.values())).device)
        # By the number of pixel values per patch.
        self._executors = {_pixel_width(graph): Executor(graph, sources, cuda_graphs=cuda_graphs) for graph in graphs}
        self._uint8_executors: dict[int, Executor] = {}
        self._lock = Lock()
        self._batch_patches: int | None = None

    def run(self, batch: PackedBatch, observer: Observer | None = None) -> Tensors:
        """Runs ``batch``; see :meth:`.Executor.run` and :meth:`executor_for`."""
        return self.executor_for(batch).run(batch, observer)

    def executor_for(self, batch: PackedBatch) -> Executor:
        """Returns the executor of ``batch``; raises :class:`.UsageError` for a batch of another tower."""
        form, remedy = self._config.batch_form, "create it with this tower's preprocess()"
        if batch.form != form:
            raise UsageError(f"the batch must be this tower's, got one with {form.differences(batch.form)}; {remedy}")
        width = batch.pixels.shape[1]
        executor = self._executors.get(width)
        if executor is None:
            expected = sorted(self._executors)
            raise UsageError(f"the batch must have one of {expected} pixel values per patch, got {width}; {remedy}")
        return self._uint8_executor(executor.graph) if batch.pixels.dtype == torch.uint8 else executor

    def __iter__(self) -> Iterator[Executor]:
        """Iterates over the executors created so far."""
        with self._lock:
            return iter([*self._executors.values(), *self._uint8_executors.values()])

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights of all executors; shared weights count once."""
        used = [weight for executor in self for weight in executor.weights.values()]
        return count_bytes([*self._sources.values(), *used])

    @property
    def captured_bytes(self) -> int:
        """Device memory of the CUDA graphs."""
        return sum(executor.captured_bytes for executor in self)

    def patches_per_batch(self, plan: MemoryPlan, device: torch.device) -> int:
        """Returns the default number of patches of a batch, from the free memory at the first call after :meth:`release`.

        A query of free memory for each call is slow, and batch sizes would vary with other processes on the GPU.
        """
        patches = self._batch_patches
        if patches is None:
            patches = self._batch_patches = patches_per_batch(plan, device)
        return patches

    def release(self) -> None:
        """Frees all device memory except the weights; the next forward pass allocates it again."""
        self._batch_patches = None
        for executor in self:
            executor.release()
        if any(executor.device.type == "cuda" for executor in self):
            empty_cache()

    def _uint8_executor(self, graph: Graph) -> Executor:
        width, class_token = _pixel_width(graph), self._config.class_token
        with self._lock:
            if width not in self._uint8_executors:
                normalization = self._normalization()
                if normalization is None:
                    raise UsageError(
                        "the batch must have float pixels, got uint8: the normalization of this tower's image processor is "
                        "unknown; call preprocess() without raw=True"
                    )
                made = fold_pixel_weights(graph, self._sources, normalization, class_token=class_token)
                self._uint8_executors[width] = Executor(
                    make_uint8_graph(graph, class_token=class_token),
                    {**self._sources, **made},
                    cuda_graphs=self._cuda_graphs,
                )
            return self._uint8_executors[width]


def estimate_weights_bytes(graphs: Iterable[Graph], itemsize: int) -> int:
    """Estimates the memory of the weights of a :class:`ModelRunner`, with ``itemsize`` bytes per parameter.

    Gaps between tensors, padding of oneDNN's blocks and the weights for uint8 pixels are not counted.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in graphs:
        # All other transforms are views.
        folded = [weight for weight in graph.weights.values() if weight.transform == "fold_temporal"]
        shapes |= graph.held_shapes | {weight.name: weight.shape for weight in folded}
    return itemsize * sum(prod(shape) for shape in shapes.values())


def _pixel_width(graph: Graph) -> int:
    return graph.values["pixels"].width
