"""The runner of one tower: for still images and for videos, for pixels and for bytes, over one set of weights.

Each has buffers and captured passes of its own, and a lock: passes of two of them may run at once.
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

from .cuda_graphs import empty_cache
from .executor import Executor, Observer
from .graph_cache import CaptureLimits
from .onednn_weights import held_bytes
from .ops import Tensors
from .tuned_tables import fill_registry
from .uint8_graph import fold_pixel_weights, make_uint8_graph

__all__ = ["ModelRunner", "estimate_weights_bytes"]


class ModelRunner:
    """What runs the batches of a tower.

    Args:
        config: what the tower is.
        graphs: what runs; each takes pixels of another width.
        sources: name → tensor as :func:`tritontower.engine.weight_loader.read_weights` holds it, of all graphs, all of one dtype and
            on one device.
        normalization: returns how uint8 pixels are normalized, or ``None`` if unknown (uint8 batches are then rejected).
            Called lazily: the image processor's files may be missing.
        cuda_graphs: whether passes on a GPU are captured, or how much each executor's may hold then.
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
        self._config, self._sources, self._normalization, self._cuda_graphs = (
            config,
            sources,
            normalization,
            cuda_graphs,
        )
        self._form = config.batch_form
        fill_registry(next(iter(sources.values())).device)
        self._by_width = {_width(graph): self._executor(graph, sources) for graph in graphs}
        self._of_bytes: dict[int, Executor] = {}
        self._lock = Lock()

    def run(self, batch: PackedBatch, observer: Observer | None = None) -> Tensors:
        """Runs ``batch``; see :meth:`.Executor.run`."""
        return self.executor_for(batch).run(batch, observer)

    def executor_for(self, batch: PackedBatch) -> Executor:
        """What runs ``batch``; for bytes it is made when the first come, since few towers are given both kinds of pixels.

        Raises:
            UsageError: the batch is another tower's.
        """
        if batch.form != self._form:
            raise UsageError(
                f"the batch is another tower's, with {self._form.differences(batch.form)}; pack the images with this "
                "tower's own preprocess()"
            )
        width = batch.pixels.shape[1]
        executor = self._by_width.get(width)
        if executor is None:
            raise UsageError(
                f"the batch has {width} pixel values a patch; the tower takes {sorted(self._by_width)}; pack the images "
                "with its own preprocess()"
            )
        return self._for_bytes(executor.graph) if batch.pixels.dtype == torch.uint8 else executor

    def __iter__(self) -> Iterator[Executor]:
        """All that there are so far."""
        with self._lock:
            return iter([*self._by_width.values(), *self._of_bytes.values()])

    @property
    def weights_bytes(self) -> int:
        """Bytes of memory that the weights take, all runner' together, each counted once."""
        used = [weight for executor in self for weight in executor.weights.values()]
        return held_bytes([*self._sources.values(), *used])

    @property
    def captured_bytes(self) -> int:
        """Bytes of device memory that captured passes hold."""
        return sum(executor.captured_bytes for executor in self)

    def release(self) -> None:
        """Gives back what passes have left on the device beside the weights; the next pass takes it again."""
        for executor in self:
            executor.release()
        if any(executor.device.type == "cuda" for executor in self):
            empty_cache()

    def _for_bytes(self, graph: Graph) -> Executor:
        """What runs ``graph`` on pixels that are bytes: over the same weights, but for the patch projection's."""
        width, class_token = _width(graph), self._config.class_token
        with self._lock:
            if width not in self._of_bytes:
                normalization = self._normalization()
                if normalization is None:
                    raise UsageError(
                        "a batch with uint8 pixels is another tower's: the arithmetic of this one's image processor is not "
                        "known; pack the images with its own preprocess(), without raw=True"
                    )
                made = fold_pixel_weights(graph, self._sources, normalization, class_token=class_token)
                folded = make_uint8_graph(graph, class_token=class_token)
                self._of_bytes[width] = self._executor(folded, {**self._sources, **made})
            return self._of_bytes[width]

    def _executor(self, graph: Graph, sources: Mapping[str, torch.Tensor]) -> Executor:
        limits = self._cuda_graphs if isinstance(self._cuda_graphs, CaptureLimits) else None
        return Executor(graph, sources, cuda_graphs=self._cuda_graphs is not False, limits=limits)


def estimate_weights_bytes(graphs: Iterable[Graph], itemsize: int) -> int:
    """Bytes of the weights that runner of ``graphs`` are going to hold, of ``itemsize`` bytes a number.

    Left out are gaps between tensors, what oneDNN's blocks take beyond the plain tensors, and the weights for bytes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in graphs:
        shapes |= graph.held_shapes
        # The other transforms are views of what is held.
        shapes |= {
            weight.name: weight.shape for weight in graph.weights.values() if weight.transform == "fold_temporal"
        }
    return itemsize * sum(prod(shape) for shape in shapes.values())


def _width(graph: Graph) -> int:
    return graph.values["pixels"].width
