"""The vision tower: pictures in, language-model-ready embeddings out."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from .batch import PackedBatch
from .checkpoint import Checkpoint, Progress
from .config import TowerConfig
from .description import Description
from .embedding import ImageEmbedding
from .errors import (
    BackendUnavailableError,
    Limits,
    NoVisionTowerError,
    TowerNotLoadedError,
    UnsupportedArchitectureError,
    UsageError,
    shorten,
)
from .executor import Executor
from .families import Family, family_of
from .fusion import fold_still_pictures, fuse
from .graph import Graph, Workload, build
from .images import Picture, canonical_rgb
from .locate import fetch_shards, locate
from .memory import MemoryPlan, plan_memory
from .preprocess import Preprocessor
from .reader import ConfigReader
from .weight_files import Prefixes

__all__ = ["VisionTower", "has_vision"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class VisionTower:
    """A vision tower of a published checkpoint; :meth:`from_pretrained` makes one.

    ``encode`` is ``preprocess`` and ``forward`` in a row; an engine that schedules its own passes calls the two halves.

    Attributes:
        config: what the tower is.
        family: the family file that read its checkpoint.
        folder: the checkpoint.
        preprocessor: turns pictures into packed batches.
        graph: the layer graph that runs for still pictures.
    """

    def __init__(
        self,
        config: TowerConfig,
        family: Family,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        preprocessor: Preprocessor,
        fetch: Callable[[Path, Prefixes], None],
    ) -> None:
        self.config = config
        self.folder = folder
        self.preprocessor = preprocessor
        self.family = family
        self._device = device
        self._dtype = dtype
        self._fetch = fetch
        self._clip_graph: Graph = fuse(build(config))
        self.graph: Graph = fold_still_pictures(self._clip_graph)
        self._executors: dict[int, Executor] | None = None
        self._load_lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        delay_load: bool = False,
        processor: Any = None,
        limits: Limits | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        progress: Progress | None = None,
    ) -> "VisionTower":
        """Reads the vision tensors of a checkpoint, and only those.

        Args:
            model: a local folder, or the id of a repository on the Hugging Face hub (``"Qwen/Qwen2-VL-2B-Instruct"``),
                of which only the configuration and the shards that hold the tower are fetched.
            device: where the tower runs; by default the first GPU, else the CPU.
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``"auto"`` for what the checkpoint holds.
            delay_load: read the configuration only; :meth:`load` reads the weights.
            processor: an image processor of transformers, for checkpoints that ship none.
            limits: what a picture may cost before it is refused.
            revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.
            progress: called with the bytes read so far and in all.

        Raises:
            TowerError: the checkpoint cannot be used; its subclasses say why.
        """
        where = _device(device)
        wanted = _dtype(dtype)
        folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        reader = ConfigReader.from_file(folder / "config.json")
        family = family_of(reader)
        config = family.read_config(reader)
        preprocessor = Preprocessor(config, family, folder, limits or Limits(), processor)
        fetch = partial(fetch_shards, token=token, local_files_only=local_files_only)
        tower = cls(config, family, folder, device=where, dtype=wanted, preprocessor=preprocessor, fetch=fetch)
        if not delay_load:
            tower.load(progress=progress)
        return tower

    # -- weights --------------------------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> "VisionTower":
        """Reads the weights, if they are not there yet; returns the tower."""
        with self._load_lock:
            if self._executors is None:
                sources = self._read_weights(progress)
                patch = self.config.patch
                executors = {patch.still_inner: Executor(self.graph, sources)}
                if patch.temporal > 1:
                    executors[patch.inner] = Executor(self._clip_graph, sources)
                # Not before both are there: another thread may already be asking.
                self._executors = executors
        return self

    def _read_weights(self, progress: Progress | None) -> dict[str, torch.Tensor]:
        names = self.family.tensor_names(self.config)
        shapes = self.graph.sources
        with self._checkpoint() as checkpoint:
            checkpoint.expect({names[ours]: shape for ours, shape in shapes.items()}, ignored=self.family.IGNORED)
            if self._dtype is None:
                self._dtype = checkpoint.dtype
            ours_of = {theirs: ours for ours, theirs in names.items()}
            loaded = checkpoint.load(self._dtype, self._device, progress=progress)
            return {ours_of[theirs]: tensor for theirs, tensor in loaded.items()}

    def _checkpoint(self) -> Checkpoint:
        self._fetch(self.folder, self.family.PREFIXES)
        return Checkpoint.open(self.folder, prefixes=self.family.PREFIXES)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are there."""
        return self._executors is not None

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations.

        With ``dtype="auto"`` and before :meth:`load` the headers of the weight files say, which a hub's checkpoint has
        to fetch first.
        """
        if self._dtype is None:
            with self._checkpoint() as checkpoint:
                self._dtype = checkpoint.dtype
        return self._dtype

    @property
    def weights_bytes(self) -> int:
        """Bytes that the weights take once loaded."""
        return self.graph.parameters * self.dtype.itemsize

    @property
    def hidden_size(self) -> int:
        """Width of an embedding: the language model's."""
        return self.config.hidden_size

    # -- pictures to embeddings -----------------------------------------------------------------------------------

    def encode(
        self, pictures: Iterable[Picture] | Picture, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> list[ImageEmbedding]:
        """Encodes still pictures of any mix of sizes in one packed pass; the order is kept.

        Args:
            pictures: one or several ``PIL.Image``, numpy or torch arrays (uint8, or float in 0 … 1), ``bytes`` of an
                encoded file, or ``pathlib.Path``.  A plain ``str`` is refused, and nothing is fetched from a URL.
            min_pixels, max_pixels: bounds of a resized picture's area, instead of the checkpoint's.

        Returns:
            An :class:`~tritontower.embedding.ImageEmbedding` per picture, on the tower's device, in memory of its own.

        Raises:
            ImageError: a picture cannot be used; the message says which one and why.
            TowerNotLoadedError: the tower was made with ``delay_load`` and :meth:`load` was not called.
        """
        batch = self.preprocess(pictures, min_pixels=min_pixels, max_pixels=max_pixels)
        return self._split(self.forward(batch), batch)

    def encode_video(
        self, frames: Iterable[Picture], *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageEmbedding:
        """Encodes the frames of one clip, in order and all of one size; see :meth:`encode` for what a frame may be.

        A clip in one array has four dimensions, the first of them time.
        A patch spans ``config.patch.temporal`` frames; the last frame is repeated until they come out even.
        """
        batch = self.preprocess_video(frames, min_pixels=min_pixels, max_pixels=max_pixels)
        (embedding,) = self._split(self.forward(batch), batch)
        return embedding

    def preprocess(
        self, pictures: Iterable[Picture] | Picture, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> PackedBatch:
        """The first half of :meth:`encode`, on the CPU: pictures → packed batch."""
        several = [pictures] if _is_one(pictures) else cast("Iterable[Picture]", pictures)
        images = [
            canonical_rgb(cast("Picture", picture), index=index, limits=self.preprocessor.limits)
            for index, picture in enumerate(several)
        ]
        return self.preprocessor.pictures(images, min_pixels=min_pixels, max_pixels=max_pixels)

    def preprocess_video(
        self, frames: Iterable[Picture], *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> PackedBatch:
        """The first half of :meth:`encode_video`, on the CPU: frames → packed batch."""
        # The rows of a single picture would pass for grey frames.
        if _is_one(frames) and getattr(frames, "ndim", 0) != 4:
            raise UsageError(f"frames is one {type(frames).__name__}; pass a list of the clip's frames, in order")
        images = [
            canonical_rgb(frame, index=index, limits=self.preprocessor.limits) for index, frame in enumerate(frames)
        ]
        return self.preprocessor.clip(images, min_pixels=min_pixels, max_pixels=max_pixels)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The second half of :meth:`encode`: packed batch → ``[tokens, hidden_size]``, all pictures' rows in order.

        The result belongs to the caller: no later pass writes to it.
        """
        return self.executor_for(batch).run(batch.to(self._device))["embeddings"]

    def executor_for(self, batch: PackedBatch) -> Executor:
        """What runs ``batch``: still pictures and clips have a graph each, over the same weights."""
        if self._executors is None:
            raise TowerNotLoadedError("the tower's weights are not loaded; call load() first")
        executor = self._executors.get(batch.pixels.shape[1])
        if executor is None or batch.rows_per_token != self.config.projector.rows_per_token:
            raise UsageError(
                f"a batch with {batch.pixels.shape[1]} pixel values a patch and {batch.rows_per_token} patches a token is "
                f"another tower's; this one takes {sorted(self._executors)} and {self.config.projector.rows_per_token}"
            )
        return executor

    def _split(self, rows: torch.Tensor, batch: PackedBatch) -> list[ImageEmbedding]:
        # A view would keep, and take along when it is pickled, the rows of the whole pack.
        parts = [part.clone() for part in rows.split(batch.token_counts)] if len(batch) > 1 else [rows][: len(batch)]
        return [
            ImageEmbedding(part, grid, original, processed, content_hash)
            for part, grid, original, processed, content_hash in zip(
                parts, batch.grids, batch.original_sizes, batch.processed_sizes, batch.content_hashes, strict=True
            )
        ]

    # -- what it will cost ----------------------------------------------------------------------------------------

    def count_tokens(
        self, width: int, height: int, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> int:
        """Tokens of a still picture of ``width`` × ``height`` pixels; needs neither the picture nor the weights."""
        _, rows, columns = self.preprocessor.grid(width, height, min_pixels=min_pixels, max_pixels=max_pixels)
        return rows * columns // self.config.projector.rows_per_token

    def memory_plan(self, patches: int | Sequence[int]) -> MemoryPlan:
        """What one pass takes beside the weights, in bytes; needs no weights, but see :attr:`dtype` for ``"auto"``.

        Args:
            patches: patches of one still picture, or of each of several in one pass.

        Raises:
            UsageError: a count is no multiple of the patches that make one token.
        """
        return plan_memory(self.graph, self._workload(patches), self.dtype.itemsize)

    def describe(self, patches: int | Sequence[int]) -> Description:
        """The layer graph with shapes, parameters, operations and bytes, as text, JSON or a drawing.

        Takes, needs and raises what :meth:`memory_plan` does.
        """
        return Description(self.graph, self._workload(patches), self.dtype.itemsize)

    def _workload(self, patches: int | Sequence[int]) -> Workload:
        counts = list(patches) if isinstance(patches, Iterable) and not isinstance(patches, str) else [patches]
        per_token = self.config.projector.rows_per_token
        if not all(isinstance(count, Integral) for count in counts):
            raise UsageError(f"patches is {shorten(patches)}; allowed: a whole number, or a list of them")
        counts = [int(count) for count in counts]
        if any(count < 0 or count % per_token for count in counts):
            raise UsageError(f"patches {counts} must be multiples of {per_token}, the patches of one token")
        return Workload(sum(counts), sum(counts) // per_token, sum(count * count for count in counts))


def has_vision(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> bool:
    """Whether a checkpoint holds a vision tower that can be loaded; only its configuration is read.

    Args:
        model: a local folder or a hub id.
        revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.

    Raises:
        CheckpointError, ConfigError: there is no such checkpoint, or its ``config.json`` cannot be read.
    """
    folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        family_of(ConfigReader.from_file(folder / "config.json"))
    except (NoVisionTowerError, UnsupportedArchitectureError):
        return False
    return True


def _is_one(pictures: object) -> bool:
    """Whether this is a picture and not several; what is neither counts as one, for its error message."""
    alone = (Image.Image, np.ndarray, torch.Tensor, bytes, bytearray, memoryview, Path, str)
    return isinstance(pictures, alone) or not isinstance(pictures, Iterable)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {str(device)!r} is not one of torch's; use 'cpu' or 'cuda', 'cuda:1', …") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} sees no GPU here; use device='cpu', or "
            "see what `tritontower env` reports"
        )
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs here, counted from 0"
        )
    if where.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"device {str(device)!r} is not supported; allowed: 'cpu', 'cuda'")
    return where


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if wanted not in DTYPES.values():
        raise UsageError(f"dtype {str(dtype)!r} is not supported; allowed: 'auto', {', '.join(map(repr, DTYPES))}")
    return wanted
