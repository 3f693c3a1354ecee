"""The layer graph: a tower as an ordered list of nodes over named values.

:func:`tritontower.graph.builder.build` turns a :class:`~tritontower.config.TowerConfig` into the *plain* graph, which is the
definition of the tower: one node per step of the reference implementation.  The passes in :mod:`tritontower.graph.fusion` rewrite
it into fewer nodes with the same numbers; ``qkv_projection`` and ``mlp`` nodes come from them alone.  Because a graph is data, its
cost (:mod:`tritontower.graph.cost`), its memory (:mod:`tritontower.graph.memory_plan`) and its description
(:mod:`tritontower.graph.summary`) follow from it without running it.

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
``qkv_projection``      rows [, cosines, sines] → qkv                 weight, bias (heads arranged)
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

from .weight_layout import WeightLayout

__all__ = ["Dtype", "Graph", "Node", "NodeKind", "Rows", "Transform", "Value", "Weight", "Workload"]

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
    """How much there is to do in one pass; every size in a graph is a multiple of one of these."""

    patches: int
    """Rows that the blocks work on; a class token counts as a patch."""
    tokens: int
    scores: int
    """Query–key pairs of one head: the sum of the squared segment lengths."""
    window_scores: int = 0
    """The same in a block that attends within windows."""
    selected: int | None = None
    """Rows that enter the projector; ``None``: all."""
    merged: int | None = None
    """Rows that leave the projector; ``None``: as many as tokens."""
    tiles: int = 0
    """Images, tiles and crops."""

    def rows(self, dimension: Rows) -> int:
        """The number of rows along ``dimension``."""
        if dimension == "selected":
            return self.patches if self.selected is None else self.selected
        if dimension == "merged":
            return self.tokens if self.merged is None else self.merged
        return {"patches": self.patches, "tokens": self.tokens, "tiles": self.tiles}[dimension]


@dataclass(frozen=True)
class Value:
    """A matrix ``[rows, width]`` that a node reads or writes."""

    name: str
    rows: Rows
    width: int
    dtype: Dtype = "activation"
    most_rows: int | None = None
    """So many rows at most are held, of scratch that serves one run of rows after the other; ``None``: all."""

    def held_rows(self, workload: Workload) -> int:
        """Rows that the value has memory for."""
        rows = workload.rows(self.rows)
        return rows if self.most_rows is None else min(rows, self.most_rows)

    def size(self, workload: Workload, itemsize: int) -> int:
        """Bytes, where one activation takes ``itemsize`` bytes."""
        element = {"activation": itemsize, "uint8": 1}.get(self.dtype, 4)
        return self.held_rows(workload) * self.width * element

    def moved(self, workload: Workload, itemsize: int) -> int:
        """Bytes of all rows, whether they are held at once or not."""
        return replace(self, most_rows=None).size(workload, itemsize)


@dataclass(frozen=True)
class Weight:
    """A weight of the graph, and the canonical tensor that it is made from."""

    name: str
    shape: tuple[int, ...]
    """Shape as the node uses it."""
    source: str
    """Name of the canonical tensor; several weights may be made from one."""
    source_shape: tuple[int, ...]
    """Shape of the canonical tensor, without padding."""
    transform: Transform = "as_is"
    padded_shape: tuple[int, ...] | None = None
    """Shape in which the canonical tensor is held, zeros behind its numbers; ``None``: without padding."""
    weight_layout: WeightLayout | None = None
    """Another order of the rows, in which the tensor is held instead of the canonical one."""

    @property
    def parameters(self) -> int:
        """Numbers in the weight as the node uses it, padding included."""
        return prod(self.shape)

    @property
    def useful_shape(self) -> tuple[int, ...]:
        """Shape as the node uses it, without padding."""
        padded = self.padded_shape is not None or self.weight_layout is not None
        return self.source_shape if padded else self.shape

    @property
    def held_name(self) -> str:
        """What the tensor in memory is called: as its source, or, where that is arranged, what no canonical tensor is."""
        return self.source if self.weight_layout is None else f"{self.source}:{self.weight_layout.name}"

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Shape of the canonical tensor in memory, before it is arranged."""
        return self.padded_shape or self.source_shape

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in memory."""
        shape = self.canonical_shape
        return shape if self.weight_layout is None else self.weight_layout.shape(shape)

    def arranged(self, weight_layout: WeightLayout) -> "Weight":
        """This weight in another order of its rows, under a name of its own."""
        name = self.name.partition(":")[0]
        shape = weight_layout.shape(self.canonical_shape)
        return replace(self, name=f"{name}:{weight_layout.name}", shape=shape, weight_layout=weight_layout)


@dataclass(frozen=True)
class Node:
    """One step: what it is called, what kind it is, what it reads and writes."""

    name: str
    kind: NodeKind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
    """Role → name of the weight."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    scratch: tuple[str, ...] = ()
    """Values that live only while the node runs."""
    block: int | None = None
    """Which of the repeated transformer blocks the node belongs to."""
    rows: Rows = "patches"
    """What the rows that it writes are."""

    @property
    def in_place(self) -> bool:
        """Whether the first output is the first input, changed."""
        return self.kind == "rope"

    @property
    def residual(self) -> str | None:
        """What a product adds to its rows: its output may be written into the residual's memory."""
        return self.inputs[1] if self.kind in ("linear", "mlp") and len(self.inputs) > 1 else None


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run, and everything they name."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises :class:`ValueError` where a node names something unknown, unset, set twice or never used."""
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
        """Name → shape of every canonical tensor that the graph is made from."""
        return {weight.source: weight.source_shape for weight in self.weights.values()}

    @property
    def held_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor in memory, padded and arranged as the graph asks for."""
        return {weight.held_name: weight.held_shape for weight in self.weights.values()}

    @property
    def parameters(self) -> int:
        """Numbers in the canonical tensors that the graph is made from."""
        return sum(prod(shape) for shape in self.sources.values())

    def consumers(self, value: str) -> list[Node]:
        """The nodes that read ``value``."""
        return [node for node in self.nodes if value in node.inputs]

    def with_nodes(
        self, nodes: Sequence[Node], values: Iterable[Value] = (), weights: Iterable[Weight] = ()
    ) -> "Graph":
        """This graph with other nodes, and with values and weights that they need beside or instead of what it has.

        Values and weights that no node names any more are dropped.
        """
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
