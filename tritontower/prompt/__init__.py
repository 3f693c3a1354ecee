"""Builds language-model inputs from text and embeddings: token ids, prompt layouts, merging and M-RoPE positions."""

from .encode import EncodedPrompt, encode_prompt
from .layout import PromptLayout, VideoLayout
from .merge import add_deepstack, merge_embeddings
from .mrope import MropePositions, MropeRule, MropeState, mrope_positions, prompt_positions
from .token_ids import DEFAULT_BASE, TokenSpace, sanitize_ids

__all__ = [
    "DEFAULT_BASE",
    "EncodedPrompt",
    "MropePositions",
    "MropeRule",
    "MropeState",
    "PromptLayout",
    "TokenSpace",
    "VideoLayout",
    "add_deepstack",
    "encode_prompt",
    "merge_embeddings",
    "mrope_positions",
    "prompt_positions",
    "sanitize_ids",
]
