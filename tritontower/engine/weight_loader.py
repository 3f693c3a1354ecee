"""Reads the weights of a layer graph from a checkpoint, one stored tensor at a time, into their final memory.

A weight with another row order than the canonical one is reordered in place after everything is read, one tensor after the
other: no weight exists twice, and there is never more than one stored tensor beside them.

All weights of a tower are allocated in one piece before the first is read.  Allocated one by one, between the read buffers,
they left holes that on a CPU wasted a third of their size.  On a CPU the large ones are separate allocations, which
:mod:`.onednn_weights` can free one by one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from tritontower.checkpoint.checkpoint import Progress
from tritontower.checkpoint.weight_map import Shape, WeightMap
from tritontower.graph.ir import Graph, Weight
from tritontower.kernels.runtime.checks import align_up

_ALIGNMENT = 128
"""Elements; at least 256 bytes in every dtype, enough for any vector load."""
_SEPARATE_BYTES = 2**20


class WeightSource(Protocol):
    """Interface of an open :class:`~tritontower.checkpoint.checkpoint.Checkpoint` or of a loaded model."""

    def iterate(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor in ``dtype`` on ``device``) one by one."""


def stored_shapes(graph: Graph, weight_maps: Mapping[str, WeightMap]) -> dict[str, Shape]:
    """Returns name → shape of every stored tensor of the graph, in graph order."""
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
    """Reads the tensors of ``graph``, padded and with reordered rows, without gradients.

    Returns :attr:`.Weight.held_name` → tensor, in one allocation except large tensors on a CPU.  ``weight_maps`` is
    canonical name → its stored tensors; their names and shapes are already checked.
    """
    shapes = graph.held_shapes
    weights: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if device.type == "cpu" and size * dtype.itemsize >= _SEPARATE_BYTES:
            weights[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            starts[name] = end
            end += align_up(size, _ALIGNMENT)
    block = torch.zeros(end, dtype=dtype, device=device)
    weights |= {
        name: block[start : start + math.prod(shapes[name])].view(shapes[name]) for name, start in starts.items()
    }
    # A canonical tensor is at most as large as its reordered form; it is collected at the beginning of that memory.
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
