"""A layer graph in words, as JSON and as a drawing: shapes, parameters, operations, bytes and launches of every node."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from tritontower.drawing import DrawnNode, collapse_repeats, graph_svg, number_ranges
from tritontower.text_table import text_table

from .cost import Cost, estimate_cost, estimate_total_cost
from .ir import Graph, Node, Workload
from .launch_count import GraphLaunches, count_launches
from .memory_plan import plan_memory

__all__ = ["Description"]

COLUMNS = ("node", "kind", "reads", "writes", "parameters", "GFLOP", "MB moved", "launches")


@dataclass(frozen=True)
class Description:
    """A graph, seen for one workload.

    Attributes:
        graph: what is described.
        workload: how many patches, tokens and scores.
        itemsize: bytes of one activation and of one weight.
        device: where kernels run it, which decides on how many launches a product takes; ``None``: one.
        dtype: of the activations, which decides with it.
        on_cpu: whether torch's own operations run it on a CPU, whose temporaries then count as memory.
    """

    graph: Graph
    workload: Workload
    itemsize: int
    device: torch.device | None = None
    dtype: torch.dtype = torch.bfloat16
    on_cpu: bool = False

    @property
    def total(self) -> Cost:
        """Operations and bytes of one pass."""
        return estimate_total_cost(self.graph, self.workload, self.itemsize)

    @cached_property
    def launches(self) -> GraphLaunches:
        """Launches of one pass, by node and by block."""
        return count_launches(self.graph, self.workload, dtype=self.dtype, device=self.device)

    def text(self) -> str:
        """A table with a line per node; repeated blocks are shown once, their numbers for one block."""
        rows = [self._row(node, blocks) for node, blocks in self._shown()]
        workload, total = self.workload, self.total
        title = (
            f"{len(self.graph.nodes)} nodes, {self.graph.parameters / 1e6:,.1f} M parameters; "
            f"{workload.patches:,} patches → {workload.tokens:,} tokens: {total.flops / 1e12:,.3f} TFLOP, "
            f"{total.bytes / 1e6:,.0f} MB moved, {self.launches.total.total:,} launches"
            + (f", {self.launches.per_block.total} a block" if self.launches.blocks else "")
        )
        return text_table(title, COLUMNS, rows)

    def to_json(self) -> dict[str, Any]:
        """Every node with its shapes and costs, the totals, and the memory plan."""
        plan = plan_memory(self.graph, self.workload, self.itemsize, cpu_dtype=self.dtype if self.on_cpu else None)
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
                "workspace_bytes": plan.workspace_bytes,
                "peak_bytes": plan.peak_bytes,
            },
            "launches": {
                **asdict(self.launches.total),
                "per_block": self.launches.per_block.total,
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
        cost = estimate_cost(self.graph, node, self.workload, self.itemsize)
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
            self.launches.nodes[node.name].total,
        )

    def _node_json(self, node: Node) -> Mapping[str, Any]:
        cost = estimate_cost(self.graph, node, self.workload, self.itemsize)
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
            "launches": self.launches.nodes[node.name].total,
        }

    def _epilogue(self, node: Node) -> list[str]:
        """What a node does besides what its kind says."""
        attributes, several = node.attributes, len(node.inputs) > 1
        padded = attributes.get("padded_head_dim")
        said = [f"heads of {attributes['head_dim']} in {padded} columns"] if padded else []
        if node.kind == "attention" and attributes["windows"]:
            said.append("windows")
        elif node.kind == "patch_projection" and several:
            said.append("positions")
        elif node.kind == "qkv_projection" and several:
            said.append("rotation")
        elif node.kind in ("linear", "mlp"):
            said += [attributes["activation"]] if attributes["activation"] else []
            said += ["residual"] if several else []
        return said

    def _remarks(self, node: Node) -> list[str]:
        epilogue = self._epilogue(node)
        parameters = [f"{self._parameters(node):,} parameters"] if node.weights else []
        return ([f"+ {', '.join(epilogue)}"] if epilogue else []) + parameters

    def _parameters(self, node: Node) -> int:
        return sum(prod(self.graph.weights[name].useful_shape) for name in node.weights.values())

    def _shapes(self, names: Sequence[str]) -> str:
        return ", ".join(map(self._shape, names))

    def _shape(self, name: str) -> str:
        return "[{}, {}]".format(*self._dimensions(name))

    def _dimensions(self, name: str) -> list[int]:
        value = self.graph.values[name]
        return [value.held_rows(self.workload), value.width]


def _inputs_first(drawn: Sequence[DrawnNode]) -> list[DrawnNode]:
    return sorted(drawn, key=lambda node: node.kind != "input")
