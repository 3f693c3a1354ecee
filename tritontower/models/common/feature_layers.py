"""Other features than the checkpoint's: which hidden states become tokens, and whether the class token is one of them."""

from collections.abc import Sequence
from dataclasses import replace

from tritontower.config import TowerConfig
from tritontower.errors import UsageError, is_integer, shorten

from .registry import Family

__all__ = ["with_features"]

SELECTIONS = ("patch", "cls_patch")


def with_features(family: Family, layer: int | Sequence[int] | None, select: str | None) -> Family:
    """``family`` with other features; itself where both are ``None``.

    Args:
        family: what the checkpoint says.
        layer: one or several indices into transformers' ``hidden_states``, which has ``depth + 1`` entries.
        select: ``"patch"`` or ``"cls_patch"``.

    Raises:
        UsageError: there is no such layer, another number of layers than the projector takes, or a class token is asked
            for where there is none or it has no place.
    """
    config = family.config
    if layer is not None:
        config = replace(config, features=_layers(config, layer), features_normed=False, pooling=None)
    if select is not None:
        config = replace(config, keep_class_token=_keeps_class_token(config, select))
    return replace(family, config=config)


def _layers(config: TowerConfig, layer: int | Sequence[int]) -> tuple[int, ...]:
    states = config.depth + 1
    given = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not given:
        raise UsageError("feature_layer is empty; allowed: a whole number, or a list of them")
    for index in given:
        if not is_integer(index) or not -states <= int(index) < states:
            raise UsageError(
                f"feature_layer has {shorten(index)}; with {config.depth} blocks allowed are whole numbers from {-states} "
                f"to {states - 1}"
            )
    if config.projector is not None and len(given) != len(config.features):
        raise UsageError(
            f"feature_layer names {len(given)} layers, but the checkpoint's projector takes {len(config.features)} side by "
            "side"
        )
    return tuple(int(index) % states for index in given)


def _keeps_class_token(config: TowerConfig, select: str) -> bool:
    if select not in SELECTIONS:
        raise UsageError(f"feature_select is {shorten(select)}; allowed: {', '.join(map(repr, SELECTIONS))}")
    if select == "patch":
        return False
    if not config.class_token:
        raise UsageError("feature_select is 'cls_patch', but this tower has no class token; allowed: 'patch'")
    if config.newline:
        raise UsageError(
            "feature_select is 'cls_patch', but this tower cuts images into tiles, among whose tokens a class token has "
            "no place; allowed: 'patch'"
        )
    return True
