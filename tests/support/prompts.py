"""Small tokenizers, hand-made embeddings, and transformers' processors without their torchvision dependency."""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tritontower.embedding import ImageEmbedding

# Kind of prompt → token names in configurations → their text.
NAMES: Mapping[str, Mapping[str, str]] = {
    "qwen": {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    },
    "pixtral": {"image": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"},
    "llava": {"image": "<image>"},
    "gemma3": {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"},
    "paligemma": {"image": "<image>"},
}

# Tower case → kind of prompt, and name and module of transformers' processor class.
PROCESSORS = {
    "qwen2_vl": ("qwen", "Qwen2VLProcessor", "qwen2_vl"),
    "qwen2_5_vl": ("qwen", "Qwen2_5_VLProcessor", "qwen2_5_vl"),
    "qwen3_vl": ("qwen", "Qwen3VLProcessor", "qwen3_vl"),
    "qwen3_5": ("qwen", "Qwen3VLProcessor", "qwen3_vl"),
    "mistral3": ("pixtral", "PixtralProcessor", "pixtral"),
    "pixtral": ("pixtral", "PixtralProcessor", "pixtral"),
    "llava": ("llava", "LlavaProcessor", "llava"),
    "llava_next": ("llava", "LlavaNextProcessor", "llava_next"),
    "llava_onevision": ("llava", "LlavaOnevisionProcessor", "llava_onevision"),
    **dict.fromkeys(("gemma3", "gemma3-pan-and-scan", "shieldgemma2"), ("gemma3", "Gemma3Processor", "gemma3")),
    "paligemma": ("paligemma", "PaliGemmaProcessor", "paligemma"),
}
KINDS = {case: kind for case, (kind, _, _) in PROCESSORS.items()}

CORPUS = [
    "What is in the image?\n\nA cat,\n and a dog.\n\n\nUser: compare them  twice\n\n\n\n",
    "a<b>c é ü 猫 <$x$>\n",
]


@cache
def _trained(style: str) -> str:
    """Trains a tokenizer and returns its JSON: ``bytes`` as Qwen's and Mistral's, ``metaspace`` as Llama's, ``runs`` as Gemma's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if style == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        # Gemma does not split text, so that a run of line breaks becomes one token.
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*alphabet, *(chr(code) for code in range(32, 127)), "\n", "▁", "é", "猫"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 8, trainer)
    if style == "metaspace":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return str(tokenizer.to_str())


def make_tokenizer(kind: str, style: str = "bytes") -> Any:
    """Makes a tokenizer of transformers with the special tokens of a kind of prompt."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = NAMES[kind]
    tokenizer = Tokenizer.from_str(_trained(style))
    # Unused tokens first, so that ids differ between kinds.
    texts = [*(f"<unused{number}>" for number in range(len(kind))), *names.values()]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in texts])
    roles = {f"{name}_token": text for name, text in names.items()} if kind == "gemma3" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=roles
    )


def write_token_ids(folder: Path, tokenizer: Any, kind: str) -> None:
    """Writes the tokenizer's ids into the configuration of a checkpoint."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    for name, text in NAMES[kind].items():
        key = f"{name}_token_index" if f"{name}_token_index" in config else f"{name}_token_id"
        config[key] = tokenizer.convert_tokens_to_ids(text)
    config["bos_token_id"] = tokenizer.bos_token_id
    path.write_text(json.dumps(config), "utf-8")


class StubVideoProcessor:
    """Replaces a video processor, which needs torchvision; returns the given grid, frames and rate for each video."""

    merge_size = temporal_patch_size = 2
    model_input_names: Sequence[str] = ()

    def __init__(self, videos: Sequence[tuple[tuple[int, int, int], int, float]]) -> None:
        self.videos = videos

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        metadata = [
            SimpleNamespace(fps=fps, sampled_fps=fps, frames_indices=list(range(frames)))
            for _, frames, fps in self.videos
        ]
        return {"video_grid_thw": torch.tensor([grid for grid, _, _ in self.videos]), "video_metadata": metadata}


def _import_processor(name: str, module: str) -> Any:
    """Imports a processor class without torchvision, and makes it accept replacements for its parts."""
    # The image processor's module wants torchvision for one function, which another module has as well.
    package = "transformers.models.pixtral"
    twin = ModuleType(f"{package}.image_processing_pixtral")
    pil = import_module(f"{package}.image_processing_pil_pixtral")
    twin.get_resize_output_image_size = pil.get_resize_output_image_size  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {twin.__name__: twin}):
        processor = getattr(import_module(f"transformers.models.{module}.processing_{module}"), name)
    return type(name, (processor,), {"check_argument_for_proper_class": lambda self, name, part: None})


def load_processor(case: str, folder: Path, tokenizer: Any, videos: Any = ()) -> Any:
    """Loads transformers' processor for a small checkpoint of a tower case."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    vision = config["vision_config"]
    tiles = (vision.get("image_size", 0) // vision["patch_size"]) ** 2
    parts, options = [images, tokenizer], {}
    if KINDS[case] == "qwen":
        parts.append(StubVideoProcessor(videos))
    elif KINDS[case] == "pixtral":
        options = {"patch_size": vision["patch_size"], "spatial_merge_size": config.get("spatial_merge_size", 1)}
    elif KINDS[case] == "gemma3":
        options = {"image_seq_length": config["mm_tokens_per_image"]}
    elif KINDS[case] == "paligemma":
        images.image_seq_length = tiles
    else:
        options = {"vision_feature_select_strategy": config.get("vision_feature_select_strategy")}
        if case == "llava_onevision":
            options |= {"num_image_tokens": tiles, "vision_aspect_ratio": config["vision_aspect_ratio"]}
        else:
            class_tokens = 1 if "clip" in vision["model_type"] else 0
            options |= {"patch_size": vision["patch_size"], "num_additional_image_tokens": class_tokens}
    processor = _import_processor(*PROCESSORS[case][1:])(*parts, **options)
    if KINDS[case] != "gemma3":
        return processor
    # The processor's own defaults would override the file's.
    crops = {name: value for name, value in vars(images).items() if "pan_and_scan" in name and value is not None}
    return partial(processor, **crops)


WIDTH = 8


def make_embedding(
    tokens: int,
    *,
    grid: tuple[int, int, int] | None = None,
    alias: str | None = None,
    content: str = "",
    seed: int = 0,
    levels: int = 0,
    **fields: Any,
) -> ImageEmbedding:
    """Makes an embedding of random rows, :data:`WIDTH` wide."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(tokens, WIDTH, generator=generator) for _ in range(levels + 1)]
    return ImageEmbedding(
        embeddings=rows[0],
        grid_thw=grid or (1, 1, tokens),
        original_size=(10, 10),
        processed_size=(14, 14),
        content_hash=content,
        deepstack=tuple(rows[1:]),
        text_alias=alias,
        **fields,
    )
