"""Small vision-language models with tokenizers, of widths that bitsandbytes can quantize on a CPU."""

import json
from pathlib import Path
from typing import Any

from .towers.gemma import save_gemma3
from .towers.llava import save_llava
from .towers.qwen import save_qwen2_5_vl

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"),
    *(
        "<|vision_end|>",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
)
WORDS = (*SPECIAL, "what", "is", "this")
VOCABULARY = (*WORDS, *(f"word{number}" for number in range(len(WORDS), 64)))
GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
WIDE_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


def word_tokenizer() -> Any:
    """Makes a tokenizer of words that has every family's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The last ones are placeholders of models that have other ids in their configuration.
    tokenizer.add_special_tokens([*SPECIAL, *VOCABULARY[58:62]])
    return tokenizer


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = GEMMA if json.loads((folder / "config.json").read_text())["model_type"] == "gemma3" else {}
    PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        additional_special_tokens=list(SPECIAL[4:]),
        extra_special_tokens=named,
        chat_template=chat_template,
        **names,
    ).save_pretrained(folder)


def update_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def save_wide(name: str, folder: Path, chat_template: str | None = None, **text: Any) -> tuple[Path, str]:
    """Saves a LLaVA, Gemma 3 or Qwen2.5-VL; returns its folder and the text that stands for an image."""
    text = {**WIDE_TEXT, **text}
    settings: dict[str, Any] = {}
    tokens = {"image": "<image>"}
    image = "<image>"
    if name == "llava":
        save_llava(folder, text=text)
        settings = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    elif name == "gemma3":
        save_gemma3(folder, text={**text, "head_dim": 16})
        tokens, image = {"image": "<image_soft_token>"}, "<start_of_image>"
        update_json(folder / "preprocessor_config.json", do_convert_rgb=False)
        settings = {"image_seq_length": 16}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        save_qwen2_5_vl(folder, text={**text, "rope_parameters": rope}, out_hidden_size=64, intermediate_size=128)
        tokens = {name: f"<|{name}|>" for name in ("vision_start", "vision_end")}
        tokens |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
        image = "<|vision_start|><|image_pad|><|vision_end|>"
    ids = {f"{name}_token_id": WORDS.index(token) for name, token in tokens.items()}
    update_json(folder / "config.json", **ids, image_token_index=ids["image_token_id"])
    if settings:
        (folder / "processor_config.json").write_text(json.dumps(settings))
    save_tokenizer(folder, chat_template)
    return folder, image
