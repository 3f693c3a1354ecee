"""The caller's bounds on the size of a resized image."""

from typing import TypedDict, cast

from tritontower.errors import ProcessorError, is_integer, shorten


class Bounds(TypedDict, total=False):
    """Bounds on the size of a resized image, pixels; ``None`` means the checkpoint's own.

    Each resizing rule supports some of the three and rejects the others.
    """

    min_pixels: int | None
    """Least area."""
    max_pixels: int | None
    """Greatest area."""
    longest_edge: int | None
    """Greatest side."""


def read_bound(bounds: Bounds, name: str, default: int) -> int:
    """Returns the bound ``name``, or ``default`` if the caller left it out."""
    value = cast("dict[str, object]", bounds).get(name)
    if value is None:
        return default
    if not is_integer(value):
        raise ProcessorError(f"{name} must be a whole number of pixels, got {shorten(value)}")
    return int(value)
