"""Fields of ``config.json`` that several models read in the same way."""

from collections.abc import Mapping

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Activation, Projector
from tritontower.errors import ConfigError
from tritontower.kernels.attention.attention import LARGEST_HEAD_DIM

ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
"""transformers' names of activations → ours."""

HEAD_MULTIPLE = 4
"""The rotary embedding rotates pairs of columns along two axes; other towers need the multiple for aligned loads."""

TEXT_WIDTHS: Mapping[str, int] = {
    "gemma": 3072,
    "gemma2": 2304,
    "gemma3_text": 2304,
    "llama": 4096,
    "ministral": 4096,
    "ministral3": 4096,
    "mistral": 4096,
    "mistral4": 4096,
    "mixtral": 4096,
    "phi3": 3072,
    "qwen2": 4096,
    "qwen3": 4096,
}
"""``model_type`` of a language model → default width of its class in transformers."""


def positive(reader: ConfigReader, key: str, default: int | None = None) -> int:
    """Reads an integer of at least 1; the key is required if there is no default."""
    return reader.get(int, key, *(() if default is None else (default,)), minimum=1)


def activation(reader: ConfigReader, key: str, default: str) -> Activation:
    """Reads an activation by transformers' name."""
    return ACTIVATIONS[reader.get(str, key, default=default, choices=tuple(ACTIVATIONS))]


def read_eps(reader: ConfigReader, key: str, default: float | None = None) -> float:
    """Reads the epsilon of a norm; the key is required if there is no default."""
    return reader.get(float, key, *(() if default is None else (default,)), minimum=0.0, maximum=1.0)


def whole_heads(reader: ConfigReader, key: str, width: int, default: int | None = None) -> int:
    """Reads the number of heads that share ``width`` columns, and checks that the kernels support their width."""
    heads = positive(reader, key, default)
    head_dim, left = divmod(width, heads)
    if left or head_dim % HEAD_MULTIPLE or not 0 < head_dim <= LARGEST_HEAD_DIM:
        allowed = (
            f"a number that divides the width ({width}) into heads whose width is a multiple of {HEAD_MULTIPLE} and at most "
            f"{LARGEST_HEAD_DIM}"
        )
        raise reader.error(key, heads, allowed)
    return heads


def rotary_theta(vision: ConfigReader) -> float:
    """Reads the base of the rotary frequencies from ``rope_parameters`` or the old ``rope_theta``."""
    vision.get(str, "rope_parameters.rope_type", default="axial", choices=("axial", "default"))
    old = vision.get(float, "rope_theta", default=10000.0, minimum=1.0)
    return vision.get(float, "rope_parameters.rope_theta", default=old, minimum=1.0)


def text_width(reader: ConfigReader, default_type: str) -> int:
    """Reads the language model's width, which published files may leave out to the class of its ``model_type``."""
    text = reader.section("text_config", optional=True)
    return positive(text, "hidden_size", TEXT_WIDTHS.get(text.get(str, "model_type", default=default_type)))


def two_linears(
    reader: ConfigReader, width: int, *, bias: bool = True, merge: int = 1, merging_linear: bool = False
) -> Projector:
    """Reads the projector of LLaVA, Pixtral and Mistral 3: two linears of the language model's ``width``."""
    return Projector(
        norm=None,
        merge=merge,
        hidden=width,
        output=width,
        activation=activation(reader, "projector_hidden_act", "gelu"),
        bias=reader.get(bool, "multimodal_projector_bias", default=bias),
        merging_linear=merging_linear,
    )


def feature_layers(reader: ConfigReader, key: str, depth: int, default: int) -> tuple[int, ...]:
    """Reads one index into ``hidden_states`` or a list of them, as the number of blocks that precede each feature."""
    first, last = -(depth + 1), depth
    try:
        layers: tuple[int, ...] = (reader.get(int, key, default, minimum=first, maximum=last),)
    except ConfigError as error:
        if not isinstance(error.value, list):
            raise
        layers = reader.get_list(int, key, minimum=first, maximum=last)
        if not layers:
            raise reader.error(key, [], "an integer, or a list of at least one") from error
    return tuple(layer % (depth + 1) for layer in layers)
