"""Features other than the checkpoint's: the caller's choice of hidden states and of the class token."""

from collections.abc import Sequence
from dataclasses import replace

from tritontower.config import TowerConfig
from tritontower.errors import UsageError, is_integer, shorten

from .family import Family

SELECTIONS = ("patch", "cls_patch")


def with_features(family: Family, layer: int | Sequence[int] | None, select: str | None) -> Family:
    """Returns ``family`` with other features, as in ``VisionTower.from_pretrained``; unchanged if both are ``None``.

    ``layer`` holds indices into transformers' ``hidden_states``, which has ``depth + 1`` entries.
    """
    config = family.config
    if layer is not None:
        config = replace(config, features=_check_layers(config, layer), features_normed=False, pooling=None)
    if select is not None:
        config = replace(config, keep_class_token=_keeps_class_token(config, select))
    return replace(family, config=config)


def _check_layers(config: TowerConfig, layer: int | Sequence[int]) -> tuple[int, ...]:
    states = config.depth + 1
    given = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not given:
        raise UsageError("feature_layer must be an integer or a list of them, got an empty list")
    for index in given:
        if not is_integer(index) or not -states <= int(index) < states:
            raise UsageError(
                f"feature_layer must be in the range from {-states} to {states - 1} for {config.depth} blocks, "
                f"got {shorten(index)}"
            )
    if config.projector is not None and len(given) != len(config.features):
        raise UsageError(
            f"feature_layer must have as many layers as the checkpoint's projector takes ({len(config.features)}), "
            f"got {len(given)}"
        )
    return tuple(int(index) % states for index in given)


def _keeps_class_token(config: TowerConfig, select: str) -> bool:
    if select not in SELECTIONS:
        raise UsageError(f"feature_select must be one of {', '.join(map(repr, SELECTIONS))}, got {shorten(select)}")
    if select == "patch":
        return False
    if not config.class_token:
        raise UsageError("feature_select must be 'patch', got 'cls_patch': this tower has no class token")
    if config.newline:
        raise UsageError(
            "feature_select must be 'patch', got 'cls_patch': this tower joins the tokens of tiles, which leaves no place for "
            "class tokens"
        )
    return True
