"""Stand-ins for CUDA graphs on a machine without a GPU: they keep the launches of a forward pass and replay them."""

from collections.abc import Callable
from copy import copy
from weakref import WeakSet

from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits, CudaGraphCache


class StepRecorder:
    """Replays by launching again over the same buffers: kernels from their recorded list, references by new decisions.

    Attributes:
        captures: number of captures.
        replays: number of replays.
        error: raised by the next captures.
        allocates: bytes that a capture takes from the pool, which lives as long as one of the replays.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error: BaseException | None = None
        self.allocates = 1000
        self._pool_bytes = 0
        self._alive: WeakSet[Steps] = WeakSet()

    @property
    def held_bytes(self) -> int:
        return self._pool_bytes if self._alive else 0

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        steps = Steps(self, self.record(launch))
        self._pool_bytes = self.held_bytes + self.allocates
        self._alive.add(steps)
        return steps

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        return launch


class Steps:
    def __init__(self, recorder: StepRecorder, launch: Callable[[], None]) -> None:
        self.recorder, self.launch = recorder, launch

    def __call__(self) -> None:
        self.recorder.replays += 1
        self.launch()


def bucketed(executor: Executor, recorder: StepRecorder | None, limits: CaptureLimits | None = None) -> Executor:
    """Copies a CPU executor to use static buffers, as on a GPU, and to capture with ``recorder``."""
    changed = copy(executor)
    cache = CudaGraphCache(executor.graph, executor.dtype, executor.device, recorder, limits or CaptureLimits())
    changed.graph_cache = cache
    return changed
