"""The weights of a layer graph, read out of a checkpoint and written into place one stored tensor at a time.

What a graph wants in another order than the canonical one is arranged where it lies when everything is read, one tensor
after the other: no weight exists twice, and beside them there is never more than one tensor.

All weights of a tower are allocated before the first is read, in one piece: allocated one by one, between the buffers that
they are read through, each leaves a hole behind, which on a CPU cost a third of their size in memory that nothing could
use.  On a CPU the large ones are pieces of their own, which :mod:`tritontower.engine.onednn_weights` can give back one by one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from tritontower.checkpoint.checkpoint import Progress
from tritontower.checkpoint.weight_map import Shape, WeightMap
from tritontower.graph.ir import Graph, Weight

__all__ = ["WeightSource", "read_weights", "stored_shapes"]

_ALIGNMENT = 128
"""Elements; 256 bytes or more in every dtype, as much as any vector load asks for."""
_ALONE_BYTES = 2**20


class WeightSource(Protocol):
    """Where stored tensors come from: an open :class:`~tritontower.checkpoint.checkpoint.Checkpoint`, or a loaded model."""

    def iterate(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor in ``dtype`` on ``device``) one by one."""
        ...


def stored_shapes(graph: Graph, weight_maps: Mapping[str, WeightMap]) -> dict[str, Shape]:
    """Name → shape of every stored tensor that the graph is made from; the order is that of the graph."""
    shapes: dict[str, Shape] = {}
    for name, shape in graph.sources.items():
        shapes |= weight_maps[name].stored_shapes(shape)
    return shapes


def read_weights(
    source: WeightSource,
    graph: Graph,
    weight_maps: Mapping[str, WeightMap],
    dtype: torch.dtype,
    device: torch.device,
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that ``graph`` is made from, padded and arranged as it wants them, without gradients.

    Args:
        source: its names and shapes checked.
        graph: says which tensors there are, and how they are padded and arranged.
        weight_maps: what each is made of.
        dtype: of the weights.
        device: where they go.
        progress: called after every stored tensor.

    Returns:
        :attr:`Weight.held_name <tritontower.graph.ir.Weight.held_name>` → tensor, all in one allocation, but for large ones
        on a CPU.

    Raises:
        CheckpointError: a tensor cannot be read; the subclasses say why.
    """
    shapes = graph.held_shapes
    weights: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if device.type == "cpu" and size * dtype.itemsize >= _ALONE_BYTES:
            weights[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            starts[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
    block = torch.zeros(end, dtype=dtype, device=device)
    weights |= {
        name: block[start : start + math.prod(shapes[name])].view(shapes[name]) for name, start in starts.items()
    }
    # A canonical tensor is no larger than its arranged form, at whose beginning it waits until all of it is there.
    written = {
        held.held_name: (held, weights[held.held_name].flatten()[: math.prod(held.canonical_shape)])
        for held in graph.weights.values()
    }
    users: dict[str, list[tuple[Weight, torch.Tensor]]] = {}
    for held, place in written.values():
        for stored in weight_maps[held.source].stored_shapes(held.source_shape):
            users.setdefault(stored, []).append((held, place.view(held.canonical_shape)))
    for stored, tensor in source.iterate(dtype, device, names=users, progress=progress):
        for held, place in users[stored]:
            weight_maps[held.source].write(place, stored, tensor)
        del tensor
    for held, place in written.values():
        if held.weight_layout is not None:
            weights[held.held_name].copy_(held.weight_layout.apply(place.view(held.canonical_shape)))
    return weights
