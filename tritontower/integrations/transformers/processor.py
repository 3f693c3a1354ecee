"""The processor of a vision-language checkpoint, also where transformers needs torchvision for its own."""

from collections.abc import Sequence
from typing import Any

from tritontower.errors import ProcessorError, UsageError, shorten

__all__ = ["ImageTextProcessor", "load_processor"]


def load_processor(source: str, config: Any, **download: Any) -> Any:
    """What turns images and text into a model's inputs.

    The first of these that can be made on this machine: the processor that ``AutoProcessor`` finds; the same class without
    its video processor, which needs torchvision; for models with a Pixtral tower, :class:`ImageTextProcessor`.

    Args:
        source: folder or hub id.
        config: the checkpoint's configuration, as transformers reads it.
        **download: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, as in transformers.

    Raises:
        ProcessorError: the checkpoint has no tokenizer or no image processor that can be loaded.
    """
    from transformers import AutoProcessor

    rows_of_tokens = config.vision_config.model_type == "pixtral"
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **download)
    except Exception as error:  # a missing package, or whatever the libraries below it raise about a file
        failure = error
    else:
        # Where the files name no class, the language model's is found, which knows nothing of rows.
        if not rows_of_tokens or type(processor).__name__ == "PixtralProcessor":
            _refuse_without_words(processor.tokenizer, source)
            return processor
    image_processor, tokenizer = _parts(source, **download)
    if rows_of_tokens:
        return ImageTextProcessor(image_processor, tokenizer, config)
    kind = _without_video(config.model_type)
    if kind is None:
        raise _unusable(source, failure) from failure
    return kind(image_processor, tokenizer, chat_template=getattr(tokenizer, "chat_template", None))


def _parts(source: str, **download: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        images = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **download)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **download)
    except Exception as error:  # whatever the libraries below it raise about a file
        raise _unusable(source, error) from error
    _refuse_without_words(tokenizer, source)
    return images, tokenizer


def _refuse_without_words(tokenizer: Any, source: str) -> None:
    # Where the files are missing, transformers makes a tokenizer of nothing but its special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ProcessorError(f"{source} holds no tokenizer: transformers finds no words in it, only special tokens")


def _unusable(source: str, error: Exception) -> ProcessorError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ProcessorError(
        f"{source} holds no image processor and tokenizer that transformers can load: {shorten(reason[0], 200)}"
    )


def _without_video(model_type: str) -> type[Any] | None:
    """The processor class of a model type, taking no videos; ``None`` where it has no video processor to leave out."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(model_type, ""))
    if kind is None or set(kind.get_attributes()) != {"image_processor", "tokenizer", "video_processor"}:
        return None
    return _two_part_class(kind)


def _two_part_class(kind: type[Any]) -> type[Any]:
    class WithoutVideo(kind):  # type: ignore[misc]
        """The processor of transformers for images and text alone: videos need torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = kind.__name__
    return WithoutVideo


class ImageTextProcessor:
    """Images and text to a model's inputs, for models whose images are rows of tokens with an end to each row.

    It is called like a processor of transformers, and does what ``PixtralProcessor`` does, which needs torchvision: every
    ``[IMG]`` in the text is repeated for each token of its image, with ``[IMG_BREAK]`` behind each row of them and
    ``[IMG_END]`` behind the last one.

    Args:
        image_processor: of transformers, for images of any size; it returns ``image_sizes``.
        tokenizer: of transformers.
        config: of the model; ``vision_config.patch_size`` and ``spatial_merge_size`` are read.
    """

    image, row_end, image_end = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

    def __init__(self, image_processor: Any, tokenizer: Any, config: Any) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.token_side: int = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **options: Any,
    ) -> Any:
        """The model's inputs, by name.

        Args:
            images: an image, or several in the order of their places in the texts; ``None``: none.
            text: one text, or several.
            return_tensors: kind of the tensors, as in transformers.
            **options: for the tokenizer: ``padding``, ``truncation`` …

        Returns:
            A ``BatchFeature`` with ``input_ids``, ``attention_mask``, and for images ``pixel_values`` and ``image_sizes``.

        Raises:
            UsageError: no text, or another number of images than places for them.
        """
        from transformers import BatchFeature

        if text is None:
            raise UsageError("text is missing; pass the prompt, with one [IMG] for each image")
        texts = [text] if isinstance(text, str) else list(text)
        inputs: dict[str, Any] = {}
        blocks: list[str] = []
        if images is not None:
            side = {"height": self.token_side, "width": self.token_side}
            inputs |= self.image_processor(images, patch_size=side, return_tensors=return_tensors)
            blocks = [self._block(int(height), int(width)) for height, width in inputs["image_sizes"]]
        places = sum(prompt.count(self.image) for prompt in texts)
        if places != len(blocks):
            raise UsageError(f"the text has {places} places for images ({self.image}), but there are {len(blocks)}")
        rest = iter(blocks)
        filled = ["".join(self._filled(prompt.split(self.image), rest)) for prompt in texts]
        return BatchFeature({**self.tokenizer(filled, return_tensors=return_tensors, **options), **inputs})

    def _block(self, height: int, width: int) -> str:
        rows = [self.image * (width // self.token_side)] * (height // self.token_side)
        return self.row_end.join(rows) + self.image_end

    @staticmethod
    def _filled(parts: Sequence[str], blocks: Any) -> list[str]:
        return [parts[0], *(piece for part in parts[1:] for piece in (next(blocks), part))]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = False, **options: Any) -> Any:
        """The text of a conversation, by the tokenizer's template, for :meth:`__call__` with its images.

        Raises:
            UsageError: with ``tokenize``, as places for images are filled only when the images are there.
        """
        if tokenize:
            raise UsageError(
                "tokenize=True is not supported here; pass the text and the images to the processor itself"
            )
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's own method."""
        return self.tokenizer.batch_decode(*arguments, **options)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """The tokenizer's own method."""
        return self.tokenizer.decode(*arguments, **options)
