"""Strict, streaming, header-first reading of the vision tensors of a safetensors checkpoint.

Names are checked before a file is opened, headers before a tensor is read, and shapes against the configuration before
memory is allocated.  Tensors of the language model are never read, and shards without vision tensors are never opened.  A
missing tensor is an error, never initialized.

A quantized weight is one tensor with its original shape (:mod:`tritontower.checkpoint.dequantize`).
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from .dequantize import FLOAT_DTYPES, SUPPORTED_SCHEMES, Decoder, Group, StoredTensor, group_tensors, make_decoder
from .files import INDEX_NAMES, Layout, Prefixes, WeightFiles, explain_read_errors, open_safetensors, strip_prefix

Progress = Callable[[int, int], None]
"""Callback with (bytes done, total bytes) after every tensor."""


@dataclass(frozen=True)
class TensorHeader:
    """Header of one vision tensor.

    Attributes:
        name: stored name, with its prefix.
        shape: of a quantized tensor, the original weight's, or as stored if it cannot be loaded.
        dtype: stored dtype in the format's terms: ``"BF16"``, ``"F32"``, ``"U8"`` …
        file: base name of its file.
        scheme: quantization, such as ``"bitsandbytes NF4"``; ``None`` if it is not quantized, or in no known way.
        nbytes: stored size in bytes, with scales and tables; only of what can be loaded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    scheme: str | None
    nbytes: int


class _Headers(Mapping[str, TensorHeader]):
    """Name → header, made on access, because the shape of a 4-bit weight must be read from its file."""

    def __init__(self, groups: Mapping[str, Group], shape: Callable[[Group], tuple[int, ...]]) -> None:
        self._groups = groups
        self._shape = shape

    def __getitem__(self, name: str) -> TensorHeader:
        group = self._groups[name]
        main = group.main
        return TensorHeader(main.name, self._shape(group), main.dtype, main.file, group.scheme, group.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


class Checkpoint:
    """Vision tensors of one checkpoint: reads headers when opened, data in :meth:`iterate`.

    A context manager: leaving it closes the files, after which only the headers remain.

    Attributes:
        folder: the folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, StoredTensor] = {}
        self._groups: dict[str, Group] = {}
        self._decoders: dict[str, Decoder] = {}
        self._expected: frozenset[str] | None = None
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()  # a safetensors handle closes its file when it is garbage-collected

    @classmethod
    def open(
        cls, folder: Path, *, prefixes: Prefixes, layout: Layout = "hf", allow_symlinks: bool = False
    ) -> "Checkpoint":
        """Reads the headers of the files with vision tensors.

        An index takes precedence over a single file.

        Args:
            folder: a local folder.
            prefixes: stored prefixes of vision tensors → replacements, see
                :func:`~tritontower.checkpoint.files.strip_prefix`.
            layout: naming of the weight files; a folder may have both layouts.
            allow_symlinks: also follow links that leave the folder to other places than the Hugging Face cache.

        Raises:
            CheckpointNotFoundError: there is no folder, or no safetensors file of this layout.
            UnsafeFormatError: there are only pickles.
            UnsafePathError: a shard's name or link leaves the folder.
            CheckpointIncompleteError: a shard, or a tensor of the index, is missing, or there is no vision tensor.
            CheckpointAmbiguousError: a tensor is stored twice, in two shards or under two prefixes.
            CheckpointCorruptError: a file is not safetensors, or damaged; the index is not JSON.
        """
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"{folder} is not a folder")
        checkpoint = cls(folder)
        files = WeightFiles(folder, allow_symlinks)
        for file, listed in files.list_files(prefixes, layout).items():
            names = checkpoint._read_headers(files.path(file), prefixes)
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
        checkpoint._groups = group_tensors(checkpoint._stored)
        return checkpoint

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Name without its prefix → header, in stored order.

        A quantized weight is one tensor; its scales and tables are not listed.  The shape of a 4-bit bitsandbytes weight is
        read on access, which raises the errors of :meth:`expect`.
        """
        return _Headers(
            self._groups, lambda group: self._decoder(group).shape if group.is_supported else group.main.shape
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most bytes of the plain tensors; ``float32`` for ``F64``.

        If all are quantized, their recorded original dtype, else ``bfloat16``.

        Raises:
            UnsupportedDtypeError: no tensor has a dtype that can be loaded.
            CheckpointCorruptError: the record is invalid.
        """
        stored: dict[str, int] = {}
        for group in self._groups.values():
            if group.is_supported and group.scheme is None:
                stored[group.main.dtype] = stored.get(group.main.dtype, 0) + group.nbytes
        if stored:
            return FLOAT_DTYPES[max(stored, key=lambda name: stored[name])]
        quantized = [group for group in self._groups.values() if group.is_supported]
        if not quantized:
            raise self._unsupported(next(iter(self._groups.values())))
        originals = (self._decoder(group).original for group in quantized)
        return next((original for original in originals if original is not None), torch.bfloat16)

    def can_read(self, name: str) -> bool:
        """Tells if the tensor with this stripped name is plain, or of a supported quantization."""
        return self._groups[name].is_supported

    def expect(
        self, specs: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = (), *, unneeded: Collection[str] = ()
    ) -> None:
        """Checks that the vision tensors are exactly ``specs`` (stripped name → shape).

        Reads only the descriptions of 4-bit weights.

        Args:
            specs: the tensors that the tower needs.
            ignored: ``fnmatch`` patterns of stripped names that may exist and are not used.
            unneeded: stripped names that may exist and are not used, such as blocks after the last needed one; any shape
                and dtype.

        Raises:
            UnsupportedDtypeError: a tensor has an unsupported quantization, or is not a float.
            CheckpointIncompleteError: tensors are missing.
            CheckpointCorruptError: the parts of a quantized tensor contradict each other.
            ShapeMismatchError: a tensor has another shape.
            UnexpectedTensorError: other vision tensors exist, so the configuration does not describe this tower.
        """
        spared = frozenset(unneeded)
        present = {
            name: group
            for name, group in self._groups.items()
            if name in specs or not (name in spared or any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored))
        }
        for group in present.values():
            if not group.is_supported:
                raise self._unsupported(group)
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
        unused = [group.main.name for name, group in present.items() if name not in specs]
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
        check_finite: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (stripped name, tensor in ``dtype`` on ``device``), file by file, in stored order.

        Holds at most one tensor at a time.

        Args:
            dtype: a floating dtype; torch converts (round to nearest even).  Quantized tensors are computed in fp32 and
                rounded once.
            device: device of the tensors.
            names: stripped names to read; ``None``: the tensors of :meth:`expect`, or all.
            check_finite: reject NaN and infinity, stored or caused by the conversion.
            progress: called after every tensor.

        Raises:
            CheckpointIncompleteError: a name is not in :attr:`tensors`.
            UnsupportedDtypeError: a tensor has a dtype or a quantization that cannot be loaded.
            NonFiniteWeightsError: NaN or infinity, or a value too large for ``dtype``.
            CheckpointCorruptError: a file shrank since its header was read, or the parts of a quantized tensor contradict
                each other.
            UsageError: the checkpoint is closed.
        """
        wanted = set(names if names is not None else self._groups if self._expected is None else self._expected)
        unknown = sorted(wanted - set(self._groups))
        if unknown:
            raise CheckpointIncompleteError(f"{self.folder} lacks {list_names(unknown)}", unknown)
        self._check_open()
        groups = {name: group for name, group in self._groups.items() if name in wanted}
        for group in groups.values():
            if not group.is_supported:
                raise self._unsupported(group)
        total, done = sum(group.nbytes for group in groups.values()), 0
        for name, group in groups.items():
            # Not a local variable: this suspended frame would keep the tensor alive.
            yield name, self._read_tensor(group, dtype, torch.device(device), check_finite)
            done += group.nbytes
            if progress is not None:
                progress(done, total)

    def _decoder(self, group: Group) -> Decoder:
        decoder = self._decoders.get(group.main.name)
        if decoder is None:
            decoder = self._decoders[group.main.name] = make_decoder(group, self._read_stored)
        return decoder

    def _read_stored(self, stored: StoredTensor) -> torch.Tensor:
        self._check_open()
        with explain_read_errors(self.folder / stored.file):
            tensor: torch.Tensor = self._handles[stored.file].get_tensor(stored.name)
        return tensor

    def _check_open(self) -> None:
        if not self._handles:
            raise UsageError("the checkpoint must be open; read inside `with Checkpoint.open(...)`")

    def _read_tensor(self, group: Group, dtype: torch.dtype, device: torch.device, check_finite: bool) -> torch.Tensor:
        stored = self._decoder(group).decode(self._read_stored)
        tensor = stored.to(device=device, dtype=dtype)
        if not check_finite or _is_finite(tensor):
            return tensor
        name, file = group.main.name, group.main.file
        if tensor is stored or not _is_finite(stored):
            raise NonFiniteWeightsError(name, f"in {file} has NaN or infinity; pass check_finite=False to load it")
        raise NonFiniteWeightsError(
            name,
            f"in {file} has values up to {stored.abs().max().item():.6g}, but the maximum of {dtype} is "
            f"{torch.finfo(dtype).max:.6g}; load it as torch.bfloat16 or torch.float32",
        )

    def _read_headers(self, path: Path, prefixes: Prefixes) -> set[str]:
        """Opens one file and adds the headers of its vision tensors; returns their stored names."""
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

    def _unsupported(self, group: Group) -> UnsupportedDtypeError:
        main = group.main
        scheme = f", {group.scheme}" if group.scheme else ""
        return UnsupportedDtypeError(
            f"tensor {shorten(main.name)} in {main.file} is stored as {main.dtype}{scheme}{self._quantization()}; only "
            f"{', '.join(FLOAT_DTYPES)} and, with their scales, {', '.join(SUPPORTED_SCHEMES)} can be loaded; use a "
            "checkpoint whose vision tower is not quantized, or in one of these ways"
        )

    def _quantization(self) -> str:
        # For a message: the method in config.json, if it has one.
        try:
            method = ConfigReader.from_file(self.folder / "config.json").get(
                str, "quantization_config.quant_method", None
            )
        except (ConfigError, CheckpointNotFoundError):
            return ""
        return f" (config.json: quant_method {shorten(method)})" if method else ""


def _is_finite(tensor: torch.Tensor) -> bool:
    # A finite sum proves it in one cheap pass, unless the sum overflows.  Summed in the tensor's own dtype, which torch
    # accumulates in fp32 anyway: for another one, it would copy the tensor first.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
