"""What there is to tune in a tower: its graph and the sizes of its images → the distinct launches of its kernels.

Two nodes whose launches the tables cannot tell apart (the same kernel, dtype, constants and buckets of sizes) are one
task.  The names of constants and sizes are those with which the kernels ask :func:`tritontower.kernels.runtime.registry.tuned`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritontower.batch.packed_batch import expected_workload
from tritontower.config import TowerConfig
from tritontower.graph.builder import build
from tritontower.graph.fusion import DEFAULT_PASSES, KERNEL_PASSES, chunk_mlp, fold_still_images, fuse
from tritontower.graph.ir import Graph, Node, Workload
from tritontower.kernels.runtime.registry import bucket, dtype_name

__all__ = ["PATCHES", "Task", "tasks_of", "tower_graph"]

PATCHES = (64, 256, 1024, 4096, 16384)
"""Patches of a pass for which a tower is tuned unless others are asked for."""

Facts = tuple[tuple[str, Any], ...]

_ROWS_THAT_MATTER = ("patches", "selected", "merged", "tokens")


@dataclass(frozen=True)
class Task:
    """One kind of launch, as the tables see it, and what else has to be known to do it."""

    kernel: str
    dtype: str
    constants: Facts
    sizes: Facts
    facts: Facts
    """What the tables do not tell apart: heads, biases, the rows of all segments."""
    node: str
    """The first node of the graph that launches it, by its kind of name: without the number of its block."""
    launches: int = 1
    """How often one pass does."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What an entry of a table belongs to."""
        return self.kernel, self.dtype, self.constants, tuple((name, bucket(size)) for name, size in self.sizes)

    @property
    def group(self) -> tuple[Any, ...]:
        """What the task has in common with the same launch of other sizes."""
        return self.kernel, self.dtype, self.constants

    def fact(self, name: str) -> Any:
        """A constant, a size or a fact, by its name."""
        return dict((*self.constants, *self.sizes, *self.facts))[name]

    @property
    def title(self) -> str:
        """What it is, in a table."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes)
        shown = {name: value for name, value in self.constants if value not in (None, False)}
        if self.kernel in ("gemm.linear", "gemm.qkv_projection", "gemm.patch_projection"):
            shown = {f"{shown.pop('inner')} → {shown.pop('columns')}": True} | shown
        words = [name if value is True else f"{name} {value}" for name, value in shown.items()]
        return f"{self.node}: {self.kernel}, {sizes}, {', '.join(words)}"


def tower_graph(config: TowerConfig) -> Graph:
    """The graph of a tower for still images as it runs where kernels run."""
    return fold_still_images(fuse(build(config), (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)))


def tasks_of(config: TowerConfig, patches: Sequence[int], dtype: torch.dtype) -> list[Task]:
    """The distinct tasks of a tower's passes over images of ``patches`` patches each, in the order of the graph.

    A tower that sees images of one size only gets as many of them as come nearest to each of ``patches``.
    """
    graph = tower_graph(config)
    found: dict[tuple[Any, ...], Task] = {}
    for count in patches:
        counts = [count]
        if config.num_patches is not None:
            counts = [config.num_patches] * max(1, round(count / config.num_patches))
        workload = expected_workload(config, counts)
        in_pass: dict[tuple[Any, ...], Task] = {}
        for node in graph.nodes:
            for task in _of_node(graph, node, workload, dtype_name(dtype)):
                known = in_pass.get(task.key)
                in_pass[task.key] = task if known is None else replace(known, launches=known.launches + 1)
        found = in_pass | found
    return sorted(found.values(), key=_order(graph))


def _order(graph: Graph) -> Callable[[Task], tuple[int, int]]:
    names = list(dict.fromkeys(_short(node) for node in graph.nodes))

    def order(task: Task) -> tuple[int, int]:
        name = max((name for name in names if task.node.startswith(name)), key=len)
        return names.index(name), _size(task)

    return order


def _size(task: Task) -> int:
    return max(int(size) for _, size in task.sizes)


def _short(node: Node) -> str:
    """A node's name without its block."""
    return node.name if node.block is None else node.name.split(".", 2)[2]


def _of_node(graph: Graph, node: Node, workload: Workload, dtype: str) -> Iterator[Task]:
    value = graph.values[node.outputs[0]]
    if value.rows not in _ROWS_THAT_MATTER or workload.rows(value.rows) < 1:
        return
    name = _short(node)
    rows = workload.rows(value.rows)
    widths = {role: graph.weights[weight].shape for role, weight in node.weights.items()}
    if node.kind == "linear":
        added = len(node.inputs) > 1
        yield _linear(name, dtype, rows, widths, "", node.attributes["activation"], residual=added)
    elif node.kind == "mlp":
        added = len(node.inputs) > 1
        yield _linear(f"{name}.up", dtype, rows, widths, "_1", node.attributes["activation"], residual=False)
        yield _linear(f"{name}.down", dtype, rows, widths, "_2", None, residual=added)
    elif node.kind == "projector":
        # Its norm takes the default: it runs once a pass, on rows that are read once.
        yield _linear(f"{name}.1", dtype, rows, widths, "_1", node.attributes["activation"], residual=False)
        yield _linear(f"{name}.2", dtype, rows, widths, "_2", None, residual=False)
    elif node.kind == "norm":
        yield _norm(name, dtype, rows, value.width, node, residual=len(node.inputs) > 1)
    elif node.kind == "qkv_projection":
        columns, inner = widths["weight"]
        attributes = node.attributes
        yield Task(
            "gemm.qkv_projection",
            dtype,
            _facts(columns=columns, inner=inner, head_dim=attributes["head_dim"]),
            _facts(rows=rows),
            _facts(
                heads=attributes["heads"],
                padded_head_dim=attributes["padded_head_dim"],
                bias="bias" in widths,
                rotated=len(node.inputs) > 1,
                query_scale=attributes["query_scale"],
            ),
            name,
        )
    elif node.kind == "patch_projection":
        columns, inner = widths["weight"]
        pixels = graph.values[node.inputs[0]].dtype
        yield Task(
            "gemm.patch_projection",
            dtype,
            _facts(columns=columns, inner=inner, pixels=dtype if pixels == "activation" else pixels),
            _facts(rows=rows),
            _facts(bias="bias" in widths, positions=len(node.inputs) > 1),
            name,
        )
    elif node.kind == "attention":
        yield _attention(node, workload, dtype, name)


def _attention(node: Node, workload: Workload, dtype: str, name: str) -> Task:
    attributes = node.attributes
    scores = workload.window_scores if attributes["windows"] else workload.scores
    # Segments of one length: that whose squares add up to the scores.
    length = max(1, round(scores / workload.patches))
    bound = attributes["length_bound"] or 0
    padded = attributes.get("padded_head_dim")
    return Task(
        "attention.attention",
        dtype,
        _facts(head_dim=attributes["head_dim"], padded=padded is not None, bounded=bound),
        _facts(longest=min(length, bound) if bound else length),
        _facts(
            heads=attributes["heads"],
            rows=workload.patches,
            width=padded or attributes["head_dim"],
            queries_scaled=attributes.get("queries_scaled", False),
        ),
        name,
    )


def _linear(
    name: str,
    dtype: str,
    rows: int,
    widths: Mapping[str, tuple[int, ...]],
    suffix: str,
    activation: str | None,
    *,
    residual: bool,
) -> Task:
    weight_rows, inner = widths[f"weight{suffix}"]
    gated = activation is not None and "gated" in activation
    return Task(
        "gemm.linear",
        dtype,
        _facts(columns=weight_rows // (2 if gated else 1), inner=inner, activation=activation, residual=residual),
        _facts(rows=rows),
        _facts(bias=f"bias{suffix}" in widths),
        name,
    )


def _norm(name: str, dtype: str, rows: int, width: int, node: Node, *, residual: bool) -> Task:
    return Task(
        "rowwise.norm",
        dtype,
        _facts(width=width, kind=node.attributes["norm"], residual=residual),
        _facts(rows=rows),
        _facts(rounding=node.attributes["rounding"]),
        name,
    )


def _facts(**values: Any) -> Facts:
    return tuple(sorted(values.items()))
