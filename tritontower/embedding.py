"""What a picture becomes: rows that a language model takes in place of token embeddings."""

from dataclasses import dataclass, replace

import torch

from .batch import Grid

__all__ = ["ImageEmbedding"]


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class ImageEmbedding:
    """The embeddings of one picture or clip, and what an engine needs to place them.

    Attributes:
        embeddings: ``[num_tokens, hidden_size]``, in the tower's dtype, in raster order (per temporal patch).
        grid_thw: temporal patches, rows and columns of *patches*; a token stands for a square of them.
        original_size: width and height as the picture came, pixels.
        processed_size: width and height after resizing, pixels.
        content_hash: digest of the pixels as they came; equal pictures have equal ones.
        deepstack: ``[num_tokens, hidden_size]`` each, which the language model adds to the picture's rows behind its first,
            second … layer (Qwen3-VL); empty for other towers.
        pooled: ``[views, width]``, one vector for the picture (for each of its tiles or crops, where it has several);
            ``None`` for towers without.
    """

    embeddings: torch.Tensor
    grid_thw: Grid
    original_size: tuple[int, int]
    processed_size: tuple[int, int]
    content_hash: str
    deepstack: tuple[torch.Tensor, ...] = ()
    pooled: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of ``embeddings``: the tokens that the picture takes in a prompt."""
        return self.embeddings.shape[0]

    def to(self, device: torch.device | str) -> "ImageEmbedding":
        """The same embedding with its rows on ``device``."""
        return replace(
            self,
            embeddings=self.embeddings.to(device),
            deepstack=tuple(level.to(device) for level in self.deepstack),
            pooled=None if self.pooled is None else self.pooled.to(device),
        )
