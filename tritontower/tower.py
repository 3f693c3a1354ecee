"""The vision tower: pictures in, language-model-ready embeddings out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, Unpack, cast, overload

import numpy as np
import torch
from PIL import Image

from .batch import PackedBatch
from .checkpoint import Checkpoint, Progress
from .config import TowerConfig
from .description import Description
from .embedding import ImageEmbedding
from .errors import BackendUnavailableError, Limits, TowerNotLoadedError, UsageError, shorten
from .executor import Executor
from .families import MISTRAL_FORMAT, Family, has_tower, read_family
from .features import with_features
from .fusion import fold_still_pictures, fuse
from .graph import Graph, Workload, build
from .images import Picture, canonical_rgb
from .locate import fetch_shards, locate
from .memory import MemoryPlan, plan_memory
from .preprocessing import Bounds, Preprocessor, pack_views
from .reader import ConfigReader
from .weights import read_weights, stored_shapes

__all__ = ["VisionTower", "has_vision"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class VisionTower:
    """A vision tower of a published checkpoint; :meth:`from_pretrained` makes one.

    ``encode`` is ``preprocess`` and ``forward`` in a row; an engine that schedules its own passes calls the two halves.

    Attributes:
        family: what the family file read out of the checkpoint's configuration.
        folder: the checkpoint.
        preprocessor: turns pictures into packed batches.
        graph: the layer graph that runs for still pictures.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        preprocessor: Preprocessor,
        fetch: Callable[..., None],
    ) -> None:
        self.folder = folder
        self.preprocessor = preprocessor
        self._device = device
        self._dtype = dtype
        self._fetch = fetch
        self._executors: dict[int, Executor] | None = None
        self._load_lock = Lock()
        self._describe(family)

    def _describe(self, family: Family) -> None:
        self.family = family
        self._clip_graph: Graph = fuse(build(family.config))
        self.graph: Graph = fold_still_pictures(self._clip_graph)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        delay_load: bool = False,
        feature_layer: int | Sequence[int] | None = None,
        feature_select: str | None = None,
        preprocessing: str = "hf",
        processor: Any = None,
        processor_options: Mapping[str, Any] | None = None,
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
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``"auto"`` for what the checkpoint's configuration declares,
                or, where it declares nothing, what the weights are stored in.
            delay_load: read the configuration only; :meth:`load` reads the weights.
            feature_layer: which hidden states become the features, instead of the checkpoint's choice, as an index into
                transformers' ``hidden_states``: 0 enters the first block, −1 leaves the last, before any norm behind it.
                Several are put side by side.  There is then no pooled output, and blocks that are not needed for the
                features are not read.
            feature_select: ``"patch"`` leaves the class token out, ``"cls_patch"`` keeps it.
            preprocessing: ``"hf"`` prepares pictures as transformers does, ``"mistral"`` as Mistral's own library
                (Pixtral and Mistral3 only).
            processor: an image processor of transformers, for checkpoints that ship none.
            processor_options: settings of the image processor to use instead of those in its file, such as
                ``{"do_pan_and_scan": True}``.
            limits: what a picture may cost before it is refused.
            revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.
            progress: called with the bytes read so far and in all.

        Raises:
            TowerError: the checkpoint cannot be used; its subclasses say why.
        """
        where = _device(device)
        wanted = _dtype(dtype)
        folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        reader = _configuration(folder)
        family = with_features(read_family(reader), feature_layer, feature_select)
        make = family.preprocessors.get(preprocessing)
        if make is None:
            raise UsageError(
                f"preprocessing {shorten(preprocessing)} is not known for this tower; allowed: "
                f"{', '.join(map(repr, family.preprocessors))}"
            )
        preprocessor = make(family.config, folder, limits or Limits(), processor, processor_options or {})
        fetch = partial(fetch_shards, token=token, local_files_only=local_files_only)
        wanted = wanted or _declared_dtype(reader)
        tower = cls(family, folder, device=where, dtype=wanted, preprocessor=preprocessor, fetch=fetch)
        if not delay_load:
            tower.load(progress=progress)
        return tower

    @property
    def config(self) -> TowerConfig:
        """What the tower is."""
        return self.family.config

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
        with self._checkpoint() as checkpoint:
            if self.family.settle is not None:
                self._describe(self.family.settle(self.family, checkpoint.tensors.keys()))
            graph, family = self.graph, self.family
            needed = stored_shapes(graph, family.tensors)
            known = {name for recipe in family.tensors.values() for name in recipe.names}
            checkpoint.expect(needed, ignored=family.ignored, unneeded=known - needed.keys())
            if self._dtype is None:
                self._dtype = checkpoint.dtype
            return read_weights(checkpoint, graph, family.tensors, self._dtype, self._device, progress=progress)

    def _checkpoint(self) -> Checkpoint:
        family = self.family
        self._fetch(self.folder, family.roots, layout=family.layout)
        return Checkpoint.open(self.folder, roots=family.roots, layout=family.layout)

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

        With ``dtype="auto"``, a configuration that declares none, and before :meth:`load`, the headers of the weight files
        say, which a hub's checkpoint has to fetch first.
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
        """Width of an embedding: the language model's, or the tower's own where it has no projector."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int | None:
        """Patches of one view; ``None`` where the picture's size decides.  A class token is not counted."""
        return self.config.num_patches

    @property
    def dummy_feature(self) -> torch.Tensor:
        """``[1, hidden_size]`` of zeros, on the tower's device and in its dtype: stands in where there is no picture."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    # -- pictures to embeddings -----------------------------------------------------------------------------------

    def encode(self, pictures: Iterable[Picture] | Picture, **bounds: Unpack[Bounds]) -> list[ImageEmbedding]:
        """Encodes still pictures of any mix of sizes in one packed pass; the order is kept.

        Args:
            pictures: one or several ``PIL.Image``, numpy or torch arrays (uint8, or float in 0 … 1), ``bytes`` of an
                encoded file, or ``pathlib.Path``.  A plain ``str`` is refused, and nothing is fetched from a URL.
            **bounds: instead of the checkpoint's own, as far as its resizing rule has them: ``min_pixels`` and
                ``max_pixels``, the area of a resized picture, or ``longest_edge``, its longer side in pixels.

        Returns:
            An :class:`~tritontower.embedding.ImageEmbedding` per picture, on the tower's device, in memory of its own.

        Raises:
            ImageError: a picture cannot be used; the message says which one and why.
            UsageError: a bound that the tower's resizing rule does not have.
            TowerNotLoadedError: the tower was made with ``delay_load`` and :meth:`load` was not called.
        """
        batch = self.preprocess(pictures, **bounds)
        return self._split(self.run(batch), batch)

    def encode_video(self, frames: Iterable[Picture], **bounds: Unpack[Bounds]) -> ImageEmbedding:
        """Encodes the frames of one clip, in order and all of one size; see :meth:`encode` for what a frame may be.

        A clip in one array has four dimensions, the first of them time.
        A patch spans ``config.patch.temporal`` frames; the last frame is repeated until they come out even.

        Raises:
            UsageError: the tower takes no video.
        """
        batch = self.preprocess_video(frames, **bounds)
        (embedding,) = self._split(self.run(batch), batch)
        return embedding

    def preprocess(self, pictures: Iterable[Picture] | Picture, **bounds: Unpack[Bounds]) -> PackedBatch:
        """The first half of :meth:`encode`, on the CPU: pictures → packed batch."""
        several = [pictures] if _is_one(pictures) else cast("Iterable[Picture]", pictures)
        images = [
            canonical_rgb(cast("Picture", picture), index=index, limits=self.preprocessor.limits)
            for index, picture in enumerate(several)
        ]
        return self.preprocessor.pictures(images, **bounds)

    def preprocess_video(self, frames: Iterable[Picture], **bounds: Unpack[Bounds]) -> PackedBatch:
        """The first half of :meth:`encode_video`, on the CPU: frames → packed batch."""
        # The rows of a single picture would pass for grey frames.
        if _is_one(frames) and getattr(frames, "ndim", 0) != 4:
            raise UsageError(f"frames is one {type(frames).__name__}; pass a list of the clip's frames, in order")
        images = [
            canonical_rgb(frame, index=index, limits=self.preprocessor.limits) for index, frame in enumerate(frames)
        ]
        return self.preprocessor.clip(images, **bounds)

    @overload
    def forward(self, batch: PackedBatch | torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...

    def forward(self, batch: PackedBatch | torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """The second half of :meth:`encode`.

        Args:
            batch: what :meth:`preprocess` returned; or pixels that are preprocessed already: ``[B, C, H, W]``, or a list
                of ``[C, H, W]``, each one view of a still picture, resized and normalised, of a floating dtype.

        Returns:
            For a packed batch ``[tokens, hidden_size]``, all pictures' rows in order, in the tower's dtype.  For pixels
            ``[B, tokens, hidden_size]``, or a list of ``[tokens, hidden_size]``, in the pixels' dtype and on their
            device.  The result belongs to the caller: no later pass writes to it.

        Raises:
            UsageError: pixels of a shape or dtype that the tower cannot take, or another tower's batch.
            TowerNotLoadedError: the weights are not there yet.
        """
        if isinstance(batch, PackedBatch):
            return self.run(batch)["embeddings"]
        views = list(batch)
        packed = pack_views(self.config, views)
        rows = self.run(packed)["embeddings"]
        parts = rows.split(packed.token_counts)
        if isinstance(batch, torch.Tensor):
            tokens = parts[0].shape[0] if parts else 0
            return rows.view(len(views), tokens, self.hidden_size).to(batch.device, batch.dtype)
        return [part.to(view.device, view.dtype, copy=True) for part, view in zip(parts, views, strict=True)]

    __call__ = forward

    def run(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Everything that the tower makes of a batch, by name.

        Returns:
            ``embeddings`` ``[tokens, hidden_size]``; ``deepstack.0`` … of the same shape, which the language model adds
            behind its first layers; ``pooled`` ``[views, width]``.  What the tower does not have is not there.
        """
        return self.executor_for(batch).run(batch.to(self._device))

    def executor_for(self, batch: PackedBatch) -> Executor:
        """What runs ``batch``: still pictures and clips have a graph each, over the same weights."""
        if self._executors is None:
            raise TowerNotLoadedError("the tower's weights are not loaded; call load() first")
        executor = self._executors.get(batch.pixels.shape[1])
        if executor is None or batch.rows_per_token != self.config.rows_per_token:
            raise UsageError(
                f"a batch with {batch.pixels.shape[1]} pixel values a patch and {batch.rows_per_token} patches a token is "
                f"another tower's; this one takes {sorted(self._executors)} and {self.config.rows_per_token}"
            )
        return executor

    def _split(self, outputs: Mapping[str, torch.Tensor], batch: PackedBatch) -> list[ImageEmbedding]:
        def parts(rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
            # A view would keep, and take along when it is pickled, the rows of the whole pack.
            return [part.clone() for part in rows.split(list(counts))] if len(batch) > 1 else [rows][: len(batch)]

        tokens = {name: parts(rows, batch.token_counts) for name, rows in outputs.items() if name != "pooled"}
        pooled = parts(outputs["pooled"], batch.view_counts) if "pooled" in outputs else None
        levels = [tokens[f"deepstack.{level}"] for level in range(len(self.config.deepstack))]
        return [
            ImageEmbedding(
                embeddings=rows,
                grid_thw=batch.grids[index],
                original_size=batch.original_sizes[index],
                processed_size=batch.processed_sizes[index],
                content_hash=batch.content_hashes[index],
                deepstack=tuple(level[index] for level in levels),
                pooled=None if pooled is None else pooled[index],
            )
            for index, rows in enumerate(tokens["embeddings"])
        ]

    # -- what it will cost ----------------------------------------------------------------------------------------

    def count_tokens(self, width: int, height: int, **bounds: Unpack[Bounds]) -> int:
        """Tokens of a still picture of ``width`` × ``height`` pixels; needs neither the picture nor the weights."""
        return self.preprocessor.layout(width, height, **bounds).tokens(self.config)

    def workload(self, sizes: Iterable[tuple[int, int]], **bounds: Unpack[Bounds]) -> Workload:
        """How much one pass over pictures of these sizes (width, height; pixels) has to do; nothing is decoded."""
        layouts = [self.preprocessor.layout(width, height, **bounds) for width, height in sizes]
        return PackedBatch.without_pixels(self.config, layouts).workload

    def memory_plan(self, patches: int | Sequence[int] | Workload) -> MemoryPlan:
        """What one pass takes beside the weights, in bytes; needs no weights, but see :attr:`dtype` for ``"auto"``.

        Args:
            patches: patches of one still picture, or of each of several in one pass; or what :meth:`workload` says.

        Raises:
            UsageError: a count of patches that no picture of this tower has.
        """
        return plan_memory(self.graph, self._workload(patches), self.dtype.itemsize)

    def describe(self, patches: int | Sequence[int] | Workload) -> Description:
        """The layer graph with shapes, parameters, operations and bytes, as text, JSON or a drawing.

        Takes, needs and raises what :meth:`memory_plan` does.
        """
        return Description(self.graph, self._workload(patches), self.dtype.itemsize)

    def _workload(self, patches: int | Sequence[int] | Workload) -> Workload:
        if isinstance(patches, Workload):
            return patches
        config = self.config
        counts = list(patches) if isinstance(patches, Iterable) and not isinstance(patches, str) else [patches]
        if not all(isinstance(count, Integral) for count in counts):
            raise UsageError(f"patches is {shorten(patches)}; allowed: a whole number, or a list of them")
        counts = [int(count) for count in counts]
        unit = config.num_patches or config.rows_per_token
        if any(count < 0 or count % unit for count in counts):
            reason = "the patches of one token" if config.num_patches is None else "the patches of one view"
            raise UsageError(f"patches {counts} must be multiples of {unit}, {reason}")
        return _workload_of(config, counts)


def _workload_of(config: TowerConfig, counts: Sequence[int]) -> Workload:
    """The workload of pictures of which only the patches are known: windows are whole, and no tile is cut or ended."""
    patches = sum(counts)
    views = (
        [count for count in counts if count]
        if config.num_patches is None
        else [config.num_patches] * (patches // config.num_patches)
    )
    class_rows = len(views) if config.class_token else 0
    window = 0 if config.windows is None else config.windows.side**2 * config.rows_per_token
    return Workload(
        patches=patches + class_rows,
        tokens=patches // config.rows_per_token + (class_rows if config.keep_class_token else 0),
        scores=sum((view + bool(class_rows)) ** 2 for view in views),
        window_scores=sum(view * min(view, window) for view in views),
        selected=patches + (class_rows if config.keep_class_token else 0),
        merged=patches // config.rows_per_token,
        views=len(views),
    )


def _configuration(folder: Path) -> ConfigReader:
    """The checkpoint's ``config.json``, or Mistral's own file where there is none."""
    own = folder / MISTRAL_FORMAT
    return ConfigReader.from_file(
        own if own.is_file() and not (folder / "config.json").is_file() else folder / "config.json"
    )


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
    return has_tower(_configuration(folder))


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


def _declared_dtype(reader: ConfigReader) -> torch.dtype | None:
    """What a configuration says the model is computed in, if a tower can be."""
    for key in ("dtype", "torch_dtype", "vision_config.dtype", "vision_config.torch_dtype"):
        if reader.has(key):
            return DTYPES.get(reader.get(str, key).removeprefix("torch."))
    return None


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if wanted not in DTYPES.values():
        raise UsageError(f"dtype {str(dtype)!r} is not supported; allowed: 'auto', {', '.join(map(repr, DTYPES))}")
    return wanted
