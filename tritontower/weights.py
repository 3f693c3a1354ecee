"""The weights of a layer graph, read out of a checkpoint and written into place one stored tensor at a time.

All weights of a tower live in one allocation: allocated one by one, between the buffers that they are read through, each
leaves a hole behind, which on a CPU cost a third of their size in memory that nothing could use.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch

from .checkpoint import Progress
from .graph import Graph
from .recipes import Recipe, Shape

__all__ = ["WeightSource", "read_weights", "stored_shapes"]

_ALIGNMENT = 128
"""Elements; 256 bytes or more in every dtype, as much as any vector load asks for."""


class WeightSource(Protocol):
    """Where stored tensors come from: an open :class:`~tritontower.checkpoint.Checkpoint`, or a loaded model."""

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


def stored_shapes(graph: Graph, recipes: Mapping[str, Recipe]) -> dict[str, Shape]:
    """Name → shape of every stored tensor that the graph is made from; the order is that of the graph."""
    shapes: dict[str, Shape] = {}
    for name, shape in graph.sources.items():
        shapes |= recipes[name].stored(shape)
    return shapes


def read_weights(
    source: WeightSource,
    graph: Graph,
    recipes: Mapping[str, Recipe],
    dtype: torch.dtype,
    device: torch.device,
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The canonical tensors of ``graph``, without gradients.

    Args:
        source: its names and shapes checked.
        graph: says which tensors there are, and how they are padded.
        recipes: what each is made of.
        dtype: of the weights.
        device: where they go.
        progress: called after every stored tensor.

    Raises:
        CheckpointError: a tensor cannot be read; the subclasses say why.
    """
    shapes = graph.held_shapes
    ends = [0]
    for shape in shapes.values():
        ends.append(ends[-1] + -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT)
    block = torch.zeros(ends[-1], dtype=dtype, device=device)
    weights = {
        name: block[start : start + math.prod(shape)].view(shape)
        for (name, shape), start in zip(shapes.items(), ends[:-1], strict=True)
    }
    users: dict[str, list[str]] = {}
    for name, shape in graph.sources.items():
        for stored in recipes[name].stored(shape):
            users.setdefault(stored, []).append(name)
    for stored, tensor in source.iterate(dtype, device, names=users, progress=progress):
        for name in users[stored]:
            recipes[name].write(weights[name], stored, tensor)
        del tensor
    return weights
