"""Loading a vision-language model whose vision part is a tower, and was never anything else."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tritontower.checkpoint.files import Prefixes
from tritontower.errors import (
    BackendUnavailableError,
    CheckpointIncompleteError,
    ConfigError,
    UnsupportedArchitectureError,
    UsageError,
    list_names,
)
from tritontower.tower import VisionTower

from .processor import load_processor
from .swap import put_in_place
from .vision_module import ReleasedModule, vision_children, vision_holder

__all__ = ["load_vlm"]


def load_vlm(
    model: str | Path,
    *,
    load_in_4bit: bool = False,
    quantization_config: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Any, Any]:
    """Loads a vision-language model and its processor; images are encoded by a tower, which is not quantized.

    transformers reads the language model only, and the tower its own tensors, so the vision weights exist once, in
    ``dtype``, whatever becomes of the language model.  ``accelerated(model).tower`` is the tower.  What the model saves has
    no vision weights, of which it warns.

    Args:
        model: a local folder, or the id of a repository on the Hugging Face hub.
        load_in_4bit: quantize the linears of the language model to NF4 with bitsandbytes, computing in ``dtype``.
        quantization_config: quantize it as this says instead, as in transformers.
        dtype: of the tower, and of the language model where it is not quantized; ``"auto"``: as the checkpoint says.
        device: where the model runs; by default the current GPU, else the CPU.
        attn_implementation: of the language model, as in transformers.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Returns:
        The model, of the class that transformers has for it, in evaluation mode; and its processor.  Without torchvision,
        which some of those of transformers need, that is the same class without videos, or a :class:`ImageTextProcessor`.

    Raises:
        BackendUnavailableError: what quantizes is not installed, or does not support the device.
        UsageError: both ``load_in_4bit`` and ``quantization_config``.
        ConfigError: the configuration asks for code from elsewhere.
        UnsupportedArchitectureError: transformers has no such model with a language model.
        CheckpointIncompleteError: tensors of the language model are missing.
        TowerError: the tower cannot be loaded, or there is no processor.
    """
    from transformers import AutoConfig

    if load_in_4bit and quantization_config is not None:
        raise UsageError("load_in_4bit and quantization_config contradict each other; pass one of them")
    download = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    tower = VisionTower.from_pretrained(model, dtype=dtype, device=device, delay_load=True, **download)  # type: ignore[arg-type]
    if load_in_4bit:
        quantization_config = _four_bits(tower.device, tower.dtype)
    source = str(model)
    if tower.family.reference is None:
        raise UnsupportedArchitectureError(
            f"{source} is in a format that transformers does not read; load the same model's checkpoint in its format, or "
            "use VisionTower by itself"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **download)
    _refuse_foreign_attention(config)
    model_class = _class_of(config, source)
    options = {"quantization_config": quantization_config, "attn_implementation": attn_implementation}
    # First what takes no time, and fails as often.
    processor = load_processor(source, config, **download)
    language = _load_language_model(
        model_class, source, config, tower, {**download, **{name: value for name, value in options.items() if value}}
    )
    put_in_place(vision_holder(language, tower.family.prefixes), tower.load(), tower.family)
    return language, processor


def _class_of(config: Any, source: str) -> type[Any]:
    """The class that transformers has for a model of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found: type[Any] | None = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if found is None:
        raise UnsupportedArchitectureError(
            f"{source} holds no language model that answers in text ({config.model_type}); use VisionTower by itself"
        )
    return found


def _load_language_model(
    model_class: type[Any], source: str, config: Any, tower: VisionTower, options: dict[str, Any]
) -> Any:
    quantized = options.get("quantization_config") is not None or hasattr(config, "quantization_config")
    placed = {"device_map": {"": tower.device}} if quantized else {}
    try:
        model, report = _without_vision(model_class, tower.family.prefixes).from_pretrained(
            source,
            config=config,
            dtype=tower.dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **placed,
            **options,
        )
    except ImportError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendUnavailableError(f"the language model cannot be loaded: {reason[0]}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointIncompleteError(
            f"{source} lacks {len(missing)} tensors of the language model: {list_names(missing)}", missing
        )
    model.__class__ = model_class
    return (model if quantized else model.to(tower.device)).eval()


def _without_vision(model_class: type[Any], prefixes: Prefixes) -> type[Any]:
    """The class with its vision part left out as soon as it is made, which is before any memory is taken for it."""

    class LanguageModelOnly(model_class):  # type: ignore[misc]
        def __init__(self, config: Any, *positional: Any, **named: Any) -> None:
            super().__init__(config, *positional, **named)
            holder = vision_holder(self, prefixes)
            left_out = vision_children(holder, prefixes)
            for name in left_out:
                setattr(holder, name, ReleasedModule())
            # Nobody is to be warned that they are in the files.
            ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None) or []
            self._keys_to_ignore_on_load_unexpected = {*ignored, *(rf"(^|\.){name}\." for name in left_out)}

    LanguageModelOnly.__name__ = LanguageModelOnly.__qualname__ = model_class.__name__
    LanguageModelOnly.__module__ = model_class.__module__
    return LanguageModelOnly


def _four_bits(device: torch.device, dtype: torch.dtype) -> Any:
    """Quantization to NF4; raises :class:`BackendUnavailableError` where there is none."""
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise BackendUnavailableError(
                f"load_in_4bit needs the package {package}, which is not installed: pip install bitsandbytes accelerate"
            )
    try:
        bitsandbytes = import_module("bitsandbytes")
    except Exception as error:  # its native library may fail in any way
        raise BackendUnavailableError(f"bitsandbytes is installed, but cannot be imported: {error}") from error
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in supported:
        raise BackendUnavailableError(
            f"bitsandbytes {bitsandbytes.__version__} supports {', '.join(sorted(supported))} here, not {device.type!r}; load "
            "the model without load_in_4bit, or on another device"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _refuse_foreign_attention(config: Any) -> None:
    """transformers would fetch and run a kernel that a configuration names by its repository."""
    sections = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for section in sections:
        name = getattr(section, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise ConfigError("attn_implementation", name, "an implementation that is part of transformers")
