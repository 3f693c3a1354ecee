"""Strict, streaming, header-first reading of the vision tensors of a safetensors checkpoint.

The order of work is what makes it safe: names are checked before a file is opened, headers before a tensor is read, and
shapes against the configuration before memory is taken.  Tensors of the language model are never read, and shards that
hold nothing else are never opened.  Nothing is ever initialized in place of a missing tensor.

Quantized weights appear as what they stand for: one tensor, with the weight's own shape (:mod:`tritontower.checkpoint.dequantize`).
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
from .dequantize import FLOAT_DTYPES, SUPPORTED_SCHEMES, Decoder, Group, StoredTensor, decoder_of, group_tensors
from .files import INDEX_NAMES, Layout, Prefixes, WeightFiles, explained, open_safetensors, strip_prefix

__all__ = ["Checkpoint", "Progress", "TensorHeader"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after every tensor."""


@dataclass(frozen=True)
class TensorHeader:
    """What the files' headers say about one tensor of the tower.

    Attributes:
        name: as stored, with its root.
        shape: sizes, outermost first; of a quantized tensor those of the weight that it stands for, or as stored if
            it cannot be loaded.
        dtype: of what is stored, in the format's own terms: ``"BF16"``, ``"F32"``, ``"U8"`` …
        file: base name of the file that holds it.
        scheme: how it is quantized, as in ``"bitsandbytes NF4"``; ``None`` if it is not, or not in any known way.
        nbytes: stored size in bytes, that of scales and tables included; only of what can be loaded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    scheme: str | None
    nbytes: int


class _Headers(Mapping[str, TensorHeader]):
    """Name → header, each made when it is asked for: the shape of some takes reading what the others are not asked."""

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
    """The vision tensors of one checkpoint: headers now, data when :meth:`iterate` is called.

    A context manager: leaving it closes the files, after which only the headers remain.

    Attributes:
        folder: where the files are.
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
        self._handles.clear()  # a safetensors handle closes its file when nobody holds it any more

    @classmethod
    def open(
        cls, folder: Path, *, prefixes: Prefixes, layout: Layout = "hf", allow_symlinks: bool = False
    ) -> "Checkpoint":
        """Reads the headers of the files in ``folder`` that hold vision tensors.

        An index wins over a single file beside it.

        Args:
            folder: a local folder.
            prefixes: beginnings of the stored names that belong to the tower → what they become, as
                :func:`~tritontower.checkpoint.files.strip_prefix` applies them.
            layout: whose names the weight files have; a folder may hold both layouts.
            allow_symlinks: also follow links that leave the folder other than into the Hugging Face cache.

        Raises:
            CheckpointNotFoundError: no folder, or no safetensors file of this layout in it.
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
        for file, promised in files.with_prefix(prefixes, layout).items():
            names = checkpoint._read_headers(files.path(file), prefixes)
            absent = sorted(set(promised) - names)
            if absent:
                raise CheckpointIncompleteError(
                    f"{file} lacks {len(absent)} tensors that {INDEX_NAMES[layout]} places there: {list_names(absent)}",
                    absent,
                )
        if not checkpoint._stored:
            raise CheckpointIncompleteError(
                f"{folder} holds no vision tensor: no name begins with {list_names([repr(root) for root in prefixes])}"
            )
        checkpoint._groups = group_tensors(checkpoint._stored)
        return checkpoint

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Name without its root → header, in the order in which the files store them.

        A quantized weight is one tensor; its scales and tables are not listed.  The shape of a bitsandbytes weight of 4
        bits is read from beside it when its header is asked for, which raises what :meth:`expect` raises for it.
        """
        return _Headers(
            self._groups, lambda group: self._decoder(group).shape if group.is_supported else group.main.shape
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type that most bytes of the tower's plain tensors are stored in; ``float32`` for ``F64``.

        Where all are quantized, the type that they had before if that is recorded, else ``bfloat16``.

        Raises:
            UnsupportedDtypeError: no tensor is of a type that can be loaded.
            CheckpointCorruptError: the record cannot be understood.
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
        """Whether the tensor with this stripped name is plain, or quantized in a way that can be undone."""
        return self._groups[name].is_supported

    def expect(
        self, specs: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = (), *, unneeded: Collection[str] = ()
    ) -> None:
        """Checks that the vision tensors are exactly ``specs`` (stripped name → shape).

        Nothing is read but the descriptions of 4-bit weights among them.

        Args:
            specs: what the tower needs.
            ignored: ``fnmatch`` patterns of stripped names that may be there and are not used.
            unneeded: stripped names that may be there and are not used, such as blocks behind the last one that is
                needed; of any shape and type.

        Raises:
            UnsupportedDtypeError: a tensor is quantized in a way that cannot be undone, or otherwise not a float.
            CheckpointIncompleteError: tensors are missing.
            CheckpointCorruptError: the parts of a quantized tensor contradict one another.
            ShapeMismatchError: a tensor has another shape.
            UnexpectedTensorError: vision tensors are left over, so the configuration describes another tower.
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
            dtype: a floating type; the conversion is torch's (round to nearest even).  Quantized tensors are computed
                in fp32 and rounded once.
            device: where the tensors go.
            names: stripped names to read; if ``None``, what :meth:`expect` was told, or else all.
            check_finite: refuse NaN and infinity, whether stored or made by the conversion.
            progress: called after every tensor.

        Raises:
            CheckpointIncompleteError: a name that is not in :attr:`tensors`.
            UnsupportedDtypeError: a tensor of a type that cannot be loaded, or quantized in a way that cannot be undone.
            NonFiniteWeightsError: NaN or infinity, or a value too large for ``dtype``.
            CheckpointCorruptError: a file shrank since its header was read; the parts of a quantized tensor contradict
                one another.
            UsageError: the checkpoint is closed.
        """
        wanted = set(names if names is not None else self._groups if self._expected is None else self._expected)
        unknown = sorted(wanted - set(self._groups))
        if unknown:
            raise CheckpointIncompleteError(f"{self.folder} lacks {list_names(unknown)}", unknown)
        self._refuse_closed()
        groups = {name: group for name, group in self._groups.items() if name in wanted}
        for group in groups.values():
            if not group.is_supported:
                raise self._unsupported(group)
        total, done = sum(group.nbytes for group in groups.values()), 0
        for name, group in groups.items():
            # Not a local variable: this frame sleeps while the caller works, and would keep the tensor alive.
            yield name, self._read_tensor(group, dtype, torch.device(device), check_finite)
            done += group.nbytes
            if progress is not None:
                progress(done, total)

    def _decoder(self, group: Group) -> Decoder:
        decoder = self._decoders.get(group.main.name)
        if decoder is None:
            decoder = self._decoders[group.main.name] = decoder_of(group, self._read_stored)
        return decoder

    def _read_stored(self, stored: StoredTensor) -> torch.Tensor:
        self._refuse_closed()
        with explained(self.folder / stored.file):
            tensor: torch.Tensor = self._handles[stored.file].get_tensor(stored.name)
        return tensor

    def _refuse_closed(self) -> None:
        if not self._handles:
            raise UsageError("the checkpoint is closed; read inside `with Checkpoint.open(...)`")

    def _read_tensor(self, group: Group, dtype: torch.dtype, device: torch.device, check_finite: bool) -> torch.Tensor:
        stored = self._decoder(group).decode(self._read_stored)
        tensor = stored.to(device=device, dtype=dtype)
        if not check_finite or _is_finite(tensor):
            return tensor
        name, file = group.main.name, group.main.file
        if tensor is stored or not _is_finite(stored):
            raise NonFiniteWeightsError(
                name, f"in {file} holds NaN or infinity; check_finite=False loads it all the same"
            )
        raise NonFiniteWeightsError(
            name,
            f"in {file} holds values up to {stored.abs().max().item():.6g}, but {dtype} ends at "
            f"{torch.finfo(dtype).max:.6g}; load it as torch.bfloat16 or torch.float32",
        )

    def _read_headers(self, path: Path, prefixes: Prefixes) -> set[str]:
        """Opens one file and takes the headers of its vision tensors in; returns their names as stored."""
        handle = open_safetensors(path)
        names: set[str] = set()
        with explained(path):
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
            f"{', '.join(FLOAT_DTYPES)} and, with their scales, {', '.join(SUPPORTED_SCHEMES)} can be loaded: use a "
            "checkpoint whose vision tower is not quantized, or in one of these ways"
        )

    def _quantization(self) -> str:
        """``" (quantized with …)"`` as config.json names it, for a message; empty where it names nothing."""
        try:
            method = ConfigReader.from_file(self.folder / "config.json").get(
                str, "quantization_config.quant_method", None
            )
        except (ConfigError, CheckpointNotFoundError):
            return ""
        return f" (config.json: quant_method {shorten(method)})" if method else ""


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite.  A finite sum proves it in one cheap pass; only an overflowing one does not."""
    # In the tensor's own type, which torch accumulates in fp32 all the same: asked for another, it makes a copy first.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
