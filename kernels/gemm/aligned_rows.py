"""Matrices whose rows start at multiples of 16 elements, which kernels and the copy engine read in whole vectors.

Rows of 588 or 1176 pixels (patches of 14 × 14) are padded to 592 and 1184; the padding is not part of the matrix.
"""

import torch

from ..runtime.checks import align_up

ALIGNMENT = 16
"""Elements; Triton infers only this divisibility of a stride."""


def align_rows(matrix: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
    """Returns ``matrix``, or a copy with aligned rows; ``pinned``: a page-locked one, which needs a GPU."""
    if matrix.stride(0) % ALIGNMENT == 0 and matrix.stride(1) == 1 and (not pinned or matrix.is_pinned()):
        return matrix
    rows, width = matrix.shape
    memory = torch.empty(
        rows, align_up(width, ALIGNMENT), dtype=matrix.dtype, device=matrix.device, pin_memory=pinned
    )  # fmt: skip
    memory[:, width:].zero_()
    return memory[:, :width].copy_(matrix)


def include_padding(matrix: torch.Tensor) -> torch.Tensor:
    """Returns ``matrix`` with the padding of its rows, for copies in one piece; as it is if its memory ends earlier."""
    rows, stride = matrix.shape[0], matrix.stride(0)
    end = (matrix.storage_offset() + rows * stride) * matrix.element_size()
    if stride < matrix.shape[1] or matrix.stride(1) != 1 or end > matrix.untyped_storage().nbytes():
        return matrix
    return matrix.as_strided((rows, stride), (stride, 1))
