"""What a vision tower *is*: a frozen description, independent of any model's name.

A file in :mod:`tritontower.families` reads a checkpoint's ``config.json`` into a :class:`TowerConfig`;
:func:`tritontower.graph.build` turns that into a layer graph.  Nothing in between knows which model it came from.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Activation", "Normalisation", "PatchEmbedding", "Projector", "RotaryEmbedding", "TowerConfig"]

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]


@dataclass(frozen=True)
class PatchEmbedding:
    """How pixels become rows: a convolution whose stride is its kernel, hence a matrix product."""

    channels: int
    size: int
    """Side of a square patch, pixels."""
    temporal: int
    """Frames that one patch spans; a still picture is that many copies of itself."""
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
class Normalisation:
    """A norm over the last dimension."""

    kind: Literal["layer_norm", "rms_norm", "gemma_rms_norm"]
    eps: float
    rounding: Literal["once", "before_weight"] = "once"
    """``before_weight``: the normalised value is rounded to the activation dtype before it meets the weight."""

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
class Projector:
    """Norm → join ``merge``² neighbouring patches → linear → activation → linear: patches to language-model tokens."""

    norm: Normalisation
    merge: int
    """Side of the square of patches that one token stands for."""
    hidden: int
    output: int
    activation: Activation
    bias: bool

    @property
    def rows_per_token(self) -> int:
        """Patches that one token stands for."""
        return self.merge * self.merge


@dataclass(frozen=True)
class TowerConfig:
    """A pre-norm transformer over picture patches, with a projector behind it."""

    family: str
    """Which file of :mod:`tritontower.families` read it; for messages, never for decisions."""
    patch: PatchEmbedding
    width: int
    depth: int
    heads: int
    norm: Normalisation
    qkv_bias: bool
    attention_bias: bool
    """Bias of the projection behind the attention."""
    mlp_hidden: int
    mlp_bias: bool
    activation: Activation
    rotary: RotaryEmbedding
    segments: Literal["frame", "picture"]
    """How far a patch sees: its own temporal patch of a video, or everything of its picture or clip."""
    projector: Projector

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings: the language model's."""
        return self.projector.output

    def to_json(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return asdict(self)
