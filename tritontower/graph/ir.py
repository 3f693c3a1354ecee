"""The layer graph: a tower as an ordered list of nodes over named values.

:func:`.builder.build` turns a :class:`~tritontower.config.TowerConfig` into the *plain* graph, which defines the tower: one
node per step of the reference implementation.  The passes in :mod:`.fusion` rewrite it into fewer nodes with the same
numbers; only they create ``qkv_projection`` and ``mlp`` nodes.  A graph is data: its cost (:mod:`.cost`), its memory
(:mod:`.memory_plan`) and its summary (:mod:`.summary`) need no run.

======================  ============================================  ================================================
node kind               inputs → outputs                              weights
======================  ============================================  ================================================
``patch_projection``    pixels [, position_index] → rows              weight, bias, position_table
``add_positions``       rows, position_index [, weights] → rows       position_table
``rotary_table``        positions → cosines, sines
``norm``                rows [, residual] → rows [, sum]              weight, bias
``linear``              rows [, residual] → rows                      weight, bias
``activation``          rows → rows
``add``                 rows, rows → rows
``rope``                qkv, cosines, sines → qkv                     (rotates in place)
``qkv_projection``      rows [, cosines, sines] → qkv                 weight, bias (rows reordered)
``attention``           qkv → rows
``mlp``                 rows [, residual] → rows                      weight_1, bias_1, weight_2, bias_2
``select``              rows …, selection → rows side by side
``pool``                rows → means of neighboring rows
``projector``           rows [, selection] → tokens                   norm_*, weight_1, bias_1, weight_2, bias_2
``assemble``            rows, index, weights → tokens                 newline
``attention_pooling``   keys and values → a row per tile              probe, weight, bias
======================  ============================================  ================================================
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch

from .weight_layout import WeightLayout

NodeKind = Literal[
    "patch_projection",
    "add_positions",
    "rotary_table",
    "norm",
    "linear",
    "activation",
    "add",
    "rope",
    "qkv_projection",
    "attention",
    "mlp",
    "select",
    "pool",
    "projector",
    "assemble",
    "attention_pooling",
]
Rows = Literal["patches", "selected", "merged", "tokens", "tiles"]
Dtype = Literal["activation", "float32", "int32", "uint8"]
Transform = Literal["as_is", "flatten", "fold_temporal"]


@dataclass(frozen=True)
class Workload:
    """The sizes of one forward pass; every size in a graph is a multiple of one of these.

    A class token counts as a patch.  ``scores`` are query–key pairs of one head, the sum of the squared segment lengths.
    ``selected`` and ``merged`` are input and output rows of the projector; ``None``: all, and as many as tokens.
    """

    patches: int
    tokens: int
    scores: int
    window_scores: int = 0
    selected: int | None = None
    merged: int | None = None
    tiles: int = 0

    def rows(self, dimension: Rows) -> int:
        """Number of rows along ``dimension``."""
        if dimension == "selected":
            return self.patches if self.selected is None else self.selected
        if dimension == "merged":
            return self.tokens if self.merged is None else self.merged
        return {"patches": self.patches, "tokens": self.tokens, "tiles": self.tiles}[dimension]


@dataclass(frozen=True)
class Value:
    """A matrix ``[rows, width]``; ``most_rows`` limits the rows in memory of scratch that is reused."""

    name: str
    rows: Rows
    width: int
    dtype: Dtype = "activation"
    most_rows: int | None = None

    def torch_dtype(self, activation: torch.dtype) -> torch.dtype:
        """Returns the dtype of the tensor; ``activation`` is that of the activations."""
        return activation if self.dtype == "activation" else getattr(torch, self.dtype)

    def held_rows(self, workload: Workload) -> int:
        """Number of rows in memory."""
        rows = workload.rows(self.rows)
        return rows if self.most_rows is None else min(rows, self.most_rows)

    def size(self, workload: Workload, itemsize: int) -> int:
        """Bytes in memory; ``itemsize`` is that of an activation."""
        element = {"activation": itemsize, "uint8": 1}.get(self.dtype, 4)
        return self.held_rows(workload) * self.width * element

    def total_size(self, workload: Workload, itemsize: int) -> int:
        """Bytes of all rows, in memory at once or not."""
        return replace(self, most_rows=None).size(workload, itemsize)


@dataclass(frozen=True)
class Weight:
    """A weight as the node uses it, made from the canonical tensor ``source``, which others may share.

    In memory, the tensor is padded with zeros to ``padded_shape`` and has its rows in the order ``weight_layout``.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    source_shape: tuple[int, ...]
    transform: Transform = "as_is"
    padded_shape: tuple[int, ...] | None = None
    weight_layout: WeightLayout | None = None

    @property
    def useful_shape(self) -> tuple[int, ...]:
        """Shape as the node uses it, without padding."""
        padded = self.padded_shape is not None or self.weight_layout is not None
        return self.source_shape if padded else self.shape

    @property
    def held_name(self) -> str:
        """Name of the tensor in memory; a reordered tensor has a suffix that no canonical name has."""
        return self.source if self.weight_layout is None else f"{self.source}:{self.weight_layout.name}"

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in memory before its rows are reordered."""
        return self.padded_shape or self.source_shape

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in memory."""
        shape = self.canonical_shape
        return shape if self.weight_layout is None else self.weight_layout.shape(shape)

    def with_layout(self, weight_layout: WeightLayout) -> "Weight":
        """Returns this weight in another row order, under another name."""
        name = self.name.partition(":")[0]
        shape = weight_layout.shape(self.canonical_shape)
        return replace(self, name=f"{name}:{weight_layout.name}", shape=shape, weight_layout=weight_layout)


@dataclass(frozen=True)
class Node:
    """One step of the graph.

    ``weights`` is role → name; ``scratch`` names values that live only while the node runs; ``rows`` is the dimension of
    the output rows.
    """

    name: str
    kind: NodeKind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    scratch: tuple[str, ...] = ()
    block: int | None = None
    rows: Rows = "patches"

    @property
    def is_in_place(self) -> bool:
        """The first output overwrites the first input."""
        return self.kind == "rope"

    @property
    def residual(self) -> str | None:
        """The value that a matmul adds to its rows; the output may overwrite it."""
        return self.inputs[1] if self.kind in ("linear", "mlp") and len(self.inputs) > 1 else None


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, and the values and weights that they name."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises :class:`ValueError` for a name that is unknown, unset, set twice or never used."""
        known = set(self.inputs)
        read: set[str] = set(self.outputs)
        used: set[str] = set()
        for node in self.nodes:
            if unset := [name for name in node.inputs if name not in known]:
                raise ValueError(f"node {node.name} reads {unset}, which no earlier node writes")
            if again := [name for name in node.outputs if name in known]:
                raise ValueError(f"node {node.name} writes {again} a second time")
            if absent := [name for name in node.weights.values() if name not in self.weights]:
                raise ValueError(f"node {node.name} uses weights {absent}, which the graph does not list")
            known.update(node.outputs)
            read.update(node.inputs)
            used.update(node.weights.values())
        written = {name for node in self.nodes for name in (*node.outputs, *node.scratch)}
        if lost := sorted((known | written) ^ set(self.values)):
            raise ValueError(f"values {lost} are listed but never written, or written but not listed")
        if idle := sorted(known - read):
            raise ValueError(f"values {idle} are written but never read")
        if idle := sorted(set(self.weights) - used):
            raise ValueError(f"weights {idle} are listed but never used")

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every canonical tensor."""
        return {weight.source: weight.source_shape for weight in self.weights.values()}

    @property
    def held_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor in memory, padded and reordered."""
        return {weight.held_name: weight.held_shape for weight in self.weights.values()}

    @property
    def parameters(self) -> int:
        """Number of parameters in the canonical tensors."""
        return sum(prod(shape) for shape in self.sources.values())

    def with_nodes(
        self, nodes: Sequence[Node], values: Iterable[Value] = (), weights: Iterable[Weight] = ()
    ) -> "Graph":
        """Returns this graph with other nodes and added or replaced values and weights; unused ones are dropped."""
        named = {name for node in nodes for name in (*node.inputs, *node.outputs, *node.scratch)}
        used = {name for node in nodes for name in node.weights.values()}
        known = {**self.values, **{value.name: value for value in values}}
        listed = {**self.weights, **{weight.name: weight for weight in weights}}
        return replace(
            self,
            nodes=tuple(nodes),
            values={name: value for name, value in known.items() if name in named},
            weights={name: weight for name, weight in listed.items() if name in used},
        )
