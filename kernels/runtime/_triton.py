"""Triton if it is installed, else a placeholder.

Triton is published for Linux only, but every kernel file also has the torch reference, which is the CPU path.  Importing
``triton`` and ``tl`` from here lets the kernel files import anywhere.  Without Triton no kernel is launched, because
:mod:`.dispatch` selects the reference.
"""

import os
from importlib import import_module
from typing import Any


class _MissingTriton:
    """Placeholder for any attribute or decorator, so that kernel definitions import without Triton."""

    def __getattr__(self, name: str) -> "_MissingTriton":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `@triton.jit` must return the function; anything else is a placeholder.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return _MissingTriton()


triton = _import("triton")
tl = _import("triton.language")

HAS_TRITON = not isinstance(triton, _MissingTriton)
"""True if kernels can be launched."""

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True if Triton runs kernels in numpy on the CPU; Triton also reads the variable when a kernel is *defined*."""
