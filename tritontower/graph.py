"""The layer graph: a tower as an ordered list of nodes over named values.

:func:`build` turns a :class:`~tritontower.config.TowerConfig` into the *plain* graph, which is the definition of the
tower: one node per step of the reference implementation.  The passes in :mod:`tritontower.fusion` rewrite it into fewer
nodes with the same numbers.  Because a graph is data, its cost (:mod:`tritontower.costs`), its memory
(:mod:`tritontower.memory`) and its description (:mod:`tritontower.description`) follow from it without running it.

======================  ==================================  =============================================
node kind               inputs → outputs                    weights
======================  ==================================  =============================================
``patch_projection``    pixels → rows                       weight, bias
``rotary_table``        positions → cosines, sines
``norm``                rows [, residual] → rows [, sum]    weight, bias
``linear``              rows [, residual] → rows            weight, bias
``activation``          rows → rows
``add``                 rows, rows → rows
``rope``                qkv, cosines, sines → qkv           (rotates in place)
``attention``           qkv → rows
``projector``           rows → tokens                       norm_*, weight_1, bias_1, weight_2, bias_2
======================  ==================================  =============================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from .config import Normalisation, TowerConfig

__all__ = ["Dtype", "Graph", "Node", "NodeKind", "Rows", "Transform", "Value", "Weight", "Workload", "build"]

NodeKind = Literal[
    "patch_projection",
    "rotary_table",
    "norm",
    "linear",
    "activation",
    "add",
    "rope",
    "attention",
    "projector",
]
Rows = Literal["patches", "tokens"]
Dtype = Literal["activation", "float32", "int32"]
Transform = Literal["as_is", "flatten", "fold_temporal"]


@dataclass(frozen=True)
class Workload:
    """How much there is to do in one pass; every size in a graph is a multiple of one of these."""

    patches: int
    tokens: int
    scores: int
    """Query–key pairs of one head: the sum of the squared segment lengths."""

    def rows(self, dimension: Rows) -> int:
        """The number of rows along ``dimension``."""
        return self.patches if dimension == "patches" else self.tokens


@dataclass(frozen=True)
class Value:
    """A matrix ``[rows, width]`` that a node reads or writes."""

    name: str
    rows: Rows
    width: int
    dtype: Dtype = "activation"

    def size(self, workload: Workload, itemsize: int) -> int:
        """Bytes, where one activation takes ``itemsize`` bytes."""
        return workload.rows(self.rows) * self.width * (itemsize if self.dtype == "activation" else 4)


@dataclass(frozen=True)
class Weight:
    """A weight of the graph, and the checkpoint tensor that it is made from."""

    name: str
    shape: tuple[int, ...]
    """Shape as the node uses it."""
    source: str
    """Canonical name of the checkpoint tensor; several weights may be made from one."""
    source_shape: tuple[int, ...]
    transform: Transform = "as_is"

    @property
    def parameters(self) -> int:
        """Numbers in the weight as the node uses it."""
        return prod(self.shape)


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

    @property
    def in_place(self) -> bool:
        """Whether the first output is the first input, changed."""
        return self.kind == "rope"


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
        """Canonical name → shape of every checkpoint tensor that the graph is made from."""
        return {weight.source: weight.source_shape for weight in self.weights.values()}

    @property
    def parameters(self) -> int:
        """Numbers in the checkpoint tensors that the graph is made from."""
        return sum(prod(shape) for shape in self.sources.values())

    def consumers(self, value: str) -> list[Node]:
        """The nodes that read ``value``."""
        return [node for node in self.nodes if value in node.inputs]

    def with_nodes(self, nodes: Sequence[Node]) -> "Graph":
        """This graph with other nodes; values that none of them names any more are dropped."""
        named = {name for node in nodes for name in (*node.inputs, *node.outputs, *node.scratch)}
        kept = {name: value for name, value in self.values.items() if name in named}
        return replace(self, nodes=tuple(nodes), values=kept)


class _Builder:
    """Collects nodes, values and weights while a tower is written down from top to bottom."""

    def __init__(self, config: TowerConfig) -> None:
        self.config = config
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.block: int | None = None

    def scoped(self, name: str) -> str:
        return name if self.block is None else f"blocks.{self.block}.{name}"

    def value(self, name: str, width: int, rows: Rows = "patches", dtype: Dtype = "activation") -> str:
        self.values[name] = Value(name, rows, width, dtype)
        return name

    def weight(self, name: str, *shape: int, source_shape: tuple[int, ...] | None = None) -> str:
        name = self.scoped(name)
        transform: Transform = "as_is" if source_shape is None else "flatten"
        self.weights[name] = Weight(name, shape, name, source_shape or shape, transform)
        return name

    def node(
        self,
        name: str,
        kind: NodeKind,
        inputs: Sequence[str],
        *outputs: tuple[str, int],
        weights: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> tuple[str, ...]:
        written = tuple(self.value(self.scoped(output), width) for output, width in outputs)
        self.nodes.append(
            Node(self.scoped(name), kind, tuple(inputs), written, weights or {}, attributes, block=self.block)
        )
        return written

    def norm(self, name: str, rows: str) -> str:
        norm = self.config.norm
        (normed,) = self.node(
            name,
            "norm",
            [rows],
            (f"{name}_rows", self.config.width),
            weights=self.norm_weights(name, norm),
            **_of(norm),
        )
        return normed

    def norm_weights(self, name: str, norm: Normalisation, role: str = "") -> dict[str, str]:
        weights = {f"{role}weight": self.weight(f"{name}.weight", self.config.width)}
        if norm.bias:
            weights[f"{role}bias"] = self.weight(f"{name}.bias", self.config.width)
        return weights

    def linear(self, name: str, rows: str, inner: int, width: int, *, bias: bool) -> str:
        weights = {"weight": self.weight(f"{name}.weight", width, inner)}
        if bias:
            weights["bias"] = self.weight(f"{name}.bias", width)
        (result,) = self.node(name, "linear", [rows], (f"{name}_rows", width), weights=weights, activation=None)
        return result


def _of(norm: Normalisation) -> dict[str, Any]:
    return {"norm": norm.kind, "eps": norm.eps, "rounding": norm.rounding}


def build(config: TowerConfig) -> Graph:
    """The plain graph of a tower: one node per step of its reference implementation.

    Args:
        config: the tower's description.

    Returns:
        A graph with the inputs ``pixels`` (a row per patch; columns channel, frame, row, column of the patch) and
        ``positions`` (row and column of each patch in its picture) and the output ``embeddings`` (a row per token).
    """
    builder = _Builder(config)
    pixels = builder.value("pixels", config.patch.inner, dtype="float32")
    positions = builder.value("positions", 2, dtype="int32")

    rows = _patch_projection(builder, pixels)
    cosines, sines = _rotary_table(builder, positions)
    for block in range(config.depth):
        builder.block = block
        rows = _block(builder, rows, cosines, sines)
    builder.block = None
    embeddings = _projector(builder, rows)
    return Graph(tuple(builder.nodes), builder.values, builder.weights, (pixels, positions), (embeddings,))


def _patch_projection(builder: _Builder, pixels: str) -> str:
    config, patch = builder.config, builder.config.patch
    kernel = (config.width, patch.channels, patch.temporal, patch.size, patch.size)
    weights = {"weight": builder.weight("patch_projection.weight", config.width, patch.inner, source_shape=kernel)}
    if patch.bias:
        weights["bias"] = builder.weight("patch_projection.bias", config.width)
    (rows,) = builder.node(
        "patch_projection", "patch_projection", [pixels], ("patch_rows", config.width), weights=weights
    )
    return rows


def _rotary_table(builder: _Builder, positions: str) -> tuple[str, str]:
    config, rotary = builder.config, builder.config.rotary
    table = tuple(builder.value(name, config.head_dim // 2, dtype="float32") for name in ("cosines", "sines"))
    attributes = {"head_dim": config.head_dim, "theta": rotary.theta, "layout": rotary.layout}
    builder.nodes.append(Node("rotary_table", "rotary_table", (positions,), table, attributes=attributes))
    return table[0], table[1]


def _block(builder: _Builder, rows: str, cosines: str, sines: str) -> str:
    """One pre-norm transformer block: attention and MLP, each added to the rows it read."""
    config = builder.config
    width = config.width
    heads: dict[str, Any] = {"heads": config.heads, "head_dim": config.head_dim}

    normed = builder.norm("norm1", rows)
    qkv = builder.linear("qkv", normed, width, 3 * width, bias=config.qkv_bias)
    (rotated,) = builder.node(
        "rope", "rope", [qkv, cosines, sines], ("rotated", 3 * width), **heads, rotation=config.rotary.rotation
    )
    (mixed,) = builder.node("attention", "attention", [rotated], ("mixed", width), **heads)
    projected = builder.linear("attention_output", mixed, width, width, bias=config.attention_bias)
    (rows,) = builder.node("attention_residual", "add", [projected, rows], ("attended", width))

    normed = builder.norm("norm2", rows)
    hidden = builder.linear("mlp_up", normed, width, config.mlp_hidden, bias=config.mlp_bias)
    (hidden,) = builder.node(
        "mlp_activation", "activation", [hidden], ("mlp_hidden", config.mlp_hidden), activation=config.activation
    )
    projected = builder.linear("mlp_down", hidden, config.mlp_hidden, width, bias=config.mlp_bias)
    (rows,) = builder.node("mlp_residual", "add", [projected, rows], ("block_rows", width))
    return rows


def _projector(builder: _Builder, rows: str) -> str:
    config, projector = builder.config, builder.config.projector
    joined = config.width * projector.rows_per_token
    weights = builder.norm_weights("projector.norm", projector.norm, role="norm_")
    for number, (inner, width) in enumerate(((joined, projector.hidden), (projector.hidden, projector.output)), 1):
        weights[f"weight_{number}"] = builder.weight(f"projector.linear_{number}.weight", width, inner)
        if projector.bias:
            weights[f"bias_{number}"] = builder.weight(f"projector.linear_{number}.bias", width)
    scratch = (
        builder.value("projector.normed", config.width),
        builder.value("projector.hidden", projector.hidden, "tokens"),
    )
    embeddings = builder.value("embeddings", projector.output, "tokens")
    attributes = {"merge": projector.rows_per_token, "activation": projector.activation, **_of(projector.norm)}
    builder.nodes.append(Node("projector", "projector", (rows,), (embeddings,), weights, attributes, scratch))
    return embeddings
