"""Loads the processor of a vision-language checkpoint, also without torchvision."""

import re
from collections.abc import Sequence
from typing import Any

from tritontower.errors import ProcessorError, UsageError, shorten


def load_processor(source: str, config: Any, **download: Any) -> Any:
    """Loads the processor that makes a model's inputs from images and text.

    Tries the processor that ``AutoProcessor`` finds; then, for models with a Pixtral tower, :class:`ImageTextProcessor`;
    then the same class without its video processor, which needs torchvision.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    has_row_ends = config.vision_config.model_type == "pixtral"
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **download)
    except Exception as error:  # a missing package, or any error about a file
        failure = error
    else:
        # Without a class name in the files, AutoProcessor finds the language model's, which has no row ends.
        if not has_row_ends or type(processor).__name__ == "PixtralProcessor":
            _check_tokenizer(processor.tokenizer, source)
            return processor
    try:
        images = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **download)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **download)
    except Exception as error:  # any error about a file
        raise _make_error(source, error) from error
    _check_tokenizer(tokenizer, source)
    if has_row_ends:
        return ImageTextProcessor(images, tokenizer, config)
    kind = _without_video(config.model_type)
    if kind is None:
        raise _make_error(source, failure) from failure
    return kind(images, tokenizer, chat_template=getattr(tokenizer, "chat_template", None))


def _check_tokenizer(tokenizer: Any, source: str) -> None:
    # Without tokenizer files, transformers makes a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ProcessorError(f"{source} must contain a tokenizer, but transformers finds only special tokens")


def _make_error(source: str, error: Exception) -> ProcessorError:
    return ProcessorError(
        f"{source} must contain an image processor and a tokenizer that transformers can load: {shorten(str(error).strip(), 200)}"
    )


def _without_video(model_type: str) -> type[Any] | None:
    """Makes the processor class of a model type without its video processor; ``None`` if it has none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    original = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(model_type, ""))
    if original is None or set(original.get_attributes()) != {"image_processor", "tokenizer", "video_processor"}:
        return None

    class WithoutVideo(original):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = original.__name__
    return WithoutVideo


class ImageTextProcessor:
    """Makes inputs from images and text for models that mark the ends of rows of image tokens.

    Used like a processor of transformers; equals ``PixtralProcessor``, which needs torchvision. Each ``[IMG]`` in the
    text is repeated for every token of its image, with ``[IMG_BREAK]`` after each row except the last, which ends in
    ``[IMG_END]``.

    Made from the image processor, the tokenizer and the configuration of the model in transformers.
    """

    image, row_end, image_end = "[IMG]", "[IMG_BREAK]", "[IMG_END]"

    def __init__(self, image_processor: Any, tokenizer: Any, config: Any) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.token_side: int = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: Any = "pt", **options: Any
    ) -> Any:
        """Makes the model's inputs from one or several texts, and images in the order of their markers.

        ``options`` are the tokenizer's, such as ``padding``. Returns a ``BatchFeature`` with ``input_ids``,
        ``attention_mask``, and for images ``pixel_values`` and ``image_sizes``. Raises :class:`UsageError` without a text,
        or if the numbers of images and markers differ.
        """
        from transformers import BatchFeature

        if text is None:
            raise UsageError("text must be given; pass the prompt, with one [IMG] for each image")
        texts = [text] if isinstance(text, str) else list(text)
        inputs: dict[str, Any] = {}
        blocks: list[str] = []
        if images is not None:
            side = {"height": self.token_side, "width": self.token_side}
            inputs |= self.image_processor(images, patch_size=side, return_tensors=return_tensors)
            blocks = [self._block(int(height), int(width)) for height, width in inputs["image_sizes"]]
        places = sum(prompt.count(self.image) for prompt in texts)
        if places != len(blocks):
            raise UsageError(f"text must have one {self.image} for each of {len(blocks)} images, got {places}")
        rest = iter(blocks)
        filled = [re.sub(re.escape(self.image), lambda _: next(rest), prompt) for prompt in texts]
        return BatchFeature({**self.tokenizer(filled, return_tensors=return_tensors, **options), **inputs})

    def _block(self, height: int, width: int) -> str:
        rows = [self.image * (width // self.token_side)] * (height // self.token_side)
        return self.row_end.join(rows) + self.image_end

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = False, **options: Any) -> Any:
        """Makes the text of a conversation by the tokenizer's template; pass it with the images to :meth:`__call__`."""
        if tokenize:
            raise UsageError("tokenize must be False; pass the resulting text and the images to the processor itself")
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> Any:
        """Calls the tokenizer's method."""
        return self.tokenizer.batch_decode(*arguments, **options)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """Calls the tokenizer's method."""
        return self.tokenizer.decode(*arguments, **options)
