"""TowerConfig: the frozen description of any vision tower.

A family file (:mod:`tritontower.models.common.registry`) reads a checkpoint's ``config.json`` into a
:class:`TowerConfig`; :func:`tritontower.graph.builder.build` turns that into a layer graph.  Nothing in between depends
on the model's name.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

DTYPE_NAMES = ("float32", "float16", "bfloat16")
"""Dtypes in which towers run."""

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True)
class PatchEmbedding:
    """A convolution whose stride is its kernel, hence a matmul of flattened patches."""

    channels: int
    size: int
    """Side of a square patch, pixels."""
    temporal: int
    """Frames that one patch spans; a still image is repeated."""
    bias: bool

    @property
    def still_inner(self) -> int:
        """Pixel values of one patch of one frame, all channels."""
        return self.channels * self.size * self.size

    @property
    def inner(self) -> int:
        """Pixel values of one patch over all its frames: the inner dimension of the matmul."""
        return self.temporal * self.still_inner


@dataclass(frozen=True)
class Normalization:
    """A norm over the last dimension."""

    kind: Literal["layer_norm", "rms_norm", "gemma_rms_norm"]
    eps: float
    rounding: Literal["once", "before_weight"] = "once"
    """``before_weight``: round the normalized value to the activation dtype before the multiplication by the weight."""

    @property
    def bias(self) -> bool:
        """True for a norm with a bias beside its weight."""
        return self.kind == "layer_norm"


@dataclass(frozen=True)
class RotaryEmbedding:
    """Two-dimensional rotary position embedding of queries and keys (RoFormer, arXiv 2104.09864, on two axes)."""

    theta: float
    layout: Literal["halves", "alternating"]
    """``halves``: rows and columns use the same frequencies; ``alternating``: they alternate in one series."""
    rotation: Literal["float32", "activation"] = "float32"
    """Dtype of the rotation; the angles are always fp32."""


@dataclass(frozen=True)
class PositionTable:
    """Learned positions: a row per cell of a square grid, added to the projected patches."""

    side: int
    """Rows and columns of the grid; the table has ``side²`` rows (and one for the class token, if there is one)."""
    sampling: Literal["exact", "bilinear"]
    """``exact``: every tile has exactly this grid; ``bilinear``: any grid, stretched over the table corner to corner."""


@dataclass(frozen=True)
class Windows:
    """Attention within square windows, in all blocks except a few."""

    side: int
    """Tokens along one side of a window, ``merge`` times as many patches.  Windows at the edge are smaller."""
    full_blocks: tuple[int, ...]
    """Blocks, counted from 0, that attend over the whole segment."""


@dataclass(frozen=True)
class Projector:
    """Patches to language-model tokens: norm, join ``merge``² neighbors, then one linear or two with an activation."""

    norm: Normalization | None
    merge: int
    """Side of the square of patches that becomes one token."""
    hidden: int | None
    """Width between the two linears; ``None`` for a single linear."""
    output: int
    activation: Activation
    """Between the two linears; unused for a single one."""
    bias: bool
    join: Literal["concatenate", "mean"] = "concatenate"
    norm_over: Literal["patch", "token"] = "patch"
    """Norm before (``patch``) or after (``token``) the patches are joined."""
    merging_linear: bool = False
    """A linear without bias that maps the joined patches back to the tower's width, before the others."""

    def __post_init__(self) -> None:
        if self.norm is None or self.merge == 1:
            return
        if self.join == "mean" and self.norm_over == "patch":
            raise ValueError("norm_over must be 'token' if patches are averaged, got 'patch'")
        if self.join == "concatenate" and self.norm_over == "token" and (self.hidden is None or self.merging_linear):
            raise ValueError("norm_over must be 'patch' unless the projector is two linears, got 'token'")


@dataclass(frozen=True)
class Pooling:
    """One vector for a whole image, beside its tokens."""

    kind: Literal["class_token", "attention"]
    """``class_token``: that token after the output norm; ``attention``: a learned query attends to all rows after the
    output norm, followed by an MLP as wide as a block's."""
    norm: Normalization | None = None
    """Before that MLP."""


@dataclass(frozen=True)
class BatchForm:
    """Fields of a tower that determine the layout of its batches; towers of equal form share batches."""

    channels: int
    patch_size: int
    temporal: int
    merge: int
    segments: Literal["frame", "image"]
    window: int | None
    """Tokens along one side of a window."""
    table_side: int | None
    table_sampling: Literal["exact", "bilinear"] | None
    class_token: bool
    keep_class_token: bool
    newline: bool
    assembly_taps: int

    def differences(self, other: "BatchForm") -> str:
        """Describes the fields in which ``other`` differs."""
        return ", ".join(
            f"{field.name} {getattr(other, field.name)} instead of {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(other, field.name) != getattr(self, field.name)
        )


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A pre-norm transformer over image patches, followed by a projector; contradicting fields raise ``ValueError``."""

    family: str
    """Name of the family file that read it; for messages, never for decisions."""
    patch: PatchEmbedding
    width: int
    depth: int
    """Blocks of the checkpoint; those after the last one that is needed are neither built nor read."""
    heads: int
    norm: Normalization
    qkv_bias: bool
    attention_bias: bool
    """Bias of the output projection of attention."""
    mlp_hidden: int
    mlp_bias: bool
    activation: Activation
    gated: bool = False
    """MLP ``down(silu(gate(x)) · up(x))`` instead of ``down(f(up(x)))``."""
    rotary: RotaryEmbedding | None = None
    position_table: PositionTable | None = None
    class_token: bool = False
    """A learned row before the patches of every tile."""
    keep_class_token: bool = False
    """That row becomes a token."""
    input_norm: Normalization | None = None
    """Before the first block."""
    output_norm: Normalization | None = None
    """After the last block; read only for ``features_normed`` and ``pooling``."""
    features_normed: bool = False
    """The features of the last block are taken after the output norm."""
    segments: Literal["frame", "image"] = "image"
    """Range of attention: a temporal patch of a video, or a whole tile or video."""
    windows: Windows | None = None
    features: tuple[int, ...]
    """Blocks after which rows are taken: ``depth`` for the last, 0 for the input of the first.  Several are
    concatenated.  Only the last goes through ``output_norm``."""
    deepstack: tuple[int, ...] = ()
    """Blocks, counted from 0, after which a separate projector makes rows for the language model's first layers."""
    deepstack_projector: Projector | None = None
    projector: Projector | None = None
    pooling: Pooling | None = None
    newline: bool = False
    """Images are cut into tiles, and a learned embedding ends every row of their tokens."""
    assembly_taps: int = 1
    """Tile rows combined into each token: 4 if a large image's tokens are interpolated."""

    def __post_init__(self) -> None:
        if self.class_token and (self.patch.bias or self.merge != 1):
            raise ValueError("a class token needs a patch embedding without bias and a projector that joins no patches")
        if self.class_token and self.windows is not None:
            raise ValueError("a class token cannot be combined with windows")
        if self.gated and self.activation != "silu":
            raise ValueError(f"activation of a gated MLP must be silu, got {self.activation}")
        if self.newline and self.keep_class_token:
            raise ValueError("class tokens cannot be kept among the tokens of tiles")
        if self.output_norm is None and (self.features_normed or self.pooling is not None):
            raise ValueError("normed features and pooling need an output norm")
        if self.pooling is not None and (self.pooling.kind == "attention") != (self.pooling.norm is not None):
            raise ValueError("pooling by attention needs a norm, pooling by the class token must have none")
        if bool(self.deepstack) != (self.deepstack_projector is not None):
            raise ValueError("deepstack and deepstack_projector must be given together")
        if not self.features or not all(0 <= feature <= self.depth for feature in self.features):
            raise ValueError(f"features must be some of 0 … {self.depth}, got {self.features}")
        if self.windows is not None and self.rotary is None:
            raise ValueError("windows need a rotary embedding, which does not depend on the order of the rows")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def merge(self) -> int:
        """Side of the square of patches that becomes one token."""
        return 1 if self.projector is None else self.projector.merge

    @property
    def rows_per_token(self) -> int:
        """Patches that become one token."""
        return self.merge * self.merge

    @property
    def feature_width(self) -> int:
        """Width of the projector's input rows."""
        return self.width * len(self.features)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings: the language model's, or the tower's own without a projector."""
        return self.feature_width if self.projector is None else self.projector.output

    @property
    def blocks_needed(self) -> int:
        """Number of blocks that must run for all outputs."""
        if self.pooling is not None:
            return self.depth
        return max((*self.features, *(block + 1 for block in self.deepstack)))

    @property
    def selects(self) -> bool:
        """True if the projector's input differs from the blocks' rows in number or order."""
        return self.windows is not None or self.newline or (self.class_token and not self.keep_class_token)

    @property
    def batch_form(self) -> BatchForm:
        """The layout of the tower's batches."""
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
        """Patches of one tile; ``None`` if they depend on the image."""
        table = self.position_table
        return None if table is None or table.sampling != "exact" else table.side**2

    @property
    def longest_segment(self) -> int | None:
        """Upper bound of a segment's rows; ``None`` if it depends on the image."""
        return None if self.num_patches is None else self.num_patches + self.class_token

    def to_json(self) -> dict[str, Any]:
        """Returns the description as plain JSON values."""
        return asdict(self)
