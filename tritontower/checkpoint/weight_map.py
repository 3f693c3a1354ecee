"""Weight maps: how the tensors of a checkpoint make one weight of the layer graph.

The graph has *canonical* tensors: one ``qkv`` matrix, one ``[gate; up]`` matrix, patch-major columns, half-split rotary
order.  Checkpoints store the same numbers under other names, in parts, transposed or in another order.  A weight map
lists the stored tensors of one canonical tensor, their shapes, and the place of their numbers.  Stored tensors are
written into place one at a time, as they are read, so that no weight ever exists twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
BOTH = ("weight", "bias")


class WeightMap(ABC):
    """Maps stored tensors to one canonical tensor."""

    @abstractmethod
    def stored_shapes(self, shape: Shape) -> Mapping[str, Shape]:
        """Stored name → its shape, for a canonical tensor of ``shape``."""

    @property
    @abstractmethod
    def stored_names(self) -> tuple[str, ...]:
        """Names of the stored tensors that make the canonical one."""

    @abstractmethod
    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Writes the stored tensor ``name``, of any floating type, into its place in ``target``.

        ``target`` is the canonical tensor, or a larger one; it is zero where nothing was written, and its padding stays
        zero.
        """

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """Returns the stored tensor ``name`` as a view of ``target``, a written canonical tensor or a larger one.

        The view has ``shape``, as :meth:`stored_shapes` returns it, and any strides.  ``None`` if the numbers are in
        another order, summed, or only a part.
        """
        return None


@dataclass(frozen=True)
class SingleTensorMap(WeightMap):
    """A weight map with one stored tensor; subclasses override the view, or the conversion to canonical order."""

    name: str

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    def stored_shapes(self, shape: Shape) -> Mapping[str, Shape]:
        """The one name and its shape."""
        return {self.name: self._stored_shape(shape)}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies the tensor into its view, or in canonical order."""
        view = self.view(target, name, tensor.shape)
        if view is None:
            tensor = self._to_canonical(tensor)
            view = _corner(target, tensor.shape)
        view.copy_(tensor)

    def _stored_shape(self, shape: Shape) -> Shape:
        return shape

    def _to_canonical(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _corner(target: torch.Tensor, shape: Shape) -> torch.Tensor:
    return target[tuple(slice(size) for size in shape)]


@dataclass(frozen=True)
class Stored(SingleTensorMap):
    """The canonical tensor unchanged, under another name."""

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """Removes the padding."""
        return _corner(target, shape)


def map_parameters(
    parts: Mapping[str, str], kinds: Sequence[str] = BOTH, ours: str = "", theirs: str = ""
) -> dict[str, WeightMap]:
    """Maps the unchanged parameters of modules, ours → theirs, below the modules ``ours`` and ``theirs``."""
    return {
        f"{ours}.{part}.{kind}".lstrip("."): Stored(f"{theirs}.{stored}.{kind}".lstrip("."))
        for part, stored in parts.items()
        for kind in kinds
    }


@dataclass(frozen=True)
class Stacked(WeightMap):
    """Equal parts concatenated along the rows: q, k and v, or gate and up.  Padding follows each part."""

    parts: tuple[WeightMap, ...]

    @classmethod
    def of(cls, *names: str) -> "Stacked":
        """Stacks tensors that are stored unchanged."""
        return cls(tuple(map(Stored, names)))

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of all parts."""
        return tuple(name for part in self.parts for name in part.stored_names)

    def stored_shapes(self, shape: Shape) -> Mapping[str, Shape]:
        """Shapes of all parts; each has an equal share of the rows."""
        rows = (shape[0] // len(self.parts), *shape[1:])
        return {name: stored for part in self.parts for name, stored in part.stored_shapes(rows).items()}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Writes the parts that use the stored tensor."""
        for part, rows in self._places(target, name):
            part.write(rows, name, tensor)

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """The view of the part, if only one uses the stored tensor."""
        places = self._places(target, name)
        return places[0][0].view(places[0][1], name, shape) if len(places) == 1 else None

    def _places(self, target: torch.Tensor, name: str) -> list[tuple[WeightMap, torch.Tensor]]:
        """Parts that use the stored tensor, each with its rows of ``target``."""
        chunks = target.split(target.shape[0] // len(self.parts))
        return [(part, rows) for part, rows in zip(self.parts, chunks, strict=False) if name in part.stored_names]


@dataclass(frozen=True)
class Transposed(SingleTensorMap):
    """A matrix stored as ``[in, out]``."""

    def _stored_shape(self, shape: Shape) -> Shape:
        return shape[::-1]

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """Removes the padding."""
        return target[: shape[1], : shape[0]].T


@dataclass(frozen=True)
class OneFrame(SingleTensorMap):
    """The kernel of a two-dimensional convolution; canonical ones have a dimension for frames."""

    def _stored_shape(self, shape: Shape) -> Shape:
        return (*shape[:2], *shape[3:])

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """Removes the padding."""
        return _corner(target.select(2, 0), shape)


@dataclass(frozen=True)
class WithBatchDimension(SingleTensorMap):
    """A tensor stored with a leading dimension of one."""

    def _stored_shape(self, shape: Shape) -> Shape:
        return (1, *shape)

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor:
        """Removes the padding."""
        return _corner(target, shape[1:]).unsqueeze(0)


@dataclass(frozen=True)
class InterleavedRotary(SingleTensorMap):
    """Rows of a query or key matrix whose rotary pairs are adjacent, instead of half a head apart."""

    heads: int

    def _to_canonical(self, tensor: torch.Tensor) -> torch.Tensor:
        # The first members of all pairs of a head come before the second ones.
        pairs: torch.Tensor = tensor.unflatten(0, (self.heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class ChannelMajor(SingleTensorMap):
    """A matrix over ``patches`` joined patches whose columns are ordered by channel, instead of by patch."""

    patches: int

    def _to_canonical(self, tensor: torch.Tensor) -> torch.Tensor:
        columns: torch.Tensor = tensor.unflatten(1, (-1, self.patches))
        return columns.transpose(1, 2).flatten(1)


@dataclass(frozen=True)
class RowSlice(SingleTensorMap):
    """Some rows of a stored tensor: ``taken`` of its ``parts`` equal parts, from part ``first`` on."""

    first: int
    taken: int
    parts: int

    def _stored_shape(self, shape: Shape) -> Shape:
        return (shape[0] // self.taken * self.parts, *shape[1:])

    def _to_canonical(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0] // self.parts
        return tensor[self.first * rows : (self.first + self.taken) * rows]


@dataclass(frozen=True)
class ClassTokenFirst(WeightMap):
    """A position table that includes the class embedding in row 0, the class token's.

    The class token is then a patch without pixels: its projection is zero, and its table row is its whole input.
    """

    table: str
    token: str

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The table and the class embedding."""
        return (self.table, self.token)

    def stored_shapes(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape, and one row of it."""
        return {self.table: shape, self.token: shape[1:]}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Adds either tensor; the sum does not depend on the order in which they are read."""
        place = target[: tensor.shape[0]] if name == self.table else target[0]
        place.add_(tensor.to(target.device, target.dtype))
