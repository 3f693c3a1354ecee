"""Builds the plain layer graph of a tower from its configuration: one node per step of the reference implementation."""

from collections.abc import Mapping, Sequence
from typing import Any

from tritontower.config import Normalization, PositionTable, Projector, RotaryEmbedding, TowerConfig
from tritontower.kernels.runtime.checks import align_up

from .ir import Dtype, Graph, Node, NodeKind, Rows, Transform, Value, Weight

MLP_ALIGNMENT = 64
"""The inner width of a gated MLP is padded to a multiple of this.  Rows of 3420 values (Qwen2.5-VL) start at addresses that
no 16-byte load can take, and the last block of a GEMM would be masked."""


class _Builder:
    """Collects nodes, values and weights."""

    def __init__(self, config: TowerConfig) -> None:
        self.config = config
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.inputs: list[str] = []
        self.block: int | None = None

    def scoped(self, name: str) -> str:
        return name if self.block is None else f"blocks.{self.block}.{name}"

    def input(self, name: str, width: int, rows: Rows = "patches", dtype: Dtype = "int32") -> str:
        """Adds a tensor of the batch, once for all nodes that read it."""
        if name not in self.values:
            self.values[name] = Value(name, rows, width, dtype)
            self.inputs.append(name)
        return name

    def value(self, name: str, width: int, rows: Rows = "patches", dtype: Dtype = "activation") -> str:
        self.values[name] = Value(name, rows, width, dtype)
        return name

    def weight(
        self,
        name: str,
        *shape: int,
        source_shape: tuple[int, ...] | None = None,
        unpadded: tuple[int, ...] | None = None,
    ) -> str:
        name = self.scoped(name)
        transform: Transform = "as_is" if source_shape is None else "flatten"
        padded = shape if unpadded not in (None, shape) else None
        self.weights[name] = Weight(name, shape, name, source_shape or unpadded or shape, transform, padded)
        return name

    def node(
        self,
        name: str,
        kind: NodeKind,
        inputs: Sequence[str],
        output: str,
        width: int | None = None,
        *,
        rows: Rows | None = None,
        weights: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node with one output, by default of the first input's shape, and returns the output's name."""
        first = self.values[inputs[0]]
        rows = rows or first.rows
        output, name = self.value(self.scoped(output), width or first.width, rows), self.scoped(name)
        node = Node(name, kind, tuple(inputs), (output,), weights or {}, attributes, block=self.block, rows=rows)
        self.nodes.append(node)
        return output

    def norm(self, name: str, rows: str, norm: Normalization, output: str = "") -> str:
        weights, attributes = self.norm_weights(name, norm, self.values[rows].width), _norm_attributes(norm)
        return self.node(output or name, "norm", [rows], output or f"{name}_rows", weights=weights, **attributes)

    def norm_weights(self, name: str, norm: Normalization, width: int, role: str = "") -> dict[str, str]:
        weights = {f"{role}weight": self.weight(f"{name}.weight", width)}
        if norm.bias:
            weights[f"{role}bias"] = self.weight(f"{name}.bias", width)
        return weights

    def linear(
        self,
        name: str,
        rows: str,
        width: int,
        *,
        bias: bool,
        joined: int = 1,
        gated: bool = False,
        unpadded: tuple[int, int] | None = None,
        weights: str = "",
        output: str = "",
        output_rows: Rows | None = None,
    ) -> str:
        """Adds a matmul of rows, or of ``joined`` neighboring rows side by side; ``unpadded``: the weight's stored shape."""
        value, weights = self.values[rows], weights or name
        columns = 2 * width if gated else width
        named = {"weight": self.weight(f"{weights}.weight", columns, value.width * joined, unpadded=unpadded)}
        if bias:
            named["bias"] = self.weight(f"{weights}.bias", columns, unpadded=unpadded and unpadded[:1])
        return self.node(
            name,
            "linear",
            [rows],
            output or f"{name}_rows",
            width,
            rows=output_rows or (value.rows if joined == 1 else "merged"),
            weights=named,
            activation="silu_gated" if gated else None,
            joined=joined,
        )

    def activation(self, name: str, rows: str, output: str) -> str:
        return self.node(name, "activation", [rows], output, activation=self.config.activation)


def _norm_attributes(norm: Normalization) -> dict[str, Any]:
    return {"norm": norm.kind, "eps": norm.eps, "rounding": norm.rounding}


def build(config: TowerConfig) -> Graph:
    """Builds the plain graph of a tower.

    Its inputs have the names of :attr:`.PackedBatch.tensors`: ``pixels`` (a row per patch; columns channel, frame, row,
    column of the patch), ``positions`` and others that the tower needs.  Its outputs are ``embeddings`` (a row per token)
    and, if the tower has them, ``deepstack.0``, ``deepstack.1`` … and ``pooled`` (a row per tile).
    """
    builder = _Builder(config)
    rows = _patch_projection(builder)
    if config.position_table is not None:
        rows = _add_positions(builder, rows, config.position_table)
    if config.input_norm is not None:
        rows = builder.norm("input_norm", rows, config.input_norm)
    table = None if config.rotary is None or not config.blocks_needed else _rotary_table(builder, config.rotary)

    after = {0: rows}
    deepstack: list[str] = []
    for block in range(config.blocks_needed):
        builder.block = block
        rows = _block(builder, rows, table, whole=config.windows is None or block in config.windows.full_blocks)
        builder.block = None
        after[block + 1] = rows
        if block in config.deepstack and config.deepstack_projector is not None:
            name = f"deepstack.{config.deepstack.index(block)}"
            selected = _select(builder, [rows], f"{name}.features")
            deepstack.append(_project(builder, name, name, selected, config.deepstack_projector))
    embeddings, pooled = _outputs(builder, after)
    outputs = (embeddings, *deepstack, *pooled)
    return Graph(tuple(builder.nodes), builder.values, builder.weights, tuple(builder.inputs), outputs)


def _outputs(builder: _Builder, after: Mapping[int, str]) -> tuple[str, list[str]]:
    """Returns the embeddings, and the pooled rows if any; ``after``: number of blocks → the rows after them."""
    config, rows = builder.config, after[builder.config.blocks_needed]
    if config.output_norm is None:
        return _embeddings(builder, [after[feature] for feature in config.features]), []
    normed = rows
    features_normed = config.features_normed and config.depth in config.features
    if features_normed or (config.pooling is not None and config.pooling.kind == "attention"):
        normed = builder.norm("output_norm", rows, config.output_norm)
    if features_normed:
        after = {**after, config.depth: normed}
    embeddings = _embeddings(builder, [after[feature] for feature in config.features])
    if config.pooling is None:
        return embeddings, []
    if config.pooling.norm is None:
        return embeddings, [_class_token_pooling(builder, rows, config.output_norm)]
    return embeddings, [_attention_pooling(builder, normed, config.pooling.norm)]


def _patch_projection(builder: _Builder) -> str:
    config, patch = builder.config, builder.config.patch
    pixels = builder.input("pixels", patch.inner, dtype="float32")
    kernel = (config.width, patch.channels, patch.temporal, patch.size, patch.size)
    weights = {"weight": builder.weight("patch_projection.weight", config.width, patch.inner, source_shape=kernel)}
    if patch.bias:
        weights["bias"] = builder.weight("patch_projection.bias", config.width)
    return builder.node("patch_projection", "patch_projection", [pixels], "patch_rows", config.width, weights=weights)


def _add_positions(builder: _Builder, rows: str, table: PositionTable) -> str:
    places = table.side**2 + (1 if builder.config.class_token else 0)
    taps = 1 if table.sampling == "exact" else 4
    inputs = [rows, builder.input("position_index", taps)]
    if taps > 1:
        inputs.append(builder.input("position_weights", taps, dtype="float32"))
    width = builder.config.width
    weights = {"position_table": builder.weight("position_table.weight", places, width)}
    return builder.node("add_positions", "add_positions", inputs, "placed_rows", width, weights=weights)


def _rotary_table(builder: _Builder, rotary: RotaryEmbedding) -> tuple[str, str]:
    head_dim = builder.config.head_dim
    positions = builder.input("positions", 2)
    table = tuple(builder.value(name, head_dim // 2, dtype="float32") for name in ("cosines", "sines"))
    attributes = {"head_dim": head_dim, "theta": rotary.theta, "layout": rotary.layout}
    builder.nodes.append(Node("rotary_table", "rotary_table", (positions,), table, attributes=attributes))
    return table[0], table[1]


def _block(builder: _Builder, rows: str, table: tuple[str, str] | None, *, whole: bool) -> str:
    """Adds a pre-norm transformer block: attention and MLP, each with a residual."""
    config = builder.config
    width = config.width
    heads: dict[str, Any] = {"heads": config.heads, "head_dim": config.head_dim}

    normed = builder.norm("norm1", rows, config.norm)
    qkv = builder.linear("qkv", normed, 3 * width, bias=config.qkv_bias)
    if config.rotary is not None and table is not None:
        rotation = config.rotary.rotation
        qkv = builder.node("rope", "rope", [qkv, *table], "rotated", **heads, rotation=rotation)
    longest_window = config.windows.side**2 * config.rows_per_token if config.windows is not None else None
    heads |= {"windows": not whole, "length_bound": config.longest_segment if whole else longest_window}
    mixed = builder.node("attention", "attention", [qkv], "mixed", width, **heads)
    projected = builder.linear("attention_output", mixed, width, bias=config.attention_bias)
    rows = builder.node("attention_residual", "add", [projected, rows], "attended")

    normed = builder.norm("norm2", rows, config.norm)
    if config.gated:
        hidden = builder.linear(
            "mlp_gate_up",
            normed,
            align_up(config.mlp_hidden, MLP_ALIGNMENT),
            bias=config.mlp_bias,
            gated=True,
            unpadded=(2 * config.mlp_hidden, width),
            output="mlp_hidden",
        )
    else:
        hidden = builder.linear("mlp_up", normed, config.mlp_hidden, bias=config.mlp_bias)
        hidden = builder.activation("mlp_activation", hidden, "mlp_hidden")
    projected = builder.linear("mlp_down", hidden, width, bias=config.mlp_bias, unpadded=(width, config.mlp_hidden))
    return builder.node("mlp_residual", "add", [projected, rows], "block_rows")


def _select(builder: _Builder, features: Sequence[str], name: str, output: str = "", rows: Rows = "selected") -> str:
    """Gathers the rows of the tokens, in the order of the image, several features side by side."""
    index = [builder.input("selection", 1, "selected")] if builder.config.selects else []
    if len(features) == 1 and not index and not output:
        return features[0]
    width = sum(builder.values[feature].width for feature in features)
    return builder.node(name, "select", [*features, *index], output or name, width, rows=rows, features=len(features))


def _embeddings(builder: _Builder, features: Sequence[str]) -> str:
    config = builder.config
    if config.projector is None:
        return _select(builder, features, "features", "embeddings", "tokens")
    selected = _select(builder, features, "features")
    if not config.newline:
        return _project(builder, "projector", "embeddings", selected, config.projector)
    return _assemble(builder, _project(builder, "projector", "projected", selected, config.projector))


def _project(builder: _Builder, name: str, output: str, rows: str, projector: Projector) -> str:
    """Projects rows to tokens with one ``projector`` node if its form allows it, else step by step."""
    norm, per_token = projector.norm, projector.merge**2
    width = builder.values[rows].width
    if projector.join == "mean" and per_token > 1:
        rows = builder.node(f"{name}.pool", "pool", [rows], f"{name}.pooled", rows="merged", count=per_token)
        per_token = 1
    if norm is not None and (projector.hidden is None or projector.merging_linear):
        rows = builder.norm(f"{name}.norm", rows, norm)
        norm = None
    if projector.merging_linear:
        rows = builder.linear(f"{name}.merging", rows, width, bias=False, joined=per_token)
        per_token = 1
    if projector.hidden is None:
        names: dict[str, Any] = {"weights": f"{name}.linear", "output": output, "output_rows": "merged"}
        return builder.linear(name, rows, projector.output, bias=projector.bias, joined=per_token, **names)
    return _projector_node(builder, name, output, rows, projector, norm, per_token)


def _projector_node(
    builder: _Builder,
    name: str,
    output: str,
    rows: str,
    projector: Projector,
    norm: Normalization | None,
    per_token: int,
) -> str:
    hidden = projector.hidden or projector.output
    width = builder.values[rows].width
    over_token = norm is not None and projector.norm_over == "token"
    scratch: tuple[str, ...] = (builder.value(f"{name}.hidden", hidden, "merged"),)
    weights: dict[str, str] = {}
    attributes: dict[str, Any] = {"merge": per_token, "activation": projector.activation, "over_token": over_token}
    if norm is not None:
        normed_width = width * per_token if over_token else width
        weights = builder.norm_weights(f"{name}.norm", norm, normed_width, role="norm_")
        normed = builder.value(f"{name}.normed", normed_width, "merged" if over_token else builder.values[rows].rows)
        scratch += (normed,)
        attributes |= _norm_attributes(norm)
    for number, (inner, out) in enumerate(((width * per_token, hidden), (hidden, projector.output)), 1):
        weights[f"weight_{number}"] = builder.weight(f"{name}.linear_{number}.weight", out, inner)
        if projector.bias:
            weights[f"bias_{number}"] = builder.weight(f"{name}.linear_{number}.bias", out)
    tokens = builder.value(output, projector.output, "merged")
    builder.nodes.append(Node(name, "projector", (rows,), (tokens,), weights, attributes, scratch, rows="merged"))
    return tokens


def _assemble(builder: _Builder, rows: str) -> str:
    """Assembles tokens from the rows of all tiles, with newline embeddings between them."""
    config = builder.config
    index = builder.input("assembly_index", config.assembly_taps, "tokens")
    share = builder.input("assembly_weights", config.assembly_taps, "tokens", "float32")
    weights = {"newline": builder.weight("newline", config.hidden_size)}
    return builder.node("assemble", "assemble", [rows, index, share], "embeddings", rows="tokens", weights=weights)


def _class_token_pooling(builder: _Builder, rows: str, norm: Normalization) -> str:
    """Normalizes the class token of every tile."""
    index, width = builder.input("class_rows", 1, "tiles"), builder.config.width
    first = builder.node("class_token", "select", [rows, index], "class_token", width, rows="tiles", features=1)
    return builder.norm("output_norm", first, norm, output="pooled")


def _attention_pooling(builder: _Builder, rows: str, norm: Normalization) -> str:
    """Adds attention of a learned query to a tile's rows, a projection, and an MLP with a residual."""
    config = builder.config
    width = config.width
    keys_values = builder.linear("pooling.keys_values", rows, 2 * width, bias=True)
    weights = {
        "probe": builder.weight("pooling.probe", 1, width),
        "weight": builder.weight("pooling.query.weight", width, width),
        "bias": builder.weight("pooling.query.bias", width),
    }
    options: dict[str, Any] = {"weights": weights, "heads": config.heads, "head_dim": config.head_dim}
    options |= {"width": width, "rows": "tiles"}
    mixed = builder.node("pooling.attention", "attention_pooling", [keys_values], "pooling.mixed", **options)
    attended = builder.linear("pooling.attention_output", mixed, width, bias=True)
    hidden = builder.norm("pooling.norm", attended, norm)
    hidden = builder.linear("pooling.mlp_up", hidden, config.mlp_hidden, bias=True)
    hidden = builder.activation("pooling.mlp_activation", hidden, "pooling.mlp_hidden")
    projected = builder.linear("pooling.mlp_down", hidden, width, bias=True)
    return builder.node("pooling.residual", "add", [projected, attended], "pooled")
