"""Shorthand for the weight maps of parameters that are stored unchanged."""

from collections.abc import Mapping, Sequence

from tritontower.checkpoint.weight_map import Stored, WeightMap

BOTH = ("weight", "bias")


def map_parameters(parts: Mapping[str, str], kinds: Sequence[str] = BOTH) -> dict[str, WeightMap]:
    """Maps the parameters of modules, ours → theirs, that are stored as the layer graph has them."""
    return {f"{ours}.{kind}": Stored(f"{theirs}.{kind}") for ours, theirs in parts.items() for kind in kinds}


def prefix_parts(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Puts ``ours.`` and ``theirs.`` before the names of modules."""
    return {f"{ours}.{part}": f"{theirs}.{stored}" for part, stored in parts.items()}
