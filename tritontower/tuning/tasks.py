"""Tuning tasks of a tower: its graph and the sizes of its images give the distinct launches of its kernels.

Nodes whose launches a table cannot tell apart (same kernel, dtype, constants and buckets of sizes) are one task.  Constants
and sizes have the names with which the kernels call :func:`tritontower.kernels.runtime.registry.lookup`.
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

PATCHES = (64, 256, 1024, 4096, 16384)
"""Default numbers of patches in a batch to tune for."""

Pairs = tuple[tuple[str, Any], ...]

_ROWS_THAT_MATTER = ("patches", "selected", "merged", "tokens")


@dataclass(frozen=True)
class Task:
    """One kind of launch."""

    kernel: str
    dtype: str
    constants: Pairs
    sizes: Pairs
    details: Pairs
    """Shapes that a table does not tell apart: heads, biases, the rows of all segments."""
    node: str
    """Name of the first node that launches it, without the number of its block."""
    launches: int = 1
    """Launches per forward pass."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Kernel, dtype, constants and buckets of sizes, as in a table."""
        return self.kernel, self.dtype, self.constants, tuple((name, bucket(size)) for name, size in self.sizes)

    @property
    def group(self) -> tuple[Any, ...]:
        """Kernel, dtype and constants, which tasks of other sizes share."""
        return self.kernel, self.dtype, self.constants

    def get(self, name: str) -> Any:
        """Returns a constant, a size or a detail."""
        return dict((*self.constants, *self.sizes, *self.details))[name]

    @property
    def is_gated(self) -> bool:
        """True if each output column takes two columns of the weight."""
        return "gated" in str(dict(self.constants).get("activation"))

    @property
    def flops(self) -> float:
        """Floating-point operations of the matmuls of one launch, without padding; 0 for norms."""
        if self.kernel == "rowwise.norm":
            return 0.0
        if self.kernel == "attention.attention":
            length = self.get("longest")
            segments = max(1, self.get("rows") // length)
            return float(4 * segments * length**2 * self.get("heads") * self.get("head_dim"))
        factor = 2 if self.is_gated else 1
        return float(2 * self.get("rows") * self.get("columns") * self.get("inner") * factor)

    @property
    def title(self) -> str:
        """One line for a report."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes)
        shown = {name: value for name, value in self.constants if value not in (None, False)}
        if self.kernel in ("gemm.linear", "gemm.qkv_projection", "gemm.patch_projection"):
            shown = {f"{shown.pop('inner')} → {shown.pop('columns')}": True} | shown
        words = [name if value is True else f"{name} {value}" for name, value in shown.items()]
        return f"{self.node}: {self.kernel}, {sizes}, {', '.join(words)}"


def build_tower_graph(config: TowerConfig) -> Graph:
    """Builds the graph of a tower for still images, with the passes that run on a GPU."""
    return fold_still_images(fuse(build(config), (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)))


def list_tasks(config: TowerConfig, patches: Sequence[int], dtype: torch.dtype) -> list[Task]:
    """Lists the distinct tasks of batches with ``patches`` patches each, in the order of the graph.

    A tower with a fixed image size gets the number of images that comes nearest to each of ``patches``.
    """
    graph = build_tower_graph(config)
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
    """Returns a node's name without its block."""
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
        if "norm_weight" in widths:
            (width,) = widths["norm_weight"]
            # Its norm runs before the rows are merged, or on merged rows.
            yield _norm(f"{name}.norm", dtype, rows * widths["weight_1"][1] // width, width, node, residual=False)
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
            _pairs(columns=columns, inner=inner, head_dim=attributes["head_dim"]),
            _pairs(rows=rows),
            _pairs(
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
            _pairs(columns=columns, inner=inner, pixels=dtype if pixels == "activation" else pixels),
            _pairs(rows=rows),
            _pairs(bias="bias" in widths, positions=len(node.inputs) > 1),
            name,
        )
    elif node.kind == "attention":
        yield _attention(node, workload, dtype, name)


def _attention(node: Node, workload: Workload, dtype: str, name: str) -> Task:
    attributes = node.attributes
    scores = workload.window_scores if attributes["windows"] else workload.scores
    # Segments of equal length whose squares add up to the scores.
    length = max(1, round(scores / workload.patches))
    bound = attributes["length_bound"] or 0
    padded = attributes.get("padded_head_dim")
    return Task(
        "attention.attention",
        dtype,
        _pairs(head_dim=attributes["head_dim"], padded=padded is not None, bounded=bound),
        _pairs(longest=min(length, bound) if bound else length),
        _pairs(
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
    gated = "gated" in str(activation)
    return Task(
        "gemm.linear",
        dtype,
        _pairs(columns=weight_rows // (2 if gated else 1), inner=inner, activation=activation, residual=residual),
        _pairs(rows=rows),
        _pairs(bias=f"bias{suffix}" in widths),
        name,
    )


def _norm(name: str, dtype: str, rows: int, width: int, node: Node, *, residual: bool) -> Task:
    return Task(
        "rowwise.norm",
        dtype,
        _pairs(width=width, kind=node.attributes["norm"], residual=residual),
        _pairs(rows=rows),
        _pairs(rounding=node.attributes["rounding"]),
        name,
    )


def _pairs(**values: Any) -> Pairs:
    return tuple(sorted(values.items()))
