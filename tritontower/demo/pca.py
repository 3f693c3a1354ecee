"""Draws patch features: their three principal components become red, green and blue.

Similar patches get similar colors.  The drawing shows at a glance whether features follow the objects or are noise, shifted,
or in the wrong order.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tritontower.errors import UsageError

# Without this clipping, a few outliers would leave no contrast.
_LOWEST, _HIGHEST = 0.02, 0.98

_BACKGROUND = (252, 252, 251)
_INK = (31, 41, 55)
_GAP = 12
_CAPTION = 15


def principal_component_image(features: torch.Tensor, grid_height: int, grid_width: int) -> NDArray[np.uint8]:
    """Projects patch features on their first three principal components and scales each to a color channel.

    The same features always give the same colors: a component's sign is chosen so that its largest
    loading is positive.  A component without variance is drawn as middle gray.

    Args:
        features: ``[grid_height × grid_width, D]``, in raster order, of any float dtype, on any device.
        grid_height: rows of patches.
        grid_width: patches in a row.

    Returns:
        ``[grid_height, grid_width, 3]``, RGB.

    Raises:
        UsageError: features of another shape, or not finite.
    """
    if features.ndim != 2 or features.shape[0] != grid_height * grid_width or features.numel() == 0:
        raise UsageError(
            f"features must have shape [{grid_height * grid_width}, D] for a grid of {grid_height} × {grid_width}, got "
            f"{list(features.shape)}"
        )
    rows = features.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise UsageError("features must be finite, got NaN or infinity")
    scores = _principal_scores(rows - rows.mean(dim=0), count=3)
    low = torch.quantile(scores, _LOWEST, dim=0)
    high = torch.quantile(scores, _HIGHEST, dim=0)
    # Rounding spreads constant features a little, which must not become colors.
    flat = high - low <= 1e-5 * rows.abs().max()
    scaled = torch.where(flat, 0.5, ((scores - low) / (high - low).clamp_min(1e-30)).clamp(0, 1))
    image: NDArray[np.uint8] = (scaled * 255).round().to(torch.uint8).reshape(grid_height, grid_width, 3).numpy()
    return image


def _principal_scores(centered: torch.Tensor, count: int) -> torch.Tensor:
    """First ``count`` principal components of ``[N, D]`` rows: ``[N, count]``, padded with zeros."""
    left, singular, right = torch.linalg.svd(centered, full_matrices=False)
    available = min(count, singular.numel())
    loadings = right[:available]
    largest = loadings.gather(1, loadings.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0)
    scores = centered.new_zeros(centered.shape[0], count)
    scores[:, :available] = left[:, :available] * singular[:available] * signs
    return scores


def side_by_side(
    images: Sequence[Image.Image], feature_maps: Sequence[NDArray[np.uint8]], titles: Sequence[str], *, cell: int = 360
) -> Image.Image:
    """Draws images next to their feature maps, one pair per row, under a title.

    Args:
        images: the inputs of the tower.
        feature_maps: ``[rows, columns, 3]`` each, from :func:`principal_component_image`; enlarged
            without smoothing, so that every patch stays a visible square.
        titles: one line each, truncated to the page.
        cell: pixels of an image's longer side on the page.

    Raises:
        UsageError: sequences of different lengths, or empty.
    """
    if not (len(images) == len(feature_maps) == len(titles) > 0):
        raise UsageError(
            "images, feature_maps and titles must have one common length above 0, got "
            f"{len(images)}, {len(feature_maps)} and {len(titles)}"
        )
    shown = [ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS) for image in images]
    column = max(image.width for image in shown)
    font = ImageFont.load_default(_CAPTION)
    row_heights = [_CAPTION + _GAP // 2 + image.height + _GAP for image in shown]
    page = Image.new("RGB", (2 * column + 3 * _GAP, sum(row_heights) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(page)
    y = _GAP
    for image, features, title, row_height in zip(shown, feature_maps, titles, row_heights, strict=True):
        draw.text((_GAP, y), _shorten(_in_font(title), font, page.width - 2 * _GAP), fill=_INK, font=font)
        below = y + _CAPTION + _GAP // 2
        page.paste(image, (_GAP, below))
        page.paste(Image.fromarray(features).resize(image.size, Image.Resampling.NEAREST), (column + 2 * _GAP, below))
        y += row_height
    return page


def _in_font(text: str) -> str:
    """Replaces characters that Pillow's default font lacks."""
    return text.replace("×", "x").replace("–", "-").encode("ascii", "replace").decode()


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    kept = text
    while kept and font.getlength(kept + "...") > width:
        kept = kept[:-1]
    return kept + "..."
