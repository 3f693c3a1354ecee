"""The variable-length attention kernel as an attention implementation of transformers, for all its vision encoders.

transformers calls an implementation with ``flash`` in its name once per layer, with the boundaries of the images
(``cu_seq_lens_q``), and any other implementation once per image and layer. It refuses to load or set a name with
``flash`` that is not its own, but reads only the configuration's field when a model runs.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tritontower.engine.tuned_tables import fill_registry
from tritontower.errors import UsageError
from tritontower.kernels.attention.attention import flash_attention_varlen
from tritontower.kernels.runtime.segments import Segments

ATTENTION = "tritontower"
"""Implementation called once per image and layer; ``set_attn_implementation`` accepts it."""
VARLEN_ATTENTION = "tritontower_flash"
"""Implementation called once per layer; :func:`vision_attention` sets it."""

# Number of recent boundary tensors whose segments are cached, per thread.
CACHED_SEGMENTS = 4
_cache = threading.local()


def register_attention() -> None:
    """Registers :data:`ATTENTION` and :data:`VARLEN_ATTENTION` with transformers; repeated calls have no effect."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionInterface.register(VARLEN_ATTENTION, _attend)


@contextmanager
def vision_attention(model: torch.nn.Module) -> Iterator[list[str]]:
    """Makes the vision encoders inside ``model`` use the variable-length kernel within the context.

    An encoder is every module whose configuration is a ``vision_config``, or the whole model if it is only an encoder;
    it must not run in another thread meanwhile. Yields the ``model_type`` of every changed configuration. Raises
    :class:`UsageError` if the model has no vision encoder.
    """
    register_attention()
    configs = _list_vision_configs(model)
    if not configs:
        raise UsageError(f"model must have a vision encoder (a vision_config), got {type(model).__name__}")
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            # The model's own setter would look for the package `flash_attn`.
            config._attn_implementation = VARLEN_ATTENTION
        yield [config.model_type for config in configs]
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _list_vision_configs(model: Any) -> list[Any]:
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        if hasattr(model.config, "text_config") or not hasattr(model.config, "patch_size"):
            return []
        vision = model.config
    # Submodules may have copies of the configuration.
    configs = [vision, *(getattr(module, "config", None) for module in model.modules())]
    unique = {id(config): config for config in configs if getattr(config, "model_type", None) == vision.model_type}
    return list(unique.values())


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention with the signature of transformers; returns no attention weights.

    Takes ``[batch, heads, rows, head_dim]``, returns ``[batch, rows, heads, head_dim]``. The images are described by
    ``cu_seq_lens_q`` (``[images + 1]``, the start of each and the number of rows), by ``attention_mask`` (``[1, 1, rows,
    rows]``, true or 0 between rows of the same image), or by ``position_ids`` (``[rows, 2]``, row and column in each).
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal or dropout or query.shape != key.shape:
        raise UsageError(
            f"attention implementation {ATTENTION!r} must be used for vision encoders: not causal, without dropout, with as "
            "many keys and heads as queries have; use another one for the language model"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise UsageError(
            f"attention implementation {ATTENTION!r} computes no gradients; run the model under torch.no_grad()"
        )
    batch, heads, rows, head_dim = query.shape
    # By the first given description; without any, each batch entry is one image.
    if cu_seq_lens_q is not None:
        if not (cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q or torch.equal(cu_seq_lens_k, cu_seq_lens_q)):
            raise UsageError("cu_seq_lens_q and cu_seq_lens_k must be equal")
        segments = _cached(cu_seq_lens_q, lambda starts: Segments.from_cu_seqlens(starts, batch * rows, max_length_q))
    elif attention_mask is not None:
        segments = _cached(attention_mask, _split_by_mask)
    elif position_ids is not None and position_ids.shape == (rows, 2):
        segments = _cached(position_ids, _split_at_origins)
    else:
        segments = Segments.from_lengths([rows] * batch)
    if segments.total != batch * rows:
        raise UsageError(
            f"images must have {batch} × {rows} rows in total, as the queries, got {segments.total}; pass the images one "
            "after the other in one batch entry"
        )
    packed = [tensor.transpose(1, 2).reshape(batch * rows, heads, head_dim) for tensor in (query, key, value)]
    fill_registry(query.device)
    attended = flash_attention_varlen(packed[0], packed[1], packed[2], segments, scale=scaling)
    return attended.view(batch, rows, heads, head_dim), None


def _cached(description: torch.Tensor, split: Callable[[torch.Tensor], Segments]) -> Segments:
    """Caches the segments: every layer passes the same tensor, and only the first should synchronize with the device."""
    if description.is_inference():
        # Such a tensor has no version that shows writes.
        return split(description)
    cached: list[tuple[weakref.ref[torch.Tensor], int, Segments]] = getattr(_cache, "segments", [])
    for reference, version, segments in cached:
        if reference() is description and version == description._version:
            return segments
    segments = split(description)
    _cache.segments = [(weakref.ref(description), description._version, segments), *cached][:CACHED_SEGMENTS]
    return segments


def _split_at_origins(positions: torch.Tensor) -> Segments:
    """Every image begins at its only position in row 0 and column 0."""
    starts = (positions == 0).all(-1).nonzero().flatten()
    boundaries = torch.cat([starts, starts.new_tensor([len(positions)])])
    return Segments.from_cu_seqlens(boundaries, len(positions))


def _split_by_mask(mask: torch.Tensor) -> Segments:
    """Reads a block-diagonal mask, or raises :class:`UsageError` for another one."""
    meet = (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
    image = (~meet.diagonal(1)).cumsum(0)
    image = torch.cat([image.new_zeros(1), image])
    if mask.shape[:2] != (1, 1) or not bool((meet == (image[:, None] == image)).all()):
        raise UsageError(
            f"attention_mask must divide the rows of one batch entry into images for {ATTENTION!r}; use another attention "
            "implementation for models that pad"
        )
    return Segments.from_lengths(image.bincount().tolist())
