"""Strict, streaming, header-first reading of the vision tensors of a safetensors checkpoint.

Names are checked before a file is opened, headers before a tensor is read, and shapes against the configuration before
memory is allocated.  Tensors of the language model are never read, and shards without vision tensors are never opened.  A
missing tensor is an error, never initialized.

A quantized weight is one tensor with its original shape (:mod:`tritontower.checkpoint.dequantize`).
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritontower.errors import (
    CheckpointAmbiguousError,
    CheckpointIncompleteError,
    CheckpointNotFoundError,
    ConfigError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnexpectedTensorError,
    UnsupportedDtypeError,
    UsageError,
    list_names,
    shorten,
)

from .config_reader import ConfigReader
from .dequantize import FLOAT_DTYPES, SUPPORTED_SCHEMES, Decoder, StoredTensor, Weight, group_tensors, make_decoder
from .files import (
    INDEX_NAMES,
    Layout,
    Prefixes,
    explain_read_errors,
    list_files,
    open_safetensors,
    safe_path,
    strip_prefix,
)

Progress = Callable[[int, int], None]
"""Callback with (bytes done, total bytes) after every tensor."""


class Checkpoint:
    """Vision tensors of one checkpoint: reads headers when opened, data in :meth:`iterate`.

    A context manager: leaving it closes the files, after which only the headers remain.  ``weights`` maps each name without
    its prefix to the weight with its scales and tables, in stored order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, StoredTensor] = {}
        self.weights: dict[str, Weight] = {}
        self._decoders: dict[str, Decoder] = {}
        self._expected: frozenset[str] | None = None
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()  # a safetensors handle closes its file when it is garbage-collected

    @classmethod
    def open(cls, folder: Path, *, prefixes: Prefixes, layout: Layout = "hf") -> "Checkpoint":
        """Reads the headers of the files with vision tensors; an index takes precedence over a single file."""
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"{folder} is not a folder")
        checkpoint = cls(folder)
        for file, listed in list_files(folder, prefixes, layout).items():
            names = checkpoint._read_headers(safe_path(folder, file), prefixes)
            absent = sorted(set(listed) - names)
            if absent:
                raise CheckpointIncompleteError(
                    f"{file} lacks {len(absent)} tensors that {INDEX_NAMES[layout]} lists: {list_names(absent)}",
                    absent,
                )
        if not checkpoint._stored:
            raise CheckpointIncompleteError(
                f"{folder} has no vision tensor: no name starts with {list_names(list(map(repr, prefixes)))}"
            )
        checkpoint.weights = group_tensors(checkpoint._stored)
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes of the plain tensors; ``float32`` for ``F64``.

        If all are quantized, their recorded original dtype, else ``bfloat16``.
        """
        stored: dict[str, int] = {}
        for weight in self.weights.values():
            if weight.is_supported and weight.scheme is None:
                stored[weight.main.dtype] = stored.get(weight.main.dtype, 0) + weight.nbytes
        if stored:
            return FLOAT_DTYPES[max(stored, key=lambda name: stored[name])]
        quantized = [weight for weight in self.weights.values() if weight.is_supported]
        _check_supported(self.folder, quantized or self.weights.values())
        originals = (self._decoder(weight).original for weight in quantized)
        return next((original for original in originals if original is not None), torch.bfloat16)

    def expect(
        self, specs: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = (), *, unneeded: Collection[str] = ()
    ) -> None:
        """Checks that the vision tensors are exactly ``specs`` (stripped name → shape).

        Tensors that match an ``fnmatch`` pattern in ``ignored`` or a name in ``unneeded`` (such as blocks after the last
        needed one) may exist, with any shape and dtype.
        """
        present = {
            name: weight
            for name, weight in self.weights.items()
            if name in specs or not (name in unneeded or any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored))
        }
        _check_supported(self.folder, present.values())
        missing = [name for name in specs if name not in present]
        if missing:
            raise CheckpointIncompleteError(
                f"{self.folder} lacks {len(missing)} of the tower's {len(specs)} tensors: {list_names(missing)}",
                missing,
            )
        for name, shape in specs.items():
            found, main = self._decoder(present[name]).shape, present[name].main
            if found != tuple(shape):
                raise ShapeMismatchError(main.name, shape, found, source=main.file)
        unused = [weight.main.name for name, weight in present.items() if name not in specs]
        if unused:
            raise UnexpectedTensorError(
                f"{self.folder} has {len(unused)} vision tensors that the tower does not use: {list_names(unused)}; "
                "config.json and the weights describe different towers",
                unused,
            )
        self._expected = frozenset(specs)

    def iterate(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (stripped name, tensor in ``dtype`` on ``device``), file by file, in stored order.

        Holds at most one tensor at a time.  torch converts (round to nearest even); quantized tensors are computed in fp32
        and rounded once.  ``names`` defaults to the tensors of :meth:`expect`, or all.  NaN and infinity, stored or caused
        by the conversion, raise :class:`NonFiniteWeightsError`.
        """
        wanted = set(names if names is not None else self.weights if self._expected is None else self._expected)
        unknown = sorted(wanted - set(self.weights))
        if unknown:
            raise CheckpointIncompleteError(f"{self.folder} lacks {list_names(unknown)}", unknown)
        weights = {name: weight for name, weight in self.weights.items() if name in wanted}
        _check_supported(self.folder, weights.values())
        total, done = sum(weight.nbytes for weight in weights.values()), 0
        for name, weight in weights.items():
            # Not a local variable: this suspended frame would keep the tensor alive.
            yield name, self._read_tensor(weight, dtype, torch.device(device))
            done += weight.nbytes
            if progress is not None:
                progress(done, total)

    def _decoder(self, weight: Weight) -> Decoder:
        decoder = self._decoders.get(weight.main.name)
        if decoder is None:
            decoder = self._decoders[weight.main.name] = make_decoder(weight, self._read_stored)
        return decoder

    def _read_stored(self, stored: StoredTensor) -> torch.Tensor:
        if not self._handles:
            raise UsageError("the checkpoint must be open; read inside `with Checkpoint.open(...)`")
        with explain_read_errors(self.folder / stored.file):
            tensor: torch.Tensor = self._handles[stored.file].get_tensor(stored.name)
        return tensor

    def _read_tensor(self, weight: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        stored = self._decoder(weight).decode(self._read_stored)
        tensor = stored.to(device=device, dtype=dtype)
        if _is_finite(tensor):
            return tensor
        name, file = weight.main.name, weight.main.file
        if tensor is stored or not _is_finite(stored):
            raise NonFiniteWeightsError(name, f"in {file} has NaN or infinity; use another checkpoint")
        raise NonFiniteWeightsError(
            name,
            f"in {file} has values up to {stored.abs().max().item():.6g}, but the maximum of {dtype} is "
            f"{torch.finfo(dtype).max:.6g}; load it as torch.bfloat16 or torch.float32",
        )

    def _read_headers(self, path: Path, prefixes: Prefixes) -> set[str]:
        # Opens one file and adds the headers of its vision tensors; returns their stored names.
        handle = open_safetensors(path)
        names: set[str] = set()
        with explain_read_errors(path):
            for name in handle.offset_keys():
                stripped = strip_prefix(name, prefixes)
                if stripped is None:
                    continue
                view = handle.get_slice(name)
                stored = StoredTensor(name, tuple(view.get_shape()), view.get_dtype(), path.name)
                other = self._stored.setdefault(stripped, stored)
                if other is not stored:
                    raise CheckpointAmbiguousError(
                        f"{shorten(other.name)} in {other.file} and {shorten(name)} in {path.name} are the same tensor "
                        "of the tower; remove one of them"
                    )
                names.add(name)
        if names:
            self._handles[path.name] = handle
        return names


def _check_supported(folder: Path, weights: Iterable[Weight]) -> None:
    weight = next((weight for weight in weights if not weight.is_supported), None)
    if weight is None:
        return
    main = weight.main
    scheme = f", {weight.scheme}" if weight.scheme else ""
    try:
        reader = ConfigReader.from_file(folder / "config.json")
        method = reader.get(str, "quantization_config.quant_method", None)
    except (ConfigError, CheckpointNotFoundError):
        method = None
    declared = f" (config.json: quant_method {shorten(method)})" if method else ""
    raise UnsupportedDtypeError(
        f"tensor {shorten(main.name)} in {main.file} is stored as {main.dtype}{scheme}{declared}; only "
        f"{', '.join(FLOAT_DTYPES)} and, with their scales, {', '.join(SUPPORTED_SCHEMES)} can be loaded; use a "
        "checkpoint whose vision tower is not quantized, or in one of these ways"
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # A finite sum proves it in one cheap pass, unless the sum overflows.  Summed in the tensor's own dtype, which torch
    # accumulates in fp32 anyway: for another one, it would copy the tensor first.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
