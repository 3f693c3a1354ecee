"""Turns Sphinx roles in docstrings into code spans, which mkdocstrings renders."""

import re
from typing import Any

import griffe


class SphinxRoles(griffe.Extension):
    """Replaces ``:meth:`~x.y``` with ```y```."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`(~?)\.?([^`]+)`", _span, obj.docstring.value)


def _span(match: re.Match[str]) -> str:
    short, name = match.groups()
    return f"`{name.rpartition('.')[2] if short else name}`"
