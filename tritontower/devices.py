"""Parses devices and dtypes, as callers and configurations name them."""

import torch

from .config import DTYPE_NAMES
from .errors import BackendUnavailableError, UsageError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def parse_device(device: str | torch.device | None) -> torch.device:
    """Returns the device, a GPU with its index; by default the calling thread's current GPU, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device must be 'cpu', 'cuda', 'cuda:1' or the like, got {str(device)!r}") from error
    if where.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device must be 'cpu', got {str(device)!r}: torch {torch.__version__} sees no GPU here; see "
            "`tritontower env`"
        )
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device must be one of {torch.cuda.device_count()} GPUs, counted from 0, got {str(device)!r}"
        )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if (
        where.type == "cuda"
        and torch.version.hip is None
        and (found := torch.cuda.get_device_capability(where)) < (8, 0)
    ):
        name = torch.cuda.get_device_name(where)
        raise BackendUnavailableError(
            f"device must have compute capability 8.0 or higher, got {found[0]}.{found[1]} ({name}); pass device='cpu'"
        )
    return where


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done its work; a CPU does it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Returns the dtype; ``None`` for ``"auto"``."""
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if wanted not in DTYPES.values():
        raise UsageError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))}, got {str(dtype)!r}")
    return wanted
