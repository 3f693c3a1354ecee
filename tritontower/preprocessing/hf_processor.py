"""Makes pixels by transformers' image processor, and checks them against the layout."""

import textwrap
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tritontower.batch.layout import ImageLayout
from tritontower.errors import ProcessorError

from .bounds import Bounds
from .patchify import cut_into_patches
from .processor_config import PIXEL_OPTIONS
from .resize.rule import ResizeRule


class HFProcessor:
    """The image processor of a checkpoint, on transformers' PIL backend; loaded on first use."""

    def __init__(self, rule: ResizeRule) -> None:
        self.rule, self.source = rule, rule.source

    @cached_property
    def processor(self) -> Any:
        """The image processor of transformers; raises if it cannot be loaded or belongs to another tower."""
        processor = self.source.given if self.source.given is not None else self._load()
        for name, value in self.rule.list_expected_attributes().items():
            if (found := getattr(processor, name, None)) != value:
                raise ProcessorError(
                    f"{name} of the image processor of {self.source.folder} must be {value!r} for this tower, "
                    f"got {found!r}; the processor's file and config.json belong to different models"
                )
        return processor

    def _load(self) -> Any:
        if (made := self.rule.make_processor()) is not None:
            return made
        # From its own module: the name at the top of transformers 5.17 asks for torchvision, whatever the backend.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(
                str(self.source.folder),
                backend="pil",
                local_files_only=True,
                trust_remote_code=False,
                # transformers refuses some published forms of a size; it accepts these.
                **self.rule.list_arguments(Bounds()),
            )
        except Exception as error:  # the libraries below raise errors of their own about a file
            raise ProcessorError(
                f"transformers cannot load the image processor of {self.source.folder}: {_shorten_reason(error)}"
            ) from error

    def fill(
        self, out: torch.Tensor, array: NDArray[np.uint8], layout: ImageLayout, arguments: Mapping[str, Any]
    ) -> None:
        """Writes the patches of one image; raises if the processor's pixels do not fit the layout or the tower."""
        config = self.rule.config
        patch, channels = config.patch.size, config.patch.channels
        pixel_options = {name: value for name, value in self.source.options.items() if name in PIXEL_OPTIONS}
        processor = self.processor
        try:
            features = processor(
                images=[array],
                input_data_format="channels_last",
                do_convert_rgb=False,  # it is RGB; some files leave this open
                return_tensors="pt",
                **{**pixel_options, **arguments, **self.rule.CALL_ARGUMENTS},
            )
        except MemoryError:
            raise
        except Exception as error:  # the libraries below check the arguments, and raise errors of their own
            raise ProcessorError(
                f"the image processor of {self.source.folder} refused an image of {array.shape[1]} × {array.shape[0]} "
                f"pixels: {_shorten_reason(error)}"
            ) from error
        pixels: torch.Tensor = features["pixel_values"]
        if "image_grid_thw" in features:
            # The processor cuts patches itself, in the same order.
            grids = features["image_grid_thw"].tolist()
            found = pixels.shape[1] // patch**2
        else:
            pixels = pixels.flatten(0, -4)  # tiles come with or without an axis of images
            grids = [[1, pixels.shape[2] // patch, pixels.shape[3] // patch]] * len(pixels)
            found = pixels.shape[1]
        # Of a video, one frame at a time.
        planned = [[1, h, w] for _, h, w in layout.tiles]
        if grids != planned:
            raise ProcessorError(
                f"the image processor of {self.source.folder} must make grids {planned}, got {grids}; "
                "its resizing rule is not the tower's"
            )
        if found != channels:
            raise ProcessorError(
                f"the image processor of {self.source.folder} must make images of {channels} channels for this tower, "
                f"got {found}"
            )
        if pixels.ndim == 2:
            out.copy_(pixels)
        else:
            cut_into_patches(pixels, patch, config.merge, out)


def _shorten_reason(error: Exception) -> str:
    # On one line: transformers names the refused setting on the first line, and the reason on the next.
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
