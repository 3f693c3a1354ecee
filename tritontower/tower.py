"""The vision tower: images in, language-model-ready embeddings out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from secrets import token_hex
from threading import Lock
from types import NoneType
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch

from .batch.packed_batch import PackedBatch
from .cache import EmbeddingCache, embedding_key, files_identity, tower_identity
from .checkpoint.checkpoint import Checkpoint, Progress
from .checkpoint.hub import fetch_shards, locate
from .config import TowerConfig
from .devices import parse_device, parse_dtype
from .embedding import ImageEmbedding, checked_alias
from .engine.executor import Executor
from .engine.graph_cache import CaptureLimits
from .engine.onednn_weights import prepack_weights
from .engine.runner import ModelRunner, estimate_weights_bytes
from .engine.static_buffers import plan_static_buffers
from .engine.weight_loader import read_weights, stored_shapes
from .errors import Limits, TowerNotLoadedError, UsageError, shorten
from .graph.builder import build
from .graph.fusion import fold_still_images, fuse, select_passes
from .graph.ir import Graph, Workload
from .graph.memory_plan import MemoryPlan, plan_memory
from .graph.summary import Description
from .kernels.runtime.dispatch import backend_on
from .models.common.family import Family
from .models.common.feature_layers import with_features
from .models.common.registry import declared_dtype, has_vision, open_config, read_family
from .preprocessing import Bounds, Preprocessor, pack_tiles
from .preprocessing.images.image import ChannelOrder, ImageInput
from .prompt.encode import PromptLayout
from .prompt.mrope import MropeRule
from .scheduler.arguments import (
    check_instance,
    frames_of,
    images_of,
    is_one_image,
    is_whole_number,
    pack_of,
    tiles_of,
    workload_of,
)
from .scheduler.outputs import aliases_of, embeddings_of
from .scheduler.prefetch import canonical_images, workers
from .scheduler.scheduler import Call, ItemError, encode_images, patches_per_pass
from .scheduler.video import VideoTimes, encode_video

__all__ = ["VisionTower", "has_vision"]

SAMPLE_PATCHES = 4096
"""For how many patches a plan is made from which the size of passes follows: enough that roundings do not count."""

_ALIASES = count(1)


class VisionTower:
    """A vision tower of a published checkpoint; :meth:`from_pretrained` makes one.

    ``encode`` is ``preprocess`` and ``forward`` in a row, as often as the images take
    (:mod:`tritontower.scheduler.scheduler`); an engine that schedules its own passes calls the two halves.

    Attributes:
        family: what the family file read out of the checkpoint's configuration.
        folder: the checkpoint.
        preprocessor: turns images into packed batches.
        cache: embeddings of earlier calls, if they are kept.
        graph: the layer graph that runs for still images.
    """

    _shares_weights = False
    """Whether somebody else holds the tower's weights as well, in the plain order of a checkpoint."""

    def __init__(
        self,
        family: Family,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        preprocessor: Preprocessor,
        fetch: Callable[..., None],
        cache: EmbeddingCache | None = None,
        cuda_graphs: bool | CaptureLimits = True,
    ) -> None:
        self.folder = folder
        self.preprocessor = preprocessor
        self._device = device
        self._dtype = dtype
        self._fetch = fetch
        self.cache = cache
        self._cuda_graphs = cuda_graphs
        self._runner: ModelRunner | None = None
        self._weights_identity = token_hex(32)
        self._load_lock = Lock()
        self._describe(family)

    def _describe(self, family: Family) -> None:
        self.family = family
        self._video_graph: Graph = fuse(build(family.config), select_passes(self._device))
        self.graph: Graph = fold_still_images(self._video_graph)

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
        cache: EmbeddingCache | None = None,
        cuda_graphs: bool | CaptureLimits = True,
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
            device: where the tower runs; by default the current GPU, else the CPU.
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``"auto"`` for what the checkpoint's configuration declares,
                or, where it declares nothing, what the weights are stored in.
            delay_load: read the configuration only; :meth:`load` reads the weights.
            feature_layer: which hidden states become the features, instead of the checkpoint's choice, as an index into
                transformers' ``hidden_states``: 0 enters the first block, −1 leaves the last, before any norm behind it.
                Several are put side by side.  There is then no pooled output, and blocks that are not needed for the
                features are not read.
            feature_select: ``"patch"`` leaves the class token out, ``"cls_patch"`` keeps it.
            preprocessing: ``"hf"`` prepares images as transformers does, ``"mistral"`` as Mistral's own library
                (Pixtral and Mistral3 only).
            processor: an image processor of transformers, for checkpoints that ship none.
            processor_options: settings of the image processor to use instead of those in its file, such as
                ``{"do_pan_and_scan": True}``.
            limits: what an image may cost before it is refused.
            cache: keeps embeddings, so that an image that comes again is not encoded again; by default nothing is kept.
                Several towers may share one.
            cuda_graphs: whether passes on a GPU are captured as CUDA graphs when their size comes the second time, and
                replayed from then on; a :class:`~tritontower.engine.graph_cache.CaptureLimits` says what they may hold (by default
                32 graphs and 4 GiB).  See :meth:`warm_up`.  It changes no number, and nothing at all on a CPU.
            revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.
            progress: called with the bytes read so far and in all.

        Raises:
            TowerError: the checkpoint cannot be used; its subclasses say why.
        """
        check_instance("limits", limits, (Limits, NoneType), "Limits(...), or None")
        check_instance("cache", cache, (EmbeddingCache, NoneType), "an EmbeddingCache, or None")
        check_instance("cuda_graphs", cuda_graphs, (bool, CaptureLimits), "True, False, or CaptureLimits(...)")
        where = parse_device(device)
        wanted = parse_dtype(dtype)
        folder = locate(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        reader = open_config(folder)
        family = with_features(read_family(reader), feature_layer, feature_select)
        make = family.preprocessors.get(preprocessing)
        if make is None:
            raise UsageError(
                f"preprocessing {shorten(preprocessing)} is not known for this tower; allowed: "
                f"{', '.join(map(repr, family.preprocessors))}"
            )
        preprocessor = make(family.config, folder, limits or Limits(), processor, processor_options or {})
        fetch = partial(fetch_shards, token=token, local_files_only=local_files_only)
        wanted = wanted or declared_dtype(reader)
        tower = cls(
            family,
            folder,
            device=where,
            dtype=wanted,
            preprocessor=preprocessor,
            fetch=fetch,
            cache=cache,
            cuda_graphs=cuda_graphs,
        )
        if not delay_load:
            tower.load(progress=progress)
        return tower

    def __repr__(self) -> str:
        config = self.config
        state = f"{self._dtype} on {self._device}" if self.is_loaded else f"not loaded, for {self._device}"
        return (
            f"<VisionTower {config.family}: {config.depth} blocks, {config.width} → {config.hidden_size} wide, {state}>"
        )

    @property
    def config(self) -> TowerConfig:
        """What the tower is."""
        return self.family.config

    @property
    def prompt_layout(self) -> PromptLayout | None:
        """How the language model's prompt has images; ``None`` for a tower that comes without a language model."""
        return self.family.prompt

    @property
    def mrope(self) -> MropeRule | None:
        """How the language model numbers the tokens of images and videos; ``None`` where it numbers them like text."""
        return self.family.mrope

    # -- weights --------------------------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> "VisionTower":
        """Reads the weights, if they are not there yet; returns the tower."""
        with self._load_lock:
            if self._runner is None:
                sources = self.read_weights(progress)
                if not self._shares_weights:
                    prepack_weights(self._graphs, sources)
                preprocessor = self.preprocessor  # not the tower: one that goes is to give its memory back at once
                # Assigned when all of it is there: other threads may already be asking.
                self._runner = ModelRunner(
                    self.config,
                    self._graphs,
                    sources,
                    normalization=lambda: preprocessor.rescaling,
                    cuda_graphs=self._cuda_graphs,
                )
        return self

    @property
    def _graphs(self) -> tuple[Graph, ...]:
        """What runs: still images and videos have a graph each where a patch spans several frames."""
        return (self.graph, self._video_graph) if self.config.patch.temporal > 1 else (self.graph,)

    @property
    def _loaded(self) -> ModelRunner:
        """The runner, of a tower that has its weights."""
        if self._runner is None:
            raise TowerNotLoadedError("the tower's weights are not loaded; call load() first")
        return self._runner

    def read_weights(self, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """Reads the weights in the layout of :attr:`graph`, for an executor of the caller's own; the tower does not keep them."""
        with self._checkpoint() as checkpoint:
            if self.family.settle is not None:
                self._describe(self.family.settle(self.family, checkpoint.tensors.keys()))
            graph, family = self.graph, self.family
            needed = stored_shapes(graph, family.tensors)
            known = {name for weight_map in family.tensors.values() for name in weight_map.stored_names}
            checkpoint.expect(needed, ignored=family.ignored, unneeded=known - needed.keys())
            if self._dtype is None:
                self._dtype = checkpoint.dtype
            return read_weights(checkpoint, graph, family.tensors, self._dtype, self._device, progress=progress)

    def _checkpoint(self) -> Checkpoint:
        family = self.family
        self._fetch(self.folder, family.prefixes, layout=family.layout)
        # Before they are read: files that change meanwhile must not pass for what is read.
        self._weights_identity = files_identity(self.folder)
        return Checkpoint.open(self.folder, prefixes=family.prefixes, layout=family.layout)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are there."""
        return self._runner is not None

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
        """Bytes that the weights take where the tower runs; ``graph.parameters`` counts the model's own numbers.

        Once they are loaded, this is the memory that holds them: padded and in the order that the kernels want, on a CPU in
        oneDNN's blocks, with the patch projection for still images beside that for videos, and with that for bytes once
        such a batch has come.  Before, it is what is going to be held, but for oneDNN's blocks, the projection for bytes
        and gaps between tensors: for published towers about a percent less.
        """
        if self._runner is not None:
            return self._runner.weights_bytes
        return estimate_weights_bytes(self._graphs, self.dtype.itemsize)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding: the language model's, or the tower's own where it has no projector."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int | None:
        """Patches of one tile; ``None`` where the image's size decides.  A class token is not counted."""
        return self.config.num_patches

    @property
    def dummy_feature(self) -> torch.Tensor:
        """``[1, hidden_size]`` of zeros, on the tower's device and in its dtype: stands in where there is no image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    # -- images to embeddings -----------------------------------------------------------------------------------

    @overload
    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        max_patches: int | None = None,
        on_error: Literal["raise"] = "raise",
        output_device: str | torch.device | None = None,
        text_alias: str | Sequence[str | None] | None = None,
        check_output: bool = False,
        progress: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> list[ImageEmbedding]: ...

    @overload
    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        max_patches: int | None = None,
        on_error: Literal["return"],
        output_device: str | torch.device | None = None,
        text_alias: str | Sequence[str | None] | None = None,
        check_output: bool = False,
        progress: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> list[ImageEmbedding | ItemError]: ...

    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        max_patches: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        output_device: str | torch.device | None = None,
        text_alias: str | Sequence[str | None] | None = None,
        check_output: bool = False,
        progress: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> list[ImageEmbedding] | list[ImageEmbedding | ItemError]:
        """Encodes still images of any mix of sizes; the order is kept.

        Several images share a pass, and a long list takes several, the next of which is preprocessed in threads while
        the device works.  Images with equal pixels are encoded once.  None of this changes a number: on a CPU a
        image's embedding is the same, bit for bit, however a call is split.

        Args:
            images: one or several ``PIL.Image``, numpy or torch arrays (uint8, or float in 0 … 1), ``bytes`` of an
                encoded file, or ``pathlib.Path``.  A plain ``str`` is refused, and nothing is fetched from a URL.
            max_patches: patches of one pass, class tokens not counted; an image with more is a pass of its own.  By
                default as many as take 1 GiB, or half of what is free on a GPU if that is less.
            on_error: what an image that cannot be encoded does: ``"raise"`` ends the call, ``"return"`` leaves an
                :class:`~tritontower.scheduler.scheduler.ItemError` in the image's place and goes on.
            output_device: where the embeddings go; by default they stay where the tower is.  From a GPU to ``"cpu"`` they
                come in page-locked memory.
            text_alias: what stands for the image in a prompt; for several, a list with one, or ``None``, for each.
            check_output: look for NaN and infinity in the embeddings, which a GPU has to be waited for.
            progress: show a progress bar; by default for 64 images or more, on a terminal.
            input_data_format: ``"channels_first"`` or ``"channels_last"``, the order of the axes of every array among the
                images; needed only where a shape allows both, such as ``[3, 50, 3]``.
            **bounds: instead of the checkpoint's own, as far as its resizing rule has them: ``min_pixels`` and
                ``max_pixels``, the area of a resized image, or ``longest_edge``, its longer side in pixels.

        Returns:
            An :class:`~tritontower.embedding.ImageEmbedding` per image, in memory of its own.

        Raises:
            ImageError, ProcessorError: an image cannot be used; the message or ``index`` says which one.
            TowerOutOfMemoryError: an image does not fit into the device's memory, not even in a pass of its own.
            NonFiniteOutputError: with ``check_output``, an embedding holds NaN or infinity.
            UsageError: a bound that the tower's resizing rule does not have, or another argument that makes no sense.
            TowerNotLoadedError: the tower was made with ``delay_load`` and :meth:`load` was not called.

            ``completed`` of whatever ends a call, also of ``KeyboardInterrupt``, holds the embeddings of the images
            before the first that has none.
        """
        several = images_of(images)
        aliases = aliases_of(text_alias, len(several))
        call = self._call(bounds, output_device, max_patches, on_error, check_output, input_data_format)
        embeddings = encode_images(call, several, progress=progress)
        return [
            embedding if alias is None or isinstance(embedding, ItemError) else embedding.with_alias(alias)
            for embedding, alias in zip(embeddings, aliases, strict=True)
        ]

    def encode_video(
        self,
        frames: Iterable[ImageInput],
        *,
        fps: float | None = None,
        timestamps: Sequence[float] | None = None,
        output_device: str | torch.device | None = None,
        text_alias: str | None = None,
        check_output: bool = False,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> ImageEmbedding:
        """Encodes the frames of one video, in order and all of one size; see :meth:`encode` for what a frame may be.

        A video in one array has four dimensions, the first of them time.
        A patch spans ``config.patch.temporal`` frames; the last frame is repeated until they come out even.

        Args:
            frames: the frames.
            fps: how many of *these* frames make a second: the rate at which they were taken out of the video.
            timestamps: instead of ``fps``, when each frame is shown, seconds.
            output_device, text_alias, check_output, input_data_format, **bounds: as in :meth:`encode`.

        Returns:
            An embedding whose ``seconds_per_grid`` and ``timestamps`` say when its temporal patches are shown, if ``fps``
            or ``timestamps`` do.

        Raises:
            UsageError: the tower takes no video, or the times make no sense.
            ImageError, ProcessorError, TowerOutOfMemoryError, NonFiniteOutputError, TowerNotLoadedError: as in
                :meth:`encode`.
        """
        self.preprocessor.check_takes_videos()
        video = frames_of(frames)
        times = VideoTimes.of(len(video), fps, timestamps)
        alias = checked_alias(text_alias)
        call = self._call(bounds, output_device, None, "raise", check_output)
        embedding = encode_video(call, self.preprocess_video(video, input_data_format=input_data_format, **bounds))
        return times.put_on(embedding, self.config.patch.temporal).with_alias(alias)

    @overload
    def get_image_embeddings(
        self,
        image: ImageInput,
        text_alias: str | None = None,
        embeddings_cpu: bool = True,
        **bounds: Unpack[Bounds],
    ) -> ImageEmbedding: ...

    @overload
    def get_image_embeddings(
        self,
        image: Sequence[ImageInput],
        text_alias: Sequence[str | None] | None = None,
        embeddings_cpu: bool = True,
        **bounds: Unpack[Bounds],
    ) -> list[ImageEmbedding]: ...

    def get_image_embeddings(
        self,
        image: ImageInput | Sequence[ImageInput],
        text_alias: str | Sequence[str | None] | None = None,
        embeddings_cpu: bool = True,
        **bounds: Unpack[Bounds],
    ) -> ImageEmbedding | list[ImageEmbedding]:
        """Encodes one image, or a list of them, the way ExLlama's towers are called.

        Args:
            image: the image, or a list.
            text_alias: what stands for the image in a prompt, or a list; where it is left out, a new one is made up,
                such as ``<$EMB_7$>``, that no other image of this process gets.
            embeddings_cpu: whether the embeddings go to the CPU; otherwise they stay where the tower is.
            **bounds: as in :meth:`encode`, which also says what is raised.

        Returns:
            One embedding for one image, a list for a list.
        """
        where = "cpu" if embeddings_cpu else None
        embeddings = [
            embedding if embedding.text_alias is not None else embedding.with_alias(f"<$EMB_{next(_ALIASES)}$>")
            for embedding in self.encode(image, text_alias=text_alias, output_device=where, **bounds)
        ]
        return embeddings[0] if is_one_image(image) else embeddings

    def preprocess(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        raw: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """The first half of :meth:`encode`, on the CPU: images → one packed batch, whatever its size.

        Args:
            images: as in :meth:`encode`.
            raw: whether pixels stay bytes, which the tower takes as well: a quarter of the memory of fp32.  By default as
                :meth:`encode` has them: bytes for a GPU, where the image processor's arithmetic is known.
            input_data_format, **bounds: as in :meth:`encode`.

        Raises:
            UsageError: ``raw``, and the image processor's arithmetic is not known.
            ImageError, ProcessorError: as in :meth:`encode`.
        """
        self.preprocessor.check_bounds(bounds)
        several = images_of(images)
        with workers(len(several)) as each:
            decoded = canonical_images(several, self.preprocessor.limits, each, input_data_format)
            return self.preprocessor.images(decoded, each=each, raw=self._raw if raw is None else raw, **bounds)

    def preprocess_video(
        self,
        frames: Iterable[ImageInput],
        *,
        raw: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """The first half of :meth:`encode_video`, on the CPU: frames → packed batch; see :meth:`preprocess`."""
        self.preprocessor.check_bounds(bounds)
        video = frames_of(frames)
        with workers(len(video)) as each:
            images = canonical_images(video, self.preprocessor.limits, each, input_data_format)
            return self.preprocessor.video(images, each=each, raw=self._raw if raw is None else raw, **bounds)

    @property
    def _raw(self) -> bool | None:
        """Whether pixels stay bytes; ``None``: where they can.  With the settings, this says what an embedding is made of."""
        return None if backend_on(self._device) == "triton" else False

    @overload
    def forward(self, batch: PackedBatch | torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...

    def forward(self, batch: PackedBatch | torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """The second half of :meth:`encode`.

        Args:
            batch: what :meth:`preprocess` returned; or pixels that are preprocessed already: ``[B, C, H, W]``, or a list
                of ``[C, H, W]``, each one tile of a still image, resized and normalized, of a floating dtype.

        Returns:
            For a packed batch ``[tokens, hidden_size]``, all images' rows in order, in the tower's dtype.  For pixels
            ``[B, tokens, hidden_size]``, or a list of ``[tokens, hidden_size]``, in the pixels' dtype and on their
            device.  The result belongs to the caller: no later pass writes to it.

        Raises:
            UsageError: pixels of a shape or dtype that the tower cannot take, or another tower's batch.
            TowerNotLoadedError: the weights are not there yet.
        """
        if isinstance(batch, PackedBatch):
            return self.run(batch)["embeddings"]
        tiles = tiles_of(batch)
        packed = pack_tiles(self.config, tiles)
        rows = self.run(packed)["embeddings"]
        parts = rows.split(packed.images.token_counts)
        if isinstance(batch, torch.Tensor):
            tokens = parts[0].shape[0] if parts else 0
            return rows.view(len(tiles), tokens, self.hidden_size).to(batch.device, batch.dtype)
        return [part.to(tile.device, tile.dtype, copy=True) for part, tile in zip(parts, tiles, strict=True)]

    __call__ = forward

    def run(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Everything that the tower makes of a batch, by name.

        Returns:
            ``embeddings`` ``[tokens, hidden_size]``; ``deepstack.0`` … of the same shape, which the language model adds
            behind its first layers; ``pooled`` ``[tiles, width]``.  What the tower does not have is not there.
        """
        return self.executor_for(batch).run(batch)

    def warm_up(self, packs: Iterable[tuple[int, int] | Sequence[tuple[int, int]]], **bounds: Unpack[Bounds]) -> int:
        """Makes passes over images of these sizes as fast as they get, before the first image comes.

        Each runs once with noise for images: what is compiled at first use is compiled, memory is taken, and on a GPU
        the pass is captured as a CUDA graph, unless that was switched off.  Without this, a pass is captured when its size
        comes the second time.  CudaGraphCache whose patches differ by less than a sixteenth may share a graph.

        On a CPU nothing is captured, and nothing done.  A video's passes are captured as they come.  While a pass is
        captured, other threads may use the GPU, but for torch's random numbers on it.

        Args:
            packs: for each pass, width and height in pixels of its images; for a pass of one image, of that.
            **bounds: as in :meth:`encode`.

        Returns:
            How many of the passes have a graph afterwards.

        Raises:
            UsageError: a size that is none.
            TowerNotLoadedError: the weights are not there yet.
        """
        runner = self._loaded
        sizes = [pack_of(pack) for pack in packs]
        workloads = [self.workload(pack, **bounds) for pack in sizes]
        if self.device.type != "cuda":
            return 0
        noise = np.random.default_rng(0)
        warm = 0
        # The largest first: the others find room in its memory.
        for _, pack in sorted(zip((-workload.patches for workload in workloads), sizes, strict=True)):
            batch = self.preprocess([noise.integers(256, size=(h, w, 3), dtype=np.uint8) for w, h in pack], **bounds)
            warm += runner.executor_for(batch).warm_up(batch)
        return warm

    @property
    def captured_bytes(self) -> int:
        """Bytes of device memory that captured passes hold; :meth:`release` gives them back."""
        return 0 if self._runner is None else self._runner.captured_bytes

    def executor_for(self, batch: PackedBatch) -> Executor:
        """What runs ``batch``: still images and videos have a graph each, over the same weights.

        Raises:
            UsageError: another tower's batch.
            TowerNotLoadedError: the weights are not there yet.
        """
        return self._loaded.executor_for(batch)

    def _pass(self, batch: PackedBatch) -> list[ImageEmbedding]:
        """Packed batch → graph → embeddings, image by image."""
        return embeddings_of(self.config, self.run(batch), batch, bidirectional=self.family.bidirectional_tiles)

    def _call(
        self,
        bounds: Bounds,
        output_device: str | torch.device | None,
        max_patches: int | None,
        on_error: str,
        check_output: bool,
        input_data_format: ChannelOrder | None = None,
    ) -> Call:
        """What a call of :meth:`encode` or :meth:`encode_video` works with."""
        runner = self._loaded
        self.preprocessor.check_bounds(bounds)
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error is {shorten(on_error)}; allowed: 'raise', 'return'")
        if max_patches is not None and not (is_whole_number(max_patches) and max_patches >= 1):
            raise UsageError(f"max_patches is {shorten(max_patches)}; allowed: a whole number ≥ 1, or None")
        return Call(
            preprocessor=self.preprocessor,
            bounds=bounds,
            run=self._pass,
            release=runner.release,
            device=self.device,
            output_device=self.device if output_device is None else parse_device(output_device),
            raw=self._raw,
            input_data_format=input_data_format,
            max_patches=int(max_patches or patches_per_pass(self._sample_plan, self.device)),
            raises=on_error == "raise",
            check_output=check_output,
            cache=self.cache,
            key=lambda content_hash: embedding_key(self._identity, bounds, content_hash),
        )

    def release(self) -> None:
        """Gives back what passes have left on the device beside the weights; the next pass takes it again."""
        if self._runner is not None:
            self._runner.release()

    @cached_property
    def _sample_plan(self) -> MemoryPlan:
        unit = self.config.num_patches or self.config.rows_per_token
        return self.memory_plan(unit * -(-SAMPLE_PATCHES // unit))

    @cached_property
    def _identity(self) -> str:
        computes = self.dtype, self.device.type, backend_on(self.device)
        return tower_identity(self._weights_identity, self.config, self.preprocessor, computes)

    # -- what it will cost ----------------------------------------------------------------------------------------

    def count_tokens(self, width: int, height: int, **bounds: Unpack[Bounds]) -> int:
        """Tokens of a still image of ``width`` × ``height`` pixels; needs neither the image nor the weights."""
        return self.preprocessor.layout(width, height, **bounds).tokens(self.config)

    def workload(self, sizes: Iterable[tuple[int, int]], **bounds: Unpack[Bounds]) -> Workload:
        """How much one pass over images of these sizes (width, height; pixels) has to do; nothing is decoded."""
        layouts = [self.preprocessor.layout(width, height, **bounds) for width, height in sizes]
        return PackedBatch.without_pixels(self.config, layouts).workload

    def memory_plan(self, patches: int | Sequence[int] | Workload) -> MemoryPlan:
        """What one pass takes beside the weights, in bytes; needs no weights, but see :attr:`dtype` for ``"auto"``.

        A pass on a GPU is planned for up to a sixteenth more rows, which many sizes of passes share, and the plan is of
        those, with pixels as :meth:`preprocess` gives them by default.

        Args:
            patches: patches of one still image, or of each of several in one pass; or what :meth:`workload` says.

        Raises:
            UsageError: a count of patches that no image of this tower has.
        """
        workload = workload_of(self.config, patches)
        if self.device.type != "cuda":
            by_torch = backend_on(self._device) == "reference"
            cpu_dtype = self.dtype if by_torch else None
            return plan_memory(self.graph, workload, self.dtype.itemsize, cpu_dtype=cpu_dtype)
        tile_rows = self.config.longest_segment
        raw = self._raw is None and self.preprocessor.rescaling is not None
        return plan_static_buffers(
            self.graph,
            workload,
            self.dtype.itemsize,
            rows_per_token=self.config.rows_per_token,
            tile_rows=tile_rows if tile_rows is not None and workload.patches == workload.tiles * tile_rows else None,
            pixels=torch.uint8 if raw else torch.float32,
        )

    def describe(self, patches: int | Sequence[int] | Workload) -> Description:
        """The layer graph with shapes, parameters, operations and bytes, as text, JSON or a drawing.

        Takes, needs and raises what :meth:`memory_plan` does.
        """
        by_torch = backend_on(self._device) == "reference"
        device = None if by_torch else self._device
        workload = workload_of(self.config, patches)
        return Description(self.graph, workload, self.dtype.itemsize, device, self.dtype, on_cpu=by_torch)
