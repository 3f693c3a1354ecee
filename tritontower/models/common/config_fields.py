"""What several families read in the same way."""

from collections.abc import Mapping

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import Activation
from tritontower.errors import ConfigError
from tritontower.kernels.attention.attention import LARGEST_HEAD_DIM

__all__ = [
    "ACTIVATIONS",
    "activation",
    "feature_layers",
    "positive",
    "rotary_theta",
    "text_width",
    "whole_heads",
]

ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
"""transformers' names of activations → ours."""

HEAD_MULTIPLE = 4
"""Two axes turn pairs of a head's columns; towers without rotary embedding keep to it as well, for aligned loads."""

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
"""``model_type`` of a language model → the width that its class in transformers has where a file says nothing."""


def positive(reader: ConfigReader, key: str, default: int | None = None) -> int:
    """A whole number of at least 1; it has to be there where there is no default."""
    if default is None:
        return reader.get(int, key, minimum=1)
    return reader.get(int, key, default, minimum=1)


def activation(reader: ConfigReader, key: str, default: str) -> Activation:
    """An activation by transformers' name for it."""
    return ACTIVATIONS[reader.get(str, key, default=default, choices=tuple(ACTIVATIONS))]


def whole_heads(reader: ConfigReader, key: str, width: int, default: int | None = None) -> int:
    """The number of heads, as wide as the kernels take them: a multiple of 4, and at most 128.

    Args:
        reader: of the section that holds the number.
        key: under which it stands.
        width: of all heads together.
        default: where the key is left out; it has to be there where this is ``None``.

    Raises:
        ConfigError: the width does not divide into so many heads, or they are not of such a width.
    """
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
    """Base of the rotary frequencies, in the old spelling or the new one."""
    vision.get(str, "rope_parameters.rope_type", default="axial", choices=("axial", "default"))
    old = vision.get(float, "rope_theta", default=10000.0, minimum=1.0)
    return vision.get(float, "rope_parameters.rope_theta", default=old, minimum=1.0)


def text_width(reader: ConfigReader, default_type: str) -> int:
    """Width of the language model: ``text_config.hidden_size``, or what transformers assumes where that is left out.

    Args:
        reader: of the whole configuration.
        default_type: the language model's ``model_type`` where ``text_config`` does not say.

    Raises:
        ConfigError: no width, for a language model of which no other is known.
    """
    text = reader.section("text_config", optional=True)
    return positive(text, "hidden_size", TEXT_WIDTHS.get(text.get(str, "model_type", default=default_type)))


def feature_layers(reader: ConfigReader, key: str, depth: int, default: int) -> tuple[int, ...]:
    """Blocks behind which the features are taken, 0 … ``depth``, from one index into ``hidden_states`` or a list of them.

    Raises:
        ConfigError: something else, no index at all, or one that a tower of ``depth`` blocks does not have.
    """
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
