"""How the prompts of several families have images, read from ``config.json``."""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.config import TowerConfig
from tritontower.prompt.layout import PromptLayout, VideoLayout

__all__ = ["QWEN_TOKENS", "pixtral_prompt", "placeholder_prompt", "qwen_prompt", "token"]

QWEN_TOKENS = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
"""Ids of the tokens of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as their configurations in transformers have them by default."""


def token(reader: ConfigReader, name: str, default: int) -> int:
    """A token's id: ``<name>_token_id``, or ``<name>_token_index`` where older configurations have it."""
    old = reader.get(int, f"{name}_token_index", default=default, minimum=0)
    return reader.get(int, f"{name}_token_id", default=old, minimum=0)


def placeholder_prompt(reader: ConfigReader, default: int) -> PromptLayout:
    """Rows that follow upon each other, and nothing round them (LLaVA)."""
    return PromptLayout(placeholder=token(reader, "image", default))


def pixtral_prompt(reader: ConfigReader, config: TowerConfig, default: int) -> PromptLayout:
    """Lines that end in tokens which the configuration does not know, by their names in the processor of transformers."""
    return PromptLayout(
        placeholder=token(reader, "image", default), merge=config.merge, row_break="[IMG_BREAK]", row_end="[IMG_END]"
    )


def qwen_prompt(
    reader: ConfigReader, *, timestamp: str | None = None, defaults: dict[str, int] = QWEN_TOKENS
) -> PromptLayout:
    """Rows between two tokens; a video's temporal patches each between their own where they have time stamps."""
    tokens = {name: token(reader, name, default) for name, default in defaults.items()}
    before, after = (tokens["vision_start"],), (tokens["vision_end"],)
    if timestamp is None:
        video = VideoLayout(placeholder=tokens["video"], before=before, after=after)
    else:
        video = VideoLayout(placeholder=tokens["video"], timestamp=timestamp, frame_before=before, frame_after=after)
    return PromptLayout(placeholder=tokens["image"], before=before, after=after, video=video)
