"""Row orders of stored weights other than the canonical one; each saves a kernel one step.

A layout pass sets one on a :class:`~tritontower.graph.ir.Weight`.  Only the reordered tensor is kept in memory; it is
reordered in place after the checkpoint has been read (:mod:`tritontower.engine.weight_loader`).
"""

from dataclasses import asdict, dataclass

import torch

from tritontower.kernels.gemm.linear import interleave_gated
from tritontower.kernels.gemm.qkv_projection import reorder_heads


@dataclass(frozen=True)
class HeadOrder:
    """Row order within each head of ``[q; k; v]``, a weight ``[3·heads·head_dim, K]`` or its bias.

    Attributes:
        pairs: the two rows of q and k that a rotation mixes are adjacent instead of half a head apart.
        ones: the first padding row of k and v is one (in a bias), so that this output column is one in every row.
    """

    heads: int
    head_dim: int
    padded_head_dim: int | None = None
    pairs: bool = False
    ones: bool = False

    @property
    def name(self) -> str:
        """Suffix of the reordered tensor's name."""
        parts = ["heads", str(self.padded_head_dim or self.head_dim)]
        return "-".join(parts + ["pairs"] * self.pairs + ["ones"] * self.ones)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the reordered shape of a tensor of the canonical ``shape``."""
        return (3 * self.heads * (self.padded_head_dim or self.head_dim), *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a reordered copy of a canonical tensor."""
        return reorder_heads(tensor, **asdict(self))


@dataclass(frozen=True)
class InterleavedGates:
    """Row order of ``[gate; up]``: row 2i is row i of gate, row 2i + 1 is row i of up."""

    name = "interleaved"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the canonical shape."""
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a reordered copy of a canonical tensor."""
        return interleave_gated(tensor)


WeightLayout = HeadOrder | InterleavedGates
