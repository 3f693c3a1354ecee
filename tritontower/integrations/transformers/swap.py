"""A tower in the place of the vision part of a model that transformers has loaded, and the way back."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from tritontower.checkpoint.checkpoint import Checkpoint, Progress
from tritontower.checkpoint.hub import locate
from tritontower.errors import Limits, TowerError, UsageError, list_names
from tritontower.models.common.assembly import TowerCheckpoint
from tritontower.models.common.family import Family
from tritontower.tower import VisionTower

from .module_weights import ModuleWeights, lend
from .vision_module import ReleasedModule, differing_fields, family_of, replacements, vision_children, vision_holder

__all__ = ["AcceleratedVision", "accelerate_vision", "accelerated", "put_in_place", "restore"]

_MARK = "_tritontower"


@dataclass(frozen=True)
class AcceleratedVision:
    """What became of a model's vision part.

    Attributes:
        tower: what encodes its images now; it may be called by itself.
        replaced: the methods of the model that it answers.
        shared_bytes: vision weights that the model and the tower hold in the same memory.
        kept_bytes: vision weights that the model holds beside the tower's, for :func:`restore`.
        released_bytes: vision weights whose memory the model gave back.
    """

    tower: VisionTower
    replaced: tuple[str, ...]
    shared_bytes: int = 0
    kept_bytes: int = 0
    released_bytes: int = 0
    lent: Mapping[str, torch.nn.Parameter] = field(default_factory=dict, repr=False)
    """Parameters of the model that are views of the tower's weights, by name."""


@torch.inference_mode(False)  # parameters that outlive the mode must not become tensors of it
@torch.no_grad()
def accelerate_vision(
    model: torch.nn.Module,
    *,
    tower: VisionTower | None = None,
    dtype: torch.dtype | None = None,
    processor: Any = None,
    release: bool = False,
) -> AcceleratedVision:
    """Puts a tower in the place of the vision part of a loaded model, which is called as before.

    ``model(...)`` and ``model.generate(...)`` take the inputs that they took; the tower answers ``get_image_features`` (and
    ``get_video_features``).  Its rows carry no gradients: the language model can be trained behind it, the vision part only
    after :func:`restore`.  The tower is made of the model's own vision weights, and the model's parameters become views of
    the tower's: both have one memory, except for what is held in another order (the merging linear of Mistral 3, CLIP's
    position table, on a GPU what the kernels want arranged) or not needed by the tower (the last block of a LLaVA).  While
    it is made, the vision weights exist twice.  Moving or converting the model afterwards separates the two again; the
    tower stays where and what it was.  A model with a tower cannot be pickled or deep-copied.  Nothing may write to the
    model's vision weights as long as the tower is there.

    Args:
        model: of one of the families of :mod:`tritontower.models.common.registry`, with a language model.
        tower: use this one instead of one made of the model's weights; loaded, and of the same configuration.  The model
            keeps its own vision weights then, unless ``release`` says otherwise.
        dtype: of the tower; by default that of the model's vision weights.  In another one nothing can be shared.
        processor: an image processor of transformers (or a processor that has one), for ``tower.encode``; by default the
            checkpoint's, if its file is on this machine.  Nothing is fetched.
        release: give the memory of the model's vision modules back for good.  :func:`restore` is impossible then, and what
            the model saves has no vision weights, of which it warns.

    Returns:
        The tower, and where the weights are.

    Raises:
        UsageError: the model has a tower already; ``tower`` is another model's, or not loaded, or comes with ``dtype``.
        UnsupportedArchitectureError, NoVisionTowerError, ConfigError: no tower can be built for the model.
        CheckpointError: the model's vision weights cannot be used: quantized, missing, of other shapes, not finite.
    """
    family = family_of(model)
    holder = vision_holder(model, family.prefixes)
    if accelerated(model) is not None:
        raise UsageError("a tower is in the place of the model's vision part already; restore(model) first")
    lent: dict[str, torch.nn.Parameter] = {}
    if tower is None:
        made = _TowerOfModule(model, holder, family, dtype, _image_processor(processor))
        made.load()
        tower = made
        lent = {} if release else made.lend()
        made.let_go()
    else:
        _check_given(tower, family, dtype)
    return put_in_place(holder, tower, family, lent=lent, release=release)


def put_in_place(
    holder: Any,
    tower: VisionTower,
    family: Family,
    *,
    lent: Mapping[str, torch.nn.Parameter] | None = None,
    release: bool = False,
) -> AcceleratedVision:
    """Makes ``tower`` answer for ``holder``; see :func:`accelerate_vision`."""
    parts = {name: holder.get_submodule(name) for name in vision_children(holder, family.prefixes)}
    sizes = {id(weight): weight.nbytes for part in parts.values() for weight in part.parameters()}
    lent = lent or {}
    shared = sum(sizes.get(id(parameter), 0) for parameter in lent.values())
    remaining = sum(sizes.values()) - shared
    functions = replacements(holder, tower)
    if release:
        for name in parts:
            setattr(holder, name, ReleasedModule())
    for name, function in functions.items():
        setattr(holder, name, function)
    facts = AcceleratedVision(
        tower=tower,
        replaced=tuple(functions),
        shared_bytes=shared,
        kept_bytes=0 if release else remaining,
        released_bytes=remaining if release else 0,
        lent=lent,
    )
    holder.__dict__[_MARK] = facts, holder.register_state_dict_post_hook(_as_it_can_be_saved)
    return facts


def accelerated(model: torch.nn.Module) -> AcceleratedVision | None:
    """The tower in the place of the model's vision part; ``None`` if there is none."""
    holder = _holder_with_tower(model)
    return None if holder is None else _mark_of(holder)[0]


@torch.inference_mode(False)
@torch.no_grad()
def restore(model: torch.nn.Module) -> None:
    """Undoes :func:`accelerate_vision`: the model has its own vision part again, with every number as it was.

    What it shared with the tower it gets back as memory of its own, and the tower lives on.

    Raises:
        UsageError: there is no tower in the model, or the model's vision weights were given away.
    """
    holder = _holder_with_tower(model)
    if holder is None:
        raise UsageError(
            "the model has no tower in the place of its vision part; accelerate_vision(model) puts one there"
        )
    facts, hook = _mark_of(holder)
    if gone := _released(holder):
        raise UsageError(
            f"the weights of {list_names(gone)} were given away (release=True, or load_vlm); load the model again"
        )
    for parameter in facts.lent.values():
        parameter.data = parameter.data.contiguous().clone()
    for name in facts.replaced:
        delattr(holder, name)
    hook.remove()
    del holder.__dict__[_MARK]


def _released(holder: torch.nn.Module) -> list[str]:
    """Names of the vision modules whose weights were given away."""
    return [name for name, child in holder.named_children() if isinstance(child, ReleasedModule)]


def _mark_of(holder: torch.nn.Module) -> tuple[AcceleratedVision, RemovableHandle]:
    return cast("tuple[AcceleratedVision, RemovableHandle]", holder.__dict__[_MARK])


def _as_it_can_be_saved(holder: torch.nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Makes what is a view of padded or transposed weights an ordinary tensor, and warns of what is not there."""
    if gone := _released(holder):
        warnings.warn(
            f"the weights of {list_names(gone)} were given away (release=True, or load_vlm) and are not in the model's state: "
            "a checkpoint of it would be loaded with random ones; save what was trained, or the model before its release",
            stacklevel=2,
        )
    for name, tensor in state.items():
        if name.startswith(prefix) and isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            state[name] = tensor.contiguous()


def _holder_with_tower(model: torch.nn.Module) -> torch.nn.Module | None:
    return next((module for module in model.modules() if _MARK in module.__dict__), None)


def _check_given(tower: VisionTower, family: Family, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != tower.dtype:
        raise UsageError(f"dtype {dtype} was asked for, but the given tower is of {tower.dtype}; leave one of them out")
    if different := differing_fields(tower.config, family.config):
        raise UsageError(
            f"the given tower is not that of the model: they differ in {list_names(different)}; load it from the same "
            "checkpoint, with the checkpoint's own features"
        )
    if not tower.is_loaded:
        raise UsageError("the given tower is not loaded; call its load() first")


def _image_processor(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


class _ModuleCheckpoint(TowerCheckpoint):
    """A loaded model in the role of a checkpoint."""

    can_prepack = False

    def __init__(self, family: Family, folder: Path, source: ModuleWeights) -> None:
        super().__init__(family, folder)
        self.source = source

    def open(self) -> Checkpoint:
        return cast("Checkpoint", self.source)


class _TowerOfModule(VisionTower):
    """A tower whose checkpoint is a model that is loaded already."""

    def __init__(
        self, model: Any, holder: Any, family: Family, dtype: torch.dtype | None, image_processor: Any
    ) -> None:
        source = ModuleWeights(model, family.prefixes)
        self._canonical: dict[str, torch.Tensor] = {}
        folder = _folder_of(model)
        make = family.preprocessors["hf"]
        super().__init__(
            _ModuleCheckpoint(family, folder, source),
            make(family.config, folder, Limits(), image_processor, {}),
            device=source.device,
            dtype=dtype or source.dtype,
        )

    def read_weights(self, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        self._canonical = super().read_weights(progress)
        return self._canonical

    def lend(self) -> dict[str, torch.nn.Parameter]:
        """Makes the model's parameters views of the tower's weights, as far as they can be; returns those."""
        parameters = cast("_ModuleCheckpoint", self.checkpoint).source.parameters
        return {name: parameters[name] for name in lend(parameters, self._canonical, self.graph, self.family.tensors)}

    def let_go(self) -> None:
        """Forgets the model, whose own weights would otherwise live as long as the tower."""
        self.checkpoint, self._canonical = TowerCheckpoint(self.family, self.folder), {}


def _folder_of(model: Any) -> Path:
    """Where the model's checkpoint is on this machine; otherwise a folder that is not there, to be named in messages."""
    name = getattr(model, "name_or_path", "")
    try:
        return locate(name, revision=getattr(model.config, "_commit_hash", None), local_files_only=True)
    except TowerError:
        # Never the current folder, which may hold another model's processor.
        return Path(name or f"<{type(model).__name__} in memory>")
