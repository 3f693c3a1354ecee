"""transformers' own implementation of a tower, as what the tower is held against.

A whole vision-language model is instantiated, because only it knows how its tower, its projector and its packing fit
together; its language model is cut down to nothing first, so that a 7B model costs the memory of its tower.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.config import TowerConfig
from tritontower.errors import ReferenceModelError, TowerError, list_names, shorten

__all__ = ["ModuleValue", "ReferenceModel", "flat_patches", "tile_images"]


BESIDE_THE_TOWER = frozenset(
    ("language_model", "text_model", "lm_head", "text_projection", "visual_projection", "logit_scale", "logit_bias")
)
"""Parts of models that no tower needs, by their names in transformers."""


@dataclass(frozen=True)
class ModuleValue:
    """A value inside transformers: the input or the output of a module, or of several, side by side."""

    paths: tuple[str, ...]
    side: Literal["input", "output"]

    @classmethod
    def input(cls, path: str) -> "ModuleValue":
        """What the module at ``path`` reads."""
        return cls((path,), "input")

    @classmethod
    def output(cls, *paths: str) -> "ModuleValue":
        """What the modules at ``paths`` return."""
        return cls(paths, "output")

    @classmethod
    def at(cls, path: str, side: str) -> "ModuleValue":
        """The ``side`` of the module at ``path``; a dot at its end does not count."""
        return cls.input(path.rstrip(".")) if side == "input" else cls.output(path.rstrip("."))

    def __str__(self) -> str:
        return f"{', '.join(self.paths)} ({self.side})"


class ReferenceModel(ABC):
    """How to load and run transformers' implementation of one family."""

    row_order: ClassVar[Literal["tower", "raster"]] = "tower"
    """Whether a tile's patches stand in its modules as in the tower, or row by row."""
    auto_class: str = "AutoModel"
    """Which of transformers' automatic classes makes the model."""

    def load(
        self, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.nn.Module:
        """The model with its vision weights, in evaluation mode, on the CPU.

        Args:
            folder: the checkpoint.
            dtype: in which the model computes.
            weights: stored name → tensor, instead of what the folder's files hold; the model is then an unquantized one,
                whatever ``config.json`` says.

        Raises:
            ReferenceModelError: transformers cannot load it, or finds vision tensors missing, which it would otherwise fill
                with random numbers.
        """
        from transformers.utils import logging

        with _quiet(logging):
            try:
                model, report = self._load(folder, dtype, weights)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
                if isinstance(error, TowerError):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ReferenceModelError(f"transformers cannot load {folder}: {shorten(reason[0], 200)}") from error
        mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
        wrong = sorted(name for name in (*report["missing_keys"], *mismatched) if not _is_beside_the_tower(name))
        if wrong:
            raise ReferenceModelError(f"transformers finds no weights in {folder} for {list_names(wrong)}")
        model.eval()
        return cast("torch.nn.Module", model)

    def _load(self, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None) -> tuple[Any, Any]:
        """The model, and transformers' report of what it found no weights for."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        _without_language_model(config)
        model_class: Any = getattr(transformers, self.auto_class)
        if weights is not None:
            _without_quantization(config)
            model_class = _chosen_class(model_class, config)
        # `from_pretrained(dtype=…)`, not `.to(dtype)`: the latter would round the rotary frequencies as well.
        return cast(
            "tuple[Any, Any]",
            model_class.from_pretrained(
                str(folder) if weights is None else None,
                config=config,
                state_dict=None if weights is None else dict(weights),
                dtype=dtype,
                # Some language models refuse SDPA, even cut down to nothing.
                attn_implementation={"": "sdpa", "vision_config": "sdpa", "text_config": "eager"},
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            ),
        )

    @abstractmethod
    def inputs(self, model: Any, batch: PackedBatch, config: TowerConfig) -> Any:
        """``batch`` in the form that the model takes, on the batch's device."""

    @abstractmethod
    def outputs(self, model: Any, inputs: Any, config: TowerConfig) -> Mapping[str, torch.Tensor]:
        """Runs the model over :meth:`inputs`; the names are those of the graph's outputs."""

    @abstractmethod
    def values(self, config: TowerConfig) -> Mapping[str, ModuleValue]:
        """Value of the layer graph → where it is found inside the model."""


def flat_patches(batch: PackedBatch, config: TowerConfig) -> torch.Tensor:
    """``[patches, inner]``: patches in merge-block order, with all the frames that one spans."""
    pixels = batch.pixels if batch.tokens.selection is None else batch.pixels[batch.tokens.selection.squeeze(1)]
    if pixels.shape[1] == config.patch.inner:
        return pixels
    frames = pixels.view(len(pixels), config.patch.channels, 1, -1)
    return frames.expand(-1, -1, config.patch.temporal, -1).flatten(1)


def tile_images(batch: PackedBatch, config: TowerConfig) -> list[torch.Tensor]:
    """``[channels, height, width]`` of every tile, put together again from its patches."""
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


def _without_language_model(config: Any) -> None:
    text = getattr(config, "text_config", None)
    if text is None:
        return
    text.num_hidden_layers = 0
    text.vocab_size = 1
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = []


def _chosen_class(auto_class: Any, config: Any) -> Any:
    """The class of model behind one of the automatic ones, which themselves want a checkpoint in a folder."""
    with torch.device("meta"):
        return type(auto_class.from_config(config, trust_remote_code=False))


def _without_quantization(config: Any) -> None:
    holders: tuple[Any, Any] = (config, getattr(config, "text_config", None))
    for holder in holders:
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config


def _is_beside_the_tower(name: str) -> bool:
    return not BESIDE_THE_TOWER.isdisjoint(name.split("."))


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Silences transformers while it reads a tower out of a whole model: it reports every tensor that it leaves out."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
