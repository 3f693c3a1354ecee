"""Shorthand for the weight maps of parameters that are stored unchanged."""

from collections.abc import Mapping, Sequence

from tritontower.checkpoint.weight_map import Stored, WeightMap

BOTH = ("weight", "bias")


def map_parameters(
    parts: Mapping[str, str], kinds: Sequence[str] = BOTH, ours: str = "", theirs: str = ""
) -> dict[str, WeightMap]:
    """Maps the parameters of modules, ours → theirs, below the modules ``ours`` and ``theirs``."""
    return {
        f"{ours}.{part}.{kind}".lstrip("."): Stored(f"{theirs}.{stored}.{kind}".lstrip("."))
        for part, stored in parts.items()
        for kind in kinds
    }
