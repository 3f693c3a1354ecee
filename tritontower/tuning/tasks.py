"""Tuning tasks of a tower: its graph and the sizes of its images give the distinct launches of its kernels.

Nodes whose launches a table cannot tell apart (same kernel, dtype, constants and buckets of sizes) are one task.  Constants
and sizes have the names with which the kernels call :func:`tritontower.kernels.runtime.registry.lookup`.
"""

from collections.abc import Iterator, Sequence
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


def list_tasks(config: TowerConfig, patches: Sequence[int], dtype: torch.dtype) -> list[Task]:
    """Lists the distinct tasks of batches with ``patches`` patches each, in the order of the graph.

    A tower with a fixed image size gets the number of images that comes nearest to each of ``patches``.
    """
    graph = fold_still_images(fuse(build(config), (*DEFAULT_PASSES, chunk_mlp, *KERNEL_PASSES)))
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
    names = list(dict.fromkeys(_short(node) for node in graph.nodes))

    def order(task: Task) -> tuple[int, int]:
        name = max((name for name in names if task.node.startswith(name)), key=len)
        return names.index(name), max(int(size) for _, size in task.sizes)

    return sorted(found.values(), key=order)


def _short(node: Node) -> str:
    """Returns a node's name without its block."""
    return node.name if node.block is None else node.name.split(".", 2)[2]


def _of_node(graph: Graph, node: Node, workload: Workload, dtype: str) -> Iterator[Task]:
    value = graph.values[node.outputs[0]]
    if value.rows not in _ROWS_THAT_MATTER or workload.rows(value.rows) < 1:
        return
    name, rows, attributes = _short(node), workload.rows(value.rows), node.attributes
    widths = {role: graph.weights[weight].shape for role, weight in node.weights.items()}
    added = len(node.inputs) > 1

    def linear(name: str, suffix: str, activation: str | None, *, residual: bool = False) -> Task:
        columns, inner = widths[f"weight{suffix}"]
        columns //= 2 if "gated" in str(activation) else 1
        constants = make_pairs(columns=columns, inner=inner, activation=activation, residual=residual)
        return Task(
            "gemm.linear", dtype, constants, make_pairs(rows=rows), make_pairs(bias=f"bias{suffix}" in widths), name
        )

    def norm(name: str, rows: int, width: int, *, residual: bool = False) -> Task:
        constants = make_pairs(width=width, kind=attributes["norm"], residual=residual)
        details = make_pairs(rounding=attributes["rounding"])
        return Task("rowwise.norm", dtype, constants, make_pairs(rows=rows), details, name)

    if node.kind == "linear":
        yield linear(name, "", attributes["activation"], residual=added)
    elif node.kind == "mlp":
        yield linear(f"{name}.up", "_1", attributes["activation"])
        yield linear(f"{name}.down", "_2", None, residual=added)
    elif node.kind == "projector":
        if "norm_weight" in widths:
            (width,) = widths["norm_weight"]
            # Its norm runs before the rows are merged, or on merged rows.
            yield norm(f"{name}.norm", rows * widths["weight_1"][1] // width, width)
        yield linear(f"{name}.1", "_1", attributes["activation"])
        yield linear(f"{name}.2", "_2", None)
    elif node.kind == "norm":
        yield norm(name, rows, value.width, residual=added)
    elif node.kind == "qkv_projection":
        columns, inner = widths["weight"]
        details = {key: attributes[key] for key in ("heads", "padded_head_dim", "query_scale")}
        yield Task(
            "gemm.qkv_projection",
            dtype,
            make_pairs(columns=columns, inner=inner, head_dim=attributes["head_dim"]),
            make_pairs(rows=rows),
            make_pairs(bias="bias" in widths, rotated=added, **details),
            name,
        )
    elif node.kind == "patch_projection":
        columns, inner = widths["weight"]
        pixels = graph.values[node.inputs[0]].dtype
        yield Task(
            "gemm.patch_projection",
            dtype,
            make_pairs(columns=columns, inner=inner, pixels=dtype if pixels == "activation" else pixels),
            make_pairs(rows=rows),
            make_pairs(bias="bias" in widths, positions=added),
            name,
        )
    elif node.kind == "attention":
        scores = workload.window_scores if attributes["windows"] else workload.scores
        # Segments of equal length whose squares add up to the scores.
        length = max(1, round(scores / workload.patches))
        bound, padded = attributes["length_bound"] or 0, attributes.get("padded_head_dim")
        width, scaled = padded or attributes["head_dim"], attributes.get("queries_scaled", False)
        yield Task(
            "attention.attention",
            dtype,
            make_pairs(head_dim=attributes["head_dim"], padded=padded is not None, bounded=bound),
            make_pairs(longest=min(length, bound) if bound else length),
            make_pairs(heads=attributes["heads"], rows=workload.patches, width=width, queries_scaled=scaled),
            name,
        )


def make_pairs(**values: Any) -> Pairs:
    """Returns the values by name as a hashable value."""
    return tuple(sorted(values.items()))
