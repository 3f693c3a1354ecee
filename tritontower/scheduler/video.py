"""Times at which the frames of a video are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real

from tritontower.embedding import MAX_SECONDS, ImageEmbedding
from tritontower.errors import UsageError, shorten

MIN_FPS, MAX_FPS = 1e-9, 1e9
"""Frames per second.  Outside, the times of the frames would not be finite numbers."""


@dataclass(frozen=True)
class VideoTimes:
    """Time of each frame of a video (empty if unknown), and the interval between two frames, in seconds."""

    seconds: tuple[float, ...] = ()
    interval: float | None = None

    @classmethod
    def parse(cls, frames: int, fps: float | None, timestamps: Sequence[float] | None) -> "VideoTimes":
        """Computes the times of ``frames`` frames from a frame rate or from timestamps."""
        if fps is not None and timestamps is not None:
            raise UsageError("fps and timestamps must not be given together; pass one of them")
        if fps is not None:
            if not _is_number(fps) or not MIN_FPS <= fps <= MAX_FPS:
                raise UsageError(f"fps must be {MIN_FPS:g} to {MAX_FPS:g} frames per second, got {shorten(fps)}")
            return cls(tuple(frame / float(fps) for frame in range(frames)), 1.0 / float(fps))
        if timestamps is None:
            return cls()
        if not isinstance(timestamps, Iterable):
            raise UsageError(
                f"timestamps must be a number of seconds for each frame, or None, got {shorten(timestamps)}"
            )
        times = list(timestamps)
        if len(times) != frames or not all(_is_number(time) and 0 <= time < MAX_SECONDS for time in times):
            raise UsageError(
                f"timestamps must be a number of seconds from 0 to below {MAX_SECONDS} for each of {frames} frames, got "
                f"{shorten(times)}"
            )
        if any(later < earlier for earlier, later in pairwise(times)):
            raise UsageError(f"timestamps must not decrease, got {shorten(times)}")
        spread = float(times[-1] - times[0]) / (frames - 1) if frames > 1 else None
        return cls(tuple(float(time) for time in times), spread or None)

    def attach(self, embedding: ImageEmbedding, temporal: int) -> ImageEmbedding:
        """Returns ``embedding`` with the times of its temporal patches, each of ``temporal`` frames.

        The time of a patch is the middle between its first and its last frame.  The video's last frame is repeated to
        fill the last patch.  These are the times that Qwen3-VL's processor writes into a prompt.
        """
        if not self.seconds:
            return embedding
        padded = [*self.seconds, *[self.seconds[-1]] * (-len(self.seconds) % temporal)]
        middles = [(padded[first] + padded[first + temporal - 1]) / 2 for first in range(0, len(padded), temporal)]
        grid = None if self.interval is None else self.interval * temporal
        return replace(embedding, timestamps=tuple(middles), seconds_per_grid=grid)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
