"""A layer graph in words, as JSON and as a drawing: shapes, parameters, operations and bytes of every node."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .costs import Cost, cost_of, total_cost
from .drawing import DrawnNode, collapse_repeats, graph_svg, number_ranges, text_table
from .graph import Graph, Node, Workload
from .memory import plan_memory

__all__ = ["Description"]

COLUMNS = ("node", "kind", "reads", "writes", "parameters", "GFLOP", "MB moved")


@dataclass(frozen=True)
class Description:
    """A graph, seen for one workload.

    Attributes:
        graph: what is described.
        workload: how many patches, tokens and scores.
        itemsize: bytes of one activation and of one weight.
    """

    graph: Graph
    workload: Workload
    itemsize: int

    @property
    def total(self) -> Cost:
        """Operations and bytes of one pass."""
        return total_cost(self.graph, self.workload, self.itemsize)

    def text(self) -> str:
        """A table with a line per node; repeated blocks are shown once, their numbers for one block."""
        rows = [self._row(node, blocks) for node, blocks in self._shown()]
        workload, total = self.workload, self.total
        title = (
            f"{len(self.graph.nodes)} nodes, {self.graph.parameters / 1e6:,.1f} M parameters; "
            f"{workload.patches:,} patches → {workload.tokens:,} tokens: {total.flops / 1e12:,.3f} TFLOP, "
            f"{total.bytes / 1e6:,.0f} MB moved"
        )
        return text_table(title, COLUMNS, rows)

    def to_json(self) -> dict[str, Any]:
        """Every node with its shapes and costs, the totals, and the memory plan."""
        plan = plan_memory(self.graph, self.workload, self.itemsize)
        return {
            "workload": asdict(self.workload),
            "itemsize": self.itemsize,
            "parameters": self.graph.parameters,
            "flops": self.total.flops,
            "bytes": self.total.bytes,
            "memory": {
                "arena_bytes": plan.arena_bytes,
                "input_bytes": plan.input_bytes,
                "output_bytes": plan.output_bytes,
                "peak_bytes": plan.peak_bytes,
            },
            "nodes": [self._node_json(node) for node in self.graph.nodes],
        }

    def svg(self, title: str = "Layer graph") -> str:
        """A drawing of the graph, its repeated blocks drawn once."""
        drawn = [
            DrawnNode(node.name, node.kind, (self._shapes(node.outputs), *self._remarks(node)))
            for node in self.graph.nodes
        ]
        drawn += [DrawnNode(name, "input", (self._shape(name),)) for name in self.graph.inputs]
        writers = {name: node.name for node in self.graph.nodes for name in node.outputs}
        edges = [(writers.get(name, name), node.name) for node in self.graph.nodes for name in node.inputs]
        nodes, edges, groups = collapse_repeats(_inputs_first(drawn), list(dict.fromkeys(edges)))
        subtitle = (
            f"{self.workload.patches:,} patches → {self.workload.tokens:,} tokens · "
            f"{self.graph.parameters / 1e6:,.1f} M parameters · {self.total.flops / 1e12:,.2f} TFLOP"
        )
        return graph_svg(nodes, edges, groups, title=title, subtitle=subtitle)

    def _shown(self) -> list[tuple[Node, Sequence[int]]]:
        """The nodes outside blocks and those of the first block of each kind, with the blocks that are alike."""
        blocks: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node.block is not None:
                blocks.setdefault(node.block, []).append(node)
        alike: dict[object, list[int]] = {}
        for block, nodes in blocks.items():
            alike.setdefault(tuple((node.kind, str(node.attributes)) for node in nodes), []).append(block)
        firsts = {group[0]: group for group in alike.values()}
        shown: list[tuple[Node, Sequence[int]]] = []
        for node in self.graph.nodes:
            if node.block is None:
                shown.append((node, ()))
            elif node.block in firsts:
                shown.append((node, firsts[node.block]))
        return shown

    def _row(self, node: Node, blocks: Sequence[int]) -> Sequence[object]:
        cost = cost_of(self.graph, node, self.workload, self.itemsize)
        name = node.name
        if node.block is not None:
            every = len(blocks) == 1 + max(other.block for other in self.graph.nodes if other.block is not None)
            which = "*" if every else ",".join(number_ranges(blocks))
            name = f"{name.replace(f'blocks.{node.block}.', f'blocks.{which}.')} ×{len(blocks)}"
        return (
            name,
            " + ".join((node.kind, *self._epilogue(node))),
            self._shapes(node.inputs),
            self._shapes(node.outputs),
            f"{self._parameters(node):,}" if node.weights else None,
            f"{cost.flops / 1e9:,.2f}" if cost.flops else None,
            f"{cost.bytes / 1e6:,.2f}",
        )

    def _node_json(self, node: Node) -> Mapping[str, Any]:
        cost = cost_of(self.graph, node, self.workload, self.itemsize)
        return {
            "name": node.name,
            "kind": node.kind,
            "block": node.block,
            "inputs": {name: self._dimensions(name) for name in node.inputs},
            "outputs": {name: self._dimensions(name) for name in node.outputs},
            "scratch": {name: self._dimensions(name) for name in node.scratch},
            "weights": {role: list(self.graph.weights[name].shape) for role, name in node.weights.items()},
            "attributes": dict(node.attributes),
            "parameters": self._parameters(node),
            "flops": cost.flops,
            "bytes": cost.bytes,
        }

    def _epilogue(self, node: Node) -> list[str]:
        """What a node does besides what its kind says."""
        if node.kind == "attention" and node.attributes["windows"]:
            return ["windows"]
        if node.kind == "patch_projection" and len(node.inputs) > 1:
            return ["positions"]
        if node.kind != "linear":
            return []
        kind = node.attributes["activation"]
        return ([kind] if kind else []) + (["residual"] if len(node.inputs) > 1 else [])

    def _remarks(self, node: Node) -> list[str]:
        epilogue = self._epilogue(node)
        parameters = [f"{self._parameters(node):,} parameters"] if node.weights else []
        return ([f"+ {', '.join(epilogue)}"] if epilogue else []) + parameters

    def _parameters(self, node: Node) -> int:
        return sum(self.graph.weights[name].parameters for name in node.weights.values())

    def _shapes(self, names: Sequence[str]) -> str:
        return ", ".join(map(self._shape, names))

    def _shape(self, name: str) -> str:
        return "[{}, {}]".format(*self._dimensions(name))

    def _dimensions(self, name: str) -> list[int]:
        value = self.graph.values[name]
        return [self.workload.rows(value.rows), value.width]


def _inputs_first(drawn: Sequence[DrawnNode]) -> list[DrawnNode]:
    return sorted(drawn, key=lambda node: node.kind != "input")
