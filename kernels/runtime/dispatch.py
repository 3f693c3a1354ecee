"""Backend selection: the only place that decides where an operation runs.

========================  =============================================================
tensor                    backend
========================  =============================================================
on a CUDA or ROCm device  ``"triton"``: the kernel, compiled
on the CPU                ``"reference"``: the plain torch function of the same file
on the CPU, with          ``"interpreter"``: the kernel, run by Triton's interpreter
``TRITON_INTERPRET=1``
========================  =============================================================

:func:`use` overrides the backend for a block of code; tests compare backends with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

from ._triton import HAS_TRITON, INTERPRETED

Backend = Literal["triton", "interpreter", "reference"]

_override: ContextVar[Backend | None] = ContextVar("tritontower_backend", default=None)


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend of an operation on ``tensor``; raises like :func:`backend_on`."""
    return backend_on(tensor.device)


def backend_on(device: torch.device) -> Backend:
    """The backend of an operation on ``device``; raises ``RuntimeError`` if the override of :func:`use` cannot run there."""
    wanted = _override.get()
    natural: Backend
    if device.type == "cuda":
        natural = "triton" if HAS_TRITON else "reference"
    else:
        natural = "interpreter" if INTERPRETED else "reference"
    # Nothing is computed on tensors without memory: any backend may be recorded.
    if wanted is None or wanted == natural or wanted == "reference" or device.type == "meta":
        return wanted or natural
    raise RuntimeError(
        f"backend must be {natural!r} or 'reference' for a tensor on {device}, got {wanted!r}; "
        "the interpreter needs TRITON_INTERPRET=1 in the environment before the first import"
    )


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Tells if an operation on ``tensor`` launches its Triton kernel, compiled or interpreted."""
    return backend_for(tensor) != "reference"


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Runs every operation inside the block on ``backend``."""
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)


if INTERPRETED:
    from .interpreter import patch_interpreter

    patch_interpreter()
