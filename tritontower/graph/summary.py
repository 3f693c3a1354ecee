"""Summary of a layer graph as a table, as JSON and as Graphviz DOT: shapes, parameters, FLOPs, bytes and launches."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from tritontower.text_table import text_table

from .cost import Cost, GraphLaunches, estimate_cost, estimate_total_cost
from .ir import Graph, Node, Workload
from .memory_plan import plan_memory

_COLUMNS = ("node", "kind", "reads", "writes", "parameters", "GFLOP", "MB moved")
_FUSED = {"patch_projection": "positions", "qkv_projection": "rotation", "linear": "residual", "mlp": "residual"}
_COLORS = {"attention": "#fde68a", "attention_pooling": "#fde68a", "norm": "#e5e7eb", "input": "#dcfce7"}


@dataclass(frozen=True)
class Description:
    """A graph with the sizes of one workload.

    Attributes:
        launches: launches of one forward pass, where kernels run.
        on_cpu: torch operations run the graph on a CPU; their workspace counts as memory.
    """

    graph: Graph
    workload: Workload
    itemsize: int
    launches: GraphLaunches | None = None
    dtype: torch.dtype = torch.bfloat16
    on_cpu: bool = False

    @property
    def total(self) -> Cost:
        """FLOPs and bytes of one forward pass."""
        return estimate_total_cost(self.graph, self.workload, self.itemsize)

    @cached_property
    def blocks(self) -> dict[int, list[int]]:
        """First block of each group of identical blocks → the numbers of the group."""
        signatures: dict[int, list[tuple[str, str]]] = {}
        for node in self.graph.nodes:
            if node.block is not None:
                signatures.setdefault(node.block, []).append((node.kind, str(node.attributes)))
        alike: dict[object, list[int]] = {}
        for block, signature in signatures.items():
            alike.setdefault(tuple(signature), []).append(block)
        return {group[0]: group for group in alike.values()}

    def text(self) -> str:
        """Formats a table with a line per node; identical blocks are listed once, with the numbers of one block."""
        shown = [node for node in self.graph.nodes if node.block is None or node.block in self.blocks]
        title = f"{self._headline()}, {self.total.bytes / 1e6:,.0f} MB moved"
        columns: tuple[str, ...] = _COLUMNS
        if self.launches is not None:
            title += f", {self.launches.total.total:,} launches, {self.launches.per_block} a block"
            columns += ("launches",)
        return text_table(title, columns, [self._row(node) for node in shown])

    def to_json(self) -> dict[str, Any]:
        """Returns every node with its shapes and costs, the totals, and the memory plan."""
        cpu_dtype = self.dtype if self.on_cpu else None
        plan = asdict(plan_memory(self.graph, self.workload, self.itemsize, cpu_dtype=cpu_dtype))
        memory = {name: size for name, size in plan.items() if name.endswith("_bytes")}
        return {
            "workload": asdict(self.workload),
            "itemsize": self.itemsize,
            "parameters": self.graph.parameters,
            "flops": self.total.flops,
            "bytes": self.total.bytes,
            "memory": memory | {"peak_bytes": sum(memory.values())},
            "launches": self.launches and {**asdict(self.launches.total), "per_block": self.launches.per_block},
            "nodes": [self._node_json(node) for node in self.graph.nodes],
        }

    def to_dot(self, title: str = "Layer graph") -> str:
        """Formats the graph as Graphviz DOT; each group of identical blocks is one cluster."""
        first_of = {block: first for first, group in self.blocks.items() for block in group}
        shown: dict[str, str] = {}  # node → the node that is drawn for it
        clusters: dict[int | None, list[str]] = {None: []}
        for name in self.graph.inputs:
            shown[name] = name
            clusters[None].append(_dot_node(name, "input", [self._shapes([name])]))
        for node in self.graph.nodes:
            first = None if node.block is None else first_of[node.block]
            local = node.name.removeprefix(f"blocks.{node.block}.")
            shown[node.name] = local if first is None else f"blocks.{first}.{local}"
            if node.block == first:
                parameters = [f"{self._parameters(node):,} parameters"] if node.weights else []
                kind = [self._kind(node)] if self._kind(node) != local else []
                lines = [*kind, self._shapes(node.outputs), *parameters]
                clusters.setdefault(first, []).append(_dot_node(node.name, node.kind, lines, local))
        writers = {name: node.name for node in self.graph.nodes for name in node.outputs}
        names = [*self.graph.inputs, *(node.name for node in self.graph.nodes)]
        order = {name: place for place, name in enumerate(names)}
        pairs = [(writers.get(name, name), node.name) for node in self.graph.nodes for name in node.inputs]
        edges = dict.fromkeys((shown[source], shown[target]) for source, target in pairs)
        parts = [f"label={_quote(title, self._headline())}", *clusters.pop(None)]
        for first, members in clusters.items():
            numbers = self.blocks[first or 0]
            label = f"blocks {', '.join(format_ranges(numbers))} × {len(numbers)}"
            parts += [f'subgraph "cluster_{first}" {{', f'label="{label}"; style=rounded', *members, "}"]
        cluster = {name: name.split(".")[:2] for name in order}
        for source, target in edges:
            if order[source] < order[target]:
                parts.append(f'"{source}" -> "{target}"')
            elif cluster[source] != cluster[target]:
                # Groups that alternate; an edge between blocks of one group is left out.
                parts.append(f'"{source}" -> "{target}" [constraint=false, style=dashed]')
        style = 'labelloc=t; fontname="Helvetica"; node [shape=box, style="rounded,filled", fontname="Helvetica"]'
        return "\n".join(["digraph {", style, *parts, "}", ""])

    def _headline(self) -> str:
        return (
            f"{len(self.graph.nodes)} nodes, {self.graph.parameters / 1e6:,.1f} M parameters; "
            f"{self.workload.patches:,} patches → {self.workload.tokens:,} tokens: {self.total.flops / 1e12:,.3f} TFLOP"
        )

    def _row(self, node: Node) -> Sequence[object]:
        cost = estimate_cost(self.graph, node, self.workload, self.itemsize)
        name = node.name
        if node.block is not None:
            group = self.blocks[node.block]
            numbers = "*" if len(self.blocks) == 1 else ",".join(format_ranges(group))
            name = f"blocks.{numbers}.{name.removeprefix(f'blocks.{node.block}.')} ×{len(group)}"
        return (
            name,
            self._kind(node),
            self._shapes(node.inputs),
            self._shapes(node.outputs),
            f"{self._parameters(node):,}" if node.weights else None,
            f"{cost.flops / 1e9:,.2f}" if cost.flops else None,
            f"{cost.bytes / 1e6:,.2f}",
            *(() if self.launches is None else (self.launches.nodes[node.name].total,)),
        )

    def _node_json(self, node: Node) -> Mapping[str, Any]:
        roles = ("inputs", "outputs", "scratch")
        shapes = {role: {name: self._dimensions(name) for name in getattr(node, role)} for role in roles}
        return {
            "name": node.name,
            "kind": node.kind,
            "block": node.block,
            **shapes,
            "weights": {role: list(self.graph.weights[name].shape) for role, name in node.weights.items()},
            "attributes": dict(node.attributes),
            "parameters": self._parameters(node),
            **asdict(estimate_cost(self.graph, node, self.workload, self.itemsize)),
            "launches": self.launches and self.launches.nodes[node.name].total,
        }

    def _kind(self, node: Node) -> str:
        """Returns the kind of a node and the operations fused into it."""
        attributes, parts = node.attributes, [str(node.kind)]
        padded = attributes.get("padded_head_dim")
        if padded:
            parts.append(f"heads of {attributes['head_dim']} in {padded} columns")
        if node.kind == "attention" and attributes["windows"]:
            parts.append("windows")
        if node.kind in ("linear", "mlp") and attributes["activation"]:
            parts.append(attributes["activation"])
        if len(node.inputs) > 1 and node.kind in _FUSED:
            parts.append(_FUSED[node.kind])
        return " + ".join(parts)

    def _parameters(self, node: Node) -> int:
        return sum(prod(self.graph.weights[name].useful_shape) for name in node.weights.values())

    def _shapes(self, names: Sequence[str]) -> str:
        return ", ".join(str(self._dimensions(name)) for name in names)

    def _dimensions(self, name: str) -> list[int]:
        value = self.graph.values[name]
        return [value.held_rows(self.workload), value.width]


def format_ranges(numbers: Iterable[int]) -> list[str]:
    """Formats ascending numbers, consecutive ones as first–last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def _dot_node(name: str, kind: str, lines: Sequence[str], label: str = "") -> str:
    return f'"{name}" [label={_quote(label or name, *lines)}, fillcolor="{_COLORS.get(kind, "#dbeafe")}"]'


def _quote(*lines: str) -> str:
    """Quotes lines of text; DOT takes the escapes of JSON."""
    return json.dumps("\n".join(lines), ensure_ascii=False)
