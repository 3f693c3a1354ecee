"""Cuts tiles into rows of patches: block by block, the patches of a block in raster order.

The remainder of a side that is not a multiple of the patch is left out at the right and at the bottom, as by a
convolution without padding.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.normalization import PixelNormalization

from .threads import Spread, run_serially


def cut_into_patches(image: torch.Tensor, patch: int, merge: int, out: torch.Tensor) -> None:
    """Cuts tiles ``[tiles, channels, height, width]`` into rows ``[patches, channels · patch²]``, tile by tile.

    ``merge`` is the side of a block in patches; 1 is plain raster order.  ``out`` may have another dtype.
    """
    tiles, channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    blocks = image[:, :, : rows * patch, : columns * patch].reshape(
        tiles, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    out.view(blocks.shape).copy_(blocks)


def cut_bytes(array: NDArray[np.uint8], patch: int, merge: int, out: NDArray[np.uint8]) -> None:
    """Cuts one tile of bytes ``[height, width, channels]``; ``out`` may have any row stride."""
    rows, columns = array.shape[0] // patch, array.shape[1] // patch
    blocks = array[: rows * patch, : columns * patch].reshape(
        rows // merge, merge, patch, columns // merge, merge, patch, -1
    )
    # Row and column of the block, of the patch in it; channel, row and column of the pixel.
    target = out.reshape(rows // merge, columns // merge, merge, merge, -1, patch, patch)
    target[...] = blocks.transpose(0, 3, 1, 4, 6, 2, 5)


def cut_values(
    array: NDArray[np.uint8],
    patch: int,
    merge: int,
    normalization: PixelNormalization,
    out: NDArray[np.float32],
    spread: Spread = run_serially,
) -> None:
    """Cuts one tile as :func:`cut_bytes` does, and writes normalized values."""
    strip, per_strip = patch * merge, array.shape[1] // patch * merge

    def cut(part: slice) -> None:
        raw = np.empty((per_strip, out.shape[1]), np.uint8)
        for number in range(part.start, part.stop):
            cut_bytes(array[number * strip : (number + 1) * strip], patch, merge, raw)
            normalization.normalize(raw, out[number * per_strip : (number + 1) * per_strip])

    spread(cut, array.shape[0] // strip)
