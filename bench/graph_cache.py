"""Simulates traffic on the CUDA-graph cache: how many forward passes are replayed, without a GPU and without weights.

    python -m bench.graph_cache                          # Qwen2-VL
    python -m bench.graph_cache --family Pixtral --passes 500 --max-bytes 1073741824

The batches of a published tower go through the real planner and the real cache, with their own static buffers; a capture
records that it happened, and a replay does nothing.  So this counts what the policy decides, and measures no time.  The last
line is JSON: for each kind of traffic, the fractions of forward passes that are replayed, of all and of the second half, the
number of captures, and padding as a fraction of the patches.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from weakref import WeakSet

import torch

from tritontower import VisionTower
from tritontower.batch.packed_batch import PackedBatch
from tritontower.benchmarks.images import family_checkpoint
from tritontower.engine.graph_cache import NODE_BYTES, CaptureLimits, CudaGraphCache
from tritontower.engine.launch_count import count_launches
from tritontower.graph.builder import build
from tritontower.graph.fusion import fold_still_images, fuse, select_passes
from tritontower.text_table import text_table

Sizes = list[tuple[int, int]]

POOL_BYTES = 32 * 2**20
"""What the captured launches allocate together: a workspace of cuBLAS on Hopper."""


class Recorder:
    """A :class:`.CaptureBackend` that counts captures and replays, and runs nothing."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self._graphs: WeakSet[Callable[[], None]] = WeakSet()

    @property
    def held_bytes(self) -> int:
        """See :class:`.CaptureBackend`."""
        return POOL_BYTES if self._graphs else 0

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """See :class:`.CaptureBackend`."""
        self.captures += 1

        def replay() -> None:
            self.replays += 1

        self._graphs.add(replay)
        return replay


@dataclass(frozen=True)
class Outcome:
    """Result of one kind of traffic; see the module's docstring."""

    replayed: float
    second_half: float
    captures: int
    padding: float
    buckets: int
    mebibytes: int


def draw_sizes(kind: str, passes: int) -> Iterator[Sizes]:
    """Yields the sizes of the images of each forward pass, pixels."""
    generator = random.Random(0)

    def draw(count: int) -> Sizes:
        return [(generator.randint(200, 1400), generator.randint(200, 1400)) for _ in range(count)]

    fixed = draw(10)
    for _ in range(passes):
        if kind == "one image":
            yield draw(1)
        elif kind == "batches of 2-8":
            yield draw(generator.randint(2, 8))
        else:
            yield [generator.choice(fixed)]


TRAFFIC: Mapping[str, str] = {
    "one image": "one image, sides uniform in 200-1400 px",
    "batches of 2-8": "2-8 such images in a batch",
    "ten sizes": "one image of one of ten sizes",
}


def simulate(tower: VisionTower, kind: str, passes: int, limits: CaptureLimits) -> Outcome:
    """Runs one kind of traffic through a new cache."""
    graph = fold_still_images(fuse(build(tower.config), select_passes(torch.device("cuda"))))
    recorder = Recorder()
    cache = CudaGraphCache(graph, torch.bfloat16, torch.device("cpu"), recorder, limits)
    replayed: list[bool] = []
    buckets = set()
    rows = padded = 0
    for sizes in draw_sizes(kind, passes):
        layouts = [tower.preprocessor.layout(width, height) for width, height in sizes]
        batch = PackedBatch.without_pixels(tower.config, layouts)
        batch = replace(batch, pixels=batch.pixels.to(torch.uint8))
        bucket = cache.bucket(batch)
        assert bucket is not None
        buckets.add(bucket)
        rows, padded = rows + batch.workload.patches, padded + bucket.workload.patches
        buffers = cache.fill(bucket, batch)
        replayed.append(buffers.replay is not None)
        if buffers.replay is not None:
            buffers.replay()
        else:
            launches = count_launches(graph, bucket.workload, device="sm_90")
            buffers.driver_bytes = NODE_BYTES * launches.total.total
            # No rows to compare: nothing was computed.
            outputs = {name: buffers.tensors[name][:0] for name in graph.outputs}
            cache.capture_if_due(buffers, lambda: None, outputs)
    second = replayed[len(replayed) // 2 :]
    return Outcome(
        replayed=sum(replayed) / len(replayed),
        second_half=sum(second) / len(second),
        captures=recorder.captures,
        padding=padded / rows - 1,
        buckets=len(buckets),
        mebibytes=cache.captured_bytes >> 20,
    )


def main(words: list[str] | None = None) -> int:
    """Prints a table, and the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="Qwen2-VL", metavar="TITLE", help="as listed by `tritontower families`")
    parser.add_argument("--passes", type=int, default=1500, help="forward passes of each kind of traffic")
    parser.add_argument("--max-bytes", type=int, default=CaptureLimits().max_bytes, help="limit of the graphs")
    arguments = parser.parse_args(words)
    with family_checkpoint(arguments.family) as path:
        tower = VisionTower.from_pretrained(path, device="cpu", dtype="bfloat16", delay_load=True)
        limits = CaptureLimits(max_bytes=arguments.max_bytes)
        found = {kind: simulate(tower, kind, arguments.passes, limits) for kind in TRAFFIC}
    rows = [
        (
            TRAFFIC[kind],
            *(f"{100 * share:.1f} %" for share in (outcome.replayed, outcome.second_half)),
            *(f"{number:,}" for number in (outcome.captures, outcome.buckets)),
            f"{100 * outcome.padding:.1f} %",
            f"{outcome.mebibytes:,} MiB",
        )
        for kind, outcome in found.items()
    ]
    columns = ("traffic", "replayed", "second half", "captures", "buckets", "padding", "graphs hold")
    print(text_table(f"{arguments.passes:,} forward passes of {arguments.family}, simulated", columns, rows))
    print(json.dumps({kind: asdict(outcome) for kind, outcome in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
