"""Layouts of images in the prompts of several models, read from ``config.json``."""

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.prompt.layout import PromptLayout, VideoLayout

QWEN_TOKENS = {"image": 151655, "video": 151656, "vision_start": 151652, "vision_end": 151653}
"""Default token ids of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in transformers."""


def token(reader: ConfigReader, name: str, default: int) -> int:
    """Reads a token id: ``<name>_token_id``, or ``<name>_token_index`` of older configurations."""
    old = reader.get(int, f"{name}_token_index", default=default, minimum=0)
    return reader.get(int, f"{name}_token_id", default=old, minimum=0)


def qwen_prompt(
    reader: ConfigReader, *, timestamp: str | None = None, defaults: dict[str, int] = QWEN_TOKENS
) -> PromptLayout:
    """Reads Qwen's layout: rows between two tokens; with time stamps, these enclose each temporal patch of a video."""
    tokens = {name: token(reader, name, default) for name, default in defaults.items()}
    before, after = (tokens["vision_start"],), (tokens["vision_end"],)
    if timestamp is None:
        video = VideoLayout(placeholder=tokens["video"], before=before, after=after)
    else:
        video = VideoLayout(placeholder=tokens["video"], timestamp=timestamp, frame_before=before, frame_after=after)
    return PromptLayout(placeholder=tokens["image"], before=before, after=after, video=video)
