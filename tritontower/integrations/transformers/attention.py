"""The variable-length attention kernel as an attention implementation of transformers, for any of its vision encoders.

transformers calls an attention implementation once per layer if its name has ``flash`` in it, with the boundaries of the
images (``cu_seq_lens_q``), and once per image and layer otherwise.  It refuses to load or to set one with such a name
that is not its own, but asks nothing when it runs: the configuration's field is what counts.
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

__all__ = ["ATTENTION", "VARLEN_ATTENTION", "register_attention", "vision_attention"]

ATTENTION = "tritontower"
"""Name of the implementation that is called once per image and layer; ``set_attn_implementation`` takes it."""
VARLEN_ATTENTION = "tritontower_flash"
"""Name of the same that is called once per layer; :func:`vision_attention` sets it."""

_KEPT = 4
_recent = threading.local()


def register_attention() -> None:
    """Makes :data:`ATTENTION` and :data:`VARLEN_ATTENTION` known to transformers; as often as you like."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionInterface.register(VARLEN_ATTENTION, _attend)


@contextmanager
def vision_attention(model: torch.nn.Module) -> Iterator[list[str]]:
    """While it lasts, the vision encoders inside ``model`` attend through the variable-length kernel.

    An encoder is every module whose configuration is a ``vision_config``, or the whole model where it is nothing else.

    Args:
        model: of transformers; its encoders must not be running in another thread meanwhile.

    Yields:
        The ``model_type`` of every configuration that was changed.

    Raises:
        UsageError: the model has no vision encoder.
    """
    register_attention()
    configs = _vision_configs(model)
    if not configs:
        raise UsageError(f"{type(model).__name__} has no vision encoder: its configuration has no vision_config")
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            # Not through the model, which would look for the package `flash_attn`.
            config._attn_implementation = VARLEN_ATTENTION
        yield [config.model_type for config in configs]
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _vision_configs(model: Any) -> list[Any]:
    whole = getattr(model.config, "vision_config", None)
    if whole is None and not hasattr(model.config, "text_config") and hasattr(model.config, "patch_size"):
        whole = model.config
    if whole is None:
        return []
    # The parts of a model may have copies of the configuration.
    own = [getattr(module, "config", None) for module in model.modules()]
    unique = {id(config): config for config in (whole, *own) if getattr(config, "model_type", None) == whole.model_type}
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
    position_ids: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer that attends.
        query, key, value: ``[batch, heads, rows, head_dim]`` each.
        attention_mask: ``None``, or ``[1, 1, rows, rows]``, true or 0 where rows of one image meet.
        scaling: what scores are multiplied by.
        dropout: has to be 0.
        is_causal: has to be false.
        cu_seq_lens_q, cu_seq_lens_k: where each image begins, ``[images + 1]``, and in the end the rows; ``None``:
            every row attends to all of its batch entry.
        position_ids: ``[rows, 2]``, row and column in each image, where nothing else says where one begins.
        **unused: hints for other implementations.

    Returns:
        ``[batch, rows, heads, head_dim]``, and no attention weights.

    Raises:
        UsageError: what is asked for is no attention of an encoder.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if causal or dropout or query.shape != key.shape:
        raise UsageError(
            f"the attention implementation {ATTENTION!r} serves vision encoders: not causal, without dropout, with as "
            "many keys and heads as queries have; use another one for the language model"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise UsageError(
            f"the attention implementation {ATTENTION!r} computes no gradients; run the model under torch.no_grad()"
        )
    batch, heads, rows, head_dim = query.shape
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and not _same(cu_seq_lens_q, cu_seq_lens_k):
        raise UsageError("cu_seq_lens_q and cu_seq_lens_k have to be the same")
    segments = _segments(batch, rows, cu_seq_lens_q, attention_mask, position_ids)
    if segments.total != batch * rows:
        raise UsageError(
            f"the images are said to have {segments.total} rows, but there are {batch} × {rows} queries; the attention "
            f"implementation {ATTENTION!r} takes images one after the other in one batch entry"
        )
    packed = [tensor.transpose(1, 2).reshape(batch * rows, heads, head_dim) for tensor in (query, key, value)]
    fill_registry(query.device)
    attended = flash_attention_varlen(packed[0], packed[1], packed[2], segments, scale=scaling)
    return attended.view(batch, rows, heads, head_dim), None


def _segments(
    batch: int,
    rows: int,
    boundaries: torch.Tensor | None,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> Segments:
    """The images, by the first of the three that says something; else every batch entry is one."""
    if boundaries is not None:
        return _once(boundaries, _between_boundaries)
    if mask is not None:
        return _once(mask, _of_mask)
    if positions is not None and positions.shape == (rows, 2):
        return _once(positions, _of_positions)
    return Segments.from_lengths([rows] * batch)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)


def _once(facts: torch.Tensor, divide: Callable[[torch.Tensor], Segments]) -> Segments:
    """The division that ``facts`` describe: every layer passes the same tensor, and only the first has to wait for it."""
    if facts.is_inference():
        # Nothing tells whether such a tensor was written to in between.
        return divide(facts)
    kept: list[tuple[weakref.ref[torch.Tensor], int, Segments]] = getattr(_recent, "kept", [])
    for reference, version, segments in kept:
        if reference() is facts and version == facts._version:
            return segments
    segments = divide(facts)
    _recent.kept = [(weakref.ref(facts), facts._version, segments), *kept][:_KEPT]
    return segments


def _between_boundaries(boundaries: torch.Tensor) -> Segments:
    return Segments.from_lengths(boundaries.diff().tolist())


def _of_positions(positions: torch.Tensor) -> Segments:
    """Every image has one place in row 0 and column 0, and begins there."""
    starts = (positions == 0).all(-1).nonzero().flatten()
    return _between_boundaries(torch.cat([starts, starts.new_tensor([len(positions)])]))


def _of_mask(mask: torch.Tensor) -> Segments:
    """The images of a mask that lets the rows of each of several attend to each other.

    Raises:
        UsageError: it is another mask.
    """
    meet = (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
    image = (~meet.diagonal(1)).cumsum(0)
    image = torch.cat([image.new_zeros(1), image])
    if mask.shape[:2] != (1, 1) or not bool((meet == (image[:, None] == image)).all()):
        raise UsageError(
            f"the attention implementation {ATTENTION!r} takes only masks that divide the rows of one batch entry into "
            "images; use another one for models that pad"
        )
    return Segments.from_lengths(image.bincount().tolist())
