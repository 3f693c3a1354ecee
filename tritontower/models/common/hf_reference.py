"""The transformers implementation of each tower, which is the reference for its numbers.

The whole vision-language model is instantiated, because only it combines tower, projector and tile assembly.  Its language
model is reduced to zero layers first, so that a 7B model needs only the memory of its tower.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import ReferenceModelError, TowerError, list_names, shorten

OTHER_PARTS = frozenset(
    ("language_model", "text_model", "lm_head", "text_projection", "visual_projection", "logit_scale", "logit_bias")
)
"""Modules of transformers that are not part of a tower."""


@dataclass(frozen=True)
class ModuleValue:
    """A value inside transformers: the input or output of a module, or the outputs of several, concatenated."""

    paths: tuple[str, ...]
    side: Literal["input", "output"]

    @classmethod
    def input(cls, path: str) -> "ModuleValue":
        """Returns the input of the module at ``path``."""
        return cls((path,), "input")

    @classmethod
    def output(cls, *paths: str) -> "ModuleValue":
        """Returns the outputs of the modules at ``paths``."""
        return cls(paths, "output")

    def __str__(self) -> str:
        return f"{', '.join(self.paths)} ({self.side})"


class ReferenceModel(ABC):
    """Loads and runs transformers' implementation of one family."""

    row_order: ClassVar[Literal["tower", "raster"]] = "tower"
    """Order of a tile's patches inside its modules: the tower's, or raster order."""
    auto_class: str = "AutoModel"
    """The auto class of transformers that creates the model."""

    def load(
        self, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.nn.Module:
        """Loads the model with its vision weights, in evaluation mode, on the CPU.

        ``weights`` (stored name → tensor) replace the folder's files, and then the quantization that ``config.json`` declares
        is ignored.  Missing vision tensors are an error, because transformers would initialize them randomly.
        """
        with _quiet():
            try:
                model, report = self._load(folder, dtype, weights)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
                if isinstance(error, TowerError):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ReferenceModelError(f"transformers cannot load {folder}: {shorten(reason[0], 200)}") from error
        mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
        wrong = sorted(
            name for name in (*report["missing_keys"], *mismatched) if OTHER_PARTS.isdisjoint(name.split("."))
        )
        if wrong:
            raise ReferenceModelError(f"transformers finds no weights in {folder} for {list_names(wrong)}")
        model.eval()
        return cast("torch.nn.Module", model)

    def _load(self, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None) -> tuple[Any, Any]:
        import transformers

        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        _remove_language_model(config)
        model_class: Any = getattr(transformers, self.auto_class)
        if weights is not None:
            for holder in (config, getattr(config, "text_config", None)):
                vars(holder or config).pop("quantization_config", None)
            # Auto classes need a checkpoint in a folder.
            with torch.device("meta"):
                model_class = type(model_class.from_config(config, trust_remote_code=False))
        # `from_pretrained(dtype=…)`, not `.to(dtype)`, which would also round the rotary frequencies.
        return cast(
            "tuple[Any, Any]",
            model_class.from_pretrained(
                str(folder) if weights is None else None,
                config=config,
                state_dict=None if weights is None else dict(weights),
                dtype=dtype,
                # Some language models reject SDPA, even with zero layers.
                attn_implementation={"": "sdpa", "vision_config": "sdpa", "text_config": "eager"},
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            ),
        )

    @abstractmethod
    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> Any:
        """Converts ``batch`` to the inputs of the model, on the batch's device."""

    @abstractmethod
    def outputs(self, model: Any, inputs: Any, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """Runs the model on :meth:`inputs`; returns the graph's outputs by name."""

    @abstractmethod
    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Returns value of the layer graph → its place inside the model."""


def module_values(table: Mapping[str, tuple[str, str]], path: str = "", ours: str = "") -> dict[str, ModuleValue]:
    """Locates values from a table of graph value → (module below ``path``, ``"input"`` or ``"output"``).

    ``ours`` is the prefix of the graph's values, with its dot.
    """
    found = {}
    for name, (module, side) in table.items():
        place = f"{path}.{module}".strip(".")
        found[f"{ours}{name}"] = ModuleValue.input(place) if side == "input" else ModuleValue.output(place)
    return found


def block_values(
    depth: int,
    layers: str,
    *,
    norms: tuple[str, str] = ("norm1", "norm2"),
    qkv: Sequence[str],
    output: str,
    down: str,
    up: str | None = None,
) -> dict[str, ModuleValue]:
    """Locates the values of all blocks, from the modules' names in a layer of the module list at ``layers``.

    ``up`` is ``None`` if the checkpoint stores two linears there, which the layer graph joins.
    """
    values: dict[str, ModuleValue] = {}
    table = {
        "norm1_rows": (norms[0], "output"),
        "mixed": (output, "input"),
        "attention_output_rows": (output, "output"),
        "attended": (norms[1], "input"),
        "norm2_rows": (norms[1], "output"),
        "mlp_hidden": (down, "input"),
        "mlp_down_rows": (down, "output"),
        "block_rows": ("", "output"),
        **({} if up is None else {"mlp_up_rows": (up, "output")}),
    }
    for block in range(depth):
        values |= module_values(table, f"{layers}.{block}", f"blocks.{block}.")
        values[f"blocks.{block}.qkv_rows"] = ModuleValue.output(*(f"{layers}.{block}.{part}" for part in qkv))
    return values


def stack_padded(images: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """Stacks images ``[channels, h, w]`` into ``[images, channels, height, width]``, with zeros at the bottom and right."""
    stacked = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(stacked, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return stacked


def flat_patches(batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
    """Returns ``[patches, inner]``: patches in merge-block order, each with all frames that it spans."""
    pixels = batch.pixels if batch.tokens.selection is None else batch.pixels[batch.tokens.selection.squeeze(1)]
    if pixels.shape[1] == config.patch.inner:
        return pixels
    frames = pixels.view(len(pixels), config.patch.channels, 1, -1)
    return frames.expand(-1, -1, config.patch.temporal, -1).flatten(1)


def tile_images(batch: PackedBatch, config: TowerConfig) -> list[torch.Tensor]:
    """Reassembles every tile, ``[channels, height, width]``, from its patches."""
    patch, images = config.patch, []
    class_rows = 1 if config.class_token else 0
    rows = zip(
        batch.pixels.split(batch.attention.tiles.lengths),
        batch.attention.positions.split(batch.attention.tiles.lengths),
        batch.images.tile_grids,
        strict=True,
    )
    for pixels, positions, (_, height, width) in rows:
        patches = pixels[class_rows:].view(-1, patch.channels, patch.size, patch.size)
        places = positions[class_rows:].long()
        raster = torch.empty_like(patches)
        raster[places[:, 0] * width + places[:, 1]] = patches
        grid = raster.unflatten(0, (height, width)).permute(2, 0, 3, 1, 4)
        images.append(grid.reshape(patch.channels, height * patch.size, width * patch.size))
    return images


def _remove_language_model(config: Any) -> None:
    if (text := getattr(config, "text_config", None)) is None:
        return
    text.num_hidden_layers = 0
    text.vocab_size = 1
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = []


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers, which would report every tensor of the language model as unexpected."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
