"""A tower's graphs and weights: runs packed batches, and plans their memory."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Self, Unpack, overload

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.cache import EmbeddingCache
from tritontower.checkpoint.checkpoint import Progress
from tritontower.config import TowerConfig
from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits
from tritontower.engine.launch_count import count_launches
from tritontower.engine.onednn_weights import prepack_weights
from tritontower.engine.planning import parse_workload, plan_forward
from tritontower.engine.runner import ModelRunner, estimate_weights_bytes
from tritontower.engine.weight_loader import read_weights, stored_shapes
from tritontower.errors import BackendUnavailableError, TowerNotLoadedError, UsageError, shorten
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.graph.ir import Graph, Workload
from tritontower.graph.memory_plan import MemoryPlan
from tritontower.graph.summary import Description
from tritontower.kernels.runtime.dispatch import backend_on
from tritontower.preprocessing import Bounds, Preprocessor, pack_tiles
from tritontower.prompt.layout import PromptLayout
from tritontower.prompt.mrope import MropeRule

from .assembly import TowerCheckpoint
from .family import Family

SAMPLE_PATCHES = 4096
"""Patches of the sample batch from which the default batch size follows; large enough that rounding does not matter."""


class TowerModel:
    """The graphs and weights of a tower; base class of :class:`~tritontower.tower.VisionTower`."""

    def __init__(
        self,
        checkpoint: TowerCheckpoint,
        preprocessor: Preprocessor,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        cuda_graphs: bool | CaptureLimits = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.preprocessor = preprocessor
        self.device = device
        self._dtype = dtype or checkpoint.dtype
        self.cache = cache
        self._cuda_graphs = cuda_graphs
        self._runner: ModelRunner | None = None
        self._load_lock = Lock()
        self._build_graphs()

    def _build_graphs(self) -> None:
        self._video_graph: Graph = fuse(build(self.config), select_passes(self.device))
        self.graph: Graph = fold_still_images(self._video_graph)

    def __repr__(self) -> str:
        config = self.config
        state = f"{self._dtype} on {self.device}" if self.is_loaded else f"not loaded, for {self.device}"
        return (
            f"<VisionTower {config.family}: {config.depth} blocks, {config.width} → {config.hidden_size} wide, {state}>"
        )

    @property
    def family(self) -> Family:
        """The checkpoint's configuration, as its family file reads it."""
        return self.checkpoint.family

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def config(self) -> TowerConfig:
        """The architecture of the tower."""
        return self.family.config

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """The layout of images in the language model's prompt; ``None`` for a tower without a language model."""
        return self.family.prompt

    @property
    def mrope(self) -> MropeRule | None:
        """The rule for the positions of image and video tokens; ``None`` if they are numbered like text."""
        return self.family.mrope

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations.

        With ``dtype="auto"`` and a configuration that declares none, this reads the headers of the weight files before
        :meth:`load`; a hub checkpoint has to be fetched for that.
        """
        if self._dtype is None:
            with self.checkpoint.open() as stored:
                self._dtype = stored.dtype
        return self._dtype

    @property
    def hidden_size(self) -> int:
        """Width of an embedding: the language model's, or the tower's own if it has no projector."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int | None:
        """Patches of one tile, without a class token; ``None`` if they depend on the image's size."""
        return self.config.num_patches

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros ``[1, hidden_size]`` on the tower's device and in its dtype, for prompts without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    def load(self, progress: Progress | None = None) -> Self:
        """Reads the weights unless they are loaded; returns the tower.  Safe to call from several threads."""
        with self._load_lock:
            if self._runner is None:
                weights = self.read_weights(progress)
                if self.checkpoint.can_prepack:
                    prepack_weights(self._graphs, weights)
                preprocessor = self.preprocessor  # not the tower, whose memory a reference cycle would keep for a while
                self._runner = ModelRunner(
                    self.config,
                    self._graphs,
                    weights,
                    normalization=lambda: preprocessor.normalization,
                    cuda_graphs=self._cuda_graphs,
                )
                self._process = os.getpid()
        return self

    def read_weights(self, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """Reads the weights in the layout of :attr:`graph`, for an executor of the caller's own; does not keep them."""
        with self.checkpoint.open() as stored:
            if self.family.settle is not None:
                self.checkpoint.family = self.family.settle(self.family, stored.weights.keys())
                self._build_graphs()
            tensors = self.family.tensors
            needed = stored_shapes(self.graph, tensors)
            known = {name for weight_map in tensors.values() for name in weight_map.stored_names}
            stored.expect(needed, ignored=self.family.ignored, unneeded=known - needed.keys())
            if self._dtype is None:
                self._dtype = stored.dtype
            return read_weights(stored, self.graph, tensors, self._dtype, self.device, progress=progress)

    @property
    def is_loaded(self) -> bool:
        """True once the weights are loaded."""
        return self._runner is not None

    @property
    def runner(self) -> ModelRunner:
        """The runner of batches; raises ``TowerNotLoadedError`` before :meth:`load`."""
        if self._runner is None:
            raise TowerNotLoadedError("the tower's weights are not loaded; call load() first")
        if self._process != os.getpid():
            self._enter_forked_process()
        return self._runner

    def _enter_forked_process(self) -> None:
        """Uses a single thread: a fork inherits torch's pool of threads without the threads, and would wait for them."""
        if self.device.type == "cuda":
            raise BackendUnavailableError(
                'a tower on a GPU cannot be used in a forked process; start it with the method "spawn", or load the tower '
                "there"
            )
        torch.set_num_threads(1)
        self._process = os.getpid()

    @property
    def _raw(self) -> bool | None:
        """Pixels stay uint8 for the Triton kernels, if the preprocessor can (``None``)."""
        return None if backend_on(self.device) == "triton" else False

    @property
    def _graphs(self) -> tuple[Graph, ...]:
        """Still images and videos have a graph each if a patch spans several frames."""
        return (self.graph, self._video_graph) if self.config.patch.temporal > 1 else (self.graph,)

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights, bytes; ``graph.parameters`` counts the model's own numbers.

        After loading, this is the memory allocated, including padding, oneDNN's blocks, and the patch projections for
        stills, videos and uint8 pixels.  Before, it is an estimate without oneDNN's blocks, the uint8 projection and gaps
        between tensors: for published towers about one percent less.
        """
        if self._runner is not None:
            return self._runner.weights_bytes
        return estimate_weights_bytes(self._graphs, self.dtype.itemsize)

    @overload
    def forward(self, batch: PackedBatch | torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...

    def forward(self, batch: PackedBatch | torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Computes the embeddings of a batch; the second half of :meth:`encode`.

        Args:
            batch: the result of :meth:`preprocess`; or pixels that are resized and normalized, ``[B, C, H, W]`` or a list
                of ``[C, H, W]``, each one tile of a still image, of a floating dtype.

        Returns:
            For a packed batch ``[tokens, hidden_size]``, the rows of all images in order, in the tower's dtype.  For
            pixels ``[B, tokens, hidden_size]``, or a list of ``[tokens, hidden_size]``, in the pixels' dtype and on their
            device.  The result belongs to the caller; no later forward pass writes to it.

        Raises:
            UsageError: pixels of a shape or dtype that the tower cannot take, or another tower's batch.
            TowerNotLoadedError: the weights are not loaded.
        """
        if isinstance(batch, PackedBatch):
            return self.run(batch)["embeddings"]
        is_scalar = isinstance(batch, torch.Tensor) and batch.ndim == 0
        if is_scalar or isinstance(batch, str) or not isinstance(batch, Iterable):
            raise UsageError(
                "batch must be the result of preprocess(), pixels [B, C, H, W], or a list of [C, H, W], got "
                f"{shorten(batch)}"
            )
        tiles = list(batch)
        packed = pack_tiles(self.config, tiles)
        rows = self.run(packed)["embeddings"]
        parts = rows.split(packed.images.token_counts)
        if isinstance(batch, torch.Tensor):
            tokens = parts[0].shape[0] if parts else 0
            return rows.view(len(tiles), tokens, self.hidden_size).to(batch.device, batch.dtype)
        return [part.to(tile.device, tile.dtype, copy=True) for part, tile in zip(parts, tiles, strict=True)]

    __call__ = forward

    def run(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Computes all outputs of a batch, by name, as far as the tower has them.

        ``embeddings`` ``[tokens, hidden_size]``; ``deepstack.0`` … of the same shape, which the language model adds after its
        first layers; ``pooled`` ``[tiles, width]``.
        """
        return self.runner.run(batch)

    def executor_for(self, batch: PackedBatch) -> Executor:
        """Returns the executor of ``batch``: stills, videos and uint8 pixels have one each, over the same weights."""
        return self.runner.executor_for(batch)

    @property
    def captured_bytes(self) -> int:
        """Bytes of device memory that captured CUDA graphs hold; :meth:`release` frees them."""
        return 0 if self._runner is None else self._runner.captured_bytes

    def release(self) -> None:
        """Frees the device memory that forward passes hold beside the weights; the next one allocates it again."""
        if self._runner is not None:
            self._runner.release()

    def count_tokens(self, width: int, height: int, **bounds: Unpack[Bounds]) -> int:
        """Returns the tokens of a still image of ``width`` × ``height`` pixels; needs neither image nor weights."""
        return self.preprocessor.layout(width, height, **bounds).tokens(self.config)

    def workload(self, sizes: Iterable[tuple[int, int]], **bounds: Unpack[Bounds]) -> Workload:
        """Returns the size of one forward pass over images of these (width, height), pixels; decodes nothing."""
        layouts = [self.preprocessor.layout(width, height, **bounds) for width, height in sizes]
        return PackedBatch.without_pixels(self.config, layouts).workload

    def memory_plan(self, patches: int | Sequence[int] | Workload) -> MemoryPlan:
        """Plans the memory of one forward pass beside the weights, bytes; needs no weights (but see :attr:`dtype`).

        On a GPU the plan includes up to a sixteenth more rows (an eighth below 1,024), because similar batch sizes share
        buffers, and pixels as :meth:`preprocess` makes them by default.  ``patches`` are those of one still image, or of each of several in one batch;
        or the result of :meth:`workload`.
        """
        workload = parse_workload(self.config, patches)
        is_raw = self.device.type == "cuda" and self._raw is None and self.preprocessor.normalization is not None
        pixels = torch.uint8 if is_raw else torch.float32
        return plan_forward(self.graph, self.config, workload, self.dtype, self.device, pixels=pixels)

    def describe(self, patches: int | Sequence[int] | Workload) -> Description:
        """Describes the layer graph with shapes, parameters, FLOPs and bytes, as text, JSON or a drawing.

        Arguments, requirements and errors are those of :meth:`memory_plan`.
        """
        by_torch = backend_on(self.device) == "reference"
        workload = parse_workload(self.config, patches)
        launches = None if by_torch else count_launches(self.graph, workload, device=self.device, dtype=self.dtype)
        return Description(self.graph, workload, self.dtype.itemsize, launches, self.dtype, on_cpu=by_torch)

    @cached_property
    def sample_plan(self) -> MemoryPlan:
        """The plan of a batch of :data:`SAMPLE_PATCHES`; needs what :meth:`memory_plan` needs."""
        unit = self.config.num_patches or self.config.rows_per_token
        return self.memory_plan(unit * -(-SAMPLE_PATCHES // unit))
