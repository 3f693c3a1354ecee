"""Triton where it is installed, a stand-in where it is not.

Triton ships for Linux only, yet every kernel file also holds the torch reference that *is* the CPU path.  Importing
``triton`` and ``tl`` from here lets those references import anywhere; launching a kernel without Triton never happens,
because :mod:`.dispatch` sends such tensors to the reference.
"""

import os
from importlib import import_module
from typing import Any

__all__ = ["HAS_TRITON", "INTERPRETED", "tl", "triton"]


class _MissingTriton:
    """Answers every attribute and every decoration, so that kernel definitions parse without Triton."""

    def __getattr__(self, name: str) -> "_MissingTriton":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `@triton.jit` hands over the function and gets it back; anything else is a placeholder.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return _MissingTriton()


triton = _import("triton")
tl = _import("triton.language")

HAS_TRITON = not isinstance(triton, _MissingTriton)
"""Whether kernels can be launched at all."""

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton runs its kernels in numpy on the CPU; Triton reads the variable when a kernel is *defined*, so do we."""
