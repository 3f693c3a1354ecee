"""Replaces the vision modules of a loaded model of transformers by a tower, and restores them."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tritontower.checkpoint.checkpoint import Progress
from tritontower.checkpoint.hub import locate
from tritontower.errors import TowerError, UsageError, list_names
from tritontower.models.common.assembly import TowerCheckpoint
from tritontower.models.common.family import Family
from tritontower.preprocessing import Preprocessor, ProcessorSource
from tritontower.tower import VisionTower

from .module_weights import ModuleWeights, share_weights
from .vision_module import ReleasedModule, find_vision_holder, list_vision_modules, make_replacements

_MARK = "_tritontower"


@dataclass(frozen=True)
class AcceleratedVision:
    """State of a model whose vision modules a tower replaces.

    Attributes:
        tower: the tower, which may also be called directly.
        replaced: names of the replaced methods.
        shared_bytes: vision weights that the model and the tower share.
        kept_bytes: vision weights that only the model has, for :func:`restore`.
        released_bytes: vision weights that the model freed.
        shared_parameters: the model's parameters that are views of the tower's weights, by name.
    """

    tower: VisionTower
    replaced: tuple[str, ...]
    shared_bytes: int
    kept_bytes: int
    released_bytes: int
    shared_parameters: Mapping[str, torch.nn.Parameter] = field(repr=False)


@torch.inference_mode(False)  # parameters that outlive the mode must not be inference tensors
@torch.no_grad()
def accelerate_vision(
    model: torch.nn.Module,
    *,
    tower: VisionTower | None = None,
    dtype: torch.dtype | None = None,
    processor: Any = None,
    release: bool = False,
) -> AcceleratedVision:
    """Replaces the vision modules of a loaded model by a tower; the model is called as before.

    ``model(...)`` and ``model.generate(...)`` take the same inputs; the tower computes ``get_image_features`` (and
    ``get_video_features``). Its rows carry no gradients: the language model can be trained, the vision modules only
    after :func:`restore`.

    The tower is made from the model's own weights, and the model's parameters become views of the tower's. Both share
    one memory, except tensors that the tower stores in another order (such as CLIP's position table, or weights reordered
    for GPU kernels) or does not need (the last block of a LLaVA). During the call the vision weights exist twice. Moving
    or converting the model later separates the two; the tower does not change. A model with a tower cannot be pickled or
    deep-copied. Do not write to the model's vision weights while the tower is in place.

    Args:
        model: of a supported family (:mod:`tritontower.models.common.registry`), with a language model.
        tower: a loaded tower of the same configuration, to use instead. The model then keeps its own vision weights,
            unless ``release`` is true.
        dtype: of the tower; by default that of the model's vision weights. With another one nothing is shared.
        processor: an image processor of transformers (or a processor that has one), for ``tower.encode``; by default the
            checkpoint's, if it is on this machine. Nothing is downloaded.
        release: free the model's vision modules for good. :func:`restore` is then impossible, and the saved model has no
            vision weights, with a warning.

    Raises:
        UsageError: the model already has a tower; ``tower`` has another configuration or dtype, or is not loaded.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: the model is not supported.
        CheckpointError: the model's vision weights are quantized, missing, not finite, or have other shapes.
    """
    holder, family = find_vision_holder(model)
    if accelerated(model) is not None:
        raise UsageError("a tower already replaces the model's vision modules; call restore(model) first")
    if tower is not None:
        _check_tower(tower, family, dtype)
        return install_tower(holder, tower, family, release=release)
    made = _ModuleTower(model, family, dtype, getattr(processor, "image_processor", processor))
    made.load()
    shared = {} if release else made.share_weights()
    made.forget_model()
    return install_tower(holder, made, family, shared_parameters=shared, release=release)


def install_tower(
    holder: Any,
    tower: VisionTower,
    family: Family,
    *,
    shared_parameters: Mapping[str, torch.nn.Parameter] = MappingProxyType({}),
    release: bool = False,
) -> AcceleratedVision:
    """Replaces the methods of ``holder``; see :func:`accelerate_vision`."""
    names = list_vision_modules(holder, family.prefixes)
    sizes = {id(weight): weight.nbytes for name in names for weight in holder.get_submodule(name).parameters()}
    shared = sum(sizes.get(id(parameter), 0) for parameter in shared_parameters.values())
    remaining = sum(sizes.values()) - shared
    functions = make_replacements(holder, tower)
    if release:
        for name in names:
            setattr(holder, name, ReleasedModule())
    for name, function in functions.items():
        setattr(holder, name, function)
    kept, released = (0, remaining) if release else (remaining, 0)
    state = AcceleratedVision(tower, tuple(functions), shared, kept, released, shared_parameters)
    holder.__dict__[_MARK] = state, holder.register_state_dict_post_hook(_prepare_state_dict)
    return state


def accelerated(model: torch.nn.Module) -> AcceleratedVision | None:
    """Returns the state of :func:`accelerate_vision`, or ``None`` if no tower is in place."""
    found = _find_mark(model)
    return None if found is None else found[1]


@torch.inference_mode(False)
@torch.no_grad()
def restore(model: torch.nn.Module) -> None:
    """Undoes :func:`accelerate_vision`: the model has its own vision modules again, with the same values.

    Shared weights are copied for the model; the tower remains usable. Raises :class:`UsageError` if the model has no
    tower, or its vision weights were released.
    """
    found = _find_mark(model)
    if found is None:
        raise UsageError("model must have a tower in place of its vision modules; call accelerate_vision(model) first")
    holder, state, hook = found
    if released := _list_released(holder):
        raise UsageError(
            f"the weights of {list_names(released)} were released (release=True, or load_vlm); load the model again"
        )
    for parameter in state.shared_parameters.values():
        parameter.data = parameter.data.contiguous().clone()
    for name in state.replaced:
        delattr(holder, name)
    hook.remove()
    del holder.__dict__[_MARK]


def _list_released(holder: torch.nn.Module) -> list[str]:
    return [name for name, child in holder.named_children() if isinstance(child, ReleasedModule)]


def _find_mark(model: torch.nn.Module) -> tuple[torch.nn.Module, AcceleratedVision, RemovableHandle] | None:
    found = ((module, *module.__dict__[_MARK]) for module in model.modules() if _MARK in module.__dict__)
    return next(found, None)


def _prepare_state_dict(holder: torch.nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Makes views of padded or transposed weights contiguous, and warns of released weights."""
    if released := _list_released(holder):
        warnings.warn(
            f"the weights of {list_names(released)} were released (release=True, or load_vlm) and are not in the model's "
            "state dict, so loading a checkpoint of it initializes them randomly; save the model before the release",
            stacklevel=2,
        )
    for name, tensor in state.items():
        if name.startswith(prefix) and isinstance(tensor, torch.Tensor):
            state[name] = tensor.contiguous()


def _check_tower(tower: VisionTower, family: Family, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != tower.dtype:
        raise UsageError(f"dtype must be {tower.dtype}, as the given tower, got {dtype}; pass only one of them")
    one, other = tower.config, family.config
    if different := [name for name in one.__dataclass_fields__ if getattr(one, name) != getattr(other, name)]:
        raise UsageError(
            f"tower must have the model's configuration, but they differ in {list_names(different)}; load it from the same "
            "checkpoint, with the checkpoint's own features"
        )
    if not tower.is_loaded:
        raise UsageError("tower must be loaded; call its load() first")


class _ModuleCheckpoint(TowerCheckpoint):
    """A loaded model in the role of a checkpoint."""

    can_prepack = False
    source: ModuleWeights

    def open(self) -> Any:
        return nullcontext(self.source)


class _ModuleTower(VisionTower):
    """A tower whose checkpoint is a loaded model."""

    def __init__(self, model: Any, family: Family, dtype: torch.dtype | None, image_processor: Any) -> None:
        folder = _locate_checkpoint(model)
        checkpoint = _ModuleCheckpoint(family, folder)
        self.source = checkpoint.source = ModuleWeights(model, family.prefixes)
        super().__init__(
            checkpoint,
            Preprocessor(ProcessorSource(family.config, folder, given=image_processor), family.resize_rules["hf"]),
            device=self.source.device,
            dtype=dtype or self.source.dtype,
        )

    def read_weights(self, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        self.canonical = super().read_weights(progress)
        return self.canonical

    def share_weights(self) -> dict[str, torch.nn.Parameter]:
        """Makes the model's parameters views of the tower's weights if possible, and returns these parameters."""
        names = share_weights(self.source.parameters, self.canonical, self.graph, self.family.tensors)
        return {name: self.source.parameters[name] for name in names}

    def forget_model(self) -> None:
        """Drops all references to the model, so that its weights do not live as long as the tower."""
        self.checkpoint = TowerCheckpoint(self.family, self.folder)
        del self.source, self.canonical


def _locate_checkpoint(model: Any) -> Path:
    """Returns the folder of the model's checkpoint on this machine, or a missing folder for error messages."""
    name = getattr(model, "name_or_path", "")
    try:
        return locate(name, revision=getattr(model.config, "_commit_hash", None), local_files_only=True)
    except TowerError:
        # Not the current folder, which may contain another model's processor.
        return Path(name or f"<{type(model).__name__} in memory>")
