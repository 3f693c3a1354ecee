"""Videos: encoded in one pass of their own, and when their frames are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real

from tritontower.batch.packed_batch import PackedBatch
from tritontower.embedding import FOREVER, ImageEmbedding
from tritontower.errors import TowerError, TowerOutOfMemoryError, UsageError, is_out_of_memory, shorten

from .scheduler import Call

__all__ = ["VideoTimes", "encode_video"]

SLOWEST, FASTEST = 1e-9, 1e9
"""Frames per second.  Beyond them the times of a video's frames would not be numbers that a file of embeddings may hold."""


def encode_video(call: Call, batch: PackedBatch) -> ImageEmbedding:
    """Encodes one video that is packed already, unless the cache knows it.

    Raises:
        TowerOutOfMemoryError: it does not fit into the device's memory.
        NonFiniteOutputError: ``call.check_output``, and it holds NaN or infinity.
    """
    result: ImageEmbedding | TowerError | None = call.recall(batch.images.content_hashes[0])
    if result is None:
        try:
            (embedding,) = call.run(batch)
            result = call.finish(embedding)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            result = call.does_not_fit("the clip", batch.attention.segments.total)
        if isinstance(result, TowerOutOfMemoryError):
            call.release()
    call.settle()
    if isinstance(result, TowerError):
        raise result
    return replace(result, is_video=True)


@dataclass(frozen=True)
class VideoTimes:
    """When the frames of a video are shown, as far as it is known.

    Attributes:
        seconds: of each frame; empty: not known.
        interval: seconds from one frame to the next.
    """

    seconds: tuple[float, ...] = ()
    interval: float | None = None

    @classmethod
    def of(cls, frames: int, fps: float | None, timestamps: Sequence[float] | None) -> "VideoTimes":
        """The times of ``frames`` frames, so many per second or at these times.

        Raises:
            UsageError: both are given, or one that cannot be right.
        """
        if fps is not None and timestamps is not None:
            raise UsageError("fps and timestamps both say when the frames are shown; pass one of them")
        if fps is not None:
            if not _is_number(fps) or not SLOWEST <= fps <= FASTEST:
                raise UsageError(f"fps is {shorten(fps)}; allowed: {SLOWEST:g} to {FASTEST:g} frames per second")
            return cls(tuple(frame / float(fps) for frame in range(frames)), 1.0 / float(fps))
        if timestamps is None:
            return cls()
        if not isinstance(timestamps, Iterable):
            raise UsageError(
                f"timestamps is {shorten(timestamps)}; allowed: a number of seconds for each frame, or None"
            )
        times = list(timestamps)
        if len(times) != frames or not all(_is_number(time) and 0 <= time < FOREVER for time in times):
            raise UsageError(
                f"{len(times)} timestamps for {frames} frames; allowed: a number of seconds from 0 to below {FOREVER} for each"
            )
        if any(later < earlier for earlier, later in pairwise(times)):
            raise UsageError("the timestamps of a video's frames must not decrease")
        spread = float(times[-1] - times[0]) / (frames - 1) if frames > 1 else None
        return cls(tuple(float(time) for time in times), spread or None)

    def put_on(self, embedding: ImageEmbedding, temporal: int) -> ImageEmbedding:
        """``embedding`` with these times, where one patch spans ``temporal`` frames.

        A temporal patch is shown in the middle between its first frame and its last, where the last frame of the video is
        repeated until the patches come out even: the times that Qwen3-VL's processor writes into a prompt.
        """
        if not self.seconds:
            return embedding
        padded = [*self.seconds, *[self.seconds[-1]] * (-len(self.seconds) % temporal)]
        middles = [(padded[first] + padded[first + temporal - 1]) / 2 for first in range(0, len(padded), temporal)]
        grid = None if self.interval is None else self.interval * temporal
        return replace(embedding, timestamps=tuple(middles), seconds_per_grid=grid)


def _is_number(value: object) -> bool:
    return isinstance(value, (Real, Integral)) and not isinstance(value, bool)
