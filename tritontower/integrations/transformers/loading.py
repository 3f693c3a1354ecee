"""Loads a vision-language model with a tower in place of its vision modules, without loading those."""

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
    shorten,
)
from tritontower.tower import VisionTower

from .processor import load_processor
from .swap import install_tower
from .vision_module import ReleasedModule, find_holder, list_vision_modules


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
    """Loads a vision-language model and its processor, with an unquantized tower as the vision encoder.

    transformers reads only the language model, and the tower its own tensors. The vision weights thus exist once, in
    ``dtype``, also with a quantized language model. ``accelerated(model).tower`` is the tower. A saved copy of the model
    has no vision weights, with a warning.

    Args:
        model: a local folder, or the id of a repository on the Hugging Face hub.
        load_in_4bit: quantize the linears of the language model to NF4 with bitsandbytes, with compute dtype ``dtype``.
        quantization_config: quantize the language model by this configuration of transformers instead.
        dtype: of the tower, and of a language model that is not quantized; ``"auto"``: as in the checkpoint.
        device: of the model; by default the current GPU, or the CPU.
        attn_implementation: of the language model, as in transformers.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Returns:
        The model, of transformers' class for it, in evaluation mode; and its processor. If the processor's class needs
        torchvision and it is missing, the same class without videos, or an :class:`ImageTextProcessor`.

    Raises:
        BackendUnavailableError: the quantization library is missing, or does not support the device.
        ConfigError: the configuration asks for foreign code.
        UnsupportedArchitectureError: transformers has no such model with a language model.
        CheckpointIncompleteError: tensors of the language model are missing.
        TowerError: the arguments are wrong, the tower cannot be loaded, or there is no processor.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if load_in_4bit and quantization_config is not None:
        raise UsageError("load_in_4bit and quantization_config must not both be given; pass one of them")
    download = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    tower = VisionTower.from_pretrained(model, dtype=dtype, device=device, delay_load=True, **download)  # type: ignore[arg-type]
    if load_in_4bit:
        quantization_config = _make_nf4_config(tower.device, tower.dtype)
    source = str(model)
    if tower.family.reference is None:
        raise UnsupportedArchitectureError(
            f"{source} must be in a format that transformers reads; load the same model's checkpoint in that format, or use "
            "VisionTower by itself"
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **download)
    _check_attention(config)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if model_class is None:
        raise UnsupportedArchitectureError(
            f"{source} must contain a language model that generates text, got {config.model_type}; use VisionTower by itself"
        )
    # First, since it is fast and may fail.
    processor = load_processor(source, config, **download)
    options = {"quantization_config": quantization_config, "attn_implementation": attn_implementation}
    options = download | {name: value for name, value in options.items() if value}
    language = _load_language_model(model_class, source, config, tower, options)
    install_tower(find_holder(language, tower.family.prefixes), tower.load(), tower.family)
    return language, processor


def _load_language_model(
    model_class: Any, source: str, config: Any, tower: VisionTower, options: dict[str, Any]
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
        raise BackendUnavailableError(
            f"the language model cannot be loaded: {shorten(str(error).strip(), 200)}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointIncompleteError(
            f"{source} lacks {len(missing)} tensors of the language model: {list_names(missing)}", missing
        )
    model.__class__ = model_class
    return (model if quantized else model.to(tower.device)).eval()


def _without_vision(model_class: type[Any], prefixes: Prefixes) -> type[Any]:
    """Makes a subclass that drops the vision modules at construction, before they take memory."""

    class LanguageModelOnly(model_class):  # type: ignore[misc]
        def __init__(self, config: Any, *positional: Any, **named: Any) -> None:
            super().__init__(config, *positional, **named)
            holder = find_holder(self, prefixes)
            dropped = list_vision_modules(holder, prefixes)
            for name in dropped:
                setattr(holder, name, ReleasedModule())
            # Prevents a warning about their tensors in the files.
            ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None) or []
            self._keys_to_ignore_on_load_unexpected = {*ignored, *(rf"(^|\.){name}\." for name in dropped)}

    LanguageModelOnly.__name__ = LanguageModelOnly.__qualname__ = model_class.__name__
    LanguageModelOnly.__module__ = model_class.__module__
    return LanguageModelOnly


def _make_nf4_config(device: torch.device, dtype: torch.dtype) -> Any:
    if lacking := [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]:
        raise BackendUnavailableError(
            f"load_in_4bit needs packages that are not installed: pip install {' '.join(lacking)}"
        )
    try:
        bitsandbytes = import_module("bitsandbytes")
    except Exception as error:  # its native library may raise anything
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


def _check_attention(config: Any) -> None:
    """Rejects repository names, from which transformers would download and run a kernel."""
    for section in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        name = getattr(section, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise ConfigError("attn_implementation", name, "an implementation that is part of transformers")
