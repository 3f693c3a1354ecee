"""Where a tower runs and in which precision, as callers and configurations say it."""

import torch

from .config import DTYPE_NAMES
from .errors import BackendUnavailableError, UsageError

__all__ = ["parse_device", "parse_dtype"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant, by default the GPU that is the calling thread's current one, or else the CPU.

    A GPU always comes with its number: which one is current is each thread's own affair.

    Raises:
        UsageError: torch knows no such device.
        BackendUnavailableError: it is not here, or no tower runs on it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {str(device)!r} is not one of torch's; use 'cpu' or 'cuda', 'cuda:1', …") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} sees no GPU here; use device='cpu', or "
            "see what `tritontower env` reports"
        )
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs here, counted from 0"
        )
    if where.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"device {str(device)!r} is not supported; allowed: 'cpu', 'cuda'")
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype that is meant; ``None`` for ``"auto"``.

    Raises:
        UsageError: it is none in which towers run.
    """
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if wanted not in DTYPES.values():
        raise UsageError(f"dtype {str(dtype)!r} is not supported; allowed: 'auto', {', '.join(map(repr, DTYPES))}")
    return wanted
