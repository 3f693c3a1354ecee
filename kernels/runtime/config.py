"""Launch configurations and architectures.

Every kernel file has a frozen ``…Config`` dataclass (block sizes, warps, pipeline stages) and a ``default_config`` that
maps a shape and an *architecture* to one.  An architecture is the compiler's name of a chip generation: ``sm_80`` (A100),
``sm_89`` (Ada), ``sm_90`` (Hopper), ``sm_100`` (Blackwell), ``sm_120`` (its workstation cards), ``gfx942`` (MI300), ``gfx950`` (MI350), or ``interpreter``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")

SHARED_MEMORY_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
"""Bytes of shared memory (LDS on AMD) that one program may use."""

# Chips that have the shared memory and the tensor cores of an older one.
_SAME_AS = {"sm_86": "sm_89", "sm_87": "sm_89"}


def nearest_architecture(name: str) -> str:
    """The known architecture whose defaults fit ``name``: usually the newest of its vendor that is not newer."""
    if name in ARCHITECTURES or name == "interpreter":
        return name
    if name in _SAME_AS:
        return _SAME_AS[name]
    if name.startswith("gfx") and not name.startswith("gfx9"):
        # AMD's gaming chips have 64 KB of LDS, like the smallest of its accelerators.
        return "gfx942"
    vendor = "sm_" if name.startswith("sm_") else "gfx"
    known = [candidate for candidate in ARCHITECTURES if candidate.startswith(vendor)]

    def generation(candidate: str) -> int:
        return int(candidate.removeprefix(vendor), 16)

    older = [candidate for candidate in known if generation(candidate) <= generation(name)]
    return older[-1] if older else known[0]


_assumed: ContextVar[torch.device | str] = ContextVar("tritontower_assumed_device", default="interpreter")


@contextmanager
def assume(device: torch.device | str) -> Iterator[None]:
    """Gives tensors without memory the configurations of ``device`` inside the block, or the defaults of an architecture."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def get_assumed_device(device: torch.device) -> torch.device | str:
    """Returns ``device``, or that of :func:`assume` if tensors on it have no memory."""
    return _assumed.get() if device.type == "meta" else device


@lru_cache
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return nearest_architecture(str(properties.gcnArchName).split(":")[0])
    return nearest_architecture(f"sm_{properties.major}{properties.minor}")


def architecture(device: torch.device) -> str:
    """The architecture of ``device`` among :data:`ARCHITECTURES`; ``"interpreter"`` for the CPU."""
    assumed = get_assumed_device(device)
    if isinstance(assumed, str):
        return nearest_architecture(assumed)
    if assumed.type != "cuda":
        return "interpreter"
    return _device_architecture(torch.cuda.current_device() if assumed.index is None else assumed.index)
