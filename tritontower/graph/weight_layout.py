"""Orders of a weight's rows other than the canonical one, in which a kernel does without a step of its own.

A fusion pass asks for one by putting it on a :class:`~tritontower.graph.ir.Weight`.  Such a weight is held in its arranged
form only: it is arranged where it lies, once, when the checkpoint has been read (:mod:`tritontower.engine.weight_loader`).
"""

from dataclasses import dataclass

import torch

from tritontower.kernels.gemm.linear import interleave_gated
from tritontower.kernels.gemm.qkv_projection import reorder_heads

__all__ = ["HeadOrder", "InterleavedGates", "WeightLayout"]


@dataclass(frozen=True)
class HeadOrder:
    """Rows of ``[q; k; v]``, a weight ``[3·heads·head_dim, K]`` or its bias, in another order within each head.

    Attributes:
        heads: heads of each of q, k and v.
        head_dim: their canonical rows.
        padded_head_dim: rows that each has in the arranged form, zeros behind its own; ``None``: no more than its own.
        pairs: whether the two rows of q and k that a rotation mixes stand side by side instead of half a head apart.
        ones: whether the first padding row of k and v is one (of a bias) instead of zero: the column of the product is
            then one in every row.
    """

    heads: int
    head_dim: int
    padded_head_dim: int | None = None
    pairs: bool = False
    ones: bool = False

    @property
    def name(self) -> str:
        """What tells the arranged tensor from the canonical one."""
        parts = ["heads", str(self.padded_head_dim or self.head_dim)]
        return "-".join(parts + ["pairs"] * self.pairs + ["ones"] * self.ones)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The arranged shape of a tensor of the canonical ``shape``."""
        return (3 * self.heads * (self.padded_head_dim or self.head_dim), *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The arranged form of a canonical tensor, in memory of its own."""
        return reorder_heads(
            tensor,
            heads=self.heads,
            head_dim=self.head_dim,
            padded_head_dim=self.padded_head_dim,
            pairs=self.pairs,
            ones=self.ones,
        )


@dataclass(frozen=True)
class InterleavedGates:
    """Rows of ``[gate; up]``, a weight or its bias, in turn: row 2i is gate's row i, row 2i + 1 is up's."""

    @property
    def name(self) -> str:
        """What tells the arranged tensor from the canonical one."""
        return "interleaved"

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The arranged shape: the canonical one."""
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The arranged form of a canonical tensor, in memory of its own."""
        return interleave_gated(tensor)


WeightLayout = HeadOrder | InterleavedGates
