"""What a vision tower *is*: a frozen description, independent of any model's name.

A file in :mod:`tritontower.models.common.registry` reads a checkpoint's ``config.json`` into a :class:`TowerConfig`;
:func:`tritontower.graph.builder.build` turns that into a layer graph.  Nothing in between knows which model it came from.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

__all__ = [
    "Activation",
    "BatchForm",
    "Normalization",
    "PatchEmbedding",
    "Pooling",
    "PositionTable",
    "Projector",
    "RotaryEmbedding",
    "TowerConfig",
    "Windows",
]

DTYPE_NAMES = ("float32", "float16", "bfloat16")
"""Dtypes in which towers run."""

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]

PADDED_TO = 64
"""What the inner width of a gated MLP is padded to a multiple of: rows of 3420 values (Qwen2.5-VL) start at addresses
that no 16-byte load can take, and a GEMM's last block would be masked."""


@dataclass(frozen=True)
class PatchEmbedding:
    """How pixels become rows: a convolution whose stride is its kernel, hence a matrix product."""

    channels: int
    size: int
    """Side of a square patch, pixels."""
    temporal: int
    """Frames that one patch spans; a still image is that many copies of itself."""
    bias: bool

    @property
    def still_inner(self) -> int:
        """Pixels of one patch of one frame, all channels."""
        return self.channels * self.size * self.size

    @property
    def inner(self) -> int:
        """Pixels of one patch over all the frames it spans: the inner dimension of the product."""
        return self.temporal * self.still_inner


@dataclass(frozen=True)
class Normalization:
    """A norm over the last dimension."""

    kind: Literal["layer_norm", "rms_norm", "gemma_rms_norm"]
    eps: float
    rounding: Literal["once", "before_weight"] = "once"
    """``before_weight``: the normalized value is rounded to the activation dtype before it meets the weight."""

    @property
    def bias(self) -> bool:
        """Whether the norm has a bias beside its weight."""
        return self.kind == "layer_norm"


@dataclass(frozen=True)
class RotaryEmbedding:
    """Two-dimensional rotary position embedding of queries and keys (RoFormer, arXiv 2104.09864, on two axes)."""

    theta: float
    layout: Literal["halves", "alternating"]
    """``halves``: rows and columns use the same frequencies; ``alternating``: they share one series out in turn."""
    rotation: Literal["float32", "activation"] = "float32"
    """The dtype in which the rotation is computed; the angles are fp32 always."""


@dataclass(frozen=True)
class PositionTable:
    """Learned positions: a row for every place of a square grid, added to the projected patches."""

    side: int
    """Rows and columns of the grid; the table has ``side²`` rows (and one for the class token, where there is one)."""
    sampling: Literal["exact", "bilinear"]
    """``exact``: every tile has just this grid; ``bilinear``: any grid, stretched over the table corner to corner."""


@dataclass(frozen=True)
class Windows:
    """Attention within square windows, in all blocks but a few."""

    side: int
    """Tokens along one side of a window: ``merge`` times as many patches.  Windows at the edge are smaller."""
    full_blocks: tuple[int, ...]
    """Blocks, counted from 0, that attend over the whole segment all the same."""


@dataclass(frozen=True)
class Projector:
    """Patches to language-model tokens: norm, join ``merge``² neighbors, one linear or two with an activation between.

    Raises:
        ValueError: a norm that would stand on the other side of the join than it is said to.
    """

    norm: Normalization | None
    merge: int
    """Side of the square of patches that one token stands for."""
    hidden: int | None
    """Width between the two linears; ``None`` where there is only one."""
    output: int
    activation: Activation
    """Of the two linears; without meaning where there is only one."""
    bias: bool
    join: Literal["concatenate", "mean"] = "concatenate"
    norm_over: Literal["patch", "token"] = "patch"
    """Whether the norm comes before the patches are joined or after."""
    merging_linear: bool = False
    """A linear without bias that takes the joined patches back to the tower's width, before the others."""

    def __post_init__(self) -> None:
        if self.norm is None or self.merge == 1:
            return
        if self.join == "mean" and self.norm_over == "patch":
            raise ValueError("patches are averaged before their norm; norm_over must be 'token'")
        if self.join == "concatenate" and self.norm_over == "token" and (self.hidden is None or self.merging_linear):
            raise ValueError("only a projector of two linears norms whole tokens; norm_over must be 'patch'")

    @property
    def rows_per_token(self) -> int:
        """Patches that one token stands for."""
        return self.merge * self.merge


@dataclass(frozen=True)
class Pooling:
    """One vector for a whole image, beside its tokens."""

    kind: Literal["class_token", "attention"]
    """``class_token``: that token, through the output norm; ``attention``: a learned query attends to all rows behind the
    output norm, then an MLP as wide as a block's."""
    norm: Normalization | None = None
    """In front of that MLP."""


@dataclass(frozen=True)
class BatchForm:
    """Everything of a tower that decides how its batches are arranged; a batch serves all towers of its form."""

    channels: int
    patch_size: int
    """Side of a square patch, pixels."""
    temporal: int
    """Frames that one patch spans."""
    merge: int
    """Side of the square of patches that one token stands for."""
    segments: Literal["frame", "image"]
    window: int | None
    """Tokens along one side of a window; ``None``: no windows."""
    table_side: int | None
    """Rows and columns of the learned positions; ``None``: there are none."""
    table_sampling: Literal["exact", "bilinear"] | None
    class_token: bool
    keep_class_token: bool
    newline: bool
    assembly_taps: int

    def differences(self, other: "BatchForm") -> str:
        """In which fields ``other`` is another form, and what they are there and here, in words."""
        return ", ".join(
            f"{field.name} {getattr(other, field.name)} instead of {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(other, field.name) != getattr(self, field.name)
        )


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A pre-norm transformer over image patches, with a projector behind it.

    Raises:
        ValueError: fields that contradict each other.
    """

    family: str
    """Which file of :mod:`tritontower.models.common.registry` read it; for messages, never for decisions."""
    patch: PatchEmbedding
    width: int
    depth: int
    """Blocks of the checkpoint; those behind the last one that is needed are neither built nor read."""
    heads: int
    norm: Normalization
    qkv_bias: bool
    attention_bias: bool
    """Bias of the projection behind the attention."""
    mlp_hidden: int
    mlp_bias: bool
    activation: Activation
    gated: bool = False
    """Whether the MLP is ``down(f(gate(x)) · up(x))`` instead of ``down(f(up(x)))``; f is then silu."""
    rotary: RotaryEmbedding | None = None
    position_table: PositionTable | None = None
    class_token: bool = False
    """Whether a learned row stands before the patches of every tile."""
    keep_class_token: bool = False
    """Whether that row becomes a token."""
    input_norm: Normalization | None = None
    """Before the first block."""
    output_norm: Normalization | None = None
    """Behind the last block; read only by what asks for it: ``features_normed``, ``pooling``."""
    features_normed: bool = False
    """Whether the features of the last block are those behind the output norm."""
    segments: Literal["frame", "image"] = "image"
    """How far a patch sees: its own temporal patch of a video, or everything of its tile or video."""
    windows: Windows | None = None
    features: tuple[int, ...]
    """Blocks behind which the rows are taken: ``depth`` for the last, 0 for what enters the first.  Several are put side
    by side.  Only the last goes through ``output_norm``."""
    deepstack: tuple[int, ...] = ()
    """Blocks, counted from 0, behind which a projector of its own makes extra rows for the language model's first layers."""
    deepstack_projector: Projector | None = None
    projector: Projector | None = None
    pooling: Pooling | None = None
    newline: bool = False
    """Whether an image is cut into tiles, whose tokens are put together with a learned embedding at the end of every row."""
    assembly_taps: int = 1
    """Rows of the tiles that one token is a weighted sum of: 4 where a large image's tokens are shrunk."""

    def __post_init__(self) -> None:
        if self.class_token and (self.patch.bias or self.merge != 1):
            raise ValueError("a class token needs a patch embedding without bias and a projector that joins no patches")
        if self.class_token and self.windows is not None:
            raise ValueError("a class token has no place in windows")
        if self.gated and self.activation != "silu":
            raise ValueError(f"a gated MLP has the activation silu, not {self.activation}")
        if self.newline and self.keep_class_token:
            raise ValueError("class tokens have no place among the tokens of tiles")
        if self.output_norm is None and (self.features_normed or self.pooling is not None):
            raise ValueError("normed features and pooling need an output norm")
        if self.pooling is not None and (self.pooling.kind == "attention") != (self.pooling.norm is not None):
            raise ValueError("pooling by attention has a norm of its own, pooling by the class token has none")
        if bool(self.deepstack) != (self.deepstack_projector is not None):
            raise ValueError("deepstack blocks and their projector come together")
        if not self.features or not all(0 <= feature <= self.depth for feature in self.features):
            raise ValueError(f"features {self.features} must be some of 0 … {self.depth}")
        if self.windows is not None and self.rotary is None:
            raise ValueError("windows need positions that do not depend on the order of the rows: a rotary embedding")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def merge(self) -> int:
        """Side of the square of patches that one token stands for."""
        return 1 if self.projector is None else self.projector.merge

    @property
    def rows_per_token(self) -> int:
        """Patches that one token stands for."""
        return self.merge * self.merge

    @property
    def feature_width(self) -> int:
        """Width of the rows that enter the projector."""
        return self.width * len(self.features)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings: the language model's, or the tower's own where there is no projector."""
        return self.feature_width if self.projector is None else self.projector.output

    @property
    def blocks_needed(self) -> int:
        """How many blocks have to run for everything that is asked for."""
        if self.pooling is not None:
            return self.depth
        return max((*self.features, *(block + 1 for block in self.deepstack)))

    @property
    def normed_features(self) -> bool:
        """Whether any feature is one behind the output norm."""
        return self.features_normed and self.depth in self.features

    @property
    def selects(self) -> bool:
        """Whether the rows that make the tokens are others than the blocks' rows, or in another order."""
        return self.windows is not None or self.newline or (self.class_token and not self.keep_class_token)

    @property
    def batch_form(self) -> BatchForm:
        """What a batch has to be arranged for, so that the tower can run it."""
        table = self.position_table
        return BatchForm(
            channels=self.patch.channels,
            patch_size=self.patch.size,
            temporal=self.patch.temporal,
            merge=self.merge,
            segments=self.segments,
            window=None if self.windows is None else self.windows.side,
            table_side=None if table is None else table.side,
            table_sampling=None if table is None else table.sampling,
            class_token=self.class_token,
            keep_class_token=self.keep_class_token,
            newline=self.newline,
            assembly_taps=self.assembly_taps,
        )

    @property
    def num_patches(self) -> int | None:
        """Patches of one tile, where every tile has as many; ``None`` where the image decides."""
        table = self.position_table
        return None if table is None or table.sampling != "exact" else table.side**2

    @property
    def longest_segment(self) -> int | None:
        """Rows that no segment ever exceeds, where all tiles are of one size; ``None`` where the image decides."""
        return None if self.num_patches is None else self.num_patches + self.class_token

    @property
    def longest_window(self) -> int | None:
        """Rows that no window ever exceeds; ``None`` for a tower without windows."""
        return None if self.windows is None else self.windows.side**2 * self.rows_per_token

    @property
    def mlp_padded(self) -> int:
        """``mlp_hidden`` as the weights are held: a gated MLP's is padded with zeros, which change nothing."""
        return -(-self.mlp_hidden // PADDED_TO) * PADDED_TO if self.gated else self.mlp_hidden

    def to_json(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return asdict(self)
