"""The vision weights of a model that transformers has loaded: read like a checkpoint, and lent back to the model.

A tower holds its weights in one allocation, in an order of its own; most of them are still there as transformers has them,
as views: q, k and v are thirds of one matrix.  A model's parameters can therefore *be* the tower's weights, so that a
vision part that is there twice takes the memory of one.
"""

import fnmatch
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

__all__ = ["ModuleWeights", "lend"]


class ModuleWeights:
    """The parameters of a module that belong to a vision tower, with the methods of an open checkpoint.

    Args:
        module: holds them, under any of the names that a checkpoint may have for them.
        prefixes: beginnings of names that belong to the tower → what they become.

    Attributes:
        parameters: name without its root → parameter.
    """

    def __init__(self, module: torch.nn.Module, prefixes: Prefixes) -> None:
        stripped = ((strip_prefix(name, prefixes), name, parameter) for name, parameter in module.named_parameters())
        found = [(name, full, parameter) for name, full, parameter in stripped if name is not None]
        self.parameters: dict[str, torch.nn.Parameter] = {name: parameter for name, _, parameter in found}
        self._full_names = {name: full for name, full, _ in found}

    def __enter__(self) -> "ModuleWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is to be closed."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Name without its root → parameter."""
        return self.parameters

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most bytes have.

        Raises:
            UnsupportedDtypeError: there is none: all are quantized.
        """
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.parameters.values():
            if parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.nbytes
        if not sizes:
            raise UnsupportedDtypeError("no vision weight of the model is of a floating type")
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def device(self) -> torch.device:
        """Where the first of them is."""
        return next(iter(self.parameters.values())).device

    def expect(
        self, specs: Mapping[str, Shape], ignored: Sequence[str] = (), *, unneeded: Collection[str] = ()
    ) -> None:
        """Checks that the parameters are exactly ``specs``; see :meth:`tritontower.checkpoint.checkpoint.Checkpoint.expect`."""
        missing = [name for name in specs if name not in self.parameters]
        if missing:
            raise CheckpointIncompleteError(
                f"the model lacks {len(missing)} of the tower's {len(specs)} tensors: {list_names(missing)}", missing
            )
        for name, shape in specs.items():
            full, parameter = self._full_names[name], self.parameters[name]
            if parameter.is_meta:
                raise CheckpointIncompleteError(f"parameter {full} has no memory yet (it is on torch's meta device)")
            if not parameter.is_floating_point():
                raise UnsupportedDtypeError(
                    f"parameter {full} is of {parameter.dtype}: the model was quantized when it was loaded, its vision "
                    "part with it; load it with tritontower.integrations.transformers.load_vlm instead, or pass a tower"
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
                f"the model has {len(unused)} vision parameters that the tower would not use: {list_names(unused)}",
                unused,
            )

    def iterate(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str] | None = None,
        check_finite: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, numbers) one by one; see :meth:`tritontower.checkpoint.checkpoint.Checkpoint.iterate`."""
        wanted = list(self.parameters if names is None else names)
        total, done = sum(self.parameters[name].nbytes for name in wanted), 0
        for name in wanted:
            parameter = self.parameters[name].detach()
            tensor = parameter.to(device, dtype)
            if check_finite and not bool(tensor.isfinite().all()):
                raise NonFiniteWeightsError(self._full_names[name], f"holds NaN or infinity, or would in {dtype}")
            yield name, tensor
            done += parameter.nbytes
            if progress is not None:
                progress(done, total)


def lend(
    parameters: Mapping[str, torch.nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    graph: Graph,
    weight_maps: Mapping[str, WeightMap],
) -> list[str]:
    """Makes parameters views of a tower's weights, whose numbers they have; their own memory is then free.

    Args:
        parameters: name without its root → parameter, of the dtype and on the device of the weights.
        weights: the tower's tensors, by name.
        graph: says how they are shaped before padding.
        weight_maps: what each is made of.

    Returns:
        The names of those that are views now.  What is held in another order or summed cannot be one.
    """
    lent: list[str] = []
    users: dict[str, int] = {}
    for name, shape in graph.sources.items():
        for stored in weight_maps[name].stored_shapes(shape):
            users[stored] = users.get(stored, 0) + 1
    for name, shape in graph.sources.items():
        if name not in weights:  # the tower holds it in another order
            continue
        for stored, stored_shape in weight_maps[name].stored_shapes(shape).items():
            view = weight_maps[name].view(weights[name], stored, stored_shape) if users[stored] == 1 else None
            parameter = parameters[stored]
            if view is not None and (view.dtype, view.device) == (parameter.dtype, parameter.device):
                parameter.data = view
                lent.append(stored)
    return lent
