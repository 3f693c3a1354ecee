"""The vision weights of a loaded model of transformers: read like a checkpoint, and shared with the model.

A tower stores its weights in one allocation, in its own order. Most of transformers' tensors are views of them, such as
thirds of a matrix of q, k and v. A model's parameters can thus *be* the tower's weights, and use no memory of their own.
"""

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from tritontower.checkpoint.checkpoint import Progress
from tritontower.checkpoint.files import Prefixes, strip_prefix
from tritontower.checkpoint.weight_map import Shape, WeightMap
from tritontower.errors import (
    CheckpointIncompleteError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnexpectedTensorError,
    UnsupportedDtypeError,
    list_names,
)
from tritontower.graph.ir import Graph


class ModuleWeights:
    """A module's parameters that belong to a vision tower, with the methods of an open checkpoint."""

    def __init__(self, module: torch.nn.Module, prefixes: Prefixes) -> None:
        # By name without prefix.
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self._full_names: dict[str, str] = {}
        for full, parameter in module.named_parameters():
            name = strip_prefix(full, prefixes)
            if name is not None:
                self.parameters[name], self._full_names[name] = parameter, full

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of most bytes; raises :class:`UnsupportedDtypeError` if all weights are quantized."""
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self.parameters.values():
            if parameter.is_floating_point():
                sizes[parameter.dtype] += parameter.nbytes
        if not sizes:
            raise UnsupportedDtypeError("the model's vision weights must have a floating dtype, but all are quantized")
        return sizes.most_common(1)[0][0]

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self.parameters.values())).device

    def expect(
        self, specs: Mapping[str, Shape], ignored: Sequence[str] = (), *, unneeded: Collection[str] = ()
    ) -> None:
        """Checks that the parameters match ``specs``; see :meth:`tritontower.checkpoint.checkpoint.Checkpoint.expect`."""
        missing = [name for name in specs if name not in self.parameters]
        if missing:
            raise CheckpointIncompleteError(
                f"the model lacks {len(missing)} of the tower's {len(specs)} tensors: {list_names(missing)}", missing
            )
        for name, shape in specs.items():
            full, parameter = self._full_names[name], self.parameters[name]
            if parameter.is_meta:
                raise CheckpointIncompleteError(f"parameter {full} must have memory, but is on torch's meta device")
            if not parameter.is_floating_point():
                raise UnsupportedDtypeError(
                    f"parameter {full} must have a floating dtype, got {parameter.dtype}: the model was quantized together "
                    "with its vision modules; load it with tritontower.integrations.transformers.load_vlm, or pass a tower"
                )
            if parameter.shape != torch.Size(shape):
                raise ShapeMismatchError(full, shape, tuple(parameter.shape), source="the model")
        unused = [
            self._full_names[name]
            for name in self.parameters
            if not (name in specs or name in unneeded or any(fnmatch.fnmatchcase(name, mask) for mask in ignored))
        ]
        if unused:
            raise UnexpectedTensorError(
                f"the model has {len(unused)} vision parameters that the tower does not use: {list_names(unused)}",
                unused,
            )

    def iterate(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str],
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors one by one; see :meth:`tritontower.checkpoint.checkpoint.Checkpoint.iterate`."""
        wanted = list(names)
        total, done = sum(self.parameters[name].nbytes for name in wanted), 0
        for name in wanted:
            parameter = self.parameters[name].detach()
            tensor = parameter.to(device, dtype)
            if not bool(tensor.isfinite().all()):
                raise NonFiniteWeightsError(self._full_names[name], f"holds NaN or infinity, or would in {dtype}")
            yield name, tensor
            done += parameter.nbytes
            if progress is not None:
                progress(done, total)


def share_weights(
    parameters: Mapping[str, torch.nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    graph: Graph,
    weight_maps: Mapping[str, WeightMap],
) -> list[str]:
    """Makes parameters views of a tower's weights, which have the same values, and thus frees their own memory.

    Returns the names of these parameters, without prefix. Tensors that the tower stores in another order, or summed,
    cannot be views. ``graph`` gives shapes without padding.
    """
    shared: list[str] = []
    stored_shapes = {name: weight_maps[name].stored_shapes(shape) for name, shape in graph.sources.items()}
    uses = Counter(stored for shapes in stored_shapes.values() for stored in shapes)
    for name, shapes in stored_shapes.items():
        if name not in weights:  # the tower stores it in another order
            continue
        for stored, shape in shapes.items():
            view = weight_maps[name].view(weights[name], stored, shape) if uses[stored] == 1 else None
            parameter = parameters[stored]
            if view is not None and (view.dtype, view.device) == (parameter.dtype, parameter.device):
                parameter.data = view
                shared.append(stored)
    return shared
