"""Cache keys of embeddings.

A key covers everything that an embedding depends on: the image's canonical pixels, the weights, the configuration, the
preprocessing, the bounds, the dtype and the backend.  Every part of a key is hashed with its length, and digests are
never shortened, so two images, towers or settings never share a key.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch

from tritontower.config import TowerConfig
from tritontower.preprocessing import Bounds, Preprocessor
from tritontower.preprocessing.processor_config import VIDEO_FILES


def cache_key(tower: str, bounds: Bounds, content_hash: str) -> str:
    """Returns the key of an image's embedding; ``tower`` is the :func:`tower_identity`."""
    given = sorted((name, value) for name, value in bounds.items() if value is not None)
    return framed_digest([tower, json.dumps(given, default=int), content_hash])


def framed_digest(parts: Iterable[str | bytes]) -> str:
    """Hashes a sequence by BLAKE2b-256, each part after its length; returns hexadecimal digits."""
    state = hashlib.blake2b(digest_size=32, person=b"tritontower-key")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def tower_identity(
    weights: str, config: TowerConfig, preprocessor: Preprocessor, computes: tuple[torch.dtype, str, str]
) -> str:
    """Hashes everything that an embedding depends on beside the image and the bounds of the call.

    ``weights`` differs for any two checkpoints; ``computes`` is the dtype, the device type and the kernel backend.
    """
    description = json.dumps(config.to_json(), sort_keys=True)
    return framed_digest([weights, description, preprocessing_identity(preprocessor), *map(str, computes)])


def preprocessing_identity(preprocessor: Preprocessor) -> str:
    """Hashes the resizing rule, its settings and options, and the processor's files.

    A setting that is not a plain value makes the digest random; such a preprocessor shares no embeddings.
    """
    rule, source = preprocessor.rule, preprocessor.source
    settings = {field.name: getattr(rule, field.name) for field in fields(rule) if field.name != "source"}
    settings["options"] = source.options
    given = source.given
    if given is not None:
        settings["given"] = [type(given).__qualname__, given.to_dict() if hasattr(given, "to_dict") else given]
    parts: list[str | bytes] = [type(rule).__qualname__, _to_json(settings)]
    for name in VIDEO_FILES:
        path = source.folder / name
        parts += [name, path.read_bytes() if path.is_file() else b""]
    return framed_digest(parts)


def _to_json(settings: dict[str, Any]) -> str:
    try:
        return json.dumps(settings, sort_keys=True, default=dict)  # for mappings; dict() rejects all other values
    except (TypeError, ValueError):
        return secrets.token_hex(32)
