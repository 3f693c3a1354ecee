"""From a description to a layer graph: a tower written down from top to bottom, one node per step of the reference."""

from collections.abc import Mapping, Sequence
from typing import Any

from tritontower.config import Normalization, PositionTable, Projector, RotaryEmbedding, TowerConfig

from .ir import Dtype, Graph, Node, NodeKind, Rows, Transform, Value, Weight

__all__ = ["build"]


class _Builder:
    """Collects nodes, values and weights while a tower is written down from top to bottom."""

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
        """What the batch brings under this name; listed once, however many nodes read it."""
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
        if unpadded is not None and unpadded != shape:
            self.weights[name] = Weight(name, shape, name, unpadded, padded_shape=shape)
        else:
            transform: Transform = "as_is" if source_shape is None else "flatten"
            self.weights[name] = Weight(name, shape, name, source_shape or shape, transform)
        return name

    def node(
        self,
        name: str,
        kind: NodeKind,
        inputs: Sequence[str],
        *outputs: tuple[str, int],
        rows: Rows = "patches",
        weights: Mapping[str, str] | None = None,
        **attributes: Any,
    ) -> tuple[str, ...]:
        written = tuple(self.value(self.scoped(output), width, rows) for output, width in outputs)
        self.nodes.append(
            Node(
                self.scoped(name), kind, tuple(inputs), written, weights or {}, attributes, block=self.block, rows=rows
            )
        )
        return written

    def norm(self, name: str, rows: str, norm: Normalization) -> str:
        value = self.values[rows]
        weights = self.norm_weights(name, norm, value.width)
        (normed,) = self.node(
            name, "norm", [rows], (f"{name}_rows", value.width), rows=value.rows, weights=weights, **_of(norm)
        )
        return normed

    def norm_weights(self, name: str, norm: Normalization, width: int, role: str = "") -> dict[str, str]:
        weights = {f"{role}weight": self.weight(f"{name}.weight", width)}
        if norm.bias:
            weights[f"{role}bias"] = self.weight(f"{name}.bias", width)
        return weights

    def linear(self, name: str, rows: str, width: int, *, bias: bool, joined: int = 1) -> str:
        """A product with rows as they are, or with ``joined`` neighbors put side by side."""
        value = self.values[rows]
        weights = {"weight": self.weight(f"{name}.weight", width, value.width * joined)}
        if bias:
            weights["bias"] = self.weight(f"{name}.bias", width)
        (result,) = self.node(
            name,
            "linear",
            [rows],
            (f"{name}_rows", width),
            rows=value.rows if joined == 1 else "merged",
            weights=weights,
            activation=None,
            joined=joined,
        )
        return result


def _of(norm: Normalization) -> dict[str, Any]:
    return {"norm": norm.kind, "eps": norm.eps, "rounding": norm.rounding}


def build(config: TowerConfig) -> Graph:
    """The plain graph of a tower: one node per step of its reference implementation.

    Args:
        config: the tower's description.

    Returns:
        A graph whose inputs carry the names of what a :class:`~tritontower.batch.packed_batch.PackedBatch` holds: ``pixels`` (a row
        per patch; columns channel, frame, row, column of the patch), ``positions`` and whatever else the tower needs.
        Its outputs are ``embeddings`` (a row per token), ``deepstack.0``, ``deepstack.1`` … and ``pooled`` (a row per
        tile), as far as the tower has them.
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
    """The embeddings, and the pooled rows if there are any; ``after`` is number of blocks → the rows behind them."""
    config, rows = builder.config, after[builder.config.blocks_needed]
    if config.output_norm is None:
        return _embeddings(builder, [after[feature] for feature in config.features]), []
    normed = rows
    if config.normed_features or (config.pooling is not None and config.pooling.kind == "attention"):
        normed = builder.norm("output_norm", rows, config.output_norm)
    if config.normed_features:
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
    (rows,) = builder.node(
        "patch_projection", "patch_projection", [pixels], ("patch_rows", config.width), weights=weights
    )
    return rows


def _add_positions(builder: _Builder, rows: str, table: PositionTable) -> str:
    places = table.side**2 + (1 if builder.config.class_token else 0)
    taps = 1 if table.sampling == "exact" else 4
    inputs = [rows, builder.input("position_index", taps)]
    if taps > 1:
        inputs.append(builder.input("position_weights", taps, dtype="float32"))
    width = builder.config.width
    weights = {"position_table": builder.weight("position_table.weight", places, width)}
    (placed,) = builder.node("add_positions", "add_positions", inputs, ("placed_rows", width), weights=weights)
    return placed


def _rotary_table(builder: _Builder, rotary: RotaryEmbedding) -> tuple[str, str]:
    head_dim = builder.config.head_dim
    positions = builder.input("positions", 2)
    table = tuple(builder.value(name, head_dim // 2, dtype="float32") for name in ("cosines", "sines"))
    attributes = {"head_dim": head_dim, "theta": rotary.theta, "layout": rotary.layout}
    builder.nodes.append(Node("rotary_table", "rotary_table", (positions,), table, attributes=attributes))
    return table[0], table[1]


def _block(builder: _Builder, rows: str, table: tuple[str, str] | None, *, whole: bool) -> str:
    """One pre-norm transformer block: attention and MLP, each added to the rows it read."""
    config = builder.config
    width = config.width
    heads: dict[str, Any] = {"heads": config.heads, "head_dim": config.head_dim}

    normed = builder.norm("norm1", rows, config.norm)
    qkv = builder.linear("qkv", normed, 3 * width, bias=config.qkv_bias)
    if config.rotary is not None and table is not None:
        (qkv,) = builder.node(
            "rope", "rope", [qkv, *table], ("rotated", 3 * width), **heads, rotation=config.rotary.rotation
        )
    bound = config.longest_segment if whole else config.longest_window
    (mixed,) = builder.node(
        "attention", "attention", [qkv], ("mixed", width), **heads, windows=not whole, length_bound=bound
    )
    projected = builder.linear("attention_output", mixed, width, bias=config.attention_bias)
    (rows,) = builder.node("attention_residual", "add", [projected, rows], ("attended", width))

    normed = builder.norm("norm2", rows, config.norm)
    hidden = _gated_hidden(builder, normed) if config.gated else _hidden(builder, normed)
    projected = _mlp_down(builder, hidden)
    (rows,) = builder.node("mlp_residual", "add", [projected, rows], ("block_rows", width))
    return rows


def _hidden(builder: _Builder, normed: str) -> str:
    config = builder.config
    hidden = builder.linear("mlp_up", normed, config.mlp_hidden, bias=config.mlp_bias)
    (hidden,) = builder.node(
        "mlp_activation", "activation", [hidden], ("mlp_hidden", config.mlp_hidden), activation=config.activation
    )
    return hidden


def _gated_hidden(builder: _Builder, normed: str) -> str:
    """``silu(gate(x)) · up(x)``: one product with ``[gate; up]``, whose two halves meet in its epilogue."""
    config = builder.config
    hidden, padded, width = config.mlp_hidden, config.mlp_padded, config.width
    weights = {"weight": builder.weight("mlp_gate_up.weight", 2 * padded, width, unpadded=(2 * hidden, width))}
    if config.mlp_bias:
        weights["bias"] = builder.weight("mlp_gate_up.bias", 2 * padded, unpadded=(2 * hidden,))
    (result,) = builder.node(
        "mlp_gate_up", "linear", [normed], ("mlp_hidden", padded), weights=weights, activation="silu_gated", joined=1
    )
    return result


def _mlp_down(builder: _Builder, hidden: str) -> str:
    config = builder.config
    width = config.width
    weights = {
        "weight": builder.weight("mlp_down.weight", width, config.mlp_padded, unpadded=(width, config.mlp_hidden))
    }
    if config.mlp_bias:
        weights["bias"] = builder.weight("mlp_down.bias", width)
    (result,) = builder.node(
        "mlp_down", "linear", [hidden], ("mlp_down_rows", width), weights=weights, activation=None, joined=1
    )
    return result


def _select(builder: _Builder, features: Sequence[str], name: str) -> str:
    """The rows that the tokens are made of, in the order of the image, several features side by side."""
    selects = builder.config.selects
    if len(features) == 1 and not selects:
        return features[0]
    index = [builder.input("selection", 1, "selected")] if selects else []
    width = sum(builder.values[feature].width for feature in features)
    (selected,) = builder.node(
        name, "select", [*features, *index], (name, width), rows="selected", features=len(features)
    )
    return selected


def _embeddings(builder: _Builder, features: Sequence[str]) -> str:
    config = builder.config
    if config.projector is None:
        index = [builder.input("selection", 1, "selected")] if config.selects else []
        (embeddings,) = builder.node(
            "features",
            "select",
            [*features, *index],
            ("embeddings", config.hidden_size),
            rows="tokens",
            features=len(features),
        )
        return embeddings
    selected = _select(builder, features, "features")
    if not config.newline:
        return _project(builder, "projector", "embeddings", selected, config.projector)
    return _assemble(builder, _project(builder, "projector", "projected", selected, config.projector))


def _project(builder: _Builder, name: str, result: str, rows: str, projector: Projector) -> str:
    """Rows → tokens, by one ``projector`` node where its form allows it, else step by step."""
    norm, per_token = projector.norm, projector.rows_per_token
    if projector.join == "mean" and per_token > 1:
        width = builder.values[rows].width
        (rows,) = builder.node(
            f"{name}.pool", "pool", [rows], (f"{name}.pooled", width), rows="merged", count=per_token
        )
        per_token = 1
    if norm is not None and (projector.hidden is None or projector.merging_linear):
        rows = builder.norm(f"{name}.norm", rows, norm)
        norm = None
    if projector.merging_linear:
        width = builder.values[rows].width
        rows = builder.linear(f"{name}.merging", rows, width, bias=False, joined=per_token)
        per_token = 1
    if projector.hidden is None:
        return _one_linear(builder, name, result, rows, projector, per_token)
    return _projector_node(builder, name, result, rows, projector, norm, per_token)


def _one_linear(builder: _Builder, name: str, result: str, rows: str, projector: Projector, per_token: int) -> str:
    width = builder.values[rows].width * per_token
    weights = {"weight": builder.weight(f"{name}.linear.weight", projector.output, width)}
    if projector.bias:
        weights["bias"] = builder.weight(f"{name}.linear.bias", projector.output)
    (tokens,) = builder.node(
        name,
        "linear",
        [rows],
        (result, projector.output),
        rows="merged",
        weights=weights,
        activation=None,
        joined=per_token,
    )
    return tokens


def _projector_node(
    builder: _Builder,
    name: str,
    result: str,
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
        attributes |= _of(norm)
    for number, (inner, out) in enumerate(((width * per_token, hidden), (hidden, projector.output)), 1):
        weights[f"weight_{number}"] = builder.weight(f"{name}.linear_{number}.weight", out, inner)
        if projector.bias:
            weights[f"bias_{number}"] = builder.weight(f"{name}.linear_{number}.bias", out)
    tokens = builder.value(result, projector.output, "merged")
    builder.nodes.append(Node(name, "projector", (rows,), (tokens,), weights, attributes, scratch, rows="merged"))
    return tokens


def _assemble(builder: _Builder, rows: str) -> str:
    """Tokens out of the rows of all tiles, and the newline embedding between them."""
    config = builder.config
    index = builder.input("assembly_index", config.assembly_taps, "tokens")
    share = builder.input("assembly_weights", config.assembly_taps, "tokens", "float32")
    weights = {"newline": builder.weight("newline", config.hidden_size)}
    (tokens,) = builder.node(
        "assemble", "assemble", [rows, index, share], ("embeddings", config.hidden_size), rows="tokens", weights=weights
    )
    return tokens


def _class_token_pooling(builder: _Builder, rows: str, norm: Normalization) -> str:
    """The class token of every tile, normalized."""
    config = builder.config
    index = builder.input("class_rows", 1, "tiles")
    (first,) = builder.node(
        "class_token", "select", [rows, index], ("class_token", config.width), rows="tiles", features=1
    )
    weights = builder.norm_weights("output_norm", norm, config.width)
    (pooled,) = builder.node(
        "pooled", "norm", [first], ("pooled", config.width), rows="tiles", weights=weights, **_of(norm)
    )
    return pooled


def _attention_pooling(builder: _Builder, rows: str, norm: Normalization) -> str:
    """A learned query attends to a tile's rows; then a projection and an MLP, whose result is added to what it read."""
    config = builder.config
    width = config.width
    keys_values = builder.linear("pooling.keys_values", rows, 2 * width, bias=True)
    weights = {
        "probe": builder.weight("pooling.probe", 1, width),
        "weight": builder.weight("pooling.query.weight", width, width),
        "bias": builder.weight("pooling.query.bias", width),
    }
    heads: dict[str, Any] = {"heads": config.heads, "head_dim": config.head_dim}
    (mixed,) = builder.node(
        "pooling.attention",
        "attention_pooling",
        [keys_values],
        ("pooling.mixed", width),
        rows="tiles",
        weights=weights,
        **heads,
    )
    attended = builder.linear("pooling.attention_output", mixed, width, bias=True)
    hidden = builder.norm("pooling.norm", attended, norm)
    hidden = builder.linear("pooling.mlp_up", hidden, config.mlp_hidden, bias=True)
    (hidden,) = builder.node(
        "pooling.mlp_activation",
        "activation",
        [hidden],
        ("pooling.mlp_hidden", config.mlp_hidden),
        rows="tiles",
        activation=config.activation,
    )
    projected = builder.linear("pooling.mlp_down", hidden, width, bias=True)
    (pooled,) = builder.node("pooling.residual", "add", [projected, attended], ("pooled", width), rows="tiles")
    return pooled
