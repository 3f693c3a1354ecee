"""Binds each node of a layer graph to its weights and to an operation of :mod:`tritontower.kernels`.

The tensors' device selects the backend (compiled kernel, interpreter, torch) in :mod:`tritontower.kernels.runtime.dispatch`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tritontower.errors import UsageError
from tritontower.graph.ir import Node, NodeKind, Rows, Weight
from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.attention.pooling_head import attention_pooling
from tritontower.kernels.gemm.aligned_rows import align_rows
from tritontower.kernels.gemm.linear import linear
from tritontower.kernels.gemm.patch_projection import fold_temporal, patch_projection
from tritontower.kernels.gemm.qkv_projection import qkv_projection
from tritontower.kernels.rowwise.activations import activation, add
from tritontower.kernels.rowwise.gather import gather_rows
from tritontower.kernels.rowwise.mean_pool import mean_rows
from tritontower.kernels.rowwise.norm import norm
from tritontower.kernels.rowwise.positions import axial_frequencies, rotary_table
from tritontower.kernels.rowwise.rope import rope_
from tritontower.kernels.runtime.dispatch import runs_kernel
from tritontower.kernels.runtime.launch import call_library
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
        """Returns the windows; raises :class:`.UsageError` if the batch has none."""
        if self.windows is None:
            raise UsageError(
                "the batch must have windows for a tower with window attention; create it with this tower's preprocess()"
            )
        return self.windows


Step = Callable[[Tensors, BatchMetadata], None]
Weights = Mapping[str, torch.Tensor]
OptionalTensor = torch.Tensor | None

TRANSFORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_is": lambda source: source,
    "flatten": lambda source: source.flatten(1),
    "fold_temporal": fold_temporal,
}


def bind_weight(weight: Weight, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns a weight as its node uses it; a reordered tensor that is missing is made from the canonical one.

    Where kernels run, the rows of a matrix are aligned.
    """
    held = sources.get(weight.held_name)
    if held is None and weight.weight_layout is not None:
        held = weight.weight_layout.apply(sources[weight.source])
    bound = TRANSFORMS[weight.transform](sources[weight.source] if held is None else held)
    return align_rows(bound) if bound.ndim == 2 and runs_kernel(bound) else bound


def bind_node(node: Node, weights: Weights) -> Step:
    """Returns the step of ``node``; weights, and what follows from them alone, are bound once."""
    if node.kind == "rotary_table":
        return partial(_rotary_table, node, axial_frequencies(**node.attributes))
    run, *roles = _STEPS[node.kind]
    bound: list[Any] = [weights[node.weights[role]] if role in node.weights else None for role in roles]
    if node.kind == "attention_pooling":
        # The query is learned, so it is the same in every forward pass.
        return partial(run, node, linear(*bound).view(node.attributes["heads"], node.attributes["head_dim"]))
    return partial(run, node, *bound)


def _patch_projection(
    node: Node,
    weight: torch.Tensor,
    bias: OptionalTensor,
    table: OptionalTensor,
    tensors: Tensors,
    metadata: BatchMetadata,
) -> None:
    pixels, *index = (tensors[name] for name in node.inputs)
    how: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows), "out": tensors[node.outputs[0]]}
    if index:
        how |= {"position_table": table, "position_index": index[0].squeeze(1)}
    patch_projection(pixels, weight, bias, **how)


def _add_positions(node: Node, table: torch.Tensor, tensors: Tensors, metadata: BatchMetadata) -> None:
    rows, index, *share = (tensors[name] for name in node.inputs)
    gather_rows(table, index, share[0] if share else None, residual=rows, out=tensors[node.outputs[0]])


def _rotary_table(node: Node, frequencies: Any, tensors: Tensors, metadata: BatchMetadata) -> None:
    cosines, sines = (tensors[name] for name in node.outputs)
    rotary_table(tensors[node.inputs[0]], frequencies, side=metadata.side, out_cos=cosines, out_sin=sines)


def _norm(node: Node, weight: torch.Tensor, bias: OptionalTensor, tensors: Tensors, metadata: BatchMetadata) -> None:
    rows, *residual = (tensors[name] for name in node.inputs)
    added: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows)}
    if residual:
        added |= {"residual": residual[0], "residual_out": tensors[node.outputs[1]]}
    norm(rows, weight, bias, **_norm_attributes(node), **added, out=tensors[node.outputs[0]])


def _linear(node: Node, weight: torch.Tensor, bias: OptionalTensor, tensors: Tensors, metadata: BatchMetadata) -> None:
    rows, *residual = (tensors[name] for name in node.inputs)
    linear(
        _join_rows(rows, node.attributes["joined"]),
        weight,
        bias,
        activation=node.attributes["activation"],
        residual=residual[0] if residual else None,
        valid_rows=metadata.valid_rows.get(node.rows),
        out=tensors[node.outputs[0]],
    )


def _activation(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    activation(tensors[node.inputs[0]], node.attributes["activation"], out=tensors[node.outputs[0]])


def _add(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    add(*(tensors[name] for name in node.inputs), out=tensors[node.outputs[0]])


def _rope(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    qkv, cosines, sines = (tensors[name] for name in node.inputs)
    q, k, _ = qkv.unflatten(1, (3, node.attributes["heads"], node.attributes["head_dim"])).unbind(1)
    dtype = torch.float32 if node.attributes["rotation"] == "float32" else q.dtype
    rope_(q, k, cosines, sines, rotation_dtype=dtype)


def _qkv_projection(
    node: Node, weight: torch.Tensor, bias: OptionalTensor, tensors: Tensors, metadata: BatchMetadata
) -> None:
    rows, *tables = (tensors[name] for name in node.inputs)
    cosines, sines = tables or (None, None)
    where: dict[str, Any] = {"valid_rows": metadata.valid_rows.get(node.rows), "out": tensors[node.outputs[0]]}
    qkv_projection(rows, weight, bias, cosines, sines, **node.attributes, **where)


def _attention(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    heads, head_dim = node.attributes["heads"], node.attributes["head_dim"]
    padded = node.attributes.get("padded_head_dim")
    scaled = node.attributes.get("queries_scaled", False)
    q, k, v = tensors[node.inputs[0]].unflatten(1, (3, heads, padded or head_dim)).unbind(1)
    flash_attention_varlen(
        q,
        k,
        v,
        metadata.get_windows() if node.attributes["windows"] else metadata.segments,
        # Padding columns affect neither the scale nor the output.
        scale=None if scaled else head_dim**-0.5,
        queries_scaled=scaled,
        length_bound=node.attributes["length_bound"],
        columns=None if padded is None else head_dim,
        out=tensors[node.outputs[0]].unflatten(1, (heads, head_dim)),
    )


def _mlp(
    node: Node,
    first: torch.Tensor,
    first_bias: OptionalTensor,
    second: torch.Tensor,
    second_bias: OptionalTensor,
    tensors: Tensors,
    metadata: BatchMetadata,
) -> None:
    x, *residual = (tensors[name] for name in node.inputs)
    out, between = tensors[node.outputs[0]], tensors[node.scratch[0]]
    total, most = x.shape[0], between.shape[0]
    for start in range(0, total, most):
        run = slice(start, min(start + most, total))
        valid_rows = metadata.valid_rows.get(node.rows)
        if total > most:
            # The configuration of all rows: that of a short last run could sum in another order.  The count of valid
            # rows is for the first run, where they begin; later runs compute all their rows.
            planned = valid_rows or ValidRows(total)
            valid_rows = planned if start == 0 else ValidRows(planned.planned)
        held, added = between[: run.stop - run.start], residual[0][run] if residual else None
        linear(x[run], first, first_bias, activation=node.attributes["activation"], valid_rows=valid_rows, out=held)
        linear(held, second, second_bias, residual=added, valid_rows=valid_rows, out=out[run])


def _select(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    count = node.attributes["features"]
    features, index = node.inputs[:count], node.inputs[count:]
    columns = tensors[node.outputs[0]].tensor_split(count, dim=1)
    for feature, out in zip(features, columns, strict=True):
        if index:
            gather_rows(tensors[feature], tensors[index[0]], out=out)
        else:
            call_library(out.copy_, tensors[feature])


def _pool(node: Node, tensors: Tensors, metadata: BatchMetadata) -> None:
    mean_rows(tensors[node.inputs[0]], node.attributes["count"], out=tensors[node.outputs[0]])


def _projector(
    node: Node,
    norm_weight: OptionalTensor,
    norm_bias: OptionalTensor,
    first: torch.Tensor,
    first_bias: OptionalTensor,
    second: torch.Tensor,
    second_bias: OptionalTensor,
    tensors: Tensors,
    metadata: BatchMetadata,
) -> None:
    x, *index = (tensors[name] for name in node.inputs)
    between, *normed = (tensors[name] for name in node.scratch)
    if node.attributes["over_token"]:
        x = _join_rows(x, node.attributes["merge"])
    selected = index[0].squeeze(1) if index else None
    if norm_weight is not None:
        norm(x, norm_weight, norm_bias, **_norm_attributes(node), row_index=selected, out=normed[0])
        x = normed[0]
    elif selected is not None:
        call_library(torch.index_select, x, 0, selected, out=normed[0])
        x = normed[0]
    valid_rows, merged = metadata.valid_rows.get(node.rows), x.view(len(between), -1)
    linear(merged, first, first_bias, activation=node.attributes["activation"], valid_rows=valid_rows, out=between)
    linear(between, second, second_bias, valid_rows=valid_rows, out=tensors[node.outputs[0]])


def _assemble(node: Node, newline: torch.Tensor, tensors: Tensors, metadata: BatchMetadata) -> None:
    rows, index, share = (tensors[name] for name in node.inputs)
    gather_rows(rows, index, share if share.shape[1] > 1 else None, fill=newline, out=tensors[node.outputs[0]])


def _attention_pooling(node: Node, query: torch.Tensor, tensors: Tensors, metadata: BatchMetadata) -> None:
    parts = tensors[node.inputs[0]].unflatten(1, (2, *query.shape))
    attention_pooling(query, parts, metadata.tiles, out=tensors[node.outputs[0]].unflatten(1, tuple(query.shape)))


def _join_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Puts ``count`` neighboring rows side by side."""
    return rows if count == 1 else rows.view(-1, count * rows.shape[1])


def _norm_attributes(node: Node) -> dict[str, Any]:
    attributes = node.attributes
    return {"kind": attributes["norm"], "eps": attributes["eps"], "rounding": attributes["rounding"]}


_MLP_ROLES = ("weight_1", "bias_1", "weight_2", "bias_2")
_STEPS: dict[NodeKind, tuple[Any, ...]] = {
    "patch_projection": (_patch_projection, "weight", "bias", "position_table"),
    "add_positions": (_add_positions, "position_table"),
    "norm": (_norm, "weight", "bias"),
    "linear": (_linear, "weight", "bias"),
    "activation": (_activation,),
    "add": (_add,),
    "rope": (_rope,),
    "qkv_projection": (_qkv_projection, "weight", "bias"),
    "attention": (_attention,),
    "mlp": (_mlp, *_MLP_ROLES),
    "select": (_select,),
    "pool": (_pool,),
    "projector": (_projector, "norm_weight", "norm_bias", *_MLP_ROLES),
    "assemble": (_assemble, "newline"),
    "attention_pooling": (_attention_pooling, "probe", "weight", "bias"),
}
"""Node kind → the function of a step, and the roles of the weights that it takes after the node."""
