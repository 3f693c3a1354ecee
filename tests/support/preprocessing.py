"""Towers, folders, images and resizing rules for the tests of preprocessing."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.configs import CONFIG
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tritontower.config import PositionTable, TowerConfig
from tritontower.errors import Limits
from tritontower.preprocessing import (
    AnyResolution,
    FixedSize,
    LongestEdge,
    MakeRule,
    Preprocessor,
    ProcessorSource,
    ResizeRule,
    SmartResize,
)
from tritontower.preprocessing.images.decode import decode_image
from tritontower.preprocessing.images.image import CanonicalImage

LIMITS = Limits()


def tower(
    patch: int = 14, merge: int = 1, temporal: int = 1, table_side: int | None = None, **changes: Any
) -> TowerConfig:
    """A tower of which only what preprocessing reads is meaningful."""
    return replace(
        CONFIG,
        family="tested",
        segments="image",
        patch=replace(CONFIG.patch, size=patch, temporal=temporal),
        position_table=None if table_side is None else PositionTable(table_side, "exact"),
        projector=replace(CONFIG.projector, merge=merge),
        **changes,
    )


def write_settings(folder: Path, values: Any, name: str = "preprocessor_config.json") -> Path:
    """``folder`` with one settings file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder


def reference_processor(folder: Path) -> Any:
    """The processor of a folder as transformers itself loads it."""
    return AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)


def canonical(array: np.ndarray) -> CanonicalImage:
    """``array``, ``[height, width, 3]`` uint8, in canonical form."""
    return decode_image(array, input_data_format="channels_last")


def blank(width: int, height: int) -> CanonicalImage:
    """A black image."""
    return CanonicalImage(np.zeros((height, width, 3), np.uint8), "black")


def random_sizes(count: int, largest: int = 3000, seed: int = 0) -> list[tuple[int, int]]:
    """Widths and heights, small ones as likely as large ones, none flatter than 1 : 200."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.uniform(0.0, np.log(largest), (2 * count, 2))).astype(int).clip(1)
    kept = [(int(w), int(h)) for w, h in sizes if max(w, h) <= 200 * min(w, h)][:count]
    assert len(kept) == count
    return kept


def make_rule(
    rule: MakeRule,
    config: TowerConfig,
    folder: Path,
    limits: Limits = LIMITS,
    given: Any = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Preprocessor:
    """A preprocessor of one resizing rule."""
    source = ProcessorSource(config, folder, limits, given, options or {})
    return Preprocessor(source, partial(rule, **arguments))


def patches_of(preprocessor: Preprocessor, images: list[CanonicalImage], **bounds: Any) -> list[torch.Tensor]:
    """The rows of patches of every image."""
    counts = [preprocessor.layout(image.width, image.height, **bounds).patches for image in images]
    pixels = preprocessor.preprocess_images(images, **bounds).pixels
    assert pixels.dtype == torch.float32
    return list(pixels.split(counts))


def put_together(rows: torch.Tensor, grid: tuple[int, int, int], patch: int, merge: int) -> torch.Tensor:
    """``[channels, height, width]`` of one tile from its rows: one patch after the other, in plain Python."""
    _, height, width = grid
    image = torch.empty(3, height * patch, width * patch)
    number = 0
    for block_row in range(0, height, merge):
        for block_column in range(0, width, merge):
            for row in range(block_row, block_row + merge):
                for column in range(block_column, block_column + merge):
                    top, left = row * patch, column * patch
                    image[:, top : top + patch, left : left + patch] = rows[number].view(3, patch, patch)
                    number += 1
    assert number == len(rows)
    return image


@dataclass(frozen=True)
class RuleCase:
    """A resizing rule with a settings file, and the arguments with which transformers calls the processor."""

    rule: type[ResizeRule]
    config: TowerConfig
    content: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> Preprocessor:
        """The preprocessor of a folder with these settings and ``changes`` in its file."""
        write_settings(folder, {**self.content, **changes})
        return make_rule(self.rule, self.config, folder, options=options, **self.arguments)


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = tower(table_side=4)
QWEN2, QWEN3 = tower(merge=2, temporal=2), tower(patch=16, merge=2, temporal=2)
QWEN_FILE = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
PIXTRAL, MISTRAL = tower(patch=16), tower(merge=2)
PIXTRAL_FILE = {"image_processor_type": "PixtralImageProcessor", "patch_size": 14}
CLIP_FILE = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 60},
    "crop_size": 56,
    "do_center_crop": True,
}
SIGLIP_FILE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, **HALF}
GEMMA_FILE = {
    **SIGLIP_FILE,
    "image_processor_type": "Gemma3ImageProcessor",
    "resample": 2,
    "do_convert_rgb": None,
    "do_pan_and_scan": None,
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
}
NEXT_FILE = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_size": 56,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56]],
}
ONEVISION_FILE = {
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "size": {"height": 31, "width": 31},
    "image_grid_pinpoints": [[31 * rows, 31 * columns] for rows in range(1, 5) for columns in range(1, 5)],
    **HALF,
}
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 30}
CROPS_CALL = {**CROPS, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}

RULES: dict[str, RuleCase] = {
    "area": RuleCase(SmartResize, QWEN2, {**QWEN_FILE, "min_pixels": 3136, "max_pixels": 100352}),
    "area, 16 × 16": RuleCase(SmartResize, QWEN3, {**QWEN_FILE, "patch_size": 16, "max_pixels": 90000, **HALF}),
    "edge": RuleCase(LongestEdge, PIXTRAL, {**PIXTRAL_FILE, "patch_size": 16, "size": {"longest_edge": 300}}),
    "edge, merged": RuleCase(LongestEdge, MISTRAL, {**PIXTRAL_FILE, "size": {"longest_edge": 280}}, call={"patch_size": 28}),
    "cropped": RuleCase(FixedSize, SQUARE, CLIP_FILE),
    "cropped beyond its sides": RuleCase(
        FixedSize, SQUARE, {**CLIP_FILE, "image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 33}}
    ),
    "squashed": RuleCase(FixedSize, SQUARE, SIGLIP_FILE),
    "pan and scan": RuleCase(FixedSize, SQUARE, {**GEMMA_FILE, **CROPS}, {"pan_and_scan": True}, CROPS_CALL),
    "tiles, cropped": RuleCase(AnyResolution, SQUARE, NEXT_FILE),
    "tiles": RuleCase(AnyResolution, tower(table_side=2), ONEVISION_FILE),
}  # fmt: skip
"""Every rule that has a processor of transformers, in every form that the fast path covers."""

OTHER_FILES: dict[str, RuleCase] = {
    "size in a section": RuleCase(SmartResize, QWEN2, {**QWEN_FILE, "size": {"shortest_edge": 5000, "longest_edge": 60000}}),
    "edge, no size": RuleCase(LongestEdge, MISTRAL, PIXTRAL_FILE, call={"patch_size": 28}),
    "edge, block side": RuleCase(LongestEdge, MISTRAL, {**PIXTRAL_FILE, "patch_size": 28, "size": {"longest_edge": 154}}),
    "edge, two sides": RuleCase(
        LongestEdge, MISTRAL, {**PIXTRAL_FILE, "size": {"height": 112, "width": 196}}, call={"patch_size": 28}
    ),
    "edge, a number": RuleCase(LongestEdge, MISTRAL, {**PIXTRAL_FILE, "size": 140}, call={"patch_size": 28}),
    "cropped, numbers": RuleCase(FixedSize, SQUARE, {**CLIP_FILE, "size": 56, "crop_size": {"height": 56, "width": 56}}),
    "cropped, fast": RuleCase(FixedSize, SQUARE, {**CLIP_FILE, "image_processor_type": "CLIPImageProcessorFast"}),
    "feature extractor": RuleCase(
        FixedSize, SQUARE, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 64, "crop_size": 56}
    ),
    "squashed, then cropped": RuleCase(FixedSize, SQUARE, {**CLIP_FILE, "size": {"height": 70, "width": 60}}),
    "padded": RuleCase(FixedSize, SQUARE, {**CLIP_FILE, "image_processor_type": "LlavaImageProcessor", "do_pad": True}),
    "squashed, a pair": RuleCase(FixedSize, SQUARE, {**SIGLIP_FILE, "size": [56, 56]}),
    "squashed, a margin": RuleCase(FixedSize, SQUARE, {**SIGLIP_FILE, "size": {"height": 60, "width": 67}}),
    "gemma, published": RuleCase(FixedSize, SQUARE, GEMMA_FILE, {"pan_and_scan": True}),
    **{
        f"defaults of {kind}": RuleCase(FixedSize, tower(table_side=16), {"image_processor_type": kind})
        for kind in ("CLIPImageProcessor", "SiglipImageProcessor", "Gemma3ImageProcessor", "LlavaImageProcessor")
    },
}  # fmt: skip
"""Other forms of the settings files."""
