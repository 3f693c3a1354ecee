"""The vision part of a model of transformers: where it is, what it is called with, and a tower in its place.

Every vision-language model of transformers makes the rows of its images in one method, ``get_image_features`` (and
``get_video_features``), from pixels that its processor prepared.  A tower replaces that method, on one model object; the
modules behind it are then never run.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tritontower.batch.layout import ImageLayout
from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.checkpoint.files import Prefixes, strip_prefix
from tritontower.config import TowerConfig
from tritontower.errors import UnsupportedArchitectureError, UsageError, shorten
from tritontower.models.common.family import Family
from tritontower.models.common.registry import read_family
from tritontower.preprocessing.resize.anyres import best_canvas
from tritontower.tower import VisionTower

__all__ = [
    "ReleasedModule",
    "differing_fields",
    "family_of",
    "feature_output",
    "is_stacked",
    "replacements",
    "takes_encoder_outputs",
    "vision_children",
    "vision_holder",
]

CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")
"""What a caller may ask the methods for beside the checkpoint's choice, and a tower has settled."""

STACKED = frozenset(("gemma3", "paligemma", "shieldgemma2"))
"""Model types that take the rows of all tiles in one tensor ``[tiles, tokens, width]``, where others take a list."""


class ReleasedModule(torch.nn.Module):
    """Stands where a module of the vision part was, whose weights only the tower has now."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Refuses.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this module of the vision part holds no weights: a tower has taken its place; call the model, its "
            "get_image_features, or the tower"
        )


def family_of(model: Any) -> Family:
    """The tower that the model's configuration describes; raises what :func:`tritontower.models.common.registry.read_family` does."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    return read_family(ConfigReader(values, source=f"the configuration of {type(model).__name__}"))


def vision_holder(model: torch.nn.Module, prefixes: Prefixes) -> Any:
    """The module inside ``model`` that makes image rows and holds the vision part.

    Raises:
        UnsupportedArchitectureError: there is none, or no language model beside it that would take the rows.
    """
    for module in model.modules():
        if hasattr(module, "get_image_features") and vision_children(module, prefixes):
            if hasattr(module, "language_model"):
                return module
            break
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} holds no vision part that feeds a language model; use VisionTower by itself"
    )


def vision_children(holder: torch.nn.Module, prefixes: Prefixes) -> list[str]:
    """Names of the modules directly inside ``holder`` that are parts of its tower."""
    named = [root for root in prefixes if root]
    return [
        name for name, _ in holder.named_children() if strip_prefix(f"{name}.x", dict.fromkeys(named, "")) is not None
    ]


def is_stacked(holder: Any) -> bool:
    """Whether the model takes the rows of its tiles in one tensor."""
    return holder.config.model_type in STACKED


def takes_encoder_outputs(model: Any) -> bool:
    """Whether a model of this version of transformers takes ``mm_encoder_outputs``."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def feature_output(holder: Any, rows: Any, deepstack: Sequence[Any] = ()) -> Any:
    """``rows`` in the class in which ``holder`` returns and takes them.

    Args:
        holder: the module that makes image rows.
        rows: per image ``[tokens, width]``, or one tensor where the model is stacked.
        deepstack: per level, the same; for models that have levels, even if it is empty.
    """
    # Only models with deepstack levels have this class, each in its own module.
    kind = getattr(inspect.getmodule(type(holder)), "BaseModelOutputWithDeepstackFeatures", None)
    if kind is not None:
        if not takes_encoder_outputs(holder):
            # transformers 5.17 does not divide a level into images.
            deepstack = [torch.cat(list(level)) for level in deepstack]
        return kind(pooler_output=rows, deepstack_features=list(deepstack))
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=rows)


def replacements(holder: Any, tower: VisionTower) -> dict[str, Callable[..., Any]]:
    """Name of a method of ``holder`` → what takes its place, with the same signature."""
    image = holder.get_image_features
    makers: dict[str, _MakeRows]
    if "image_grid_thw" in inspect.signature(image).parameters:
        makers = {"get_image_features": _of_patches, "get_video_features": _of_patches}
    elif hasattr(holder, "pack_image_features"):
        makers = {"get_image_features": _of_tiles}
        if hasattr(holder, "apply_pooling"):
            makers["get_video_features"] = _of_frames
    elif tower.config.num_patches is None:
        makers = {"get_image_features": _of_sized_images}
    else:
        makers = {"get_image_features": _of_same_size}
    return {name: _in_place_of(getattr(holder, name), holder, tower, make) for name, make in makers.items()}


_Arguments = Mapping[str, Any]
_MakeRows = Callable[[Any, VisionTower, _Arguments], Any]
"""Holder, tower and the arguments of the call by name → what the method returns."""


def _in_place_of(original: Callable[..., Any], holder: Any, tower: VisionTower, make: _MakeRows) -> Callable[..., Any]:
    signature = inspect.signature(original)

    # `generate` reads the signature to see what it may pass.
    @functools.wraps(original)
    def by_tower(*positional: Any, **named: Any) -> Any:
        as_output = named.pop("return_dict", None)
        bound = signature.bind(*positional, **named)
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        _refuse_lost_gradients(holder, tower)
        for choice in CHOICES:
            asked, settled = arguments.get(choice), getattr(holder.config, choice, None)
            if asked is not None and asked != settled:
                raise UsageError(
                    f"{choice} is {shorten(asked)}, but the tower in the model's place makes features of "
                    f"{shorten(settled)}, the configuration's; restore(model) before asking for others"
                )
        output = make(holder, tower, arguments)
        wants_output = holder.config.return_dict if as_output is None else as_output
        return output if wants_output else output.to_tuple()

    return by_tower


def _refuse_lost_gradients(holder: Any, tower: VisionTower) -> None:
    """Raises where the vision part is being trained, which would go on without ever changing it."""
    if not (holder.training and torch.is_grad_enabled()):
        return
    parts = (holder.get_submodule(name) for name in vision_children(holder, tower.family.prefixes))
    if any(weight.requires_grad for part in parts for weight in part.parameters()):
        raise UsageError(
            "the model is being trained, its vision weights with it, but the tower in their place computes no gradients; "
            "freeze them (requires_grad_(False)), call model.eval(), or restore(model)"
        )


def _of_patches(holder: Any, tower: VisionTower, arguments: _Arguments) -> Any:
    """Rows of patches in merge-block order, and the grid of every image or video."""
    video = arguments.get("pixel_values_videos") is not None
    pixels = arguments["pixel_values_videos" if video else "pixel_values"]
    grids = arguments["video_grid_thw" if video else "image_grid_thw"]
    outputs, counts = _run_patches(tower, pixels, [tuple(grid) for grid in grids.tolist()])
    levels = [outputs[f"deepstack.{level}"].split(counts) for level in range(len(tower.config.deepstack))]
    return feature_output(holder, outputs["embeddings"].split(counts), levels)


def _run_patches(
    tower: VisionTower, pixels: torch.Tensor, grids: Sequence[tuple[int, int, int]]
) -> tuple[Mapping[str, torch.Tensor], list[int]]:
    config = tower.config
    layouts = [ImageLayout.of_one_tile(grid, config.patch.size) for grid in grids]
    batch = PackedBatch.pack(
        config,
        pixels.detach().float(),
        layouts,
        original_sizes=[layout.processed_size for layout in layouts],
        content_hashes=[""] * len(layouts),
    )
    return tower.run(batch), list(batch.images.token_counts)


def _of_same_size(holder: Any, tower: VisionTower, arguments: _Arguments) -> Any:
    """Images that are all of one size."""
    rows = tower.forward(arguments["pixel_values"])
    return feature_output(holder, rows if is_stacked(holder) else list(rows))


def _of_sized_images(holder: Any, tower: VisionTower, arguments: _Arguments) -> Any:
    """Images padded to one size, and the height and width of each."""
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    if sizes is None:
        return feature_output(holder, tower.forward(list(pixels)))
    sizes = torch.as_tensor(sizes).tolist()
    tiles = [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]
    return feature_output(holder, tower.forward(tiles))


def _of_tiles(holder: Any, tower: VisionTower, arguments: _Arguments) -> Any:
    """The tiles of every image, and the height and width of the images before they were cut; the model joins them."""
    config, sizes = holder.config, torch.as_tensor(arguments["image_sizes"])
    counts = list(_tile_counts(config, sizes.tolist(), arguments.get("batch_num_images")))
    pixels = arguments["pixel_values"]
    if pixels.ndim == 5:
        pixels = torch.cat([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])
    rows = tower.forward(pixels)
    allowed = inspect.signature(holder.pack_image_features).parameters
    options = {
        name: arguments.get(name) or getattr(config, name)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        if name in allowed
    }
    packed, _ = holder.pack_image_features(rows.split(counts), sizes, image_newline=holder.image_newline, **options)
    return feature_output(holder, packed)


def _tile_counts(config: Any, sizes: Sequence[Sequence[int]], images_per_prompt: Any) -> Iterator[int]:
    """Tiles of each image, the squashed one included; an image among several of a prompt may come as that one alone."""
    side = config.vision_config.image_size
    alone = [True] * len(sizes)
    if images_per_prompt is not None:
        alone = [count == 1 for count in map(int, images_per_prompt) for _ in range(count)]
    for (height, width), cut in zip(sizes, alone, strict=True):
        rows, columns = best_canvas(width, height, config.image_grid_pinpoints)
        yield 1 + (rows // side) * (columns // side) if cut else 1


def _of_frames(holder: Any, tower: VisionTower, arguments: _Arguments) -> Any:
    """Frames of videos ``[videos, frames, channels, height, width]``, shrunk, and ended where the model does not end them."""
    since_5_18 = takes_encoder_outputs(holder)
    pixels = arguments["pixel_values_videos" if since_5_18 else "pixel_values"]
    rows = holder.apply_pooling(tower.forward(pixels.flatten(0, 1)))
    videos = rows.reshape(pixels.shape[0], -1, rows.shape[-1])
    if since_5_18:
        newline = holder.image_newline.to(videos).expand(len(videos), 1, -1)
        videos = torch.cat((videos, newline), dim=1)
    return feature_output(holder, videos)


def differing_fields(one: TowerConfig, other: TowerConfig) -> list[str]:
    """Names of the fields in which two towers differ."""
    return [name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)]
