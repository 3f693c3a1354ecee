"""Argument checks and integer arithmetic shared by the kernels' wrappers."""

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ceil_div(numerator: int, denominator: int) -> int:
    """``numerator / denominator``, rounded up."""
    return -(-numerator // denominator)


def align_up(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return ceil_div(size, alignment) * alignment


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``; ``size`` must be positive."""
    return 1 << (size - 1).bit_length()


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Raises ``TypeError`` unless ``tensor`` has one of :data:`FLOAT_DTYPES`."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """Raises ``TypeError`` for another dtype or device, ``ValueError`` for another shape or a last stride not 1."""
    if tensor.dtype != dtype or tensor.device != device:
        raise TypeError(f"{name} must be {dtype} on {device}, got {tensor.dtype} on {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(shape)} and strides {tensor.stride()}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have last stride 1, got shape {tuple(shape)} and strides {tensor.stride()}; "
            "pass a contiguous tensor"
        )


def check_matrix(name: str, tensor: torch.Tensor) -> None:
    """Raises ``ValueError`` unless ``tensor`` is ``[M, K]`` with K at least 1 and last stride 1."""
    if tensor.dim() != 2 or not tensor.shape[1]:
        raise ValueError(f"{name} must be [M, K] with K at least 1, got shape {tuple(tensor.shape)}")
    check_tensor(name, tensor, tensor.shape, tensor.dtype, tensor.device)


def check_rows(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Checks a ``tensor`` that is not ``None`` for this shape, and the dtype and device of ``like``."""
    if tensor is not None:
        check_tensor(name, tensor, shape, like.dtype, like.device)


def checked_output(
    out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor, name: str = "out"
) -> torch.Tensor:
    """Returns ``out`` if :func:`check_rows` accepts it, or a new tensor if it is ``None``."""
    check_rows(name, out, shape, like)
    return like.new_empty(shape) if out is None else out


def check_not_overwritten(name: str, source: torch.Tensor, out: torch.Tensor) -> None:
    """Raises ``ValueError`` if ``out`` starts where ``source`` does, so that rows would be overwritten before use."""
    # Tensors without memory have the address 0.
    if out.data_ptr() == source.data_ptr() != 0:
        raise ValueError(f"out must not be {name}, whose rows would be overwritten before they are read")
