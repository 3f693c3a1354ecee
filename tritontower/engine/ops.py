"""Binds each node of a layer graph to its weights and to an operation of :mod:`tritontower.kernels`.

The tensors' device selects the backend (compiled kernel, interpreter, torch) in :mod:`tritontower.kernels.runtime.dispatch`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tritontower.errors import UsageError
from tritontower.graph.ir import Node, NodeKind, Rows, Weight
from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.attention.pooling_head import attention_pooling
from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.patch_projection import fold_temporal, patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection
from tritontower.kernels.rowwise.activations import activation, add
from tritontower.kernels.rowwise.gather import gather_rows
from tritontower.kernels.rowwise.mean_pool import mean_rows
from tritontower.kernels.rowwise.norm import norm
from tritontower.kernels.rowwise.positions import axial_frequencies, rotary_table
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime.segments import Segments
from tritontower.kernels.runtime.valid_rows import ValidRows

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchMetadata:
    """Metadata of the batch that a step needs beside the tensors.

    ``valid_rows`` has an entry for each padded dimension; there are none if the tensors have exactly the batch's rows.
    """

    segments: Segments
    windows: Segments | None
    tiles: Segments
    side: int
    valid_rows: Mapping[Rows, ValidRows] = field(default_factory=dict)

    def get_windows(self) -> Segments:
        """Returns the windows.

        Raises:
            UsageError: the batch has none.
        """
        if self.windows is None:
            raise UsageError(
                "the batch must have windows for a tower with window attention; create it with this tower's preprocess()"
            )
        return self.windows


Step = Callable[[Tensors, BatchMetadata], None]
Weights = Mapping[str, torch.Tensor]

TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_is": lambda source: source,
    "flatten": lambda source: source.flatten(1),
    "fold_temporal": fold_temporal,
}


def bind_weight(weight: Weight, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns a weight as its node uses it.

    Args:
        weight: the weight.
        sources: tensors as returned by :func:`.weight_loader.read_weights`.  If a reordered tensor is missing, a reordered
            copy of the canonical one is made.
    """
    held = sources.get(weight.held_name)
    if held is None and weight.weight_layout is not None:
        held = weight.weight_layout.apply(sources[weight.source])
    return TRANSFORMS[weight.transform](sources[weight.source] if held is None else held)


def _bind_patch_projection(node: Node, weights: Weights) -> Step:
    pixels, *index = node.inputs
    (rows,) = node.outputs
    weight, bias, table = _get_weights(node, weights, "weight", "bias", "position_table")

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        how: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows), "out": tensors[rows]}
        if index:
            how |= {"position_table": table, "position_index": tensors[index[0]].squeeze(1)}
        patch_projection(tensors[pixels], weight, bias, **how)

    return step


def _bind_add_positions(node: Node, weights: Weights) -> Step:
    rows, index, *share = node.inputs
    (result,) = node.outputs
    (table,) = _get_weights(node, weights, "position_table")

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        shares = tensors[share[0]] if share else None
        gather_rows(table, tensors[index], shares, residual=tensors[rows], out=tensors[result])

    return step


def _bind_rotary_table(node: Node, weights: Weights) -> Step:
    (positions,), (cosines, sines) = node.inputs, node.outputs
    frequencies = axial_frequencies(*(node.attributes[name] for name in ("head_dim", "theta", "layout")))

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        where = {"out_cos": tensors[cosines], "out_sin": tensors[sines]}
        rotary_table(tensors[positions], frequencies, side=metadata.side, **where)

    return step


def _bind_norm(node: Node, weights: Weights) -> Step:
    rows, *residual = node.inputs
    normed, *summed = node.outputs
    weight, bias = _get_weights(node, weights, "weight", "bias")
    how = _norm_attributes(node)

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        added: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows)}
        if residual:
            added |= {"residual": tensors[residual[0]], "residual_out": tensors[summed[0]]}
        norm(tensors[rows], weight, bias, **how, **added, out=tensors[normed])

    return step


def _bind_linear(node: Node, weights: Weights) -> Step:
    rows, *residual = node.inputs
    (result,) = node.outputs
    weight, bias = _get_weights(node, weights, "weight", "bias")
    kind, joined = node.attributes["activation"], node.attributes["joined"]

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        x, added = _join_rows(tensors[rows], joined), tensors[residual[0]] if residual else None
        valid_rows = metadata.valid_rows.get(node.rows)
        linear(x, weight, bias, activation=kind, residual=added, valid_rows=valid_rows, out=tensors[result])

    return step


def _bind_activation(node: Node, weights: Weights) -> Step:
    (rows,), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        activation(tensors[rows], node.attributes["activation"], out=tensors[result])

    return step


def _bind_add(node: Node, weights: Weights) -> Step:
    (first, second), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        add(tensors[first], tensors[second], out=tensors[result])

    return step


def _bind_rope(node: Node, weights: Weights) -> Step:
    qkv, cosines, sines = node.inputs
    shape = (3, node.attributes["heads"], node.attributes["head_dim"])

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        q, k, _ = tensors[qkv].unflatten(1, shape).unbind(1)
        dtype = torch.float32 if node.attributes["rotation"] == "float32" else q.dtype
        rope_(q, k, tensors[cosines], tensors[sines], rotation_dtype=dtype)

    return step


def _bind_qkv_projection(node: Node, weights: Weights) -> Step:
    rows, *tables = node.inputs
    (qkv,) = node.outputs
    weight, bias = _get_weights(node, weights, "weight", "bias")

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        cosines, sines = (tensors[name] for name in tables) if tables else (None, None)
        where: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows), "out": tensors[qkv]}
        qkv_projection(tensors[rows], weight, bias, cosines, sines, **node.attributes, **where)

    return step


def _bind_attention(node: Node, weights: Weights) -> Step:
    (qkv,), (mixed,) = node.inputs, node.outputs
    heads, head_dim = node.attributes["heads"], node.attributes["head_dim"]
    padded = node.attributes.get("padded_head_dim")
    scaled = node.attributes.get("queries_scaled", False)
    # Padding columns affect neither the scale nor the output.
    how: dict[str, Any] = {
        "scale": None if scaled else head_dim**-0.5,
        "queries_scaled": scaled,
        "length_bound": node.attributes["length_bound"],
        "columns": None if padded is None else head_dim,
    }

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        q, k, v = tensors[qkv].unflatten(1, (3, heads, padded or head_dim)).unbind(1)
        segments = metadata.get_windows() if node.attributes["windows"] else metadata.segments
        flash_attention_varlen(q, k, v, segments, **how, out=tensors[mixed].unflatten(1, (heads, head_dim)))

    return step


def _bind_mlp(node: Node, weights: Weights) -> Step:
    rows, *residual = node.inputs
    (result,), (hidden,) = node.outputs, node.scratch
    first, first_bias, second, second_bias = _get_weights(node, weights, "weight_1", "bias_1", "weight_2", "bias_2")
    kind = node.attributes["activation"]

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        x, out, between = tensors[rows], tensors[result], tensors[hidden]
        total, most = x.shape[0], between.shape[0]
        added = tensors[residual[0]] if residual else None
        for start in range(0, total, most):
            run = slice(start, min(start + most, total))
            valid_rows = metadata.valid_rows.get(node.rows)
            if total > most:
                # The configuration of all rows: that of a short last run could sum in another order.  The count of valid
                # rows is for the first run, where they begin; later runs compute all their rows.
                planned = valid_rows or ValidRows(total)
                valid_rows = planned if start == 0 else ValidRows(planned.planned)
            held, run_added = between[: run.stop - run.start], None if added is None else added[run]
            linear(x[run], first, first_bias, activation=kind, valid_rows=valid_rows, out=held)
            linear(held, second, second_bias, residual=run_added, valid_rows=valid_rows, out=out[run])

    return step


def _bind_select(node: Node, weights: Weights) -> Step:
    features, index = node.inputs[: node.attributes["features"]], node.inputs[node.attributes["features"] :]
    (result,) = node.outputs

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        columns = tensors[result].tensor_split(len(features), dim=1)
        for feature, out in zip(features, columns, strict=True):
            if index:
                gather_rows(tensors[feature], tensors[index[0]], out=out)
            else:
                out.copy_(tensors[feature])

    return step


def _bind_pool(node: Node, weights: Weights) -> Step:
    (rows,), (result,) = node.inputs, node.outputs

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        mean_rows(tensors[rows], node.attributes["count"], out=tensors[result])

    return step


def _bind_projector(node: Node, weights: Weights) -> Step:
    rows, *index = node.inputs
    (tokens,), (hidden, *normed) = node.outputs, node.scratch
    norm_weight, norm_bias = _get_weights(node, weights, "norm_weight", "norm_bias")
    first, first_bias, second, second_bias = _get_weights(node, weights, "weight_1", "bias_1", "weight_2", "bias_2")
    merge, kind = node.attributes["merge"], node.attributes["activation"]
    how = {} if norm_weight is None else _norm_attributes(node)

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        x = _join_rows(tensors[rows], merge) if node.attributes["over_token"] else tensors[rows]
        selected = tensors[index[0]].squeeze(1) if index else None
        if norm_weight is not None:
            norm(x, norm_weight, norm_bias, **how, row_index=selected, out=tensors[normed[0]])
            x = tensors[normed[0]]
        elif selected is not None:
            x = torch.index_select(x, 0, selected, out=tensors[normed[0]])
        between, valid_rows = tensors[hidden], metadata.valid_rows.get(node.rows)
        merged = x.view(len(between), -1)
        linear(merged, first, first_bias, activation=kind, valid_rows=valid_rows, out=between)
        linear(between, second, second_bias, valid_rows=valid_rows, out=tensors[tokens])

    return step


def _bind_assemble(node: Node, weights: Weights) -> Step:
    rows, index, share = node.inputs
    (tokens,) = node.outputs
    (newline,) = _get_weights(node, weights, "newline")

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        counted = tensors[share] if tensors[share].shape[1] > 1 else None
        gather_rows(tensors[rows], tensors[index], counted, fill=newline, out=tensors[tokens])

    return step


def _bind_attention_pooling(node: Node, weights: Weights) -> Step:
    (keys_values,), (mixed,) = node.inputs, node.outputs
    probe, weight, bias = _get_weights(node, weights, "probe", "weight", "bias")
    heads = (node.attributes["heads"], node.attributes["head_dim"])
    # The query is learned, so it is the same in every forward pass.
    query = linear(probe, weight, bias).view(heads)

    def step(tensors: Tensors, metadata: BatchMetadata) -> None:
        parts = tensors[keys_values].unflatten(1, (2, *heads))
        attention_pooling(query, parts, metadata.tiles, out=tensors[mixed].unflatten(1, heads))

    return step


def _join_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Puts ``count`` neighboring rows side by side."""
    return rows if count == 1 else rows.view(-1, count * rows.shape[1])


def _get_weights(node: Node, weights: Weights, *roles: str) -> list[Any]:
    """Returns the node's weights by role; ``None`` for a role that it does not have."""
    return [weights[node.weights[role]] if role in node.weights else None for role in roles]


def _norm_attributes(node: Node) -> dict[str, Any]:
    attributes = node.attributes
    return {"kind": attributes["norm"], "eps": attributes["eps"], "rounding": attributes["rounding"]}


BINDINGS: dict[NodeKind, Callable[[Node, Weights], Step]] = {
    "patch_projection": _bind_patch_projection,
    "add_positions": _bind_add_positions,
    "rotary_table": _bind_rotary_table,
    "norm": _bind_norm,
    "linear": _bind_linear,
    "activation": _bind_activation,
    "add": _bind_add,
    "rope": _bind_rope,
    "qkv_projection": _bind_qkv_projection,
    "attention": _bind_attention,
    "mlp": _bind_mlp,
    "select": _bind_select,
    "pool": _bind_pool,
    "projector": _bind_projector,
    "assemble": _bind_assemble,
    "attention_pooling": _bind_attention_pooling,
}
