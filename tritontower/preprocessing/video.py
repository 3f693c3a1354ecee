"""Makes the patches of a video: frames side by side in each temporal patch, the last frame repeated to fill it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tritontower.batch.layout import ImageLayout

from .fast_path import FastPath, allocate_pixels
from .hf_processor import HFProcessor
from .images.image import CanonicalImage
from .patchify import cut_bytes
from .pillow_resize import resize_by_pillow, resize_image


def fill_video(
    frames: Sequence[CanonicalImage],
    layout: ImageLayout,
    fast_path: FastPath | None,
    hf_processor: HFProcessor,
    each: Callable[..., Iterable[Any]],
    raw: bool,
) -> torch.Tensor:
    """Returns ``[patches, inner]``: columns are channel, frame, row and column of the patch."""
    config = hf_processor.rule.config
    patch = config.patch
    pixels = allocate_pixels(layout.patches, patch.inner, raw=fast_path is not None)
    slots = pixels.view(layout.grid[0], -1, patch.channels, patch.temporal, patch.size**2)

    def fill(number: int, frame: CanonicalImage) -> None:
        rows = torch.empty(slots.shape[1], patch.still_inner, dtype=pixels.dtype)
        if fast_path is None:
            # The processor's own rule would not find the size of every video.
            resample = hf_processor.source.options.get("resample", hf_processor.processor.resample)
            array = resize_by_pillow(frame.array, layout.processed_size, resample)
            hf_processor.fill(rows, array, layout, {"do_resize": False})
        else:
            array = resize_image(frame.array, layout.processed_size, fast_path.resample)
            cut_bytes(array, patch.size, config.merge, rows.numpy())
        slots[number // patch.temporal, :, :, number % patch.temporal] = rows.unflatten(1, (patch.channels, -1))
        _ = frame.digest  # part of the video's digest; computed here, in several threads

    for _ in each(fill, range(len(frames)), frames):
        pass
    filled = (len(frames) - 1) % patch.temporal + 1
    slots[-1, :, :, filled:] = slots[-1, :, :, filled - 1 : filled]
    if fast_path is None or raw:
        return pixels
    values = allocate_pixels(layout.patches, patch.inner)
    fast_path.normalization.normalize(pixels.numpy(), values.numpy())
    return values


def hash_frames(frames: Sequence[CanonicalImage]) -> str:
    """Returns a digest of all frames in their order."""
    state = hashlib.blake2b(digest_size=32, person=b"tritontower-clip")
    for frame in frames:
        state.update(bytes.fromhex(frame.digest))
    return state.hexdigest()
