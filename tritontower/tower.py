"""The vision tower: images in, language-model-ready embeddings out."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, Unpack, overload

import numpy as np
import torch

from .batch.packed_batch import PackedBatch
from .cache import EmbeddingCache
from .checkpoint.checkpoint import Progress
from .devices import parse_device, parse_dtype
from .embedding import ImageEmbedding, check_alias
from .engine.graph_cache import CaptureLimits
from .errors import Limits, UsageError, is_integer, shorten
from .kernels.runtime.dispatch import backend_on
from .models.common.assembly import make_preprocessor, open_checkpoint
from .models.common.registry import has_vision
from .models.common.tower_model import TowerModel
from .preprocessing import Bounds
from .preprocessing.images.image import ChannelOrder, ImageInput
from .scheduler.arguments import check_instance, is_one_image, list_frames, list_images, parse_aliases, parse_sizes
from .scheduler.cache_keys import cache_key, tower_identity
from .scheduler.outputs import ItemError, OutputHandler
from .scheduler.prefetch import decode_all, thread_map
from .scheduler.scheduler import EncodeOptions, Scheduler
from .scheduler.video import VideoTimes

__all__ = ["VisionTower", "has_vision"]

_ALIASES = count(1)


class VisionTower(TowerModel):
    """A vision tower of a published checkpoint; made by :meth:`from_pretrained`.

    ``encode`` is ``preprocess`` followed by ``forward``, once per batch (:mod:`tritontower.scheduler.scheduler`).  An
    engine that schedules its own batches calls the two methods directly.

    Attributes:
        checkpoint: the folder, and the configuration as its family file reads it.
        preprocessor: turns images into packed batches.
        cache: cache of embeddings; ``None``: nothing is cached.
        graph: the layer graph for still images.
    """

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
    ) -> Self:
        """Reads the vision tensors of a checkpoint, and only those.

        Args:
            model: a local folder, or the id of a repository on the Hugging Face hub (``"Qwen/Qwen2-VL-2B-Instruct"``), of
                which only the configuration and the shards with vision tensors are fetched.
            device: device of the tower; by default the current GPU, else the CPU.
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``"auto"``: the dtype that the configuration declares, else
                the dtype of the stored weights.
            delay_load: read the configuration only; :meth:`load` reads the weights.
            feature_layer: hidden states that become the features, as an index into transformers' ``hidden_states``: 0 is
                the input of the first block, −1 the output of the last, before any final norm.  Several are concatenated.
                There is then no pooled output, and blocks that the features do not need are not read.
            feature_select: ``"patch"`` drops the class token, ``"cls_patch"`` keeps it.
            preprocessing: ``"hf"`` prepares images like transformers, ``"mistral"`` like Mistral's own library (Pixtral
                and Mistral3 only).
            processor: an image processor of transformers, for checkpoints without one.
            processor_options: settings that replace those of the image processor's file, such as
                ``{"do_pan_and_scan": True}``.
            limits: limits on the size of an image.
            cache: caches embeddings of images that come again; by default nothing is cached.  Towers may share one.
            cuda_graphs: whether a GPU captures a forward pass as a CUDA graph when a batch size comes for the first time,
                and replays it afterwards.  :class:`~tritontower.engine.graph_cache.CaptureLimits` limits their memory (by
                default 4 GiB).  See :meth:`warm_up`.  It never changes an embedding.
            revision, token, cache_dir, local_files_only: as in ``huggingface_hub``.
            progress: called with the bytes read so far and the total.

        Raises:
            TowerError: the checkpoint cannot be used; the subclass names the reason.
        """
        check_instance("limits", limits, (Limits, NoneType), "Limits(...) or None")
        check_instance("cache", cache, (EmbeddingCache, NoneType), "an EmbeddingCache or None")
        check_instance("cuda_graphs", cuda_graphs, (bool, CaptureLimits), "True, False or CaptureLimits(...)")
        where, precision = parse_device(device), parse_dtype(dtype)
        checkpoint = open_checkpoint(
            model,
            feature_layer=feature_layer,
            feature_select=feature_select,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        preprocessor = make_preprocessor(
            checkpoint, preprocessing, processor=processor, options=processor_options, limits=limits
        )
        tower = cls(checkpoint, preprocessor, device=where, dtype=precision, cache=cache, cuda_graphs=cuda_graphs)
        return tower if delay_load else tower.load(progress=progress)

    @overload
    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[EncodeOptions],
    ) -> list[ImageEmbedding]: ...

    @overload
    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        on_error: Literal["return"],
        **options: Unpack[EncodeOptions],
    ) -> list[ImageEmbedding | ItemError]: ...

    def encode(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        max_patches: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        output_device: str | torch.device | None = None,
        text_alias: str | Sequence[str | None] | None = None,
        check_output: bool | None = None,
        progress: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> list[ImageEmbedding] | list[ImageEmbedding | ItemError]:
        """Encodes still images of any mix of sizes, in order.

        Several images share a batch.  A long list takes several batches; the next one is preprocessed in threads while
        the device runs.  Images with equal pixels are encoded once.  None of this changes an embedding: on a CPU it is the
        same, bit for bit, however a call is split.

        Args:
            images: one or several ``PIL.Image``, numpy or torch arrays (uint8, or float in 0 … 1), ``bytes`` of an
                encoded file, or ``pathlib.Path``.  A plain ``str`` is rejected, and nothing is fetched from a URL.
            max_patches: patches of one batch, without class tokens; a larger image gets a batch of its own.  By default
                as many as take 1 GiB, or half of a GPU's free memory if that is less (as of the first call, or the first
                after :meth:`release` or an out-of-memory error).
            on_error: for an image that cannot be encoded, ``"raise"`` ends the call, ``"return"`` puts an
                :class:`~tritontower.scheduler.outputs.ItemError` in its place.
            output_device: device of the embeddings; by default the tower's.  From a GPU to ``"cpu"`` they are copied to
                ordinary memory while the GPU goes on.
            text_alias: the text that stands for the image in a prompt; for several, a list of one, or ``None``, for each.
            check_output: check the embeddings for NaN and infinity; on a GPU this synchronizes once per batch.  By default
                in float16 only, which large activations overflow.
            progress: show a progress bar; by default for 64 images or more, on a terminal.
            input_data_format: ``"channels_first"`` or ``"channels_last"``: axis order of all arrays among the images;
                needed only if a shape allows both, such as ``[3, 50, 3]``.
            **bounds: limits on the resized image that replace the checkpoint's, as far as its resizing rule has them:
                ``min_pixels`` and ``max_pixels`` (area), or ``longest_edge`` (longer side), in pixels.

        Returns:
            An :class:`~tritontower.embedding.ImageEmbedding` per image, in memory of its own.

        Raises:
            ImageError, ProcessorError: an image cannot be used; the message or ``index`` names it.
            TowerOutOfMemoryError: an image does not fit into the device's memory, even in a batch of its own.
            NonFiniteOutputError: an embedding contains NaN or infinity, and ``check_output`` looks for them.
            UsageError: an argument is invalid, or the tower's resizing rule does not have a bound.
            TowerNotLoadedError: the tower was made with ``delay_load``, and :meth:`load` was not called.
            EncodeInterrupted: Ctrl-C; it is a ``KeyboardInterrupt``.

            ``completed`` of each of these holds the embeddings of the images before the first one without a result.
        """
        several = list_images(images)
        aliases = parse_aliases(text_alias, len(several))
        scheduler = self._make_scheduler(bounds, output_device, max_patches, on_error, check_output, input_data_format)
        return [
            result if alias is None or isinstance(result, ItemError) else result.with_alias(alias)
            for result, alias in zip(scheduler.encode_images(several, progress=progress), aliases, strict=True)
        ]

    def encode_video(
        self,
        frames: Iterable[ImageInput],
        *,
        fps: float | None = None,
        timestamps: Sequence[float] | None = None,
        output_device: str | torch.device | None = None,
        text_alias: str | None = None,
        check_output: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> ImageEmbedding:
        """Encodes the frames of one video, in order and of one size; the last is repeated to fill the last temporal patch.

        Args:
            frames: a list of frames, each as in :meth:`encode`; or one array of four dimensions, the first of them time.
            fps: frame rate of *these* frames, that is, the rate at which they were sampled.
            timestamps: instead of ``fps``, the time of each frame, seconds.
            output_device, text_alias, check_output, input_data_format, **bounds: as in :meth:`encode`.

        Returns:
            An embedding; with ``fps`` or ``timestamps`` it has the times of its temporal patches.  Errors are those of
            :meth:`encode`, and a ``UsageError`` if the tower takes no videos.
        """
        self.preprocessor.check_takes_videos()
        video = list_frames(frames)
        times = VideoTimes.parse(len(video), fps, timestamps)
        alias = check_alias(text_alias)
        scheduler = self._make_scheduler(bounds, output_device, None, "raise", check_output)
        batch = self.preprocess_video(video, input_data_format=input_data_format, **bounds)
        return times.attach(scheduler.encode_video(batch), self.config.patch.temporal).with_alias(alias)

    def get_image_embeddings(
        self,
        image: ImageInput | Sequence[ImageInput],
        text_alias: str | Sequence[str | None] | None = None,
        embeddings_cpu: bool = True,
        **bounds: Unpack[Bounds],
    ) -> Any:
        """Encodes one image, or a list of them to a list, with the signature of ExLlama's towers.

        An image without ``text_alias`` gets a new one, such as ``<$EMB_7$>``, unique in this process.  ``embeddings_cpu``
        moves the embeddings to the CPU.  Everything else is as in :meth:`encode`.
        """
        output_device = "cpu" if embeddings_cpu else None
        embeddings = [
            embedding if embedding.text_alias is not None else embedding.with_alias(f"<$EMB_{next(_ALIASES)}$>")
            for embedding in self.encode(image, text_alias=text_alias, output_device=output_device, **bounds)
        ]
        return embeddings[0] if is_one_image(image) else embeddings

    def _make_scheduler(
        self,
        bounds: Bounds,
        output_device: str | torch.device | None,
        max_patches: int | None,
        on_error: str,
        check_output: bool | None,
        input_data_format: ChannelOrder | None = None,
    ) -> Scheduler:
        runner = self.runner
        self.preprocessor.check_bounds(bounds)
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error must be 'raise' or 'return', got {shorten(on_error)}")
        if not isinstance(check_output, (bool, NoneType)):
            raise UsageError(f"check_output must be True, False or None, got {shorten(check_output)}")
        if max_patches is not None and not (is_integer(max_patches) and max_patches >= 1):
            raise UsageError(f"max_patches must be an integer ≥ 1, or None, got {shorten(max_patches)}")
        return Scheduler(
            config=self.config,
            runner=runner,
            preprocessor=self.preprocessor,
            outputs=OutputHandler(
                device=self.device,
                output_device=self.device if output_device is None else parse_device(output_device),
                check_output=self.dtype == torch.float16 if check_output is None else check_output,
                cache=self.cache,
                key=lambda digest: cache_key(self._identity, bounds, digest),
            ),
            bounds=bounds,
            raw=self._raw,
            input_data_format=input_data_format,
            max_patches=int(max_patches or runner.patches_per_batch(self.sample_plan, self.device)),
            raise_errors=on_error == "raise",
            bidirectional=self.family.bidirectional_tiles,
        )

    @cached_property
    def _identity(self) -> str:
        computes = self.dtype, self.device.type, backend_on(self.device)
        return tower_identity(self.checkpoint.identity, self.config, self.preprocessor, computes)

    def preprocess(
        self,
        images: Iterable[ImageInput] | ImageInput,
        *,
        raw: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """Packs images into one batch of any size, on the CPU; the first half of :meth:`encode`.

        ``raw`` keeps the pixels uint8, a quarter of the memory of fp32; it raises ``UsageError`` if the arithmetic of the image
        processor is not known.  By default it is set as :meth:`encode` does: on a GPU, if that arithmetic is known.
        """
        self.preprocessor.check_bounds(bounds)
        several, raw = list_images(images), self._raw if raw is None else raw
        with thread_map(len(several)) as each:
            decoded = decode_all(several, self.preprocessor.limits, each, input_data_format)
            return self.preprocessor.preprocess_images(decoded, each=each, raw=raw, **bounds)

    def preprocess_video(
        self,
        frames: Iterable[ImageInput],
        *,
        raw: bool | None = None,
        input_data_format: ChannelOrder | None = None,
        **bounds: Unpack[Bounds],
    ) -> PackedBatch:
        """Packs the frames of one video, on the CPU; the first half of :meth:`encode_video`.  See :meth:`preprocess`."""
        self.preprocessor.check_bounds(bounds)
        video, raw = list_frames(frames), self._raw if raw is None else raw
        with thread_map(len(video)) as each:
            decoded = decode_all(video, self.preprocessor.limits, each, input_data_format)
            return self.preprocessor.preprocess_video(decoded, each=each, raw=raw, **bounds)

    def warm_up(self, sizes: Iterable[tuple[int, int] | Sequence[tuple[int, int]]], **bounds: Unpack[Bounds]) -> int:
        """Compiles kernels, allocates memory and captures CUDA graphs for batches of these sizes.

        Each batch runs once with noise as images.  Without this, a batch size is captured when it first comes.  Batches
        whose patches differ by less than a sixteenth (an eighth below 1,024) may share a graph.  Videos are captured as they
        come.  On a CPU there is nothing to do.  During a capture, other threads may use the GPU, except torch's random numbers on it.

        Args:
            sizes: for each batch, (width, height) of each of its images, pixels; or of its only image.
            **bounds: as in :meth:`encode`.

        Returns:
            The number of batches that have a captured graph afterwards.
        """
        runner = self.runner
        batches = [parse_sizes(images) for images in sizes]
        workloads = [self.workload(images, **bounds) for images in batches]
        if self.device.type != "cuda":
            return 0
        noise = np.random.default_rng(0)
        captured = 0
        for _, images in sorted(zip((-workload.patches for workload in workloads), batches, strict=True)):
            # The largest first: the others fit into its memory.
            batch = self.preprocess([noise.integers(256, size=(h, w, 3), dtype=np.uint8) for w, h in images], **bounds)
            captured += runner.executor_for(batch).warm_up(batch)
        return captured
