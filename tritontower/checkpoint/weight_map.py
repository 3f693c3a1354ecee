"""Recipes: how a checkpoint spells a weight of the layer graph.

The graph knows *canonical* tensors: one ``qkv`` matrix, one ``[gate; up]`` matrix, patch-major columns, half-split rotary
order.  Checkpoints store the same numbers under other names, in parts, transposed or in another order.  A recipe says
which stored tensors a canonical one is made of, what shape each must have, and where its numbers go.  Stored tensors are
written into place one at a time, as they are read, so that no weight ever exists twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = [
    "ChannelMajor",
    "ClassTokenFirst",
    "InterleavedRotary",
    "OfBatchOfOne",
    "OfOneTensor",
    "OneFrame",
    "PartOf",
    "Recipe",
    "Shape",
    "Stacked",
    "Stored",
    "Transposed",
]

Shape = tuple[int, ...]


class Recipe(ABC):
    """From stored tensors to one canonical tensor."""

    @abstractmethod
    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """Stored name → its shape, for a canonical tensor of ``shape``."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every stored tensor that the canonical one is made of."""

    @abstractmethod
    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Puts the stored tensor ``name`` into its place in ``target``.

        Args:
            target: the canonical tensor, zero where nothing was written; it may be larger than the canonical shape,
                and what is beyond stays zero.
            name: one of :meth:`stored`.
            tensor: its numbers, in any floating type.
        """

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """The stored tensor ``name`` as a part of ``target``'s memory, if its numbers are there in its own order.

        Args:
            target: the canonical tensor, or a larger one, in which everything was written.
            name: one of :meth:`stored`.
            shape: its shape, as :meth:`stored` says.

        Returns:
            A view of ``shape``, with any strides; ``None`` where there is none.
        """
        return None


@dataclass(frozen=True)
class OfOneTensor(Recipe):
    """A recipe with one stored tensor."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The one."""
        return (self.name,)


@dataclass(frozen=True)
class Stored(OfOneTensor):
    """The canonical tensor as it is, under another name."""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """One tensor of the canonical shape."""
        return {self.name: shape}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it."""
        target[tuple(slice(size) for size in tensor.shape)].copy_(tensor)

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """All of it but the padding."""
        return target[tuple(slice(size) for size in shape)]


@dataclass(frozen=True)
class Stacked(Recipe):
    """Equal parts, one below the other: q, k and v, or gate and up."""

    parts: tuple[Recipe, ...]

    @classmethod
    def of(cls, *names: str) -> "Stacked":
        """Parts that are stored as they are."""
        return cls(tuple(map(Stored, names)))

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(name for part in self.parts for name in part.names)

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """Every part has its share of the rows."""
        part = (shape[0] // len(self.parts), *shape[1:])
        return {name: each for recipe in self.parts for name, each in recipe.stored(part).items()}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Writes one part; padding stands behind each of them."""
        for recipe, part in self._places(target, name):
            recipe.write(part, name, tensor)

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """That of the one part that it is in."""
        places = self._places(target, name)
        return places[0][0].view(places[0][1], name, shape) if len(places) == 1 else None

    def _places(self, target: torch.Tensor, name: str) -> list[tuple[Recipe, torch.Tensor]]:
        """The parts that have the stored tensor in them, and their rows of ``target``."""
        rows = target.shape[0] // len(self.parts)
        return [
            (recipe, target[number * rows : (number + 1) * rows])
            for number, recipe in enumerate(self.parts)
            if name in recipe.names
        ]


@dataclass(frozen=True)
class Transposed(OfOneTensor):
    """A matrix stored as ``[in, out]``."""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape reversed."""
        return {self.name: shape[::-1]}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it, transposed."""
        Stored(self.name).write(target, name, tensor.T)

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """The transpose."""
        return target[: shape[1], : shape[0]].T


@dataclass(frozen=True)
class OneFrame(OfOneTensor):
    """The kernel of a two-dimensional convolution: canonical ones have a dimension for frames."""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape without its frames."""
        return {self.name: (*shape[:2], *shape[3:])}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it with one frame."""
        Stored(self.name).write(target, name, tensor.unsqueeze(2))

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """The one frame."""
        return Stored(self.name).view(target.select(2, 0), name, shape)


@dataclass(frozen=True)
class InterleavedRotary(OfOneTensor):
    """Rows of a query or key matrix in which a rotary pair stands side by side, instead of half a head apart."""

    heads: int

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape."""
        return {self.name: shape}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it, the first members of all pairs of a head before the second ones."""
        pairs = tensor.unflatten(0, (self.heads, -1, 2))
        Stored(self.name).write(target, name, pairs.transpose(1, 2).flatten(0, 2))


@dataclass(frozen=True)
class ChannelMajor(OfOneTensor):
    """A matrix over joined patches whose columns are ordered channel by channel, instead of patch by patch."""

    patches: int
    """Patches that are joined."""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape."""
        return {self.name: shape}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it, its columns patch by patch."""
        columns = tensor.unflatten(1, (-1, self.patches))
        Stored(self.name).write(target, name, columns.transpose(1, 2).flatten(1))


@dataclass(frozen=True)
class ClassTokenFirst(Recipe):
    """A position table whose row 0, the class token's, has the class embedding in it.

    A class token is then a patch without pixels: its projection is zero, and its table row is all there is.
    """

    table: str
    token: str

    @property
    def names(self) -> tuple[str, ...]:
        """The table and the token."""
        return (self.table, self.token)

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The table, and one vector."""
        return {self.table: shape, self.token: shape[1:]}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Adds either one; the sum is the same in whichever order they are read."""
        place = target[: tensor.shape[0]] if name == self.table else target[0]
        place.add_(tensor.to(target.device, target.dtype))


@dataclass(frozen=True)
class PartOf(OfOneTensor):
    """Some rows of a stored tensor: ``taken`` of its ``parts`` equal parts, from part ``first`` on."""

    first: int
    taken: int
    parts: int

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """As many rows as all parts have."""
        return {self.name: (shape[0] // self.taken * self.parts, *shape[1:])}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies the rows."""
        rows = tensor.shape[0] // self.parts
        Stored(self.name).write(target, name, tensor[self.first * rows : (self.first + self.taken) * rows])


@dataclass(frozen=True)
class OfBatchOfOne(OfOneTensor):
    """A tensor that is stored with a first dimension of one."""

    def stored(self, shape: Shape) -> Mapping[str, Shape]:
        """The canonical shape behind a one."""
        return {self.name: (1, *shape)}

    def write(self, target: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Copies it without that dimension."""
        Stored(self.name).write(target, name, tensor.squeeze(0))

    def view(self, target: torch.Tensor, name: str, shape: Shape) -> torch.Tensor | None:
        """It, behind a one."""
        return target[tuple(slice(size) for size in shape[1:])].unsqueeze(0)
