"""Stand-ins for CUDA graphs on a machine without a GPU: they record the launches of a forward pass and replay them."""

from collections.abc import Callable
from copy import copy
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tritontower.engine.executor import Executor
from tritontower.engine.graph_cache import CaptureLimits, CudaGraphCache


class StepRecorder:
    """Replays by running the steps again over the same buffers; Python decides anew.

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


class LaunchRecorder(StepRecorder):
    """Replays the recorded launches with the same arguments, as a CUDA graph does: Python decides nothing.

    Kernels are those of Triton's interpreter.  Of torch's operations, those that write are repeated; a repeated operation
    writes to the memory that the recorded one allocated.
    """

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        tape: list[Callable[[], None]] = []
        call = interpreter.GridExecutor.__call__

        def recorded(grid: Any, *arguments: Any, **options: Any) -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                call(grid, *arguments, **options)
            tape.append(lambda: call(grid, *arguments, **options))

        interpreter.GridExecutor.__call__ = recorded
        try:
            with _Tape(tape):
                launch()
        finally:
            interpreter.GridExecutor.__call__ = call
        return lambda: [repeat() for repeat in tape] and None


class _Tape(TorchDispatchMode):
    def __init__(self, tape: list[Callable[[], None]]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        aliases = [value.alias_info for value in function._schema.returns if value.alias_info is not None]
        writes = any(alias.is_write for alias in aliases)
        if writes:
            self.tape.append(lambda: function(*arguments, **options))
        elif not aliases and "empty" not in function._schema.name and isinstance(result, torch.Tensor):
            self.tape.append(lambda: result.copy_(function(*arguments, **options)))
        return result


def bucketed(executor: Executor, recorder: StepRecorder | None, limits: CaptureLimits | None = None) -> Executor:
    """Copies a CPU executor to use static buffers, as on a GPU, and to capture with ``recorder``."""
    changed = copy(executor)
    cache = CudaGraphCache(executor.graph, executor.dtype, executor.device, recorder, limits or CaptureLimits())
    changed.graph_cache = cache
    return changed
