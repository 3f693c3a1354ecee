"""Strict, streaming, header-first reading of the vision tensors of a safetensors checkpoint.

The order of work is what makes it safe: names are checked before a file is opened, headers before a tensor is read, and
shapes against the configuration before memory is taken.  Tensors of the language model are never read, and shards that
hold nothing else are never opened.  Nothing is ever initialised in place of a missing tensor.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import (
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
from .reader import ConfigReader
from .weight_files import INDEX_NAME, Prefixes, WeightFiles, explained, open_safetensors, strip_prefix

__all__ = ["Checkpoint", "Progress", "TensorHeader"]

_ALIGNMENT = 128
"""Elements; 256 bytes or more in every dtype, as much as any vector load asks for."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after every tensor."""

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says about one tensor.

    Attributes:
        name: as stored, with its prefix.
        shape: sizes, outermost first.
        dtype: in the format's own terms: ``"BF16"``, ``"F32"``, ``"U8"`` …
        file: base name of the file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def nbytes(self) -> int:
        """Stored size in bytes; only of types that can be loaded."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


class Checkpoint:
    """The vision tensors of one checkpoint: headers now, data when :meth:`iterate` is called.

    A context manager: leaving it closes the files, after which only the headers remain.

    Attributes:
        folder: where the files are.
        tensors: stripped name → header, in the order in which the files store them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorHeader] = {}
        self._expected: frozenset[str] | None = None
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()  # a safetensors handle closes its file when nobody holds it any more

    @classmethod
    def open(cls, folder: Path, *, prefixes: Prefixes, allow_symlinks: bool = False) -> "Checkpoint":
        """Reads the headers of the files in ``folder`` that hold vision tensors.

        An index wins over a ``model.safetensors`` beside it.

        Args:
            folder: a local folder.
            prefixes: beginnings of the stored names that belong to the tower; the longest that fits is stripped, or
                replaced if this is a mapping.  ``""`` takes every name that no other prefix takes.
            allow_symlinks: also follow links that leave the folder other than into the Hugging Face cache.

        Raises:
            CheckpointNotFoundError: no folder, or no safetensors file in it.
            UnsafeFormatError: only pickles in it.
            UnsafePathError: a shard's name or link points outside.
            CheckpointIncompleteError: a shard, or a tensor that the index promises, is missing; no vision tensor at all.
            CheckpointAmbiguousError: a tensor is stored twice, in two shards or under two prefixes.
            CheckpointCorruptError: a file is not safetensors, or damaged; the index is not JSON.
        """
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"{folder} is not a folder")
        checkpoint = cls(folder)
        files = WeightFiles(folder, allow_symlinks)
        for file, promised in files.with_prefix(prefixes).items():
            headers = checkpoint._read_headers(files.path(file), prefixes)
            absent = sorted(set(promised) - {header.name for header in headers})
            if absent:
                raise CheckpointIncompleteError(
                    f"{file} lacks {len(absent)} tensors that {INDEX_NAME} places there: {list_names(absent)}", absent
                )
        if not checkpoint.tensors:
            raise CheckpointIncompleteError(
                f"{folder} holds no vision tensor: no name begins with {list_names([repr(p) for p in prefixes])}"
            )
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The type that most bytes of the tower are stored in; ``float32`` for ``F64``.

        Raises:
            UnsupportedDtypeError: no tensor is of a type that can be loaded.
        """
        stored: dict[str, int] = {}
        for header in self.tensors.values():
            if header.dtype in _DTYPES:
                stored[header.dtype] = stored.get(header.dtype, 0) + header.nbytes
        if not stored:
            raise self._unsupported(next(iter(self.tensors.values())))
        return _DTYPES[max(stored, key=lambda name: stored[name])]

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors that can be loaded."""
        return sum(header.nbytes for header in self.tensors.values() if header.dtype in _DTYPE_BYTES)

    def expect(self, specs: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
        """Checks that the vision tensors are exactly ``specs`` (stripped name → shape).  Reads nothing.

        Args:
            specs: what the tower needs.
            ignored: ``fnmatch`` patterns of stripped names that may be there and are not used.

        Raises:
            UnsupportedDtypeError: a tensor is quantised or otherwise not a float of 16, 32 or 64 bits.
            CheckpointIncompleteError: tensors are missing.
            ShapeMismatchError: a tensor has another shape.
            UnexpectedTensorError: vision tensors are left over, so the configuration describes another tower.
        """
        present = {
            name: header
            for name, header in self.tensors.items()
            if name in specs or not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
        }
        for header in present.values():
            if header.dtype not in _DTYPE_BYTES:
                raise self._unsupported(header)
        missing = [name for name in specs if name not in present]
        if missing:
            raise CheckpointIncompleteError(
                f"{self.folder} lacks {len(missing)} of the tower's {len(specs)} tensors: {list_names(missing)}",
                missing,
            )
        for name, shape in specs.items():
            if present[name].shape != tuple(shape):
                raise ShapeMismatchError(present[name].name, shape, present[name].shape, source=present[name].file)
        unused = [header.name for name, header in present.items() if name not in specs]
        if unused:
            raise UnexpectedTensorError(
                f"{self.folder} holds {len(unused)} vision tensors that the tower would not use: {list_names(unused)}; "
                "config.json describes another tower than the weights",
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
        """Yields (stripped name, tensor in ``dtype`` on ``device``) one by one, file by file, in stored order.

        At no time is more than one tensor held beyond those that the caller keeps.

        Args:
            dtype: a floating type; the conversion is torch's (round to nearest even).
            device: where the tensors go.
            names: stripped names to read; if ``None``, what :meth:`expect` was told, or else all.
            check_finite: refuse NaN and infinity, whether stored or made by the conversion.
            progress: called after every tensor.

        Raises:
            CheckpointIncompleteError: a name that is not in :attr:`tensors`.
            UnsupportedDtypeError: a tensor of a type that cannot be loaded.
            NonFiniteWeightsError: NaN or infinity, or a value too large for ``dtype``.
            CheckpointCorruptError: a file shrank since its header was read.
            UsageError: the checkpoint is closed.
        """
        wanted = set(names if names is not None else self.tensors if self._expected is None else self._expected)
        unknown = sorted(wanted - set(self.tensors))
        if unknown:
            raise CheckpointIncompleteError(f"{self.folder} lacks {list_names(unknown)}", unknown)
        if not self._handles:
            raise UsageError("the checkpoint is closed; iterate inside `with Checkpoint.open(...)`")
        headers = {name: header for name, header in self.tensors.items() if name in wanted}
        for header in headers.values():
            if header.dtype not in _DTYPE_BYTES:
                raise self._unsupported(header)
        total, done = sum(header.nbytes for header in headers.values()), 0
        for name, header in headers.items():
            # Not a local variable: this frame sleeps while the caller works, and would keep the tensor alive.
            yield name, self._read_tensor(header, dtype, torch.device(device), check_finite)
            done += header.nbytes
            if progress is not None:
                progress(done, total)

    def load(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", *, progress: Progress | None = None
    ) -> dict[str, torch.Tensor]:
        """Everything that :meth:`iterate` would yield, side by side in one allocation; it raises what that raises.

        Tensors allocated one at a time, between the buffers that they are read through, leave a hole behind each: on a
        CPU that cost a third of the weights' size in memory that nothing could use.
        """
        names = [name for name in self.tensors if self._expected is None or name in self._expected]
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in names:
            count = math.prod(self.tensors[name].shape)
            places[name] = (end, count)
            end += -(-count // _ALIGNMENT) * _ALIGNMENT
        block = torch.empty(end, dtype=dtype, device=device)
        loaded = {}
        for name, tensor in self.iterate(dtype, device, names=names, progress=progress):
            start, count = places[name]
            loaded[name] = block[start : start + count].view(tensor.shape).copy_(tensor)
            del tensor
        return loaded

    def _read_tensor(
        self, header: TensorHeader, dtype: torch.dtype, device: torch.device, check_finite: bool
    ) -> torch.Tensor:
        with explained(self.folder / header.file):
            stored: torch.Tensor = self._handles[header.file].get_tensor(header.name)
        tensor = stored.to(device=device, dtype=dtype)
        if not check_finite or _is_finite(tensor):
            return tensor
        if tensor is stored or not _is_finite(stored):
            raise NonFiniteWeightsError(
                header.name, f"in {header.file} holds NaN or infinity; check_finite=False loads it all the same"
            )
        raise NonFiniteWeightsError(
            header.name,
            f"in {header.file} holds values up to {stored.abs().max().item():.6g}, but {dtype} ends at "
            f"{torch.finfo(dtype).max:.6g}; load it as torch.bfloat16 or torch.float32",
        )

    def _read_headers(self, path: Path, prefixes: Prefixes) -> list[TensorHeader]:
        """Opens one file and takes the headers of its vision tensors in; the data is not touched."""
        handle = open_safetensors(path)
        headers: list[TensorHeader] = []
        with explained(path):
            for name in handle.offset_keys():
                stripped = strip_prefix(name, prefixes)
                if stripped is None:
                    continue
                view = handle.get_slice(name)
                header = TensorHeader(name, tuple(view.get_shape()), view.get_dtype(), path.name)
                other = self.tensors.setdefault(stripped, header)
                if other is not header:
                    raise CheckpointAmbiguousError(
                        f"{shorten(other.name)} in {other.file} and {shorten(name)} in {path.name} are the same tensor "
                        "of the tower; remove one of them"
                    )
                headers.append(header)
        self._handles[path.name] = handle
        return headers

    def _unsupported(self, header: TensorHeader) -> UnsupportedDtypeError:
        return UnsupportedDtypeError(
            f"tensor {shorten(header.name)} in {header.file} is stored as {header.dtype}{self._quantisation()}; "
            f"only {', '.join(_DTYPE_BYTES)} can be loaded: use a checkpoint whose vision tower is not quantised"
        )

    def _quantisation(self) -> str:
        """``" (quantised with …)"`` as config.json names it, for a message; empty where it names nothing."""
        try:
            method = ConfigReader.from_file(self.folder / "config.json").get(
                str, "quantization_config.quant_method", None
            )
        except (ConfigError, CheckpointNotFoundError):
            return ""
        return f" (config.json: quant_method {shorten(method)})" if method else ""


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite.  A finite sum proves it in one cheap pass; only an overflowing one does not."""
    accumulator = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(tensor.sum(dtype=accumulator).isfinite()) or bool(tensor.isfinite().all())
