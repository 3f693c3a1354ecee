"""The one place that decides where an operation runs.

========================  =============================================================
tensor                    backend
========================  =============================================================
on a CUDA or ROCm device  ``"triton"``: the kernel, compiled
on the CPU                ``"reference"``: the plain torch function of the same file
on the CPU, with          ``"interpreter"``: the kernel, run by Triton's interpreter
``TRITON_INTERPRET=1``
========================  =============================================================

:func:`use` overrides the choice for a block of code; tests compare backends with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Concatenate, Literal, ParamSpec

import torch

from ._triton import HAS_TRITON, INTERPRETED

__all__ = ["Backend", "backend_for", "backend_on", "on_device_of_first", "runs_kernel", "use"]

Backend = Literal["triton", "interpreter", "reference"]

Parameters = ParamSpec("Parameters")

_override: ContextVar[Backend | None] = ContextVar("tritontower_backend", default=None)


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend that an operation on ``tensor`` takes.

    Raises:
        RuntimeError: an override asks for a backend that cannot take this tensor here.
    """
    return backend_on(tensor.device)


def backend_on(device: torch.device) -> Backend:
    """The backend that an operation on tensors of ``device`` takes; raises what :func:`backend_for` does."""
    wanted = _override.get()
    natural: Backend
    if device.type == "cuda":
        natural = "triton" if HAS_TRITON else "reference"
    else:
        natural = "interpreter" if INTERPRETED else "reference"
    if wanted is None or wanted == natural or wanted == "reference":
        return wanted or natural
    raise RuntimeError(
        f"backend {wanted!r} was asked for, but a tensor on {device} can only take {natural!r} or 'reference' "
        "here; the interpreter needs TRITON_INTERPRET=1 in the environment before the first import"
    )


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether an operation on ``tensor`` launches its Triton kernel (compiled or interpreted)."""
    return backend_for(tensor) != "reference"


def on_device_of_first(
    launcher: Callable[Concatenate[torch.Tensor, Parameters], None],
) -> Callable[Concatenate[torch.Tensor, Parameters], None]:
    """Makes the device of a launcher's first tensor the current one: Triton launches there, wherever the tensors lie."""

    @wraps(launcher)
    def guarded(first: torch.Tensor, /, *arguments: Parameters.args, **options: Parameters.kwargs) -> None:
        with torch.cuda.device_of(first):
            launcher(first, *arguments, **options)

    return guarded


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Sends every operation inside the block to ``backend``; the previous choice returns afterwards."""
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)


if INTERPRETED:
    from .interpreter import repair_interpreter

    repair_interpreter()
