"""The vision modules of a model of transformers: finding them, and functions that run a tower in their place.

Every vision-language model of transformers computes image rows in one method, ``get_image_features`` (and
``get_video_features``), from pixels that its processor prepared. A tower replaces that method on one model object. The
modules that it called are then unused.
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
from tritontower.errors import UnsupportedArchitectureError, UsageError, shorten
from tritontower.models.common.family import Family
from tritontower.models.common.registry import read_family
from tritontower.preprocessing.resize.anyres import select_canvas
from tritontower.tower import VisionTower

Arguments = Mapping[str, Any]
EncodeFunction = Callable[[Any, VisionTower, Arguments], Any]
"""Maps the holder, the tower and the arguments of a call to the method's result."""


class ReleasedModule(torch.nn.Module):
    """Replaces a vision module whose weights only the tower has."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Always raises :class:`UsageError`."""
        raise UsageError(
            "this vision module has no weights, since a tower replaced it; call the model, its get_image_features, or the "
            "tower"
        )


def find_vision_holder(model: torch.nn.Module) -> tuple[Any, Family]:
    """Finds the module inside ``model`` that computes image rows, and its tower's description."""
    values = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    family = read_family(ConfigReader(values, source=f"the configuration of {type(model).__name__}"))
    return find_holder(model, family.prefixes), family


def find_holder(model: torch.nn.Module, prefixes: Prefixes) -> Any:
    """Finds the module inside ``model`` that computes image rows, given the prefixes of its vision weights."""
    for module in model.modules():
        if hasattr(module, "get_image_features") and list_vision_modules(module, prefixes):
            if hasattr(module, "language_model"):
                return module
            break
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} must have vision modules that feed a language model; use VisionTower by itself"
    )


def list_vision_modules(holder: torch.nn.Module, prefixes: Prefixes) -> list[str]:
    """Lists the names of the direct children of ``holder`` that belong to its tower."""
    named = dict.fromkeys(filter(None, prefixes), "")
    return [name for name, _ in holder.named_children() if strip_prefix(f"{name}.x", named) is not None]


def is_stacked(holder: Any) -> bool:
    """Returns whether the model takes the rows of all tiles as one tensor ``[tiles, tokens, width]``, not as a list."""
    return holder.config.model_type in ("gemma3", "paligemma", "shieldgemma2")


def takes_encoder_outputs(model: Any) -> bool:
    """Returns whether this version of transformers passes ``mm_encoder_outputs`` to the model."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def make_feature_output(holder: Any, rows: Any, deepstack: Sequence[Any] = ()) -> Any:
    """Wraps rows, one tensor per image or a stack, and those of each deepstack level as ``holder`` returns them."""
    # Models with deepstack levels have this class, each in its own module.
    output = getattr(inspect.getmodule(type(holder)), "BaseModelOutputWithDeepstackFeatures", None)
    if output is None:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=rows)
    if not takes_encoder_outputs(holder):
        # transformers 5.17 does not split a level into images.
        deepstack = [torch.cat(list(level)) for level in deepstack]
    return output(pooler_output=rows, deepstack_features=list(deepstack))


def make_replacements(holder: Any, tower: VisionTower) -> dict[str, Callable[..., Any]]:
    """Makes functions with the signatures of ``holder``'s methods, by name, which run the tower."""
    functions: dict[str, EncodeFunction]
    if "image_grid_thw" in inspect.signature(holder.get_image_features).parameters:
        functions = {"get_image_features": _encode_patches, "get_video_features": _encode_patches}
    elif hasattr(holder, "pack_image_features"):
        functions = {"get_image_features": _encode_tiles}
        if hasattr(holder, "apply_pooling"):
            functions["get_video_features"] = _encode_frames
    elif tower.config.num_patches is None:
        functions = {"get_image_features": _encode_padded_images}
    else:
        functions = {"get_image_features": _encode_equal_images}
    return {name: _replace(getattr(holder, name), holder, tower, encode) for name, encode in functions.items()}


def _replace(
    original: Callable[..., Any], holder: Any, tower: VisionTower, encode: EncodeFunction
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    # `generate` reads the signature to decide which arguments it passes.
    @functools.wraps(original)
    def run_tower(*positional: Any, **named: Any) -> Any:
        return_dict = named.pop("return_dict", None)
        bound = signature.bind(*positional, **named)
        arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        if holder.training and torch.is_grad_enabled():
            _check_training(holder, tower)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, configured = arguments.get(name), getattr(holder.config, name, None)
            if given is not None and given != configured:
                raise UsageError(
                    f"{name} must be {shorten(configured)}, as in the configuration and thus in the tower, got "
                    f"{shorten(given)}; call restore(model) to use others"
                )
        output = encode(holder, tower, arguments)
        return output if (holder.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return run_tower


def _check_training(holder: Any, tower: VisionTower) -> None:
    """Raises if vision weights are being trained, since they would get no gradients."""
    modules = map(holder.get_submodule, list_vision_modules(holder, tower.family.prefixes))
    if any(weight.requires_grad for module in modules for weight in module.parameters()):
        raise UsageError(
            "vision weights must not be trained while a tower replaces them, since it computes no gradients; freeze them "
            "(requires_grad_(False)), call model.eval(), or restore(model)"
        )


def _encode_patches(holder: Any, tower: VisionTower, arguments: Arguments) -> Any:
    """Encodes rows of patches in merge-block order, with the grid of every image or video."""
    video = arguments.get("pixel_values_videos") is not None
    pixels = arguments["pixel_values_videos" if video else "pixel_values"]
    grids = arguments["video_grid_thw" if video else "image_grid_thw"]
    layouts = [ImageLayout.of_one_tile(tuple(grid), tower.config.patch.size) for grid in grids.tolist()]
    batch = PackedBatch.pack(
        tower.config,
        pixels.detach().float(),
        layouts,
        original_sizes=[layout.processed_size for layout in layouts],
        content_hashes=[""] * len(layouts),
    )
    outputs, counts = tower.run(batch), list(batch.images.token_counts)
    levels = [outputs[f"deepstack.{level}"].split(counts) for level in range(len(tower.config.deepstack))]
    return make_feature_output(holder, outputs["embeddings"].split(counts), levels)


def _encode_equal_images(holder: Any, tower: VisionTower, arguments: Arguments) -> Any:
    """Encodes images of one size."""
    rows = tower.forward(arguments["pixel_values"])
    return make_feature_output(holder, rows if is_stacked(holder) else list(rows))


def _encode_padded_images(holder: Any, tower: VisionTower, arguments: Arguments) -> Any:
    """Encodes images that are padded to one size, with the height and width of each."""
    images, sizes = list(arguments["pixel_values"]), arguments.get("image_sizes")
    if sizes is not None:
        sizes = torch.as_tensor(sizes).tolist()
        images = [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
    return make_feature_output(holder, tower.forward(images))


def _encode_tiles(holder: Any, tower: VisionTower, arguments: Arguments) -> Any:
    """Encodes the tiles of every image, with the height and width of the whole image; the model joins the rows."""
    config, sizes = holder.config, torch.as_tensor(arguments["image_sizes"])
    counts = list(_count_tiles(config, sizes.tolist(), arguments.get("batch_num_images")))
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
    return make_feature_output(holder, packed)


def _count_tiles(config: Any, sizes: Sequence[Sequence[int]], images_per_prompt: Any) -> Iterator[int]:
    """Yields the tiles of each image, with the base tile; one of several images of a prompt has only that one."""
    side = config.vision_config.image_size
    alone = [True] * len(sizes)
    if images_per_prompt is not None:
        alone = [count == 1 for count in map(int, images_per_prompt) for _ in range(count)]
    for (height, width), cut in zip(sizes, alone, strict=True):
        rows, columns = select_canvas(width, height, config.image_grid_pinpoints)
        yield 1 + (rows // side) * (columns // side) if cut else 1


def _encode_frames(holder: Any, tower: VisionTower, arguments: Arguments) -> Any:
    """Encodes and pools frames of videos ``[videos, frames, channels, height, width]``; adds the newline since 5.18."""
    since_5_18 = takes_encoder_outputs(holder)
    pixels = arguments["pixel_values_videos" if since_5_18 else "pixel_values"]
    rows = holder.apply_pooling(tower.forward(pixels.flatten(0, 1)))
    videos = rows.reshape(pixels.shape[0], -1, rows.shape[-1])
    if since_5_18:
        newline = holder.image_newline.to(videos).expand(len(videos), 1, -1)
        videos = torch.cat((videos, newline), dim=1)
    return make_feature_output(holder, videos)
